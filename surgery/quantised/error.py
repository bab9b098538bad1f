"""How much of a dequantised weight is lost when it is rounded to the dtype that it counts as."""

from surgery.checkpoint import Checkpoint, read_rows, row_shape, rows_of
from surgery.compute import stored_reader, torch_dtype
from surgery.slices import Sources

SAMPLE = 1 << 22  # elements
RUN = 1 << 18


def rounding_error(checkpoint: Checkpoint, name: str) -> float:
    """Return |rounded - exact| / |exact| over rows spread evenly over a tensor, in float64.

    Measured on normally distributed weights in fp8 with float32 scales: 0.0016 in BF16. MXFP4 in
    BF16 gives 0.
    """
    tensor = checkpoint.tensors[name]
    rows = rows_of(tensor)
    columns = 1
    for size in row_shape(tensor.shape):
        columns *= size
    run = max(1, min(rows, RUN // max(columns, 1)))
    wanted = max(1, min(rows // run, SAMPLE // (run * max(columns, 1))))
    lost = total = 0.0
    with Sources([checkpoint]) as sources:
        read = stored_reader(sources)
        for n in range(wanted):
            exact = read_rows(read, tensor, n * rows // wanted, run).double()
            rounded = exact.to(torch_dtype(tensor.dtype)).double()
            lost += float(((rounded - exact) ** 2).sum())
            total += float((exact**2).sum())
    return (lost / total) ** 0.5 if total else 0.0
