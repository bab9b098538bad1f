"""`surgery inspect`: what a checkpoint is made of."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from cli import render
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.layers.rules import told_layers
from surgery.survey import Survey, survey

SHOWN_FILES = 8
BAR = 24  # cells of a full bar
MANY_EXPERTS = "{per_layer} per layer, {per_token} per token"


def command(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A directory, a .safetensors file, or org/name[@rev]."),
    ],
    *,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    weights: Annotated[
        str | None, typer.Option(help="The weight or index file to take, where there are several.")
    ] = None,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Fetch a hub model that is not in the cache.")
    ] = False,
) -> None:
    """Show what a checkpoint is made of: parts, layers, dtypes, ties, tokenizer, files.

    Reads headers and small files only, whatever the size of the model.
    """
    source = open_checkpoint(path, weights=weights, allow_download=allow_download)
    found = survey(source, kinds=told_layers)
    if as_json:
        listed = {"tensor_list": list(_tensors(source))} if tensors else {}
        render.print_json(found.as_dict() | listed)
        return
    _show(found)
    if tensors:
        _show_tensors(source)


def _show(found: Survey) -> None:
    render.line(_headline(found), "bold")
    render.pairs(list(_facts(found)))
    if found.parts:
        _show_parts(found)
    if found.layers:
        _show_layers(found)
    _show_dtypes(found)
    _show_files(found)
    for note in found.notes:
        render.gap()
        render.line(f"note: {note}", "yellow")


def _headline(found: Survey) -> str:
    words = [found.name, found.family] if found.family != "unknown" else [found.name]
    if found.layers:
        words.append(f"{found.layers.count} layers")
    parameters = f"{render.quantity(found.parameters)} parameters"
    active = f" ({render.quantity(found.active)} active)" if found.active else ""
    return "  ".join([*words, parameters + active, render.size(found.bytes)])


def _facts(found: Survey) -> Iterator[tuple[str, str]]:
    told = found.dimensions
    if found.architectures:
        yield "architecture", ", ".join(found.architectures)
    if found.layers:
        yield "layers", _layers(found)
    if widths := list(_widths(told)):
        yield "widths", ", ".join(widths)
    if "heads" in told:
        yield "heads", _heads(told)
    if found.experts:
        shown = MANY_EXPERTS if "per_token" in found.experts else "{per_layer} per layer"
        yield "experts", shown.format(**found.experts)
    if "vocabulary" in told:
        yield "vocabulary", f"{told['vocabulary']:,} rows"
    yield from _ends(found)
    if context := list(_context(told)):
        yield "context", ", ".join(context)
    for stack in found.other_stacks:
        held = render.quantity(stack.parameters)
        yield "also", f"{stack.prefix}: {stack.layers} modules, {held} parameters"
    if found.quantization:
        yield "quantized", found.quantization
    yield "tokenizer", _tokenizer(found)
    yield "record", _record(found.record)
    if found.revision:
        yield "commit", found.revision


def _layers(found: Survey) -> str:
    layers = found.layers
    assert layers is not None  # noqa: S101 - told by the caller
    extra = f", and {layers.extra} extra (next-token predictors)" if layers.extra else ""
    return f"{layers.pattern}{extra}, named {layers.prefix}.N"


def _widths(told: Mapping[str, float]) -> Iterator[str]:
    names = {"hidden": "hidden", "feed_forward": "feed-forward", "expert_feed_forward": "expert"}
    yield from (f"{shown} {told[name]:,}" for name, shown in names.items() if name in told)


def _heads(told: Mapping[str, float]) -> str:
    shared = f", {told['kv_heads']} for keys and values" if "kv_heads" in told else ""
    width = f", {told['head_width']} wide" if "head_width" in told else ""
    return f"{told['heads']}{shared}{width}"


def _ends(found: Survey) -> Iterator[tuple[str, str]]:
    if found.embedding:
        yield "embedding", found.embedding
        tied = "tied to the embedding" if found.tied else "none"
        yield "head", found.head or tied


def _context(told: Mapping[str, float]) -> Iterator[str]:
    if "context" in told:
        yield f"{told['context']:,} positions"
    if "window" in told:
        yield f"sliding window {told['window']:,}"
    if "rope_theta" in told:
        yield f"RoPE base {told['rope_theta']:,.0f}"


def _tokenizer(found: Survey) -> str:
    held = found.tokenizer
    if held is None:
        return "none"
    tokens = f", {held.tokens:,} tokens" if held.tokens is not None else ""
    template = f", chat template in {held.template}" if held.template else ""
    return f"{held.kind} ({held.files[0]}){tokens}{template}"


def _record(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "none"
    inputs = ", ".join(str(ref) for ref in record["inputs"])
    told = json.dumps(record["parameters"], ensure_ascii=False, default=str)
    return f"made by {record['operation']} {told} from {inputs}"


def _show_parts(found: Survey) -> None:
    render.gap()
    rows = [
        (
            part.name,
            part.tensors,
            render.quantity(part.parameters),
            f"{part.parameters / max(found.parameters, 1):.1%}",
            *render.share_bar(part.parameters / max(found.parameters, 1), BAR),
        )
        for part in found.parts
    ]
    bars = ("",) if rows and len(rows[0]) > 4 else ()  # noqa: PLR2004 - a bar behind the columns
    render.table(
        ("part", "tensors", "parameters", "share", *bars),
        rows,
        numbers=(1, 2, 3),
        styles={4: "cyan"},
    )


def _show_layers(found: Survey) -> None:
    render.gap()
    assert found.layers is not None  # noqa: S101 - told by the caller
    rows = [
        (
            group.kind,
            group.count,
            group.layers,
            group.tensors,
            render.quantity(group.parameters),
            render.size(group.bytes),
        )
        for group in found.layers.groups
    ]
    headings = ("kind of layer", "count", "layers", "tensors each", "parameters each", "bytes each")
    render.table(headings, rows, numbers=(1, 3, 4, 5))


def _show_dtypes(found: Survey) -> None:
    render.gap()
    rows = [
        (d.name, d.tensors, render.quantity(d.parameters), render.size(d.bytes))
        for d in found.dtypes
    ]
    render.table(("dtype", "tensors", "elements", "bytes"), rows, numbers=(1, 2, 3))


def _show_files(found: Survey) -> None:
    render.gap()
    weights = [file for file in found.files if file.tensors]
    others = [file for file in found.files if not file.tensors]
    shown = [*weights[:SHOWN_FILES], *others[:SHOWN_FILES]]
    rows = [(file.name, render.size(file.bytes), file.tensors or "") for file in shown]
    render.table(("file", "bytes", "tensors"), rows, numbers=(1, 2))
    left = len(found.files) - len(shown)
    if left:
        total = render.size(sum(file.bytes for file in found.files))
        render.line(f"and {left} more; all files have {total} (--json lists them)", "dim")


def _tensors(source: Checkpoint) -> Iterator[dict[str, Any]]:
    for name, tensor in source.tensors.items():
        yield {
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "file": source.file_names[tensor.file],
        }


def _show_tensors(source: Checkpoint) -> None:
    render.gap()
    rows = [
        (name, t.dtype, " x ".join(map(str, t.shape)), render.size(t.nbytes), t.file.name)
        for name, t in source.tensors.items()
    ]
    render.table(("tensor", "dtype", "shape", "bytes", "file"), rows, numbers=(3,))
