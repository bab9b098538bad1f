"""Widths: every unit copied, so that the wider model computes what the model did."""

from growth.widen.plan import widen

__all__ = ["widen"]
