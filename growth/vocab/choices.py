"""The choices that the commands on vocabularies offer; no numpy is loaded for them."""

from typing import Literal

How = Literal["mean", "subword", "zero", "random"]
Init = Literal["mean", "zero", "random"]
Method = Literal["omp", "subword", "mean"]
