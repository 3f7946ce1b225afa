"""Tests of the claims: the plan, runs that are not made twice, and the verdicts."""

import json

import pytest
import torch

import pdarts
from harness.conftest import random_images
from harness.evaluate import EvaluateResult
from harness.measure import __main__ as measure
from harness.measure import claims
from harness.measure.claims import Claims, compared, limit_name, plan, random_cells
from harness.report.cells import check_genotype, depth_of, skips_of
from harness.search import SearchResult
from pdarts import GENOTYPES


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """What is run, in turn; searches and trainings are made up, and stop where their name is in `stop`."""
    done = []

    def search(settings, images, out=None, resume=None, **_):
        done.append(("search", (out or resume).name))
        folder = out or resume
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint.pt").touch()
        if folder.name in stop:
            raise KeyboardInterrupt
        torch.manual_seed(settings.seed + 100 * len(settings.depths))
        names, stages = (pdarts.PRIMITIVES,) * 14, []
        for keep in settings.keep:
            stages.append(pdarts.Stage(names, names, torch.randn(14, len(names[0])), torch.randn(14, len(names[0]))))
            names = pdarts.shrink(names, stages[-1].alphas_normal, max(keep - 3, 3))
        lines = [
            {"stage": s, "train_accuracy": 0.5, "alpha_accuracy": 0.4, "seconds": 60.0}
            for s in range(1, len(stages) + 1)
        ]
        for name in ("log", "times"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return SearchResult(stages[-1].genotype(), stages, [])

    def evaluate(genotype, settings, images, out=None, resume=None, **_):
        done.append(("cell", (out or resume).name))
        return EvaluateResult(50 + skips_of(genotype.normal), 1000 * depth_of(genotype.normal), 10, 0.9)

    monkeypatch.setattr(claims, "load", lambda *_: random_images())
    monkeypatch.setattr(claims, "search", search)
    monkeypatch.setattr(claims, "evaluate", evaluate)
    monkeypatch.setattr(pdarts, "correct_predictions", lambda network, _: (network, 100))
    stop = monkeypatch.stop = set()
    return done


def made(tmp_path, seeds=2, scale="small"):
    return Claims(tmp_path / "claims", scale, seeds, None, "cpu", dataset="shapes")


def test_every_seed_has_the_same_plan_and_searches_come_before_their_cells():
    entries = plan(2)
    assert len(entries) == 2 * (3 + 8 + 4 + 2) and len({e.name for e in entries}) == len(entries)
    first, second = (
        [(e.kind, e.group, e.cell) for e in entries if e.seed == seed] for seed in (0, 1)
    )
    assert first == second and [kind for kind, *_ in first[:3]] == ["search"] * 3
    names = [e.name for e in entries]
    assert "seed1-search-no-skip-dropout" in names and "seed0-cell-pdarts-m2" in names
    for scale in claims.SCALES.values():
        assert claims.SEARCHES["no skip dropout"](scale).skip_dropout == (0.0, 0.0, 0.0)
        single = claims.SEARCHES["one stage"](scale)
        assert (single.depths, single.keep, single.alpha_start) == ((8,), (8,), 0)


def test_a_plan_goes_on_where_it_was_stopped_and_repeats_nothing(tmp_path, runs, monkeypatch):
    monkeypatch.stop.add("seed0-search-one-stage")
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, seeds=1).run()
    assert [name for _, name in runs] == [
        "seed0-search-pdarts", "seed0-search-no-skip-dropout", "seed0-search-one-stage"
    ]
    monkeypatch.stop.clear()
    again = made(tmp_path, seeds=1)
    again.run()
    assert runs[3] == ("search", "seed0-search-one-stage")
    names = [name for _, name in runs[3:]]
    assert len(names) == len(set(names)) and "seed0-search-pdarts" not in names
    results = list(again.results().values())
    assert len(results) == len(again.entries)
    lines = (tmp_path / "claims/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == [entry.name for entry in again.entries]  # as in the plan
    # Equal cells of a seed are trained once.
    trained = {(r["seed"], json.dumps(r["genotype"])) for r in results if r["kind"] == "cell"}
    assert len([name for name in names if "-cell-" in name]) == len(trained)
    number = len(runs)
    again.run()
    assert len(runs) == number and not list((tmp_path / "claims/runs").glob("*/*.pt"))
    text = (tmp_path / "claims/claims.md").read_text()
    assert f"{len(results)} of {len(results)} runs are done" in text
    for row in ("| P-DARTS, M = 2 |", "| random, no limit |", "| one stage | 1 |", "deep searches collapse"):
        assert row in text
    assert "P-DARTS, stage 3" in (tmp_path / "claims/skips.svg").read_text()


def test_the_command_says_that_a_stopped_plan_resumes(tmp_path, runs, monkeypatch, capsys):
    monkeypatch.stop.add("seed0-search-pdarts")
    command = ["claims", "--data", "x", "--out", str(tmp_path / "claims"), "--seeds", "1", "--device", "cpu"]
    assert measure.main(command) == 130 and "the same command resumes" in capsys.readouterr().err
    monkeypatch.stop.clear()
    assert measure.main(command) == 0 and len(runs) > 10


def test_a_folder_of_other_claims_or_of_something_else_is_refused(tmp_path, runs):
    made(tmp_path)
    with pytest.raises(pdarts.InputError, match="claims of other settings or data"):
        made(tmp_path, scale="paper")
    about = tmp_path / "claims/claims.json"
    older = json.loads(about.read_text())
    del older["settings"]["search"]["stem"]  # of a version that did not have it
    about.write_text(json.dumps(older))
    made(tmp_path)
    older["settings"]["search"]["epochs"] += 1
    about.write_text(json.dumps(older))
    with pytest.raises(pdarts.InputError, match="claims of other settings or data"):
        made(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(pdarts.InputError, match="already holds something else"):
        Claims(tmp_path / "other", "small", 1, None, "cpu", dataset="shapes")


def test_depth_is_the_longest_path_and_random_cells_keep_their_limit():
    assert depth_of(GENOTYPES["PDARTS"].normal) == 3  # 2 -> 3 -> 4 at most, by node 4 or 5
    assert depth_of([("sep_conv_3x3", 0), ("sep_conv_3x3", 1)] * 4) == 1
    chain = [(name, source) for node in range(4) for name, source in (("skip_connect", 0), ("sep_conv_3x3", 1 + node))]
    assert depth_of(chain) == 4
    cells = [random_cells(seed, 2) for seed in range(50)]
    assert max(skips_of(cell.normal) for cell in cells) == 2 and len({str(cell) for cell in cells}) == 50
    assert max(skips_of(random_cells(seed, None).normal) for seed in range(50)) > 2
    for cell in cells:
        assert check_genotype(cell) == cell
        assert all(a[1] != b[1] for a, b in zip(cell.normal[::2], cell.normal[1::2]))


def test_verdicts_count_seeds():
    assert compared("c", {0: 2, 1: 3}, {0: 1, 1: 1})[2] == "shows, in every seed"
    assert compared("c", {0: 2, 1: 1}, {0: 1, 1: 1})[2] == "shows in 1 of 2 seeds"
    assert compared("c", {0: 1, 1: 0}, {0: 1, 1: 1})[2] == "does not show"
    assert compared("c", {0: 1, 1: 0}, {0: 1, 1: 1}, equal=True)[2] == "shows in 1 of 2 seeds"
    assert compared("c", {}, {0: 1})[2] == "not run yet"
    assert compared("c", {0: 3, 1: 5}, {0: 1, 1: 1})[1] == "+3 +- 1.41 (+2, +4)"
    assert limit_name(None) == "no limit"


@pytest.mark.parametrize("arguments, message", [
    (["claims"], "the following arguments are required: --out, --data"),
    (["claims", "--data", "x", "--out", "y", "--seeds", "0"], "--seeds: '0'; expected a whole number, 1 or more"),
    (["claims", "--data", "nowhere", "--out", "y"], "no cifar10 in nowhere"),
])
def test_the_command_names_what_is_wrong(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        measure.main(arguments)
    assert message in capsys.readouterr().err
