"""Tests of harness/report/cells.py: the published cells, genotype files, drawings."""

import collections
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pdarts
from harness.fuzz import accepted, case, cases, changed, damaged
from harness.report.cells import PUBLISHED, cell_table, check_genotype, draw, parse_dictionary, read_genotype
from pdarts import OPERATIONS, Genotype, InputError, Network

# --- cells of other papers --------------------------------------------------------------------------------------------

# name, stem, C, L, classes -> parameters without and with the auxiliary head
PARAMETERS = """
DARTS_V1 cifar 36 20 10 3169414 3645840 | DARTS_V1 cifar 16 8 10 232890 668356
DARTS_V1 imagenet 48 14 1000 4510432 5772744
DARTS_V2 cifar 36 20 10 3349342 3825768 | DARTS_V2 cifar 16 8 10 246106 681572
DARTS_V2 imagenet 48 14 1000 4718752 5981064
NASNet cifar 36 20 10 3830950 4288944 | NASNet cifar 16 8 10 333946 761220 | NASNet imagenet 48 14 1000 5564320 6802056
AmoebaNet cifar 36 20 10 3145078 3603072 | AmoebaNet cifar 16 8 10 326330 753604
AmoebaNet imagenet 48 14 1000 4627360 5865096
DARTS_V1 cifar 36 20 100 3221344 - | DARTS_V2 cifar 36 20 100 3401272 -
NASNet cifar 36 20 100 3895840 - | AmoebaNet cifar 36 20 100 3184048 -
"""


ROWS = [row.strip() for row in re.split(r"[|\n]", PARAMETERS) if row.strip()]


@pytest.mark.parametrize("row", [pytest.param(r, marks=[pytest.mark.slow] * ("cifar 36" in r)) for r in ROWS])
def test_networks_of_other_papers_have_the_official_numbers_of_parameters(row):
    name, stem, channels, cells, classes, bare, with_head = row.split()
    head = with_head != "-"
    network = Network(PUBLISHED[name], int(channels), int(classes), int(cells), auxiliary=head, stem=stem)
    sizes = {key: p.numel() for key, p in network.named_parameters()}
    assert sum(n for key, n in sizes.items() if not key.startswith("auxiliary_head.")) == int(bare)
    assert not head or sum(sizes.values()) == int(with_head)


def test_operations_of_other_papers_are_not_searched_and_have_the_official_keys():
    others = ["sep_conv_7x7", "conv_7x1_1x7"]
    assert list(OPERATIONS) == [*pdarts.PRIMITIVES, *others] and len(pdarts.PRIMITIVES) == 8
    assert pdarts.SPACE.primitives == pdarts.PRIMITIVES
    state = Network(PUBLISHED["AmoebaNet"], 8, 5, 3, stem="imagenet").state_dict()
    assert state["cells.1._ops.8.2.weight"].shape == (16, 16, 7, 1)  # conv_7x1_1x7: the second convolution
    assert state["cells.1._ops.3.op.5.weight"].shape == (16, 1, 7, 7)  # sep_conv_7x7: the second depthwise one


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["sep_conv_7x7", "conv_7x1_1x7"])
def test_operations_of_other_papers_round_sizes_up(name, stride):
    op = OPERATIONS[name].build(4, stride, True)
    for height, width in (8, 8), (7, 9), (1, 2):
        assert op(torch.randn(2, 4, height, width)).shape == (2, 4, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize("name", ["DARTS_V1", "DARTS_V2", "NASNet", "AmoebaNet"])
def test_networks_of_other_papers_return_auxiliary_logits_in_training_only(name):
    network = Network(PUBLISHED[name], 4, 10, 5, auxiliary=True)
    logits, auxiliary = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == auxiliary.shape == (2, 10)
    assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


# --- genotypes: reading and checking ----------------------------------------------------------------------------------


def test_a_genotype_is_read_by_its_name_or_from_a_file(tmp_path):
    path = tmp_path / "genotype.json"
    for name, genotype in PUBLISHED.items():
        assert read_genotype(name) is genotype and check_genotype(genotype) == genotype
        path.write_text(json.dumps(genotype._asdict() | {"max_skips": 2}))
        assert read_genotype(str(path)) == genotype
    with pytest.raises(InputError, match="no genotype 'RDARTS'; expected a file, one of PDARTS, DARTS_V1"):
        read_genotype("RDARTS")
    for text, message in ("something", "not valid .*; expected JSON, as in"), ("[]", "expected an object with norm"):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_genotype(str(path))
    with pytest.raises(InputError, match="cell is a str; expected a Genotype.* or another object with normal, normal"):
        check_genotype("PDARTS", "cell")


OTHER = collections.namedtuple("Genotype", "normal normal_concat reduce reduce_concat")  # another project's
TUPLES = OTHER(*(tuple(field) for field in PUBLISHED["NASNet"]))
NODES = PUBLISHED["PDARTS"]._replace(**{
    kind: [pairs[i : i + 2] for i in range(0, 8, 2)]
    for kind, pairs in zip(("normal", "reduce"), (PUBLISHED["PDARTS"].normal, PUBLISHED["PDARTS"].reduce))
})


@pytest.mark.parametrize("genotype, name", [
    *((genotype, name) for name, genotype in PUBLISHED.items()),
    (TUPLES, "NASNet"),
    (NODES, "PDARTS"),
    (NODES._replace(reduce=tuple(map(tuple, NODES.reduce))), "PDARTS"),
    (OTHER(*PUBLISHED["DARTS_V1"])._replace(normal_concat=range(2, 6), reduce_concat=range(2, 6)), "DARTS_V1"),
    (TUPLES._replace(normal=[(op, np.int64(source)) for op, source in TUPLES.normal]), "NASNet"),
], ids=str)
def test_a_genotype_of_any_project_is_read_as_an_object_as_text_and_in_a_file(tmp_path, genotype, name):
    right = PUBLISHED[name]
    objects = genotype, genotype._asdict(), SimpleNamespace(**genotype._asdict())
    positional = f"Genotype({', '.join(map(repr, genotype))})"
    lines = "Genotype = namedtuple('Genotype', 'normal')\n", *(f"12:00 genotype = {genotype}\n" for _ in range(2))
    (tmp_path / "log.txt").write_text("".join(lines))
    texts = repr(genotype), positional, repr(genotype).replace("), (", "),\n  ("), str(tmp_path / "log.txt")
    for read in (*map(check_genotype, objects), *map(read_genotype, texts)):
        assert read == right and repr(read) == repr(right) and type(read) is Genotype


def test_a_network_takes_another_project_s_genotype():
    theirs, ours = (Network(cell, 4, 10, 3).state_dict() for cell in (TUPLES, PUBLISHED["NASNet"]))
    assert list(theirs) == list(ours)


@pytest.mark.parametrize("change, message", [
    (lambda text: text[:-1], "the genotype is not valid .*; expected JSON, as in a genotype.json, or a printed Genoty"),
    (lambda text: text.replace("normal=", "norm="), "the genotype is not valid .TypeError: .*norm.*; expected JSON"),
    (lambda text: text.replace("[2, 3, 4, 5]", "open('x')"), "the genotype is not valid .ValueError: malformed node"),
    (lambda text: text.replace("[2, 3, 4, 5]", "range(2, 10**30)"), "the genotype is not valid"),
    (lambda text: text.replace("[2, 3, 4, 5]", f"range(2, {10**30})"), "normal_concat is range.*; expected states fr"),
    (lambda text: text.replace("sep_conv_3x3", "conv"), "the genotype: normal.* unknown operation 'conv'; expected"),
    (lambda text: text + text.replace("sep_conv_3x3", "none"), "holds 2 genotypes; expected one, such as the text of"),
])
def test_a_text_that_is_no_genotype_is_refused_in_a_line(change, message):
    with pytest.raises(InputError, match=message) as error:
        read_genotype(change(repr(PUBLISHED["PDARTS"])))
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, change, message",
    [
        ("normal", lambda pairs: [*pairs[:3], ["sep_conv_4x4", 0], *pairs[4:]],
         r"normal\[3\] has unknown operation 'sep_conv_4x4'; expected one of none, max_pool_3x3"),
        ("reduce", lambda pairs: [["skip_connect", 2], *pairs[1:]], r"reduce\[0\] has input 2; node 0 can take 0 to 1"),
        ("reduce", lambda pairs: [["skip_connect", True], *pairs[1:]], r"reduce\[0\] has input True"),
        ("normal_concat", lambda _: [9], r"normal_concat is \[9\]; expected states from 2 to 5 once"),
        ("reduce_concat", lambda _: [2, 2], r"reduce_concat is \[2, 2\]; expected states from 2 to 5 once"),
        ("normal", lambda pairs: pairs[:-1], "normal must be a list of .* two for each node"),
        ("normal", lambda pairs: ["skip_connect", *pairs[1:]], r"normal\[0\] is 'skip_connect'; expected an \(operat"),
        ("normal", lambda pairs: pairs * 26, "normal has 104 nodes; expected at most 100"),
    ],
)
def test_wrong_genotypes_get_a_message_that_names_the_entry(field, change, message):
    cell = PUBLISHED["PDARTS"]
    with pytest.raises(InputError, match=f"cell: {message}"):
        check_genotype(cell._replace(**{field: change(getattr(cell, field))}), "cell")


def hostile_json(text):
    for depth in (10, 400, *range(900, 1000, 7), 10**5):
        yield text.replace('"sep_conv_3x3"', "[" * depth + "]" * depth, 1)
        yield text.replace('"sep_conv_3x3"', '{"a":' * depth + "0" + "}" * depth, 1)
        yield "[" * depth
    for number in ("9" * 4000, "9" * 5000, "1e999", "-1e999", "NaN", "-Infinity", "1" + "0" * 30, "1.0", "-0", "01"):
        yield text.replace(", 0]", f", {number}]", 1)
        yield text.replace("[2, 3, 4, 5]", f"[2, {number}]", 1)
    pair, many = '["none", 0],', 10**4
    yield text.replace('"normal": [', '"normal": [' + pair * many, 1)
    yield text.replace("[2, 3, 4, 5]", f"[{'2, ' * many}2]", 1)
    yield text.replace('{"normal"', '{"normal": [], "normal"', 1)
    yield from ("", "null", "{}", "\ufeff" + text, text + text, "\x00")


def test_random_genotype_files_are_drawn_as_they_say_or_refused(tmp_path, limits):
    path, taken = tmp_path / "genotype.json", 0

    def check(content: bytes):
        nonlocal taken
        path.write_bytes(content)
        genotype = accepted(read_genotype, str(path))
        if genotype is None:
            return
        fields = parse_dictionary(content.decode())
        for kind in "normal", "reduce":
            pairs, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
            assert [list(pair) for pair in pairs] == fields[kind] and concat == fields[f"{kind}_concat"]
            assert all(op in OPERATIONS and 0 <= source < 2 + i // 2 for i, (op, source) in enumerate(pairs))
            assert len(pairs) % 2 == 0 and set(concat) <= set(range(2, 2 + len(pairs) // 2))
            assert {*map(type, concat), *(type(source) for _, source in pairs)} == {int}
        for svg in draw(genotype).values():
            ElementTree.fromstring(svg)
        taken += 1

    texts = [json.dumps(genotype._asdict()) for genotype in PUBLISHED.values()]
    for number, text in enumerate(hostile_json(texts[0])):
        with case("hostile", number):
            check(text.encode())
    for number, rng in cases(800):
        text = rng.choice(texts)
        with case(number):
            if number % 2:
                check(damaged(text.encode(), rng))
            else:
                value = json.loads(text)
                for _ in range(rng.choice((1, 1, 3))):
                    value = changed(value, rng)
                check(json.dumps(value).encode())
    assert taken > 20


# --- drawings of cells ------------------------------------------------------------------------------------------------


def svg_geometry(svg):
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    boxes = []
    for group in root.iter(f"{space}g"):
        rect = group.find(f"{space}rect")
        x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        boxes.append((group.get("class"), group.find(f"{space}text").text, x, y, x + w, y + h))
    paths = [p.get("d") for p in root.iter(f"{space}path") if p.get("fill") == "none"]
    width, height = float(root.get("width")), float(root.get("height"))
    return boxes, paths, width, height


@pytest.mark.parametrize("kind", ["normal", "reduce"])
@pytest.mark.parametrize("name", [*PUBLISHED, "crowded", "long"])
def test_drawings_show_every_edge_and_nothing_overlaps(name, kind, monkeypatch):
    crowded = [("conv_7x1_1x7", 0), ("sep_conv_7x7", 0)] * 6
    if name == "long":
        crowded = [("Wm" * 12, 0), ("x" * 20 + "y" * 180, 1)] * 6
        for operation, _ in crowded:
            monkeypatch.setitem(OPERATIONS, operation, OPERATIONS["none"])
    genotype = PUBLISHED.get(name) or Genotype(crowded, [2, 3, 4, 5, 6, 7], crowded, [7])
    boxes, paths, width, height = svg_geometry(draw(genotype)[kind])
    pairs, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
    labels = sorted(text for kind_, text, *_ in boxes if kind_ == "label")
    whole = {"x" * 12 + "\u2026" + "y" * 11: "x" * 20 + "y" * 180}
    assert sorted(whole.get(label, label) for label in labels) == sorted([*(op for op, _ in pairs), "concat"])
    states = [box for box in boxes if box[0] == "state"]
    assert [text for _, text, *_ in states] == ["c_{k-2}", "c_{k-1}", *map(str, range(len(pairs) // 2)), "c_{k}"]
    assert [box[2] for box in states] == sorted(box[2] for box in states)  # inputs left, output right
    assert len(paths) == len(pairs) + len(concat)
    for _, text, left, top, right, bottom in boxes:
        assert 0 <= left and right <= width and 0 <= top and bottom <= height
        assert sum(13 if c in "Wm" else 8 for c in text) <= right - left  # the text fits
    for a, b in itertools.combinations(boxes, 2):
        assert a[4] < b[2] or b[4] < a[2] or a[5] < b[3] or b[5] < a[3], f"{a} overlaps {b}"
    ends = []
    for path in paths:
        x0, y0, y, x1, y1 = bracket(path)
        ends.append((x0, x1, y))
        crossed = []
        for box in boxes:
            _, _, left, top, right, bottom = box
            for x, y_end in (x0, y0), (x1, y1):  # the vertical parts touch their states only
                assert not (left < x < right and max(min(y, y_end), top) < min(max(y, y_end), bottom) - 4.1)
            if top < y < bottom and max(min(x0, x1), left) < min(max(x0, x1), right):
                crossed.append(box)
        above = y < y0
        assert [box[0] for box in crossed] == ["label"] if above else all(box[1] == "concat" for box in crossed)
    brackets = [(min(a, b), max(a, b), y) for a, b, y in ends[: len(pairs)]]
    for a, b in itertools.combinations(brackets, 2):
        assert a[2] != b[2] or a[1] < b[0] or b[1] < a[0]
    uprights = [x for a, b, _ in brackets for x in (a, b)]
    assert len(set(uprights)) == 2 * len(pairs)


def test_drawings_of_cells_are_dark_on_dark_pages():
    for svg in draw(PUBLISHED["PDARTS"]).values():
        root = ElementTree.fromstring(svg)
        paper = next(rect for rect in root.iter() if rect.get("class") == "paper")
        assert (root.get("class"), paper.get("width")) == ("cell", root.get("width"))
        dark = svg.partition("@media (prefers-color-scheme: dark)")[2]
        assert re.match(r" \{\n\.cell \.paper, \.cell \.label rect \{ fill: #16181c \}", dark)


def bracket(path):
    """x0, y0, height of the bracket, x1, y1 of a drawn edge."""
    match = re.fullmatch(r"M(\S+) (\S+) V\S+ Q\S+ (\S+) \S+ \S+ H\S+ Q(\S+) \S+ \S+ \S+ V(\S+)", path)
    return [float(n) for n in match.groups()]


def test_table_lists_both_cells():
    lines = cell_table(PUBLISHED["NASNet"]).splitlines()
    assert len(lines) == 11 and lines[0].split() == ["normal", "cell", "reduction", "cell"]
    assert lines[7].split("  ")[1:] == ["node 3 = avg_pool_3x3 of c_{k-2}", "", "node 3 = skip_connect of node 1"]
