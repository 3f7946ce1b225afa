"""Tests of the report of a GPU, on the CPU: its parts, and one that fails or takes too long."""

import argparse
import json
import os

import pytest
import torch

import kernels
from harness.conftest import beside
from harness.measure import __main__ as measure
from harness.measure import gpu_checks, gpu_speed
from harness.measure.conftest import FAST, SMALL_STEPS

SMALL = ["--device", "cpu", *SMALL_STEPS, *FAST]


def small_args(**changes):
    """The options of a report of small steps."""
    given = {"device": "cpu", "stages": (3,), "channels": 8, "batch": 2, "rounds": 2, "seconds": 0.01, "search": 1}
    defaults = {"networks": ((16, 8), (36, 20)), "official": None, "skip_dropout": None, "compile": True}
    return argparse.Namespace(**defaults | given | changes)


def report(folder, *arguments):
    """The exit status, and the content of both forms of the report."""
    status = measure.main(["gpu", "--out", str(folder), *SMALL, *arguments])
    return status, json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gpu"], "the following arguments are required: --out"),
        (["gpu", "--out", "x", "--minutes", "0"], "argument --minutes: '0'; expected more than 0"),
        (["gpu", "--out", "x", "--parts", "12"], "invalid choice: 12"),
        (["traffic", "--stages", "4"], "invalid choice: 4"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        measure.main(arguments)
    error = capsys.readouterr().err
    assert message in error and ended.value.code == 2 and error.count("\n") == 1


@beside
def test_the_report_of_parts_is_kept_and_a_part_that_fails_does_not_stop_the_others(folder):
    status, content, text = report(folder, "--parts", "1", "4")
    assert status == 0 and [p["status"] for p in content["parts"].values()] == ["done", gpu_checks.GPU_ONLY]
    settings = {row["what"]: row["value"] for row in content["parts"]["1"]["tables"][""]}
    assert settings["torch.backends.cudnn.allow_tf32"] == "True" and settings["torch.backends.cuda.matmul.allow_tf32"]
    assert torch.__version__ in content["versions"] and torch.__version__ in text and content["device"] in text

    status, content, text = report(folder, "--parts", "10", "--official", str(folder), "--networks", "8x4")
    assert status == 1 and list(content["parts"]) == ["1", "4", "10"]
    assert content["parts"]["1"]["status"] == "done"
    assert "failed: no model.py in" in content["parts"]["10"]["status"]
    measured = [r["side"] for r in content["parts"]["10"]["tables"]["C = 8, 4 cells, float32"] if r.get("ms")]
    assert measured == ["plain"]
    table = "**C = 8, 4 cells, float32**"
    for line in ("| 1. Versions and device | done |", "## 10. Steps of an evaluation", table, "--parts 10"):
        assert line in text
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("part-*.json"))


def test_a_part_that_outruns_its_limit_is_ended(tmp_path):
    status, content, text = report(tmp_path, "--parts", "9", "--minutes", "0.02")
    assert status == 1 and content["parts"]["9"]["status"] == "ended by its limit of 0.12 s"
    assert content["parts"]["9"]["seconds"] < 5 and "ended by its limit of 0.12 s" in text


def test_another_report_json_is_left_alone(tmp_path, capsys):
    (tmp_path / "report.json").write_text("[1, 2]")
    with pytest.raises(SystemExit):
        measure.main(["gpu", "--out", str(tmp_path), *SMALL])
    assert "is no report" in capsys.readouterr().err and (tmp_path / "report.json").read_text() == "[1, 2]"


@pytest.mark.slow  # half a minute
def test_a_search_is_the_same_again_and_resumed():
    found = [row for _, row in gpu_speed.demo(small_args(), torch.device("cpu"))]
    assert len(found) == 3 and all(r["the first's log.jsonl"] and r["the first's genotype.json"] for r in found)


def test_operators_are_right_and_a_wrong_one_is_found(few_cells, monkeypatch):
    arguments, cpu = small_args(channels=8), torch.device("cpu")
    monkeypatch.setattr(gpu_checks, "ALLOWED", {"float64": 1e-11, "bfloat16": 5e-2})  # the others go the same way
    found = [row for _, row in gpu_checks.correctness(arguments, cpu)]
    assert len(found) == 2 * 2 * 14 + 2 and all(row["right"] for row in found)
    wrong = [("pool", lambda f, x: f.pool(x, "max") + (f is gpu_checks.FUSED) * 1e-3, [(2, 4, 8, 8)], [])]
    monkeypatch.setattr(gpu_checks, "operators", lambda shape: wrong)
    monkeypatch.setattr(gpu_checks, "network_rows", lambda *_: [])  # right, as above
    with pytest.raises(gpu_checks.Wrong, match="2 relative errors"):
        list(gpu_checks.correctness(arguments, cpu))


@pytest.mark.slow
def test_the_other_parts_run_on_the_cpu(few_cells, few_weights, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(gpu_speed, "copy_bandwidth", lambda _: 1e9)  # that of the machine, a second, is in part 1
    (built,) = (row for _, row in gpu_checks.build(small_args(), cpu) if row["device"] == "cpu")
    assert built["supported"] and built["why not"] is None
    found = []
    with pytest.raises(gpu_checks.Wrong, match="official: InputError: no model_search.py"):
        for row in gpu_speed.steps(small_args(official=str(tmp_path)), cpu):
            found.append(row)
    rows_of = [row for table, row in found if table == "stage 3" and row.get("ms")]
    assert {row["side"] for row in rows_of} == {"plain", "ours"}
    assert all(row["to ours"] == 1 for row in rows_of if row["side"] == "ours")
    found = list(gpu_speed.whole_search(small_args(), cpu))
    hours = {row["side"]: row["hours"] for table, row in found if table == "projected hours"}
    ms = {row["side"]: row for table, row in found if table == "steps"}
    expected = 12500 * (10 * ms["ours"]["weights (ms)"] + 15 * ms["ours"]["both (ms)"]) / 3.6e6
    assert set(hours) == {"plain", "ours"} and hours["ours"] == pytest.approx(expected)
    found = list(gpu_speed.evaluation_steps(small_args(networks=[(8, 4)]), cpu))
    assert [row["side"] for table, row in found if table == "C = 8, 4 cells, float32"] == ["plain", "ours"]
    assert found[-1][1]["to ours"] == 1 and all(row["ms"] > 0 for table, row in found if "cells" in table)
    found = [row for _, row in gpu_speed.mixed_operation(small_args(), cpu)]
    assert len(found) == 2 * 3 * 3 * 2 and all(0 < row["of the bandwidth"] for row in found)
    convolution = gpu_checks.Convolution((2, 4, 8, 8), 3, 2, torch.float32, "channels-last", cpu)
    assert convolution.error() < 1e-5 and all(min(times) > 0 for times in convolution.times(0.01).values())


def test_sides_with_fewer_fused_operations_or_streams_leave_the_others_as_they_are(monkeypatch):
    monkeypatch.setenv("PDARTS_CUDA_STREAMS", "2")
    chosen = kernels.use_on_cuda("pool")
    try:
        seen = {}
        for name in ("ours", *gpu_speed.LESS):
            with gpu_speed.with_less(name):
                fused = kernels.use_on_cuda("")
                kernels.use_on_cuda(fused)
                seen[name] = fused, os.environ["PDARTS_CUDA_STREAMS"]
            assert os.environ["PDARTS_CUDA_STREAMS"] == "2" and kernels.use_on_cuda("pool") == "pool"
    finally:
        kernels.use_on_cuda(chosen)
    assert seen["ours"] == ("pool", "2") and seen["ours, one stream, graph"] == ("pool", "1")
    assert seen["ours, mixed operations only, graph"] == ("mixed", "2")
