"""The paper's claims, measured: `python -m harness.measure claims --data DIR --out DIR [--scale small|paper]`.

The plan, OUT/plan.jsonl, has a line for each run of each seed:

    searches    P-DARTS; without skip dropout; without progression: one stage with all candidates, as DARTS searches
    cells       of the P-DARTS search: those of its stages, and of its last stage for M = 0 to 4 and without limit; of
                the other searches; random ones, with at most 2 skip-connects and without limit. Each is trained from
                scratch under one small budget, the same for all.

A finished run leaves a line in OUT/results.jsonl, its charts and its logs in OUT/runs/NAME, and is not repeated; a run
that was interrupted resumes. After each run OUT/claims.md, cells.svg and skips.svg are made anew from all results.
Several processes share a plan: the same command in as many terminals as there are cores (each with OMP_NUM_THREADS=1)
or GPUs (each with its --device). `--scale small` takes two CPU cores two hours; `--scale paper` is for GPUs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import random
import shutil
import statistics
import time
from typing import NamedTuple

import pdarts
from harness.data.images import load
from harness.devices import pick_device
from harness.evaluate import evaluate
from harness.files import locked, write_whole
from harness.progress import duration
from harness.report.cells import check_genotype, depth_of, skips_of
from harness.report.charts import dots_svg
from harness.search import search
from harness.settings import EvaluateSettings, SearchSettings
from pdarts import Genotype, InputError

LIMITS = (0, 1, 2, 3, 4, None)  # M


def write_lines(path: pathlib.Path, records: list[dict]):
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records).encode())


class Scale(NamedTuple):
    search: SearchSettings
    one_stage: SearchSettings
    evaluate: EvaluateSettings


def one_stage(settings: SearchSettings, **changes) -> SearchSettings:
    """Return the settings of DARTS's search: 8 cells, all candidates, alphas from the first epoch on, no dropout."""
    single = {"depths": (8,), "keep": (8,), "skip_dropout": (0.0,), "alpha_start": 0}
    return dataclasses.replace(settings, **single, **changes)


# The alphas go as far as the paper's: 375 steps in a stage of 6e-3, where those have 3900 of 6e-4; one stage: 1125 of
# 6e-3, and DARTS 19500 of 3e-4.
_SMALL = SearchSettings(
    images=4000, channels=8, stem_stride=2, epochs=9, alpha_start=3, batch_size=32, lr=0.05, alpha_lr=6e-3
)
SCALES = {
    "small": Scale(
        _SMALL,
        one_stage(_SMALL, epochs=18),
        EvaluateSettings(
            images=4000, depth=8, channels=12, stem_stride=2, epochs=12, batch_size=32, lr=0.05, drop_path=0.1
        ),
    ),
    "paper": Scale(
        SearchSettings(), one_stage(SearchSettings(), epochs=50, batch_size=64, alpha_lr=3e-4), EvaluateSettings()
    ),
}
SEARCHES = {
    "P-DARTS": lambda scale: scale.search,
    "no skip dropout": lambda scale: dataclasses.replace(scale.search, skip_dropout=(0.0, 0.0, 0.0)),
    "one stage": lambda scale: scale.one_stage,
}


class Entry(NamedTuple):
    """A line of the plan. kind: "search", or "cell" for the training of a cell; cell: its name in its search."""

    name: str
    kind: str
    seed: int
    group: str
    cell: str = ""


def limit_name(limit: int | None) -> str:
    return "no limit" if limit is None else f"M = {limit}"


def plan(seeds: int) -> list[Entry]:
    entries = []
    for seed in range(seeds):

        def add(kind, group, cell="", seed=seed):
            words = f"{group} {cell}".replace(" = ", "").replace("-", "").split()
            entries.append(Entry(f"seed{seed}-{kind}-{'-'.join(words).lower()}", kind, seed, group, cell))

        for group in SEARCHES:
            add("search", group)
        for cell in ("stage 1", "stage 2", *map(limit_name, LIMITS)):  # stage 3 is M = 2
            add("cell", "P-DARTS", cell)
        for group in list(SEARCHES)[1:]:
            for limit in (2, None):
                add("cell", group, limit_name(limit))
        for limit in (2, None):
            add("cell", "random", limit_name(limit))
    return entries


def random_cells(seed: int, limit: int | None) -> Genotype:
    """Draw two inputs of each node and their operations; the normal cell has at most `limit` skip-connects."""
    generator = random.Random(seed)
    names = [name for name in pdarts.PRIMITIVES if name != "none"]

    def cell():
        pairs = [(node, source) for node in range(4) for source in sorted(generator.sample(range(2 + node), 2))]
        return [(generator.choice(names), source) for _, source in pairs]

    normal = cell()
    while limit is not None and skips_of(normal) > limit:
        normal = cell()
    return Genotype(normal, [2, 3, 4, 5], cell(), [2, 3, 4, 5])


class Claims:
    """The runs of a plan in a folder, and their summary."""

    def __init__(self, folder, scale: str, seeds: int, data: str | None, device: str, dataset: str = "cifar10"):
        self.folder, self.scale, self.device = pathlib.Path(folder), SCALES[scale], device
        self.images, self.entries = load(EvaluateSettings(dataset=dataset), data), plan(seeds)
        settings = {name: dataclasses.asdict(value) for name, value in self.scale._asdict().items()}
        about = json.loads(json.dumps({"scale": scale, "data": self.images.fingerprint(), "settings": settings}))
        known = self.folder / "claims.json"
        if self.folder.exists() and not known.exists() and {p.name for p in self.folder.iterdir()} - {"locks"}:
            raise InputError(f"{self.folder} already holds something else; expected a new or empty folder")
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "locks/summary"):
            if known.exists() and not self.same(json.loads(known.read_text()), about):
                raise InputError(f"{self.folder} holds claims of other settings or data; expected a new folder")
            write_whole(known, json.dumps(about, indent=1).encode())
            write_lines(self.folder / "plan.jsonl", [entry._asdict() for entry in self.entries])

    @staticmethod
    def same(old: dict, new: dict) -> bool:
        """Compare the claims of a folder with these; settings that it does not name are younger than it."""
        named = {name: values | old["settings"].get(name, {}) for name, values in new["settings"].items()}
        return old | {"settings": named} == new

    def results(self) -> dict[str, dict]:
        """Return the results of the finished runs by their names, in the order of the plan."""
        path = self.folder / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = {result["name"]: result for result in map(json.loads, lines)}
        return {entry.name: found[entry.name] for entry in self.entries if entry.name in found}

    def add(self, result: dict):
        """Add the result of a run, and make the summary anew."""
        with locked(self.folder / "locks/summary"):
            results = self.results() | {result["name"]: result}
            write_lines(self.folder / "results.jsonl", [results[e.name] for e in self.entries if e.name in results])
        self.write()

    def run(self) -> int:
        """Make all runs that are left and that no other process has begun; return the exit status."""
        started, done = time.monotonic(), 0
        while left := [entry for entry in self.entries if entry.name not in self.results()]:
            if any(self.run_one(entry) for entry in left):
                done += 1
            else:
                time.sleep(1)  # other processes make these runs, or the searches that find their cells
        self.write()
        print(f"\n{done} runs in {duration(time.monotonic() - started)}; {self.folder / 'claims.md'}")
        return 0

    def run_one(self, entry: Entry) -> bool:
        """Make a run; False if that is not possible now."""
        if (identity := self.identity(entry)) is None:
            return False
        with locked(self.folder / "locks" / identity, wait=False) as mine:
            if not mine or entry.name in self.results():  # another process makes this run, or has just made it
                return False
            print(f"\n{self.entries.index(entry) + 1} of {len(self.entries)}: {entry.name}", flush=True)
            self.add(entry._asdict() | (self.search if entry.kind == "search" else self.train)(entry))
            for name in ("checkpoint.pt", "checkpoint-before.pt", "weights.pt"):  # its report and its logs stay
                (self.folder / "runs" / entry.name / name).unlink(missing_ok=True)
        return True

    def identity(self, entry: Entry) -> str | None:
        """Return a name that runs share if they have the same result: equal cells of a seed.

        None for a cell that is not found yet.
        """
        if entry.kind == "search":
            return entry.name
        if (genotype := self.genotype(entry)) is None:
            return None
        return f"seed{entry.seed}-cell-{hashlib.sha256(repr(genotype).encode()).hexdigest()[:16]}"

    def where(self, entry: Entry) -> dict:
        """Return the arguments of a run: its folder, from which it resumes if it has begun."""
        path = self.folder / "runs" / entry.name
        begun = any(path.glob("checkpoint*.pt"))
        if not begun:
            shutil.rmtree(path, ignore_errors=True)  # of a run that was killed in its first epoch
        return {"resume" if begun else "out": path, "device": self.device, "show": True}

    def search(self, entry: Entry) -> dict:
        settings = dataclasses.replace(SEARCHES[entry.group](self.scale), seed=entry.seed)
        where = self.where(entry)
        path = where.get("out") or where["resume"]
        found = search(settings, self.images.first(settings.images), **where)
        log, times = (
            [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]
            for name in ("log", "times")
        )
        last, stages = found.stages[-1], []
        for number, stage in enumerate(found.stages, 1):
            normal = stage.genotype(None).normal
            at_the_end = [record for record in log if record["stage"] == number][-1]
            stages.append({
                "skips": skips_of(normal),
                "depth": depth_of(stage.genotype(settings.max_skips).normal),
                "depth_reduce": depth_of(stage.genotype(settings.max_skips).reduce),
                "train_accuracy": at_the_end["train_accuracy"],
                "alpha_accuracy": at_the_end["alpha_accuracy"],
                "genotype": stage.genotype(settings.max_skips),
            })  # fmt: skip
        cells = {limit_name(limit): last.genotype(limit) for limit in LIMITS}
        cells |= {f"stage {number}": stage["genotype"] for number, stage in enumerate(stages, 1)}
        seconds = sum(record["seconds"] for record in times)
        return {"stages": stages, "cells": {name: cell._asdict() for name, cell in cells.items()}, "seconds": seconds}

    def train(self, entry: Entry) -> dict:
        genotype = self.genotype(entry)
        about = {"genotype": genotype._asdict(), "skips": skips_of(genotype.normal), "depth": depth_of(genotype.normal)}
        about = json.loads(json.dumps(about))
        for other in self.results().values():  # of one seed: two searches may well find the same cell
            if other["kind"] == "cell" and other["seed"] == entry.seed and other["genotype"] == about["genotype"]:
                same = {key: other[key] for key in ("parameters", "multiply_adds", "test_accuracy", "seconds")}
                return about | same | {"same_as": other.get("same_as", other["name"])}
        settings, started = dataclasses.replace(self.scale.evaluate, seed=entry.seed), time.monotonic()
        images = self.images.first(settings.images)
        few = dataclasses.replace(images, x_test=images.x_test[:1000], y_test=images.y_test[:1000])  # after each epoch
        trained = evaluate(genotype, settings, few, **self.where(entry))
        numbers = {"parameters": trained.parameters, "multiply_adds": trained.multiply_adds}
        correct, total = pdarts.correct_predictions(trained.network, images.to(pick_device(self.device)).test())
        seconds = time.monotonic() - started
        return about | numbers | {"test_accuracy": correct / total, "seconds": seconds}

    def genotype(self, entry: Entry) -> Genotype | None:
        if entry.group == "random":
            limit = next(limit for limit in LIMITS if limit_name(limit) == entry.cell)
            return random_cells(entry.seed, limit)
        search = next(e for e in self.entries if (e.kind, e.seed, e.group) == ("search", entry.seed, entry.group))
        found = self.results().get(search.name)
        return check_genotype(Genotype(**found["cells"][entry.cell])) if found else None

    def write(self):
        with locked(self.folder / "locks/summary"):
            text, charts = summary(list(self.results().values()), self.entries, self.scale)
            write_whole(self.folder / "claims.md", text.encode())
            for name, svg in charts.items():
                write_whole(self.folder / f"{name}.svg", svg.encode())


# --- The summary of the results ---------------------------------------------------------------------------------------


def spread(values, form="{:.3g}") -> str:
    """Return the mean +- the standard deviation, and every single value."""
    if not values:
        return "-"
    deviation = f" +- {form.replace('+', '').format(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{form.format(statistics.mean(values))}{deviation} ({', '.join(map(form.format, values))})"


def values_of(results, key, **fields) -> dict[int, float]:
    """Return key(result) by seed, of the results with these fields."""
    chosen = (r for r in results if all(r.get(name) == value for name, value in fields.items()))
    return {r["seed"]: key(r) for r in chosen}


def compared(claim: str, more: dict, less: dict, form="{:+.3g}", equal=False) -> list[str]:
    """Return a row of the table: whether `more` is larger than `less`, or `equal`, seed by seed, as the claim says."""
    seeds = sorted(more.keys() & less.keys())
    differences = [more[seed] - less[seed] for seed in seeds]
    shows = sum(d > 0 or equal and d == 0 for d in differences)
    if not seeds:
        verdict = "not run yet"
    elif shows == len(seeds):
        verdict = "shows, in every seed"
    elif shows == 0:
        verdict = "does not show"
    else:
        verdict = f"shows in {shows} of {len(seeds)} seeds"
    return [claim, spread(differences, form), verdict]


def summary(results, entries, scale) -> tuple[str, dict[str, str]]:
    """Return claims.md, and the charts by name."""
    searches = [r for r in results if r["kind"] == "search"]
    cells = [r for r in results if r["kind"] == "cell"]

    def of_stage(group, stage, key):
        return {
            r["seed"]: r["stages"][stage][key] for r in searches if r["group"] == group and len(r["stages"]) > stage
        }

    def accuracy(group, cell):
        return values_of(cells, lambda r: 100 * r["test_accuracy"], group=group, cell=cell)

    rows, lines = [], ["# The paper's claims", "", f"{len(results)} of {len(entries)} runs are done.", ""]
    dropout = "deep searches collapse into skip-connects without dropout: more of them in the last stage"
    rows.append(compared(dropout, of_stage("no skip dropout", 2, "skips"), of_stage("P-DARTS", 2, "skips")))
    deeper = "the last stage's cell is deeper than the first's"
    rows.append(compared(deeper, of_stage("P-DARTS", 2, "depth"), of_stage("P-DARTS", 0, "depth")))
    pairs = [
        ("the last stage's cell is better than the first's (%)", ("P-DARTS", "M = 2"), ("P-DARTS", "stage 1")),
        ("progression is better than one stage (%)", ("P-DARTS", "M = 2"), ("one stage", "no limit")),
        ("and than one stage with M = 2 (%)", ("P-DARTS", "M = 2"), ("one stage", "M = 2")),
        ("searched cells are better than random ones with M = 2 (%)", ("P-DARTS", "M = 2"), ("random", "M = 2")),
        ("and than those without limit (%)", ("P-DARTS", "M = 2"), ("random", "no limit")),
        ("M = 2 is better than no limit with dropout (%)", ("P-DARTS", "M = 2"), ("P-DARTS", "no limit")),
    ]  # fmt: skip
    rows += [compared(claim, accuracy(*more), accuracy(*less)) for claim, more, less in pairs]
    claim = "refinement only makes sense on top of dropout: without it no limit is at least as good as M = 2 (%)"
    no_limit, at_most_2 = (accuracy("no skip dropout", limit) for limit in ("no limit", "M = 2"))
    rows.append(compared(claim, no_limit, at_most_2, equal=True))
    lines += table(["the paper's claim", "difference here: mean +- std (each seed)", "here"], rows)

    lines += ["", "## Searches", "", "![skip-connects of the stages](skips.svg)", ""]
    rows = []
    for group in SEARCHES:
        for stage in range(len(SEARCHES[group](scale).depths)):
            names = ("skips", "{:.2g}"), ("depth", "{:.2g}"), ("train_accuracy", "{:.1%}"), ("alpha_accuracy", "{:.1%}")
            columns = [spread(list(of_stage(group, stage, key).values()), form) for key, form in names]
            rows.append([group, str(stage + 1), *columns])
    head = ["search", "stage", "skip-connects before refinement", "depth of the normal cell"]
    lines += table([*head, "accuracy on the weights' half", "on the alphas' half"], rows)
    seconds = {group: [r["seconds"] / 60 for r in searches if r["group"] == group] for group in SEARCHES}
    lines += ["", "Minutes: " + "; ".join(f"{group} {spread(values)}" for group, values in seconds.items())]

    lines += ["", "## Cells, trained from scratch", "", "![test accuracies](cells.svg)", ""]
    rows, chart = [], []
    for group, cell in dict.fromkeys((e.group, e.cell) for e in entries if e.kind == "cell"):
        mine = [r for r in cells if (r["group"], r["cell"]) == (group, cell)]
        columns = [
            spread([100 * r["test_accuracy"] for r in mine], "{:.2f}"),
            spread([r["parameters"] / 1e3 for r in mine]),
            spread([r["depth"] for r in mine], "{:.2g}"),
            spread([r["skips"] for r in mine], "{:.2g}"),
            spread([r["seconds"] / 60 for r in mine]),
        ]
        rows.append([f"{group}, {cell}", *columns])
        chart.append((f"{group}, {cell}", [100 * r["test_accuracy"] for r in mine]))
    lines += table(["cell", "test accuracy (%)", "parameters (thousands)", "depth", "skip-connects", "minutes"], rows)
    charts = {"cells": dots_svg(chart, "test accuracy (%) after training from scratch, each seed and the mean")}
    skips = []
    for group in SEARCHES:
        for stage in range(len(SEARCHES[group](scale).depths)):
            skips.append((f"{group}, stage {stage + 1}", list(of_stage(group, stage, "skips").values())))
    charts["skips"] = dots_svg(skips, "skip-connects in the normal cell before refinement, each seed and the mean")
    return "\n".join(lines) + "\n", charts


def table(head, rows) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
