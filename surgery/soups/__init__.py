"""Averages chosen by measuring: the greedy soup, and every average of parts at once."""

from surgery.soups.ablate import Ablation, Subset, ablate
from surgery.soups.greedy import Decision, Greedy, greedy_soup
from surgery.soups.measure import Change, HeldOut

__all__ = [
    "Ablation",
    "Change",
    "Decision",
    "Greedy",
    "HeldOut",
    "Subset",
    "ablate",
    "greedy_soup",
]
