"""Tests of bench.py: its tables, on small networks, and what it refuses."""

import dataclasses
import functools
import itertools
import sys

import pytest
import torch

import bench
import kernels
import pdarts
from harness.conftest import CELL, ONE_NODE
from harness.measure.conftest import FAST, SMALL_STEPS
from harness.measure.search_steps import OurStep, batches, candidates

SMALL = ["--device", "cpu", *SMALL_STEPS]


def test_the_candidates_are_those_that_the_stages_of_a_search_keep(few_weights):
    for stage, keep in enumerate(pdarts.CIFAR10.keep, 1):
        for cell in candidates(stage):
            assert [len(set(names)) for names in cell] == [keep] * 14
            assert all(names == tuple(n for n in pdarts.PRIMITIVES if n in names) for names in cell)
    ((images, labels),) = batches(1, 2, torch.device("cpu"))
    config = dataclasses.replace(pdarts.CIFAR10, depths=(3, 4, 5), channels=2)
    step = OurStep(2, config, images, labels, fused=False)
    assert (step.search.candidates_normal, step.search.candidates_reduce) == candidates(2)
    assert len(step.network.cells) == 4
    other = OurStep(2, config, images, labels, fused=False, number=12)
    assert (other.search.candidates_normal, other.search.candidates_reduce) == candidates(2, 12) != candidates(2)
    names = set(itertools.chain.from_iterable(candidates(2)[0]))
    assert names == set(pdarts.PRIMITIVES)  # pools, skip-connects and `none` too


def dropout_of(network):
    """The rates of the skip dropout in a network."""
    return {round(float(m.rate), 6) for m in network.modules() if isinstance(m, pdarts.SkipDropout)}


@pytest.mark.slow
def test_steps_are_checked_without_dropout_and_timed_with_it(rows, monkeypatch, few_cells, few_weights, peak):
    checked, timed = [], []
    ways, run = pdarts.loss_and_logits, OurStep.run
    monkeypatch.setattr(pdarts, "loss_and_logits", lambda n, *args: (checked.append(dropout_of(n)), ways(n, *args))[1])
    monkeypatch.setattr(OurStep, "run", lambda s, which: (timed.append(dropout_of(s.network)), run(s, which))[1])
    for arguments, rate in ([], 0.7), (["--skip-dropout", "0", "0.1", "0.2"], 0.2):
        found = rows("step", *SMALL, *FAST, "--search", "3", *arguments)
        assert checked[:2] == [{0.0}] * 2  # plain and fused
        assert timed and all(rates == {rate} for rates in timed)
        assert all(rates == {rate} for rates in checked[2:])  # where the saved bytes are counted, too
        assert {row["dropout"] for row in found} == {rate}
        checked.clear()
        timed.clear()


def test_the_losses_of_both_ways_are_found_equal(rows, few_cells):
    found = rows("losses", *SMALL, "--steps", "2")
    assert [r["of"] for r in found] == ["weights", "alphas"] * 2
    assert all(r["distance"]["kernels, float64"] < 1e-9 for r in found)
    assert all(r["distance"]["last bit"] < 1e-9 < r["distance"]["kernels, float32"] < 0.1 for r in found)


def test_losses_that_float64_tells_apart_are_an_error(rows, monkeypatch, few_cells, peak):
    fuse = kernels.fuse

    def slightly_wrong(network):
        with torch.no_grad():
            network.classifier.bias += 1
        network.classifier.weight.data *= 1.01
        return fuse(network)

    monkeypatch.setattr(kernels, "fuse", slightly_wrong)
    with pytest.raises(SystemExit, match="not plain torch's to 4 digits"):
        rows("losses", *SMALL, "--steps", "1")
    with pytest.raises(SystemExit):  # nor is a step measured
        rows("step", *SMALL, *FAST)


OFFICIAL = """
import torch


class Network(torch.nn.Module):
    def __init__(self, C, num_classes, layers, criterion, switches_normal, switches_reduce, p):
        super().__init__()
        assert (C, layers, [sum(edge) for edge in switches_normal], p) == (8, 3, [3] * 5, 0.7)
        self.alphas = torch.randn(5, 3).cuda().requires_grad_()
        self.classifier = torch.nn.Linear(3, num_classes)

    def arch_parameters(self):
        return [self.alphas]

    def forward(self, x):
        return self.classifier(x.mean((2, 3)) * self.alphas.softmax(1).mean(0))
"""


def test_a_step_is_measured_and_that_of_the_official_code_too(rows, tmp_path, capsys, few_cells):
    (tmp_path / "model_search.py").write_text(OFFICIAL)
    found = rows("step", *SMALL, *FAST, "--official", str(tmp_path))
    sides = itertools.product(("weights", "alphas"), ("ours", "plain", "official"))
    assert [(r["step"], r["side"]) for r in found] == list(sides)
    assert all(r["seconds"] > 0 for r in found) and found[0]["saved_per_image"] < 0.5 * found[1]["saved_per_image"]
    assert all(0 < r["of_peak"] < 1 for r in found if r["side"] != "official")  # which computes little here
    assert found[0]["times_ours"] == 1 and "search 1 of testdata/derive.json" in capsys.readouterr().out


OFFICIAL_EVALUATION = """
import pdarts
import torchvision.datasets as datasets


class NetworkCIFAR(pdarts.Network):
    def __init__(self, C, num_classes, layers, auxiliary, genotype):
        super().__init__(genotype, C, num_classes, layers, auxiliary)

    def forward(self, x):
        self.set_drop_path(self.drop_path_prob)
        return super().forward(x)
"""


def test_a_step_of_an_evaluation_is_measured_and_checked_against_the_official_code(
    rows, tmp_path, capsys, monkeypatch, peak
):
    monkeypatch.setitem(pdarts.GENOTYPES, "PDARTS", CELL)
    options = ["--device", "cpu", "--batch", "2", *FAST, "--networks", "8x4", "--official", str(tmp_path)]
    (tmp_path / "model.py").write_text(OFFICIAL_EVALUATION)
    found = rows("evaluate", *options)
    assert [(r["C"], r["cells"], r["side"]) for r in found] == [
        (8, 4, side) for side in ("ours", "plain", "official", "official-cl")
    ]
    assert all(r["seconds"] > 0 for r in found) and found[0]["saved_per_image"] < found[1]["saved_per_image"]
    share = found[1]["of_peak"] * found[1]["seconds"]  # the same operations on all sides
    assert all(r["of_peak"] * r["seconds"] == pytest.approx(share) and 0 < r["of_peak"] < 1 for r in found)
    output = capsys.readouterr().out
    assert "from plain" in output and "from official" in output
    wrong = OFFICIAL_EVALUATION.replace("super().forward(x)", "super().forward(x * 1.001)")
    (tmp_path / "model.py").write_text(wrong)
    sys.modules.pop("model")
    with pytest.raises(SystemExit):
        rows("evaluate", *options)
    assert "expected at most 1e-9" in capsys.readouterr().err


def test_epochs_of_a_search_are_measured(rows, monkeypatch, few_cells, few_weights):
    monkeypatch.setattr(pdarts, "Search", functools.partial(pdarts.Search, space=ONE_NODE))
    monkeypatch.setattr(kernels, "fuse", lambda network: network)  # which takes longer than these epochs
    found = rows("search", "--device", "cpu", "--channels", "8", "--batch", "2")
    assert [r["stage"] for r in found] == [1, 2, 3] and all(r["epoch"] > 0 < r["epoch_with_alphas"] for r in found)
    assert [r["skip_dropout"] for r in found] == pytest.approx([0.0, 0.2, 0.35])  # the second of two warm-up epochs
    assert all(a > b for a, b in zip([0.1, 0.4, 0.7], [r["skip_dropout_with_alphas"] for r in found]))


def test_without_a_command_the_operations_are_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "begin", lambda args: seen.append(args) or sys.exit(0))
    for arguments in [], ["--dtype", "float16", "--no-compile"], ["operations"]:
        with pytest.raises(SystemExit):
            bench.main(arguments)
    assert [args.run for args in seen] == [bench.operations] * 3
    assert [(args.dtype, args.compile) for args in seen] == [("float32", True), ("float16", False), ("float32", True)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["losses", "--data", "nowhere"], "no cifar10 in nowhere"),
        (["step", "--rounds", "1"], "argument --rounds: '1'; expected a whole number, 2 or more"),
        (["step", "--skip-dropout", "0.1", "0.2"], "argument --skip-dropout: 2 rates; expected one rate or three"),
        (["step", "--skip-dropout", "1"], "argument --skip-dropout: '1'; expected a rate from 0 to less than 1"),
        (["step", "--search", "13"], "search is 13; expected 1 to 12, those of testdata/derive.json"),
        (["step", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["step", "--channels", "0"], "argument --channels: '0'; expected a whole number, 1 or more"),
        (["step", "--seconds", "0"], "argument --seconds: '0'; expected more than 0"),
        (["evaluate", "--networks", "16x3"], "'16x3'; expected CxCELLS, such as 36x20, with 4 cells or more"),
        (["step", "--official", "nowhere"], "no model_search.py in nowhere; expected a checkout of github.com"),
        (["step", "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["search", "--stages", "1"], "unrecognized arguments: --stages 1"),
        (["steps"], "invalid choice: 'steps'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    error = capsys.readouterr().err
    assert message in error and ended.value.code == 2 and error.count("\n") == 1


def test_every_command_has_its_own_help(capsys):
    for command, (own, others) in {"step": ("--skip-dropout", "--networks"), "losses": ("--steps", "--rounds")}.items():
        with pytest.raises(SystemExit) as ended:
            bench.main([command, "--help"])
        text = capsys.readouterr().out
        assert ended.value.code == 0 and own in text and others not in text
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    text = capsys.readouterr().out
    assert "python -m harness.measure gpu" in text and "python bench.py step" in text
