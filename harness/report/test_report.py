"""Tests of what a run shows of itself: charts and pages that are whole at any time, and say what was measured."""

import html.parser
import re
import xml.etree.ElementTree as ElementTree

import pytest

import pdarts
from harness.checkpoint import Folder
from harness.conftest import CELL, POOLS, TINY
from harness.evaluate import evaluate
from harness.report import report
from harness.report.charts import Line, Stages, alphas_svg, curves_svg, dots_svg, limits, ticks
from harness.run import Run
from harness.search import search
from harness.settings import EvaluateSettings

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg):
    """The elements of a drawing whose texts lie in it; none overlaps another."""
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = []
    for text in root.iter(f"{SVG}text"):
        x, y, size = float(text.get("x")), float(text.get("y")), (7.2 if text.get("class") == "title" else 6.2)
        wide = size * len(text.text)
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[text.get("text-anchor")]
        assert 0 <= left and left + wide <= width and 8 <= y <= height, text.text
        boxes.append((left, left + wide, y - 8, y, text.text))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2], (a, b)
    return root


class Page(html.parser.HTMLParser):
    """Checks that every element ends where it should, and gathers the text."""

    def __init__(self, content):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "rect", "path", "circle"):
            self.open.append(tag)
        assert not any(value and value.startswith("http") for name, value in attributes if name in ("src", "href"))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


@pytest.fixture
def pages(monkeypatch):
    """What was written, in turn."""
    written, write = [], report.page

    def noted(title, finished, parts):
        written.append((finished, write(title, finished, parts)))
        return written[-1][1]

    monkeypatch.setattr(report, "page", noted)
    return written


def test_a_search_shows_itself_after_every_epoch(images, tmp_path, pages):
    result = search(TINY, images, tmp_path / "run", kernels="off", space=POOLS)
    assert [finished for finished, _ in pages] == [False] * 6 + [True]
    for finished, content in pages:
        text = Page(content).text
        assert ('http-equiv="refresh"' in content) != finished
        assert ("search --resume" in text) != finished
        assert (f"evaluate {tmp_path}/run/genotype.json" in text) == finished
        assert "alpha_lr" in text and "softmax(alpha)" in text
    assert "Stage 2 of 3: 1 of 2 epochs are done." in Page(pages[2][1]).text
    last = (tmp_path / "run/report.html").read_text()
    assert last == pages[-1][1] and last.count("normal cell</title>") == 4  # the cell, and those of three stages
    assert f"{result.test_accuracies[2]:.1%}" in Page(last).text

    alphas, curves = (drawn((tmp_path / f"run/{name}.svg").read_text()) for name in ("alphas", "curves"))
    lines = [path for path in alphas.iter(f"{SVG}path") if path.get("class") == "line"]
    assert len(lines) == 2 * 5 * (4 + 4 + 3) + 4  # of every candidate of every edge and stage, and the legend
    assert len(list(curves.iter(f"{SVG}circle"))) > 3  # accuracies on test images, once in a stage


def test_an_evaluation_shows_itself_and_a_killed_one_shows_its_last_epoch_too(images, tmp_path, pages):
    settings = EvaluateSettings(dataset="shapes", depth=3, channels=8, epochs=2, batch_size=6, cutout=4)
    result = evaluate(CELL, settings, images, tmp_path / "run")
    assert [finished for finished, _ in pages] == [False, True, True]
    assert "evaluate --resume" in Page(pages[0][1]).text and "1 of 2 epochs" in Page(pages[0][1]).text
    text = Page(pages[-1][1]).text
    assert f"test error {result.test_error:.2%}" in text and "drop_path" in text
    options = "--depth 3 .*--batch-size 6.* --cutout 4"
    assert re.search(f"--weights .*/run/weights.pt --preset demo --data IMAGES {options}", text)
    assert "IMAGES stands for a file (see --data) of the images, which the run has got from Python" in text
    drawn((tmp_path / "run/curves.svg").read_text())
    before = (tmp_path / "run/curves.svg").read_bytes()
    (tmp_path / "run/curves.svg").unlink()
    evaluate(CELL, settings, images, resume=tmp_path / "run")
    assert (tmp_path / "run/curves.svg").read_bytes() == before


def test_a_page_shows_any_name_as_text(images, tmp_path):
    run = Run("search", TINY, images, Folder(tmp_path / "<b>"), "cpu", "off")
    run.description["data"] = "<script>alert(1)</script> & co"
    alphas = {f"softmax_alphas_{kind}": [[0.25] * 4] * 5 for kind in ("normal", "reduce")}
    run.log = [record(1, epoch) | alphas for epoch in (0, 1)]
    searching = pdarts.Search(TINY, images.search_data(TINY), space=POOLS)
    searching.begin_stage()
    report.write_search(run, searching)
    content = (tmp_path / "<b>/report.html").read_text()
    assert "<script>" not in content and "<b>" not in content and "<script>alert(1)</script> & co" in Page(content).text


def record(stage, epoch, value=0.125):
    edges = [[value] * (8, 5, 3)[stage - 1]] * 14
    rates = {"lr": 0.02, "skip_dropout": 0.1, "train_loss": 2.0, "train_accuracy": 0.3}
    return {"stage": stage, "epoch": epoch, "softmax_alphas_normal": edges, "softmax_alphas_reduce": edges, **rates}


@pytest.mark.parametrize("epochs", [1, 2, 25, 600])
def test_charts_hold_their_texts_apart_at_any_length(epochs):
    stages = Stages([epochs] * 3, epochs // 3)
    names = [tuple(pdarts.PRIMITIVES[:k] for _ in range(14)) for k in (8, 5, 3)]
    log = [record(stage, epoch) for stage in (1, 2, 3) for epoch in range(epochs)]
    drawn(alphas_svg(log, [(n, n) for n in names], pdarts.SPACE.edges, stages))
    drawn(curves_svg(log, stages, "skip_dropout"))
    drawn(curves_svg([{**r, "loss": 1e-9, "lr": 1e-7} for r in log], Stages([3 * epochs]), "drop_path"))


def test_operations_of_one_colour_differ_where_a_stage_has_one_epoch():
    names, p = (pdarts.PRIMITIVES,) * 2, {f"softmax_alphas_{kind}": [[0.125] * 8] * 2 for kind in ("normal", "reduce")}
    root = drawn(alphas_svg([record(1, 0) | p], [(names, names)], pdarts.cell_edges(1), Stages([1])))
    dots = [tuple(dot.get(name) for name in ("fill", "stroke")) for dot in root.iter(f"{SVG}circle")]
    assert len(set(dots)) == 8 and all(dots.count(dot) == 5 for dot in dots)  # of 4 edges, and in the legend


def test_custom_operations_have_room_and_colours_of_their_own(monkeypatch):
    custom = [f"{name}_of_an_own_project_with_a_long_name" for name in ("first", "second")]
    for name in custom:
        monkeypatch.setitem(pdarts.OPERATIONS, name, pdarts.OPERATIONS["none"])
    p = {f"softmax_alphas_{kind}": [[0.5] * 2] * 2 for kind in ("normal", "reduce")}
    log = [record(1, epoch) | p for epoch in range(2)]
    root = drawn(alphas_svg(log, [((tuple(custom),) * 2,) * 2], pdarts.cell_edges(1), Stages([2])))
    assert len({path.get("stroke") for path in root.iter(f"{SVG}path") if path.get("class") == "line"}) == 2


def test_tables_of_a_page_scroll_where_they_are_wider():
    content = report.page("title", True, [report.table(("a", "b"), [(1, 2)])])
    assert Page(content).text and '<div class="wide"><table' in content
    assert re.search(r"figure, \.wide \{[^}]*overflow-x: auto", content)


@pytest.mark.parametrize("nodes", range(1, 7))
def test_alphas_of_cells_of_any_number_of_nodes_leave_room_for_their_legend(nodes):
    edges, names = pdarts.cell_edges(nodes), [pdarts.PRIMITIVES]
    p = {f"softmax_alphas_{kind}": [[0.125] * 8] * len(edges) for kind in ("normal", "reduce")}
    log = [record(1, epoch) | p for epoch in range(2)]
    drawn(alphas_svg(log, [(names * len(edges),) * 2], edges, Stages([2], 1)))


def test_lines_are_broken_between_stages_and_where_nothing_was_measured():
    chart = curves_svg([record(s, e) | {"alpha_loss": None if e == 1 else 2.0} for s in (1, 2) for e in range(4)],
                       Stages([4, 4]), "skip_dropout")
    loss = re.findall(r'stroke="#d9722e"[^>]* d="M([^"]*)"', chart)
    assert [len(path.split("L")) for path in loss if "h24" not in path] == [2, 2]  # epochs 2 and 3
    assert chart.count('r="2.5" fill="#d9722e"') == 2  # epoch 0


def test_ticks_are_round_and_cover_the_axis():
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1]) and ticks(0, 0.26) == pytest.approx([0, 0.1, 0.2])
    assert ticks(1.98, 2.02) == pytest.approx([1.98, 2.0, 2.02])
    assert ticks(0, 3e-9) == pytest.approx([0, 1e-9, 2e-9, 3e-9])
    assert limits([Line("", "", [2.0, 2.0])])[0] < 2 < limits([Line("", "", [2.0, 2.0])])[1]
    drawn(dots_svg([("one", [1.0, 2.0]), ("none", [])], "dots"))
    drawn(dots_svg([("one", [1.0])], "a single dot"))
