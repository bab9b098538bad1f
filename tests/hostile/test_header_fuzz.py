"""Our header parser against the format's own, on thousands of damaged files.

Whatever the crate rejects, ours rejects too; what both accept, both read alike; and ours rejects
more only for the reasons that it is meant to.
"""

import pytest
from hostile.mutate import mutant
from safetensors import SafetensorError, safe_open

from surgery.checkpoint.header import read_header
from surgery.errors import CheckpointError

BATCH = 1_000
# Where ours is the stricter on purpose.
STRICTER = (
    "twice",
    "control characters",
    "exactly dtype",
    "__metadata__",
    "unknown dtype",
    "integer",
)


def by_the_crate(path):
    """Name, dtype and shape of every tensor, or None where the crate rejects the file."""
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError:
        return None


def by_us(path):
    """The same by our parser, and why it rejects the file where it does."""
    try:
        header = read_header(path)
    except CheckpointError as error:
        return None, str(error)
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors}, ""


def compare(seeds, path):
    """Run both parsers over the files of these seeds; count what they said."""
    accepted = rejected = 0
    for seed in seeds:
        path.unlink(missing_ok=True)
        path.write_bytes(mutant(seed))
        theirs, (ours, reason) = by_the_crate(path), by_us(path)
        if theirs is None:
            assert ours is None, f"seed {seed}: we accept what the crate rejects"
            rejected += 1
        elif ours is None:
            assert any(word in reason for word in STRICTER), f"seed {seed}: {reason}"
        else:
            assert ours == theirs, f"seed {seed}"
            accepted += 1
    return accepted, rejected


@pytest.mark.parametrize("batch", range(3))
def test_never_accepts_what_the_crate_rejects(batch, tmp_path):
    seeds = range(batch * BATCH, (batch + 1) * BATCH)
    accepted, rejected = compare(seeds, tmp_path / "mutant.safetensors")
    assert accepted > BATCH / 10, "too few sound files: the fuzz would prove little"
    assert rejected > BATCH / 10, "too few damaged files: the fuzz would prove little"


@pytest.mark.slow
def test_never_accepts_what_the_crate_rejects_in_100000_files(tmp_path):
    accepted, rejected = compare(range(10_000, 110_000), tmp_path / "mutant.safetensors")
    assert min(accepted, rejected) > 10_000
