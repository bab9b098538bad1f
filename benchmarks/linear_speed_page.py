"""The page of a run of benchmarks.linear_speed: losing figures are on it too."""

from typing import Any

from benchmarks.report import table

Facts = dict[str, Any]
SOFTMAX = "softmax"
LENGTHS = tuple(1024 << n for n in range(7))  # 1k to 64k
STOPPED = {"time": "too slow", "memory": "out of memory"}


def short(length: int | str) -> str:
    """Return a number of tokens as 4k."""
    n = int(length)
    return f"{n // 1024}k" if n >= 1024 else str(n)


def number(value: float) -> str:
    """Return three digits, or all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def beside(value: float, softmax: object) -> str:
    """Return a figure, and how many times that of softmax it is."""
    if not isinstance(softmax, float | int) or not softmax:
        return number(value)
    return f"{number(value)} ({value / softmax:.2f}x)"


def cell(arm: Facts, softmax: Facts, length: int) -> str:
    """Return one cell of the table of prefills."""
    found = arm["prefill"].get(str(length), "-")
    if isinstance(found, str):
        return STOPPED.get(found, found)
    return beside(found, softmax["prefill"].get(str(length)))


def prefill_rows(arms: Facts) -> list[list[str]]:
    """Return tokens a second by length."""
    own = arms[SOFTMAX]
    return [[name, *(cell(arm, own, n) for n in LENGTHS)] for name, arm in arms.items()]


def decode_rows(arms: Facts) -> list[list[str]]:
    """Return tokens a second at one row, and at the largest batch."""
    own = arms[SOFTMAX]
    return [
        [
            name,
            beside(arm["one"], own["one"]),
            str(arm["largest"]["rows"]),
            beside(arm["largest"]["speed"], own["largest"]["speed"]),
        ]
        for name, arm in arms.items()
    ]


def kept_rows(arms: Facts) -> list[list[str]]:
    """Return bytes kept by length, and from which length on that is less than softmax keeps."""
    lengths = list(arms[SOFTMAX]["kept"])
    token = arms[SOFTMAX]["kept"][lengths[-1]] / int(lengths[-1])
    rows = []
    for name, arm in arms.items():
        sizes = [arm["kept"][n] for n in lengths]
        even = "-" if name == SOFTMAX else number(sizes[-1] / token)
        rows.append([name, *(f"{size / 1024:,.1f}" for size in sizes), even])
    return rows


def training_rows(arms: Facts) -> list[list[str]]:
    """Return bytes a token that training keeps by length, and the speed of a transfer."""
    rows = []
    for name, arm in arms.items():
        each = [f"{size / int(n) / 1024:,.1f}" for n, size in arm["training"].items()]
        speed = "-" if arm["transfer"] is None else number(arm["transfer"])
        rows.append([name, *each, speed])
    return rows


def heading(facts: Facts) -> list[str]:
    """Return what was measured, and where."""
    shape, machine = facts["shape"], facts["machine"]
    told = [f"{key} {value}" for key, value in machine.items() if key != "file system"]
    told += [f"{key} {value}" for key, value in facts["versions"].items()]
    seconds = (
        "Seconds are those that the one thread had, not of the clock: the machine was shared."
        if facts["device"] == "cpu"
        else "Seconds are of the clock, after the device has ended."
    )
    return [
        f"# Speed and memory of linearized models, {facts['date']}",
        "",
        f"`{facts['commit']}`, shape {shape['name']}: {shape['layers']} layers, hidden "
        f"{shape['hidden']}, {shape['heads']} heads of {shape['hidden'] // shape['heads']}, "
        f"{shape['kv_heads']} KV heads, vocabulary {shape['vocabulary']}, {shape['dtype']}, on "
        f"{facts['device']}; random weights, every method with its defaults. {seconds}",
        "",
        f"{'; '.join(told)}. The run took {facts['seconds']:.0f} s.",
        "",
        f"Made by `PYTHONPATH=. python -m benchmarks.linear_speed --work DIR --device "
        f"{facts['device']} --shape {shape['name']}`. In brackets: times the figure of softmax "
        "in the same run; above 1 is faster.",
        "",
    ]


def page(facts: Facts) -> str:
    """Return the page."""
    done = {name: arm for name, arm in facts["arms"].items() if "failed" not in arm}
    lines = heading(facts)
    if SOFTMAX not in done:
        return "\n".join([*lines, f"softmax failed: {facts['arms'][SOFTMAX]['failed']}", ""])
    shape, kept = facts["shape"], done[SOFTMAX]["kept"]
    lines += ["## Prefill, tokens a second, one row", ""]
    lines += [f"A length is not tried when it would take more than {shape['limit']:.0f} s.", ""]
    lines += table(["", *map(short, LENGTHS)], prefill_rows(done))
    room = f"{facts['budget']} MiB of caches" if facts["device"] == "cpu" else "the memory"
    lines += [f"## Decoding behind {short(shape['context'])} tokens, tokens a second", ""]
    lines += [
        f"The largest batch is the power of two whose caches still fit into {room}, at most "
        f"{shape['rows']}. Softmax writes into a cache of full length, so that a token copies no "
        "keys.",
        "",
    ]
    lines += table(["", "one row", "rows", "all of those rows"], decode_rows(done))
    lines += ["## What is kept of a row, KiB", ""]
    head = [f"after {short(n)} tokens" for n in kept]
    lines += table(["", *head, "tokens at which softmax keeps as much"], kept_rows(done))
    lines += ["## Training", ""]
    lines += [
        "What a forward pass saves for gradients of all parameters, the head aside, in KiB a token "
        "(where memory is linear it is the same at every length), and tokens a second of the "
        f"transfer stage in rows of {short(shape['piece'])} tokens, where there is anything to "
        "learn.",
        "",
    ]
    head = [f"KiB a token at {short(n)}" for n in done[SOFTMAX]["training"]]
    lines += table(["", *head, "transfer, tokens/s"], training_rows(done))
    failed = {name: arm["failed"] for name, arm in facts["arms"].items() if "failed" in arm}
    if failed:
        lines += ["## Not measured", "", *(f"- {n}: {why}" for n, why in failed.items()), ""]
    return "\n".join(lines)
