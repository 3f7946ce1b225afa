"""Cells: those published by other papers; counting, reading, checking and drawing."""

from __future__ import annotations

import ast
import html
import itertools
import json
import numbers
import os
import pathlib
import re
import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.files import reason, short
from harness.report import forms
from harness.report.charts import colour_of
from pdarts import GENOTYPES, OPERATIONS, Genotype, InputError, Network, parse_genotype

# --- Cells of other papers --------------------------------------------------------------------------------------------

PUBLISHED = {
    **GENOTYPES,
    "NASNet": parse_genotype(
        "sep_conv_5x5 1, sep_conv_3x3 0 | sep_conv_5x5 0, sep_conv_3x3 0 | avg_pool_3x3 1, skip_connect 0 | "
        "avg_pool_3x3 0, avg_pool_3x3 0 | sep_conv_3x3 1, skip_connect 1",
        "sep_conv_5x5 1, sep_conv_7x7 0 | max_pool_3x3 1, sep_conv_7x7 0 | avg_pool_3x3 1, sep_conv_5x5 0 | "
        "skip_connect 3, avg_pool_3x3 2 | sep_conv_3x3 2, max_pool_3x3 1",
    )._replace(reduce_concat=[4, 5, 6]),
    "AmoebaNet": parse_genotype(
        "avg_pool_3x3 0, max_pool_3x3 1 | sep_conv_3x3 0, sep_conv_5x5 2 | sep_conv_3x3 0, avg_pool_3x3 3 | "
        "sep_conv_3x3 1, skip_connect 1 | skip_connect 0, avg_pool_3x3 1",
        "avg_pool_3x3 0, sep_conv_3x3 1 | max_pool_3x3 0, sep_conv_7x7 2 | sep_conv_7x7 0, avg_pool_3x3 1 | "
        "max_pool_3x3 0, max_pool_3x3 1 | conv_7x1_1x7 0, sep_conv_3x3 5",
    )._replace(normal_concat=[4, 5, 6], reduce_concat=[3, 4, 6]),
}

# --- Reading and checking ---------------------------------------------------------------------------------------------

MAX_NODES = 100  # of a cell; published ones have 4 or 5


def skips_of(pairs) -> int:
    """Return the number of skip-connects of a cell."""
    return sum(name == "skip_connect" for name, _ in pairs)


def depth_of(pairs) -> int:
    """Return the number of operations, skip-connects too, on the longest path through the cell."""
    depths = [0, 0]
    for i in range(0, len(pairs), 2):
        depths.append(1 + max(depths[source] for _, source in pairs[i : i + 2]))
    return max(depths)


@torch.no_grad()
def count(network: Network, size: int | tuple[int, int] = 32, in_channels: int = 3) -> tuple[int, int]:
    """Return parameters and multiply-adds for an image of `size` (H, or (H, W)), without the auxiliary head.

    A multiply-add is one multiplication and one addition in a convolution or the classifier; batch norms, ReLUs, pools
    and sums count as nothing. docs/COUNTING.md compares this with other tools and with published numbers."""
    was_training, (h, w) = network.training, (size, size) if isinstance(size, int) else size
    with FlopCounterMode(display=False) as counter:
        network.eval()(network.classifier.weight.new_zeros(1, in_channels, h, w))
    network.train(was_training)
    parameters = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary_head"))
    return parameters, (counter.get_total_flops() // 2)


def check_genotype(genotype, name="genotype") -> Genotype:
    """Return the Genotype of any object or dict with its four fields; an InputError names the entry that is wrong.

    A cell may hold its pairs node by node, as [[(operation, input), (operation, input)], ...] too, and AutoDL's weights
    of the pairs as third entries."""
    fields = genotype if isinstance(genotype, dict) else {
        field: getattr(genotype, field) for field in Genotype._fields if hasattr(genotype, field)}
    if not set(Genotype._fields) <= fields.keys():
        raise InputError(
            f"{name} is a {type(genotype).__name__}; expected a Genotype, such as GENOTYPES['PDARTS'], or another "
            f"object with {', '.join(Genotype._fields)}")
    cells = []
    for kind in ("normal", "reduce"):
        pairs, concat = fields[kind], fields[f"{kind}_concat"]
        if isinstance(pairs, (list, tuple)) and all(map(is_node, pairs)):
            pairs = [pair[:2] if len(pair) == 3 else pair for node in pairs for pair in node]
        if not isinstance(pairs, (list, tuple)) or not pairs or len(pairs) % 2:
            raise InputError(
                f"{name}: {kind} must be a list of (operation, input) pairs, two for each node; got {short(pairs)}")
        if len(pairs) > 2 * MAX_NODES:
            raise InputError(f"{name}: {kind} has {len(pairs) // 2} nodes; expected at most {MAX_NODES}")
        for i, pair in enumerate(pairs):
            where = f"{name}: {kind}[{i}]"
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise InputError(f"{where} is {short(pair)}; expected an (operation, input) pair")
            operation, source = pair
            if not isinstance(operation, str) or operation not in OPERATIONS:
                raise InputError(
                    f"{where} has unknown operation {short(operation)}; expected one of {', '.join(OPERATIONS)}")
            if not is_whole(source) or not 0 <= source < 2 + i // 2:
                raise InputError(f"{where} has input {short(source)}; node {i // 2} can take 0 to {1 + i // 2}")
        states = range(2, 2 + len(pairs) // 2)
        if (not isinstance(concat, (list, tuple, range)) or not concat
                or any(not is_whole(s) or s not in states for s in concat) or len(set(concat)) < len(concat)):
            raise InputError(
                f"{name}: {kind}_concat is {short(concat)}; expected states from {states[0]} to {states[-1]} once")
        cells += [[(str(operation), int(source)) for operation, source in pairs], [int(s) for s in concat]]
    return Genotype(*cells)


def is_node(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (list, tuple)) for v in value)


def is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)  # numpy's too


# As logs and genotypes.py hold it, with four levels of brackets at most.
WITHIN = r"[^()]"
for _ in range(4):
    WITHIN = rf"(?:[^()]|\({WITHIN}*\))"
PRINTED = re.compile(rf"Genotype\({WITHIN}*\)")
OF_NUMPY = re.compile(r"(?:np|numpy)\.\w+\(([^()]*)\)")  # np.int64(1), as numpy prints a number in a list


def parse_printed(text: str) -> Genotype:
    """Return the genotype of "Genotype(normal=[('sep_conv_3x3', 1), ...], normal_concat=range(2, 6), ...)"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd strings
        call = ast.parse(text, mode="eval").body
        arguments = dict(zip(Genotype._fields, call.args)) | {word.arg: word.value for word in call.keywords}
        for field, node in arguments.items():
            is_range = isinstance(node, ast.Call) and ast.unparse(node.func) == "range"
            arguments[field] = range(*map(ast.literal_eval, node.args)) if is_range else ast.literal_eval(node)
        for field in ("connectN", "connects"):  # of AutoDL
            if (value := arguments.pop(field, None)) is not None:
                raise ValueError(f"{field} is {short(value)}, where cells here have no further connections")
        return Genotype(**arguments)


def parse_dictionary(text: str):
    """Return the content of JSON, or of a dictionary as Python prints it."""
    try:
        return json.loads(text)
    except ValueError:
        if not text.startswith("{"):
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)


def read_genotype(source: str) -> Genotype:
    """Return the genotype of a name in PUBLISHED, of a file, or of a text such as "Genotype(normal=[...], ...)".

    A file is a genotype.json of a search, or holds one such text, as a log does. Texts and files may also be
    dictionaries in the forms of NNI, nasbench301 and AutoDL, see forms.py."""
    if source in PUBLISHED:
        return PUBLISHED[source]
    is_text = "Genotype(" in source or source.startswith("{")
    name = "the genotype" if is_text else source
    if not is_text and not os.path.isfile(source):
        raise InputError(
            f"no genotype {short(source)}; expected a file, one of {', '.join(PUBLISHED)}, or a text like "
            "Genotype(normal=[('sep_conv_3x3', 1), ...], ...)")
    try:
        text = source if is_text else pathlib.Path(source).read_text(encoding="utf-8")
        printed = sorted(set(PRINTED.findall(OF_NUMPY.sub(r"\1", text))))
        content = parse_printed(printed[0]) if printed else forms.plain(parse_dictionary(text.strip()), name)
    except InputError:
        raise
    except (ValueError, TypeError, SyntaxError, AttributeError, MemoryError, RecursionError) as error:
        raise InputError(
            f"{name} is not valid ({reason(error)}); expected JSON, as in a genotype.json, or a printed Genotype(...)"
        ) from None
    if len(printed) > 1:
        raise InputError(f"{name} holds {len(printed)} genotypes; expected one, such as the text of one of them")
    if not printed and (not isinstance(content, dict) or not set(Genotype._fields) <= content.keys()):
        raise InputError(f"{name} is not a genotype; expected an object with {', '.join(Genotype._fields)}")
    return check_genotype(content, name)


# --- Drawing ----------------------------------------------------------------------------------------------------------

# An arc diagram: the states stand in a row, and every operation has a bracket above them, at a height (lane) of its
# own wherever two would overlap. Lines go up and down only above a state; the label stands between two states. So no
# label meets another label, a state or another bracket, whatever the genotype.
LANE, PORT, BOX, LABEL = 34, 14, 36, (108, 22)  # pixels: between lanes, ports; height; smallest label: width, height
WIDE = frozenset("MWmw@%")  # letters of 13 pixels at most; others have 8, on the average
LONGEST = 24  # characters of a label; longer names are shortened, and shown whole under the mouse
DARK = """
@media (prefers-color-scheme: dark) {
.cell .paper, .cell .label rect { fill: #16181c } .cell .state rect { fill: #2a2e35; stroke: #9aa0a6 }
.cell .state text, .cell > text { fill: #ddd } .cell [stroke="#666666"] { stroke: #9aa0a6 }
.cell [fill="#666666"] { fill: #9aa0a6 }
}
"""


def draw(genotype: Genotype) -> dict[str, str]:
    """Return {"normal": SVG, "reduce": SVG} of the two cells."""
    genotype = check_genotype(genotype)
    return {
        "normal": cell_svg(genotype.normal, genotype.normal_concat, "normal cell"),
        "reduce": cell_svg(genotype.reduce, genotype.reduce_concat, "reduction cell")}


def cell_svg(pairs, concat, title: str) -> str:
    """Draw a cell: inputs left, nodes, output right, every edge labelled with its operation."""
    nodes = len(pairs) // 2
    names = ["c_{k-2}", "c_{k-1}", *map(str, range(nodes)), "c_{k}"]
    label = max(LABEL[0], *(sum(13 if c in WIDE else 8 for c in shortened(name)) + 12 for name, _ in pairs))
    between = label + 24
    edges = sorted((2 + i // 2 - source, source, 2 + i // 2, name) for i, (name, source) in enumerate(pairs))

    # Short edges get the low lanes. Edges share a lane where they meet in one state at most.
    lanes: list[list[tuple[int, int]]] = []
    placed = []  # (source, target, operation, lane)
    for _, source, target, name in edges:
        free = (i for i, lane in enumerate(lanes) if all(target <= a or b <= source for a, b in lane))
        lane = next(free, len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append((source, target))
        placed.append((source, target, name, lane))

    # Ports along the top of a state: arriving edges left, leaving ones right, nested so that none of them cross.
    ports = {}
    for state in range(len(names)):
        arriving = sorted((lane, i) for i, (_, target, _, lane) in enumerate(placed) if target == state)
        leaving = sorted(((lane, i) for i, (source, _, _, lane) in enumerate(placed) if source == state), reverse=True)
        ports[state] = [("in", i) for _, i in arriving] + [("out", i) for _, i in leaving]
    widths = [max(72, PORT * (len(ports[state]) + 1)) for state in range(len(names))]
    left = [20 + sum(widths[:state]) + between * state for state in range(len(names))]
    top = 44 + LANE * len(lanes)  # of the row of states
    port_x = {}
    for state, order in ports.items():
        for position, port in enumerate(order):
            port_x[port] = left[state] + widths[state] / 2 + PORT * (position - (len(order) - 1) / 2)

    width, bus = left[-1] + widths[-1] + 20, top + BOX + 26
    lines, labels = [], []
    for i, (source, target, name, lane) in enumerate(placed):
        x0, x1, y = port_x["out", i], port_x["in", i], top - 26 - LANE * lane
        colour = colour_of(name)
        lines.append(svg_bracket(x0, x1, top, y, colour))
        gap = (source + target - 1) // 2  # the gap in the middle, to the right of this state
        x = left[gap] + widths[gap] + between / 2
        labels.append(svg_box(x - label / 2, y - LABEL[1] / 2, label, LABEL[1], name, "label", colour))
    end = left[-1] + widths[-1] / 2
    for state in concat:
        lines.append(svg_bracket(left[state] + widths[state] / 2, end, top + BOX, bus, "#666666"))
    x = left[-1] - between / 2
    labels.append(svg_box(x - 32, bus - LABEL[1] / 2, 64, LABEL[1], "concat", "label", "#666666"))
    for state, name in enumerate(names):
        labels.append(svg_box(left[state], top, widths[state], BOX, name, "state", "#333333"))
    text = html.escape(title)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {bus + 24:g}" width="{width:g}" '
        f'height="{bus + 24:g}" class="cell" style="min-width: {0.6 * width:g}px" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f"<title>{text}</title><style>{DARK}</style>",
        f'<rect class="paper" width="{width:g}" height="{bus + 24:g}" fill="#ffffff"/>',
        f'<text x="20" y="24" font-size="15" font-weight="bold" fill="#333333">{text}</text>',
        *lines, *labels, "</svg>\n"])


def svg_bracket(x0, x1, start, y, colour):
    """Draw a line from (x0, start) up or down to y, across and back to (x1, start), rounded, with an arrow head."""
    up = 1 if y < start else -1
    path = (f"M{x0:g} {start:g} V{y + up * 8:g} Q{x0:g} {y:g} {x0 + 8:g} {y:g} "
            f"H{x1 - 8:g} Q{x1:g} {y:g} {x1:g} {y + up * 8:g} V{start - up * 4:g}")
    head = f"M{x1:g} {start:g} l-4 {-up * 8} h8 z"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/><path d="{head}" fill="{colour}"/>'


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}\u2026{name[1 - LONGEST // 2 :]}"


def svg_box(x, y, width, height, text, kind, colour):
    whole = f"<title>{html.escape(text)}</title>" if shortened(text) != text else ""
    fill, ink, round_ = ("#ffffff", colour, height / 2) if kind == "label" else ("#eef1f5", "#222222", 6)
    return (
        f'<g class="{kind}">{whole}<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_:g}" '
        f'fill="{fill}" stroke="{colour}"/><text x="{x + width / 2:g}" y="{y + height / 2 + 4.5:g}" '
        f'text-anchor="middle" fill="{ink}">{html.escape(shortened(text))}</text></g>')


def cell_table(genotype: Genotype) -> str:
    """Return both cells as lines of text."""
    inputs = {0: "c_{k-2}", 1: "c_{k-1}"}
    columns = [["normal cell"], ["reduction cell"]]
    for column, pairs in zip(columns, (genotype.normal, genotype.reduce)):
        for i, (name, source) in enumerate(pairs):
            node = f"node {i // 2} =" if i % 2 == 0 else "      +"
            column.append(f"{node:8} {name:12} of {inputs.get(source, f'node {source - 2}')}")
    return "\n".join(f"  {a:34}  {b}".rstrip() for a, b in itertools.zip_longest(*columns, fillvalue=""))
