"""Learning rates over a run, as shares of the peak."""

import math

from surgery.recover.settings import Settings

COOLED = 0.5  # the infinite schedule's constant rate, as a share of the peak
COOLING = 0.3  # of the steps, from the peak to that rate
POWER = -0.51  # the exponent that the power schedule's authors fitted
EXTENDABLE = frozenset({"wsd", "constant", "infinite", "power"})


def rate(settings: Settings, step: int, *, first: int | None = None) -> float:
    """Return the learning rate of a step (from 0) as a share of the peak.

    Every schedule warms up in a straight line first; after surgery the optimiser starts anew, so
    a run that goes on with a trained model re-warms as well.

    - `wsd`: stable, then 1 - sqrt(z) over the last `decay` of the steps (arXiv 2405.18392).
    - `cosine`, `linear`: fall from the peak to `floor` at the end.
    - `constant`: stays.
    - `infinite`: falls to half of the peak, stays, and falls exponentially over the last `decay`
      (arXiv 2403.08763, section 4.3).
    - `rex`: (1 - z) / (1/2 + (1 - z) / 2) (arXiv 2107.04197, equation 1).
    - `power`: falls with the tokens seen to the power of -0.51, then to `floor` in a straight
      line over the last `decay` (arXiv 2408.13359, equation 5).

    Args:
        first: steps that the run was begun with, where it has been extended since: its beginning
            stays as it was.
    """
    total, first = settings.steps, first or settings.steps
    warm = math.ceil(settings.warmup * first)
    if step < warm:
        return (step + 1) / (warm + 1)
    z = (step - warm) / max(total - warm, 1)
    return settings.floor + (1 - settings.floor) * _shape(settings, step, warm, z, first)


def decay_start(settings: Settings) -> int:
    """Return the first step of the final decay; a run that is extended goes on from here."""
    if settings.schedule == "constant" or settings.schedule not in EXTENDABLE:
        return settings.steps
    return settings.steps - math.ceil(settings.decay * settings.steps)


def _shape(  # noqa: PLR0911 - one for each schedule
    settings: Settings, step: int, warm: int, z: float, first: int
) -> float:
    kind = settings.schedule
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * z))
    if kind == "linear":
        return 1 - z
    if kind == "rex":
        return (1 - z) / (0.5 + 0.5 * (1 - z))
    start = decay_start(settings)
    left = max(step - start, 0) / max(settings.steps - start, 1)
    if kind == "power":
        seen = max(min(step, start) - warm, 0) / max(warm, 1)
        return float((1 + seen) ** POWER) * (1 - left)
    if kind == "infinite":
        cooled = min((step - warm) / max(COOLING * first, 1), 1)
        stable = COOLED + (1 - COOLED) * 0.5 * (1 + math.cos(math.pi * cooled))
        return stable * 0.05**left if left else stable
    return 1 - math.sqrt(left)
