"""Multi-level training: coalesce to a smaller model, de-coalesce it again, interpolate.

Source: "A Multi-Level Framework for Accelerating Training Transformer Models", arXiv 2404.07999.
"""

from growth.levels.coalesce import coalesce
from growth.levels.decoalesce import decoalesce
from growth.levels.interpolate import interpolate
from growth.levels.pairs import Pairing

__all__ = ["Pairing", "coalesce", "decoalesce", "interpolate"]
