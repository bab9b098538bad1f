"""Measurement: bits per byte, divergence from a parent, paired statistics."""

from surgery.evaluate.panel import evaluate
from surgery.evaluate.results import Divergence, Evaluation, Figures, ModelFigures
from surgery.evaluate.statistics import Difference

__all__ = ["Difference", "Divergence", "Evaluation", "Figures", "ModelFigures", "evaluate"]
