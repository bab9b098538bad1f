"""The layers by modules map of a difference: colours on a terminal, numbers when piped."""

from collections.abc import Sequence
from math import log10

from rich.style import Style
from rich.text import Text

from cli import render
from surgery.difference import Difference, Group
from surgery.errors import printable

# From little to much change; viridis without its darkest end, which dark terminals swallow.
RAMP = (
    "#453781", "#39568c", "#2d708e", "#238a8d", "#20a386", "#3cbc75", "#74d055", "#b8de29",
    "#fde725",
)  # fmt: skip
SHADES = "\u2591\u2592\u2593\u2588"  # where there is no colour
SAME, ABSENT = "\u00b7", " "
TICK = 5  # layers between two numbers above the map


def show_heat_map(found: Difference) -> None:
    """Print relative L2 by layer and module, if the model has layers."""
    if not found.layers:
        return
    if not render.is_watched():
        _show_numbers(found)
        return
    known = [v for cell in found.cells.values() if (v := _value(cell))]  # 0 is not of the ramp
    scale = (min(known), max(known)) if known else (1.0, 1.0)
    names = [printable(module) for module in found.modules]
    label = max(map(len, names))
    layers, space = list(found.layers), max(render.out().width - label - 4, 8)
    width = 2 if len(layers) * 2 <= space else 1
    per_line = space // width
    for start in range(0, len(layers), per_line):
        _block(found, names, layers[start : start + per_line], scale, (label, width))
    render.out().print(_legend(scale, label))


def _show_numbers(found: Difference) -> None:
    render.gap()
    cells = found.cells
    rows = [
        (layer, *(_plain(cells.get((layer, module))) for module in found.modules))
        for layer in found.layers
    ]
    headings = ("relative L2 of layer", *found.modules)
    render.table(headings, rows, numbers=range(len(headings)))


def _value(cell: Group | None) -> float | None:
    return cell.figures.relative_l2 if cell and cell.figures else None


def _plain(cell: Group | None) -> str:
    value = _value(cell)
    return "-" if value is None else f"{value:.3g}"


def _block(
    found: Difference,
    names: Sequence[str],
    layers: Sequence[int],
    scale: tuple[float, float],
    sizes: tuple[int, int],
) -> None:
    """Print one block of layers, which run from left to right."""
    label, width = sizes
    cells = found.cells
    render.out().print(Text(" " * (label + 2) + _ruler(layers, width), style="dim"))
    for module, name in zip(found.modules, names, strict=True):
        line = Text(f"{name.ljust(label)}  ")
        for layer in layers:
            line.append(*_glyph(_value(cells.get((layer, module))), scale, width))
        render.out().print(line)


def _ruler(layers: Sequence[int], width: int) -> str:
    marks = [" "] * (len(layers) * width + 6)
    for i, layer in enumerate(layers):
        if layer % TICK == 0:
            marks[i * width : i * width + len(str(layer))] = str(layer)
    return "".join(marks).rstrip()


def _glyph(value: float | None, scale: tuple[float, float], width: int) -> tuple[str, Style]:
    if value is None:
        return ABSENT * width, Style()
    if value == 0:
        return SAME * width, Style(dim=True)
    at = _position(value, scale)
    if render.out().no_color:
        return SHADES[round(at * (len(SHADES) - 1))] * width, Style()
    return SHADES[-1] * width, Style(color=RAMP[round(at * (len(RAMP) - 1))])


def _position(value: float, scale: tuple[float, float]) -> float:
    """Place a value between the least and the largest, by powers of ten: 0 to 1."""
    low, high = scale
    return (log10(value) - log10(low)) / (log10(high) - log10(low)) if high > low else 1.0


def _legend(scale: tuple[float, float], label: int) -> Text:
    low, high = scale
    line = Text(f"{'relative L2'.rjust(label)}  ")
    line.append(SAME * 2, Style(dim=True)).append(f" identical   {low:.2g} ")
    steps = len(RAMP) - 1
    for i in range(len(RAMP)):
        line.append(*_glyph(low * (high / low) ** (i / steps), scale, 2))
    return line.append(f" {high:.2g}")
