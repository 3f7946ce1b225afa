"""Small measurements for tests."""

import dataclasses
import functools
import json

import pytest

import bench
import pdarts
from harness.measure import __main__ as measure
from harness.measure import search_steps

SMALL_STEPS = "--stages 3 --channels 8 --batch 2".split()
FAST = "--rounds 2 --seconds 0.01".split()


@pytest.fixture
def few_cells(monkeypatch):
    """Searches of three cells, of two nodes, which have the candidates of the first five edges."""
    candidates = search_steps.candidates
    of_five_edges = lambda *numbers: tuple(cell[:5] for cell in candidates(*numbers))  # noqa: E731
    monkeypatch.setattr(search_steps, "candidates", of_five_edges)
    monkeypatch.setattr(pdarts, "CIFAR10", dataclasses.replace(pdarts.CIFAR10, depths=(3, 3, 3)))
    monkeypatch.setattr(pdarts, "Search", functools.partial(pdarts.Search, space=pdarts.SearchSpace(nodes=2)))


@pytest.fixture
def peak(monkeypatch):
    """A made-up rate of matrix products: measuring the machine's takes a second."""
    monkeypatch.setattr(bench, "matrix_peak", lambda *_: 1e12)


@pytest.fixture
def rows(tmp_path):
    """The rows that a command of bench.py, or of harness.measure, writes for these options."""

    def run(command, *options):
        main = measure.main if command == "traffic" else bench.main
        assert main([command, *options, "--json", str(tmp_path / "rows.json")]) == 0
        return json.loads((tmp_path / "rows.json").read_text())["rows"]

    return run
