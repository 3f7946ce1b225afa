"""bench.py: its tables, small, and the report of a GPU, on the CPU."""

import argparse
import dataclasses
import itertools
import json
import os

import pytest
import torch

import bench
import pdarts
from harness import gpu_checks, gpu_speed
from harness.conftest import beside

SMALL = ("--stages", "3", "--channels", "2", "--batch", "2", "--device", "cpu", "--rounds", "2", "--seconds", "0.01")


@pytest.fixture
def few_cells(monkeypatch):
    monkeypatch.setattr(pdarts, "CIFAR10", dataclasses.replace(pdarts.CIFAR10, depths=(3, 3, 3)))


@pytest.fixture
def peak(monkeypatch):
    """That of the machine, which takes a second to measure, made up."""
    monkeypatch.setattr(bench, "matrix_peak", lambda *_: 1e12)


def rows(tmp_path, *arguments):
    assert bench.main([*arguments, *SMALL, "--json", str(tmp_path / "rows.json")]) == 0
    return json.loads((tmp_path / "rows.json").read_text())["rows"]


def small_args(**changes):
    arguments = bench._parser().parse_args(["gpu", *SMALL])
    return argparse.Namespace(**{**vars(arguments), "command": "", **changes})


def report(folder, *arguments):
    """The exit status, and what the report holds."""
    status = bench.main(["gpu", "--out", str(folder), *SMALL, *arguments])
    return status, json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def test_the_candidates_are_those_that_the_stages_of_a_search_keep(few_weights):
    for stage, keep in enumerate(pdarts.CIFAR10.keep, 1):
        for cell in bench.candidates(stage):
            assert [len(set(names)) for names in cell] == [keep] * 14
            assert all(names == tuple(n for n in pdarts.PRIMITIVES if n in names) for names in cell)
    ((images, labels),) = bench.batches(1, 2, torch.device("cpu"))
    step = bench.OurStep(2, pdarts.CIFAR10, images, labels, fused=False)
    assert (step.search.candidates_normal, step.search.candidates_reduce) == bench.candidates(2)
    assert len(step.network.cells) == 11
    names = set(itertools.chain.from_iterable(bench.candidates(2)[0]))
    assert names == set(pdarts.PRIMITIVES)  # pools, skip-connects and `none` too


def test_bench_finds_the_losses_of_both_ways_equal(tmp_path, few_cells):
    found = rows(tmp_path, "losses", "--steps", "2")
    assert [r["of"] for r in found] == ["weights", "alphas"] * 2
    assert all(r["distance"]["kernels, float64"] < 1e-9 for r in found)
    assert all(r["distance"]["last bit"] < 1e-9 < r["distance"]["kernels, float32"] < 0.1 for r in found)


def test_losses_that_float64_tells_apart_are_an_error(tmp_path, monkeypatch, few_cells, peak):
    fuse = bench.kernels.fuse

    def slightly_wrong(network, recompute):
        with torch.no_grad():
            network.classifier.bias += 1
        network.classifier.weight.data *= 1.01
        return fuse(network, recompute)

    monkeypatch.setattr(bench.kernels, "fuse", slightly_wrong)
    with pytest.raises(SystemExit, match="not plain torch's to 4 digits"):
        rows(tmp_path, "losses", "--steps", "1")
    with pytest.raises(SystemExit):  # nor is a step measured
        rows(tmp_path, "step")


def test_bench_measures_a_step(tmp_path, capsys, few_cells):
    found = rows(tmp_path, "step")
    assert [(r["step"], r["side"]) for r in found] == list(itertools.product(("weights", "alphas"), ("ours", "plain")))
    assert all(r["seconds"] > 0 for r in found) and found[0]["kept_per_image"] < 0.5 * found[1]["kept_per_image"]
    assert all(0 < r["of_peak"] < 1 for r in found)
    assert found[0]["times_ours"] == 1 and "first search of testdata/derive.json" in capsys.readouterr().out


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


def test_bench_measures_a_step_of_an_evaluation_and_checks_it_against_the_official_code(tmp_path, capsys, peak):
    (tmp_path / "model.py").write_text(OFFICIAL_EVALUATION)
    found = rows(tmp_path, "evaluate", "--networks", "2x4", "--official", str(tmp_path))
    assert [(r["C"], r["cells"], r["side"]) for r in found] == [
        (2, 4, side) for side in ("ours", "plain", "official", "official-cl")
    ]
    assert all(r["seconds"] > 0 for r in found) and found[0]["kept_per_image"] < found[1]["kept_per_image"]
    share = found[1]["of_peak"] * found[1]["seconds"]  # the same operations on all sides
    assert all(r["of_peak"] * r["seconds"] == pytest.approx(share) and 0 < r["of_peak"] < 1 for r in found)
    output = capsys.readouterr().out
    assert "from plain" in output and "from official" in output
    wrong = OFFICIAL_EVALUATION.replace("super().forward(x)", "super().forward(x * 1.001)")
    (tmp_path / "model.py").write_text(wrong)
    bench.sys.modules.pop("model")
    with pytest.raises(SystemExit):
        rows(tmp_path, "evaluate", "--networks", "2x4", "--official", str(tmp_path))
    assert "expected at most 1e-9" in capsys.readouterr().err


def test_bench_measures_epochs_of_a_search(tmp_path, few_cells, few_weights):
    found = rows(tmp_path, "search")
    assert [r["stage"] for r in found] == [1, 2, 3] and all(r["epoch"] > 0 < r["epoch_with_alphas"] for r in found)


OFFICIAL = """
import torch


class Network(torch.nn.Module):
    def __init__(self, C, num_classes, layers, criterion, switches_normal, switches_reduce, p):
        super().__init__()
        assert (C, layers, [sum(edge) for edge in switches_normal]) == (2, 3, [3] * 14)
        self.alphas = torch.randn(14, 3).cuda().requires_grad_()
        self.classifier = torch.nn.Linear(3, num_classes)

    def arch_parameters(self):
        return [self.alphas]

    def forward(self, x):
        return self.classifier(x.mean((2, 3)) * self.alphas.softmax(1).mean(0))
"""


def test_the_official_code_is_measured_on_the_cpu_too(tmp_path, few_cells, few_weights, peak):
    (tmp_path / "model_search.py").write_text(OFFICIAL)
    found = rows(tmp_path, "step", "--official", str(tmp_path))
    assert [r["side"] for r in found] == ["ours", "plain", "official"] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["losses", "--data", "nowhere"], "no cifar10 in nowhere"),
        (["step", "--rounds", "1"], "--rounds is 1; expected 2 or more"),
        (["losses", "--dtype", "bfloat16"], "losses in bfloat16; expected float32"),
        (["step", "--dtype", "float16"], "step in float16; expected float32 or bfloat16"),
        (["step", "--official", "nowhere"], "no model_search.py in nowhere; expected a checkout"),
        (["evaluate", "--official", "nowhere"], "no model.py in nowhere; expected a checkout"),
        (["evaluate", "--networks", "36x3"], "argument --networks: '36x3'; expected CxCELLS, such as 36x20"),
        (["evaluate", "--networks", "36"], "'36'; expected CxCELLS"),
        (["step", "--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["steps"], "invalid choice: 'steps'"),
        (["gpu"], "gpu with --out None and --minutes 30; expected --out DIR"),
        (["gpu", "--out", "x", "--minutes", "0"], "more than 0 minutes"),
        (["gpu", "--out", "x", "--parts", "12"], "invalid choice: 12"),
    ],
)
def test_bench_names_what_is_wrong_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    error = capsys.readouterr().err
    assert message in error and ended.value.code == 2 and error.count("\n") == 1


@beside
def test_the_report_of_parts_is_kept_and_a_part_that_fails_does_not_stop_the_others(folder):
    status, content, text = report(folder, "--parts", "1", "4")
    assert status == 0 and [p["status"] for p in content["parts"].values()] == ["done", gpu_checks.GPU_ONLY]
    settings = {row["what"]: row["value"] for row in content["parts"]["1"]["tables"][""]}
    assert settings["torch.backends.cudnn.allow_tf32"] == "True" and settings["torch.backends.cuda.matmul.allow_tf32"]
    assert torch.__version__ in content["versions"] and torch.__version__ in text and content["device"] in text

    status, content, text = report(folder, "--parts", "11", "10", "--official", str(folder), "--networks", "2x4")
    assert status == 1 and list(content["parts"]) == ["1", "4", "10", "11"]
    assert content["parts"]["11"]["status"] == "done"
    assert "failed: no model.py in" in content["parts"]["10"]["status"]
    measured = [r["side"] for r in content["parts"]["10"]["tables"]["C = 2, 4 cells, float32"] if r.get("ms")]
    assert measured == ["plain"]
    table = "**C = 2, 4 cells, float32**"
    for line in ("| 1. Versions and device | done |", "## 10. Steps of an evaluation", table, "--parts 11 10"):
        assert line in text
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("part-*.json"))


def test_a_part_that_outruns_its_limit_is_ended(tmp_path):
    status, content, text = report(tmp_path, "--parts", "9", "--minutes", "0.02")
    assert status == 1 and content["parts"]["9"]["status"] == "ended by its limit of 0.12 s"
    assert content["parts"]["9"]["seconds"] < 5 and "ended by its limit of 0.12 s" in text


def test_ours_move_less_than_torchs_convolutions_on_cuda_would(tmp_path, few_cells):
    found = rows(tmp_path, "traffic", "--stages", "1")
    assert [row["convolutions and pooling"] for row in found] == ["torch's"] * 2 + ["ours"] * 2 + ["cells"] * 2
    for torchs, ours, cells in zip(found[:2], found[2:4], found[4:]):
        assert 0 < cells["GB"] < ours["GB"] < torchs["GB"] and 0 < 2 * cells["launches"] < ours["launches"]
        assert 0 < cells["GB kept"] < ours["GB kept"] < torchs["GB kept"]


def test_another_report_json_is_left_alone(tmp_path, capsys):
    (tmp_path / "report.json").write_text("[1, 2]")
    with pytest.raises(SystemExit):
        bench.main(["gpu", "--out", str(tmp_path), *SMALL])
    assert "is no report" in capsys.readouterr().err and (tmp_path / "report.json").read_text() == "[1, 2]"


@beside
def test_a_search_is_the_same_again_and_resumed(folder):
    if "PDARTS_SLOW" not in os.environ:
        pytest.skip("takes half a minute: set PDARTS_SLOW=1")
    found = [row for _, row in gpu_speed.demo(small_args(), torch.device("cpu"))]
    assert len(found) == 3 and all(r["the first's log.jsonl"] and r["the first's genotype.json"] for r in found)


def test_operators_are_right_and_a_wrong_one_is_found(monkeypatch):
    arguments, cpu = small_args(channels=4), torch.device("cpu")
    found = [row for _, row in gpu_checks.correctness(arguments, cpu)]
    assert len(found) == 4 * 2 * 14 + 2 and all(row["right"] for row in found)
    wrong = [("pool", lambda f, x: f.pool(x, "max") + (f is gpu_checks.FUSED) * 1e-3, [(2, 4, 8, 8)], [])]
    monkeypatch.setattr(gpu_checks, "operators", lambda shape: wrong)
    monkeypatch.setattr(gpu_checks, "network_rows", lambda *_: [])  # right, as above
    with pytest.raises(gpu_checks.Wrong, match="4 relative errors"):
        list(gpu_checks.correctness(arguments, cpu))


def test_the_other_parts_run_on_the_cpu(few_cells, few_weights, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(bench, "copy_bandwidth", lambda _: 1e9)  # that of the machine, a second, is in part 1
    (built,) = (row for _, row in gpu_checks.build(small_args(), cpu) if row["device"] == "cpu")
    assert built["served"] and built["why not"] is None
    found = []
    with pytest.raises(gpu_checks.Wrong, match="official: InputError: no model_search.py"):
        for row in gpu_speed.steps(small_args(official=str(tmp_path)), cpu):
            found.append(row)
    rows_of = [row for table, row in found if table == "stage 3" and row.get("ms")]
    assert {row["side"] for row in rows_of} == {"plain", "ours", "ours, recompute"}
    assert all(row["to ours"] == 1 for row in rows_of if row["side"] == "ours")
    found = list(gpu_speed.whole_search(small_args(), cpu))
    hours = {row["side"]: row["hours"] for table, row in found if table == "projected hours"}
    ms = {row["side"]: row for table, row in found if table == "steps"}
    expected = 12500 * (10 * ms["ours"]["weights (ms)"] + 15 * ms["ours"]["both (ms)"]) / 3.6e6
    assert set(hours) == {"plain", "ours"} and hours["ours"] == pytest.approx(expected)
    found = list(gpu_speed.evaluation_steps(small_args(networks=[(2, 4)]), cpu))
    assert [row["side"] for table, row in found if table == "C = 2, 4 cells, float32"] == ["plain", "ours"]
    assert found[-1][1]["to ours"] == 1 and all(row["ms"] > 0 for table, row in found if "cells" in table)
    found = [row for _, row in gpu_speed.mixed_operation(small_args(), cpu)]
    assert len(found) == 2 * 3 * 3 * 2 and all(0 < row["of the bandwidth"] for row in found)
    found = list(gpu_speed.convolutions(small_args(), cpu))
    assert len(found) == 3 * (5 + 4) + 1 and all(row["times faster"] > 0 for _, row in found[:-1])
    assert found[-1][1]["PDARTS_CUDA_OPERATIONS"].startswith("mixed")
    by_size = {(16, 32, 32): [1.0, 1.2], (32, 16, 16): [1.0, 1.0], (64, 8, 8): [2.0]}
    assert gpu_speed.worth_it("pool", by_size) == ["pool:16x32x32", "pool:64x8x8"]
    assert gpu_speed.worth_it("pool", {(64, 8, 8): [1.2]}) == ["pool"]
    convolution = gpu_checks.Convolution((2, 4, 8, 8), 3, 2, torch.float32, "channels-last", cpu)
    assert convolution.error() < 1e-5 and all(min(times) > 0 for times in convolution.times(0.01).values())


def test_sides_with_fewer_fused_operations_or_streams_leave_the_others_as_they_are(monkeypatch):
    monkeypatch.setenv("PDARTS_CUDA_STREAMS", "2")
    chosen = bench.kernels.use_on_cuda("pool")
    try:
        seen = {}
        for name in ("ours", *gpu_speed.LESS):
            with gpu_speed.with_less(name):
                fused = bench.kernels.use_on_cuda("")
                bench.kernels.use_on_cuda(fused)
                seen[name] = fused, os.environ["PDARTS_CUDA_STREAMS"]
            assert os.environ["PDARTS_CUDA_STREAMS"] == "2" and bench.kernels.use_on_cuda("pool") == "pool"
    finally:
        bench.kernels.use_on_cuda(chosen)
    assert seen["ours"] == ("pool", "2") and seen["ours, one stream, graph"] == ("pool", "1")
    assert seen["ours, mixed operations only, graph"] == ("mixed", "2")
