"""Signals that ask a run to save and stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT)


class Asked:
    """Whether somebody has asked the run to stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.by: int | None = None

    def __bool__(self) -> bool:
        return self.by is not None

    def take(self, number: int, _: FrameType | None) -> None:
        """Note a signal."""
        if self.by is not None:
            raise KeyboardInterrupt
        self.by = number


@contextmanager
def listening() -> Iterator[Asked]:
    """Take the signals while the run goes on, and give them back afterwards."""
    asked = Asked()
    try:
        before = {number: signal.signal(number, asked.take) for number in ASKING}
    except ValueError:  # not the main thread: whoever runs us takes the signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
