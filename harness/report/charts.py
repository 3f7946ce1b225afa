"""Charts of a run as SVG, readable on light and on dark pages: lines over the epochs, stages side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from pdarts import OPERATIONS

# The class keeps these rules from the other drawings of a page.
STYLE = """
.chart text { font: 11px Helvetica, Arial, sans-serif; fill: #333 }
.chart .title { font-size: 13px; font-weight: bold }
.chart .paper { fill: #fff } .chart .grid { stroke: #e3e6ea } .chart .axis { stroke: #9aa0a6; fill: none }
.chart .stage { stroke: #9aa0a6; stroke-dasharray: 2 3 } .chart .warm { fill: #888; fill-opacity: 0.13 }
.chart .line { fill: none; stroke-width: 1.6; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
.chart text { fill: #ddd } .chart .paper { fill: #16181c } .chart .grid { stroke: #2e3238 }
.chart .axis, .chart .stage { stroke: #767c84 }
}
"""
COLOURS = {
    "none": "#888888",
    "max_pool_3x3": "#3274c4",
    "avg_pool_3x3": "#3274c4",
    "skip_connect": "#2a9d5c",
    "sep_conv_3x3": "#d9722e",
    "sep_conv_5x5": "#d9722e",
    "dil_conv_3x3": "#8a56b5",
    "dil_conv_5x5": "#8a56b5",
    "sep_conv_7x7": "#d9722e",
    "conv_7x1_1x7": "#b5485a",
}
SECOND = {"max_pool_3x3", "sep_conv_5x5", "dil_conv_5x5"}  # of two operations of one colour: dashed


CUSTOM = ("#b5485a", "#1f9aa8", "#b0901c", "#cc5fa8")


def colour_of(operation: str) -> str:
    """The colour of an operation in drawings; custom ones share some."""
    custom = [name for name in OPERATIONS if name not in COLOURS]
    return COLOURS.get(operation) or CUSTOM[custom.index(operation) % len(CUSTOM) if operation in custom else 0]


class Line(NamedTuple):
    """A value of each epoch, or None. Values in a row are drawn as a line, single ones as dots, hollow if dashed."""

    name: str
    colour: str
    values: Sequence[float | None]
    dashed: bool = False


class Stages(NamedTuple):
    """The horizontal axis: the epochs of each stage, the first `warmup` of which train weights only."""

    epochs: Sequence[int]
    warmup: int = 0

    def starts(self) -> list[int]:
        return [sum(self.epochs[:stage]) for stage in range(len(self.epochs))]


class Frame(NamedTuple):
    """The place of a panel in a drawing."""

    x: float
    y: float
    width: float
    height: float


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" class="chart" style="min-width: {0.6 * width:g}px">',  # smaller ones are scrolled
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        rectangle("paper", 0, 0, width, height),
        *parts,
        "</svg>\n",
    ])


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(content)}</text>'


def rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return round numbers between two others, one at least."""
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * size for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * size) <= most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def limits(lines: Sequence[Line], low: float | None = None) -> tuple[float, float]:
    """Return the limits of the vertical axis, a little more than the values need."""
    values = [v for line in lines for v in line.values if v is not None] or [0.0, 1.0]
    low, high = min(values) if low is None else low, max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if low == 0 else low - margin), high + margin


def panel(
    frame: Frame, title: str, lines: Sequence[Line], stages: Stages, low_high, labels=True, numbered=True, percent=False
):
    """Draw axes and lines. labels: numbers beside the axes; numbered: the numbers of the stages below."""
    (low, high), total = low_high, sum(stages.epochs)

    def across(epoch):
        return frame.x + frame.width * (epoch + 0.5) / total

    def up(value):
        return frame.y + frame.height * (1 - (value - low) / (high - low))

    bottom, right, parts = frame.y + frame.height, frame.x + frame.width, []
    for start in stages.starts():
        left = frame.x + frame.width * start / total
        wide = frame.width * min(stages.warmup, total) / total
        if stages.warmup:
            parts.append(rectangle("warm", left, frame.y, wide, frame.height))
        if start:
            parts.append(f'<path class="stage" d="M{left:.1f} {frame.y:g}V{bottom:g}"/>')
    for tick in ticks(low, high):
        parts.append(f'<path class="grid" d="M{frame.x:g} {up(tick):.1f}H{right:g}"/>')
        if labels:
            parts.append(text(frame.x - 5, up(tick) + 4, f"{tick:.0%}" if percent else f"{tick:.4g}", "end"))
    parts.append(f'<path class="axis" d="M{frame.x:g} {frame.y:g}V{bottom:g}H{right:g}"/>')
    if labels and len(stages.epochs) == 1:
        for epoch in ticks(0, max(total - 1, 1), 6):
            if epoch == int(epoch) < total:
                parts.append(text(across(epoch), bottom + 15, f"{epoch:g}", "middle"))
    else:
        for stage, (start, epochs) in enumerate(zip(stages.starts(), stages.epochs), 1):
            middle = frame.x + frame.width * (start + epochs / 2) / total
            parts += [text(middle, bottom + 15, f"stage {stage}", "middle")] * numbered
    if title:
        parts.append(text(frame.x, frame.y - 7, title, kind="title" if labels else ""))
    for line in lines:
        parts += draw_line(line, stages, across, up)
    return parts


def stroke(line: Line, path: str) -> str:
    dash = ' stroke-dasharray="5 3"' if line.dashed else ""
    return f'<path class="line" stroke="{line.colour}"{dash} d="{path}"/>'


def dot(line: Line, x: float, y: float) -> str:
    filling = f'fill="none" stroke="{line.colour}" stroke-width="1.6"' if line.dashed else f'fill="{line.colour}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" {filling}/>'


def draw_line(line: Line, stages: Stages, across, up) -> list[str]:
    parts, path = [], []

    def end():
        if len(path) > 1:
            parts.append(stroke(line, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in path)))
        elif path:
            parts.append(dot(line, *path[0]))
        path.clear()

    starts = set(stages.starts())
    for epoch, value in enumerate(line.values):
        if epoch in starts or value is None:
            end()
        if value is not None:
            path.append((across(epoch), up(value)))
    end()
    return parts


def legend(x: float, y: float, lines: Sequence[Line], step: float = 17, dots: bool = False) -> list[str]:
    parts = []
    for i, line in enumerate(lines):
        at = y + i * step
        parts.append(dot(line, x + 12, at) if dots else stroke(line, f"M{x:g} {at:g}h24"))
        parts.append(text(x + 30, at + 4, line.name))
    return parts


def alphas_svg(log: list[dict], candidates: list, edges: Sequence[tuple[int, int]], stages: Stages) -> str:
    """Draw softmax(alpha) of every edge, (node, input). log: records of log.jsonl; candidates: (normal, reduce) of each
    stage so far."""
    nodes = edges[-1][0] + 1
    width, height, gap, margin = 150, 84, (18, 34), (78, 62)
    kinds = ("normal", "normal cell"), ("reduce", "reduction cell")
    block = nodes * (height + gap[1]) + margin[1]
    largest = max(p for record in log for kind, _ in kinds for edge in record[f"softmax_alphas_{kind}"] for p in edge)
    high = min(1.0, math.ceil(largest * 10 + 0.2) / 10)
    parts, names = [], [name for name in OPERATIONS if any(name in edge for stage in candidates for edge in stage[0])]
    samples = [Line(name, colour_of(name), (), name in SECOND) for name in names]
    for which, (kind, title) in enumerate(kinds):
        top = which * block + margin[1]
        parts.append(text(16, top - 34, f"{title}: softmax(alpha) of its edges", kind="title"))
        for index, (node, source) in enumerate(edges):
            where = Frame(margin[0] + source * (width + gap[0]), top + node * (height + gap[1]), width, height)
            lines = []
            for line in samples:
                values = []
                for record in log:
                    edge = candidates[record["stage"] - 1][which][index]
                    at = edge.index(line.name) if line.name in edge else None
                    values.append(None if at is None else record[f"softmax_alphas_{kind}"][index][at])
                lines.append(line._replace(values=values))
            name = ("c_{k-2}", "c_{k-1}")[source] if source < 2 else f"node {source - 2}"
            last = node == nodes - 1
            parts += panel(where, f"{name} to node {node}", lines, stages, (0, high), labels=False, numbered=last)
            if source == 0:
                for tick in ticks(0, high, 3):
                    parts.append(text(where.x - 5, where.y + height * (1 - tick / high) + 4, f"{tick:g}", "end"))
    free = margin[0] + max(min(nodes + 1, 3), nodes - 1) * (width + gap[0]) + 14  # right of the first nodes' edges
    longest = max(130, *(32 + 6.2 * len(name) for name in names))
    across = max(margin[0] + (nodes + 1) * (width + gap[0]), free + longest)
    parts += legend(free, margin[1] + 4, samples, dots=max(stages.epochs) == 1)
    if stages.warmup:
        y = margin[1] + 4 + 17 * len(samples)
        parts.append(rectangle("warm", free, y - 6, 24, 12))
        parts.append(text(free + 30, y + 4, "weights only"))
    return svg(across + 8, 2 * block, "softmax(alpha) over the epochs of the search", parts)


BLUE, ORANGE, GREEN = "#3274c4", "#d9722e", "#2a9d5c"


def curves_svg(log: list[dict], stages: Stages, rate: str) -> str:
    """Draw losses, accuracies and rates of the records of log.jsonl; rate: "skip_dropout" or "drop_path"."""

    def line(name, colour, key):
        return Line(name, colour, [record.get(key) for record in log])

    training = "weights' half" if rate == "skip_dropout" else "training"
    panels = [
        ("loss", [line(training, BLUE, "train_loss"), line("alphas' half", ORANGE, "alpha_loss")], None, False),
        (
            "accuracy",
            [
                line(training, BLUE, "train_accuracy"),
                line("alphas' half", ORANGE, "alpha_accuracy"),
                line("test", GREEN, "test_accuracy"),
            ],
            0,
            True,
        ),
        ("learning rate", [line("learning rate", BLUE, "lr")], 0, False),
        (rate.replace("_", " "), [line(rate.replace("_", " "), BLUE, rate)], 0, False),
    ]
    parts, width, height = [], 420, 170
    for i, (title, lines, low, percent) in enumerate(panels):
        lines = [one for one in lines if any(v is not None for v in one.values)]
        frame = Frame(62 + i % 2 * (width + 80), 44 + i // 2 * (height + 78), width, height)
        parts += panel(frame, title, lines, stages, limits(lines, low), percent=percent)
        if len(lines) > 1:
            for j, one in enumerate(lines):
                parts += legend(frame.x + frame.width - 106 * (len(lines) - j), frame.y - 11, [one])
        epochs = f"{stages.epochs[0]} epoch{'s' * (stages.epochs[0] > 1)}"
        below = "epoch" if len(stages.epochs) == 1 else f"{epochs} of each stage"
        parts.append(text(frame.x + width / 2, frame.y + height + 30, below, "middle"))
    return svg(2 * (width + 80) + 4, 2 * (height + 78) + 22, "losses, accuracies and rates over the epochs", parts)


def dots_svg(groups: Sequence[tuple[str, Sequence[float]]], title: str) -> str:
    """Draw a row of dots, and a bar at their mean, for each group of values."""
    left, width, step, top = 190, 460, 24, 46
    values = [v for _, group in groups for v in group] or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    bottom = top + step * len(groups)

    def across(value):
        return left + width * (value - low) / (high - low)

    parts = [text(16, 24, title, kind="title")]
    for tick in ticks(low, high, 6):
        parts.append(f'<path class="grid" d="M{across(tick):.1f} {top - 6:g}V{bottom:g}"/>')
        parts.append(text(across(tick), bottom + 15, f"{tick:.4g}", "middle"))
    for i, (name, group) in enumerate(groups):
        y = top + step * (i + 0.5) - 3
        parts.append(text(left - 10, y + 4, name, "end"))
        for value in group:
            parts.append(f'<circle cx="{across(value):.1f}" cy="{y:.1f}" r="4" fill="{BLUE}" fill-opacity="0.55"/>')
        if group:
            mean = across(sum(group) / len(group))
            parts.append(f'<path class="line" stroke="{ORANGE}" d="M{mean:.1f} {y - 8:.1f}v16"/>')
    return svg(left + width + 30, bottom + 30, title, parts)
