"""The checkpoints of a run: where it goes on, and where a longer run leaves it."""

from collections.abc import Callable, Mapping
from typing import Any

from surgery.calibrate.statistics import identify
from surgery.errors import TrainError
from surgery.recover.checkpoints import Checkpoints
from surgery.recover.saved import Saved
from surgery.recover.schedule import EXTENDABLE, decay_start
from surgery.recover.session import Session

Found = tuple[int, Saved] | None


class History:
    """Two folders: the newest checkpoints, and the last one before the final decay.

    Attributes:
        newest, stable: the folders.
    """

    def __init__(self, session: Session, tell: Callable[[str], None] | None) -> None:
        self.settings, self.folder = session.settings, session.ask.folder
        kept: dict[str, Any] = {
            "settings": identity(session),
            "world": session.world,
            "tell": tell if session.world.is_first else None,
        }
        self.newest = Checkpoints(self.folder / "checkpoints", keep=self.settings.keep, **kept)
        self.stable = Checkpoints(self.folder / "stable", keep=1, **kept)

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_: object) -> None:
        self.newest.close()
        self.stable.close()

    def clear(self) -> None:
        """Remove what an earlier run has saved: this one starts anew."""
        self.newest.forget(after=-1)
        self.stable.forget(after=-1)

    def find(self) -> Found:
        """Return where the run goes on, or None where it begins.

        A run of another length goes on from the newest checkpoint before the final decay of
        both; what was saved after it is removed, as it is on another way.

        Raises:
            RecipeError: what was saved is of a run that was asked something else.
            TrainError: nothing was kept before the decay.
        """
        found = self.newest.load_newest()
        limit = decay_start(self.settings)
        if found is None:
            return self.stable.load_newest(limit=limit)
        step, saved = found
        plan: Mapping[str, int] = saved["plan"]
        if plan["steps"] == self.settings.steps:
            return found
        limit = min(limit, plan["decay"])
        if step <= limit:
            return found
        earlier = self._before(limit)
        if earlier is None:
            fact = f"has run {step} of {plan['steps']} steps and kept none of the first {limit}"
            remedy = "keep --tokens as it was, or start anew with --fresh"
            raise TrainError(self.folder, fact, remedy)
        self.newest.forget(after=earlier[0])
        return earlier

    def _before(self, limit: int) -> Found:
        """Return the newest of both folders up to a step."""
        both = [folder.load_newest(limit=limit) for folder in (self.newest, self.stable)]
        return max((one for one in both if one is not None), key=lambda one: one[0], default=None)


def identity(session: Session) -> dict[str, Any]:
    """Return what must be the same for a run to go on: a longer stable phase may follow."""
    left_out = session.settings.free | (
        {"tokens"} if session.settings.schedule in EXTENDABLE else set()
    )
    told = session.settings.as_dict()
    ask = session.ask
    return {
        **{name: value for name, value in told.items() if name not in left_out},
        "student": identify(session.student),
        "teacher": ask.teacher or (str(ask.cache) if ask.cache else None),
        "data": session.rows.digest,
    }
