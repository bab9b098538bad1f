"""Speed of training: tokens and floating-point operations a second, against what the device can."""

import time
from dataclasses import dataclass, field

# Dense bfloat16, in TFLOP/s, by a part of the device's name (the vendor's data sheets).
PEAKS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0,
    "L40S": 362.0, "L4": 121.0, "A10G": 70.0, "RTX 4090": 165.0, "MI300X": 1307.0,
}  # fmt: skip


def peak_of(device_name: str) -> float | None:
    """Return the device's dense bfloat16 peak in TFLOP/s, or None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


@dataclass(slots=True)
class Meter:
    """Counts tokens and time.

    Attributes:
        parameters: of the student, without the embedding where it is only looked up.
        teacher: of a teacher that runs along, likewise; 0 without one.
        partly: few parameters train, so that no gradients of the weights are computed.
        peak: TFLOP/s of one device; `devices` how many there are.
    """

    parameters: int
    teacher: int
    partly: bool
    peak: float | None
    devices: int
    tokens: int = 0
    seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Begin to count the time of a step."""
        self._since = time.perf_counter()

    def add(self, tokens: int) -> dict[str, float]:
        """Count a step of so many tokens, padding included; return its figures.

        `tflops` counts what is done: 6 N a token where all weights train, 4 N where few do, and
        2 N of a teacher that runs along; attention is left out. `mfu` is that over the peak, and
        `mfu_6n` what it would be if every step counted 6 N, as some tools do.
        """
        took = time.perf_counter() - self._since
        self.tokens += tokens
        self.seconds += took
        return {"seconds": took, **self._speed(tokens, took)}

    def mean(self) -> dict[str, float]:
        """Return the figures of all steps that were counted."""
        return self._speed(self.tokens, self.seconds)

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        speed = tokens / seconds if seconds > 0 else 0.0
        done = speed * ((4 if self.partly else 6) * self.parameters + 2 * self.teacher) / 1e12
        six = speed * (6 * self.parameters + 2 * self.teacher) / 1e12
        told = {"tokens_per_second": speed, "tflops": done}
        if self.peak:
            whole = self.peak * self.devices
            told |= {"mfu": done / whole, "mfu_6n": six / whole}
        return told
