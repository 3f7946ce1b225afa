"""Parts 6 to 10 of harness/measure/gpu_report.py: the speed of steps and operations, and a whole search."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import torch

import kernels
import pdarts
from harness.devices import pick_kernels
from harness.files import reason
from harness.measure.evaluation_steps import evaluation_sides, verify_evaluation
from harness.measure.gpu_checks import GPU_ONLY, Wrong
from harness.measure.operations import operation_rows
from harness.measure.operations import verify as verify_operations
from harness.measure.search_steps import SKIP_DROPOUT, OfficialStep, OurStep, batches, verify_step
from harness.measure.timing import ROOT, copy_bandwidth, time_steps

# --- 6, 7: steps of a search ------------------------------------------------------------------------------------------

# The fused operations on CUDA (None: the same as otherwise) and the streams of sides that have less than the others.
LESS = {
    "ours, one stream, graph": (None, "1"),
    "ours, mixed operations only, graph": ("mixed", "2"),
}


def sides(args, device, config, batch):
    """Return {name: stage -> function that builds it}, or {name: None} where a GPU is needed and missing."""

    def ours(**ways):
        return lambda stage: functools.partial(OurStep, stage, config, *batch, number=args.search, **ways)

    def official(stage):
        return functools.partial(OfficialStep, args.official, stage, config, *batch, number=args.search)

    on_cuda = device.type == "cuda"
    return {
        # Other sides before ours: an error in a kernel may end the use of the GPU for this process.
        **({"official": official} if args.official and config.dtype == "float32" else {}),
        "plain": ours(fused=False),
        "plain, graph": ours(fused=False, graph=True) if on_cuda else None,
        "ours": ours(),
        "ours, graph": ours(graph=True) if on_cuda else None,
        **{name: ours(graph=True) if on_cuda else None for name in LESS},
    }


@contextlib.contextmanager
def with_less(name):
    """Enter a block in which a side of LESS has the operations and streams that it names."""
    if name not in LESS:
        yield
        return
    operations, streams = LESS[name]
    chosen, before = kernels.use_on_cuda("mixed"), os.environ.pop("PDARTS_CUDA_STREAMS", None)
    kernels.use_on_cuda(operations or chosen)
    os.environ["PDARTS_CUDA_STREAMS"] = streams  # which the kernels read at every call
    try:
        yield
    finally:
        kernels.use_on_cuda(chosen)
        del os.environ["PDARTS_CUDA_STREAMS"]
        os.environ.update({} if before is None else {"PDARTS_CUDA_STREAMS": before})


def measured(args, device, make, kinds, name=""):
    """Yield the rows of one side, or one with the problem that it has."""
    try:
        with with_less(name):
            yield from time_steps({"": make}, kinds, device, args.seconds, args.rounds)
    except Exception as error:
        yield {"problem": reason(error)}
        traceback.print_exc()
    gc.collect()  # the memory of a failed side


def steps(args, device):
    rates = tuple(args.skip_dropout or SKIP_DROPOUT)
    config = dataclasses.replace(pdarts.CIFAR10, channels=args.channels, skip_dropout=rates)
    (batch,) = batches(1, args.batch, device)
    problems, rows = [], []
    for name, make in sides(args, device, config, batch).items():
        for stage in args.stages:
            if name == "ours":  # as late as that: see `sides`
                loss, gradients = verify_step(stage, config, *batch, args.search)
                distances = {"loss": loss, "gradients": gradients}
                yield "verified: relative distances of ours from plain", {"stage": stage, **distances}
            about = {"stage": stage, "skip dropout": rates[stage - 1], "step of": None, "side": name}
            if make is None:
                yield f"stage {stage}", about | {"problem": GPU_ONLY}
                continue
            for result in measured(args, device, make(stage), ("weights", "alphas"), name):
                problems += [f"{name}: {result['problem']}"] if "problem" in result else []
                rows.append(about | step_row(result))
                for r in rows:
                    r["to ours"] = ratio_to_ours(r, rows)
                yield f"stage {stage}", rows[-1]
    raise_if_any(problems)


def raise_if_any(problems):
    if problems:
        raise Wrong(f"{len(problems)} of the sides cannot be measured: {problems[0]}")


def step_row(result):
    """Return a row of `time_steps` as the report shows it."""
    return {
        "step of": result.get("step"),
        "ms": milliseconds(result.get("seconds")),
        "+- ms": milliseconds(result.get("spread")),
        "to ours": None,
        "saved MB/image": megabytes(result.get("saved_per_image")),
        "peak MB": megabytes(result.get("peak")),
        "reserved MB": megabytes(result.get("reserved")),
        "problem": result.get("problem"),
    }


def milliseconds(seconds):
    return None if seconds is None else 1e3 * seconds


def megabytes(size):
    return None if size is None else size / 1e6


def ratio_to_ours(row, rows):
    base = [r["ms"] for r in rows if r["side"] == "ours" and all(r.get(k) == row.get(k) for k in ("stage", "step of"))]
    return row["ms"] / base[0] if base and base[0] and row["ms"] else None


def whole_search(args, device):
    """Project a search from steps on one batch, without augmentation, checkpoints and tests.

    The skip dropout has the initial rates of the paper's search on CIFAR-10: a step takes the same time at every rate
    above 0, so that the steps stand for those of all epochs.
    """
    (batch,) = batches(1, args.batch, device)
    paper, problems = pdarts.CIFAR10, []
    rates = tuple(args.skip_dropout or paper.skip_dropout)
    number = math.ceil(25000 / args.batch)
    for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        config = dataclasses.replace(paper, channels=args.channels, dtype=dtype, skip_dropout=rates)
        every = sides(args, device, config, batch)
        for name in ("official", "plain", "plain, graph", "ours", "ours, graph"):
            if (make := every.get(name)) is None:
                continue
            hours, whole = 0.0, True
            for stage in args.stages:
                seconds = {}
                for result in measured(args, device, make(stage), ("weights", "both")):
                    if "problem" in result:
                        problems.append(f"{name}: {result['problem']}")
                        whole = False
                    else:
                        seconds[result["step"]] = result["seconds"]
                if len(seconds) == 2:
                    epochs = {"weights": paper.alpha_start, "both": paper.epochs - paper.alpha_start}
                    hours += sum(seconds[which] * number * epochs[which] for which in seconds) / 3600
                ms = {f"{which} (ms)": milliseconds(seconds.get(which)) for which in ("weights", "both")}
                about = {"dtype": dtype, "side": name, "stage": stage, "skip dropout": rates[stage - 1]}
                yield "steps", about | ms
            stages = " ".join(map(str, args.stages))
            yield "projected hours", {"dtype": dtype, "side": name, "stages": stages, "hours": hours if whole else None}
    raise_if_any(problems)


# --- 8: the mixed operation -------------------------------------------------------------------------------------------


def mixed_operation(args, device):
    pick_kernels("on", device)
    bandwidth = copy_bandwidth(device)
    on_cuda = device.type == "cuda"
    for dtype in ("float32", "bfloat16") if on_cuda else ("float32",):
        verify_operations(device, getattr(torch, dtype), False)
        compiled = args.compile and on_cuda and dtype == "float32"  # it takes minutes
        settings = device, getattr(torch, dtype), False, args.batch, compiled, args.seconds / 5, bandwidth
        for r in operation_rows(*settings):
            ms, fused = r["ms"], r["ms"]["fused"]
            yield f"{dtype}, copy bandwidth {bandwidth / 1e9:.0f} GB/s", {
                "operation": r["operation"],
                "shape": str(r["shape"]),
                "K": r["candidates"],
                "pass": r["pass"],
                "fused ms": fused,
                "+- ms": r["spread_ms"]["fused"],
                "of the bandwidth": r["limit_ms"] / fused,
                **{f"{side} to fused": ms[side] / fused if side in ms else None for side in ("eager", "compile")},
                "compile, of the bandwidth": r["limit_ms"] / ms["compile"] if "compile" in ms else None,
                "problem": r["compile_problem"],
            }


# --- 9: a search again, and resumed -----------------------------------------------------------------------------------


def demo(args, device):
    """Run the demo's search in processes: twice, and once stopped by SIGINT and resumed."""
    options = ["--deterministic", "--device", str(device)]
    if device.type == "cpu":  # small
        sizes = {"images": 64, "epochs": 2, "alpha-start": 1, "batch-size": 16, "channels": min(args.channels, 4)}
        options += ["--depths", *"333", *(str(part) for name, value in sizes.items() for part in (f"--{name}", value))]
    with tempfile.TemporaryDirectory() as folder:
        first, second, stopped = (pathlib.Path(folder, name) for name in ("first", "second", "stopped"))

        def start(*where):
            command = [sys.executable, ROOT / "pdarts.py", "search", "--preset", "demo", *options, *where]
            return subprocess.Popen(command, stdout=2)  # the log

        def row(what, path, started):
            seconds = time.monotonic() - started
            names = ("log.jsonl", "genotype.json")
            same = {name: (path / name).read_bytes() == (first / name).read_bytes() for name in names}
            return {"search": what, "seconds": seconds, **{f"the first's {name}": same[name] for name in names}}

        def ended(process, expected=0):
            if process.wait() != expected:
                raise Wrong(f"a search ended with status {process.returncode}; expected {expected} (see the log)")

        right = True
        for what, path in ("first", first), ("second", second):
            started = time.monotonic()
            ended(start("--out", path))
            yield "", (last := row(what, path, started))
            right = right and all(last.values())
        started = time.monotonic()
        process = start("--out", stopped)
        log = stopped / "log.jsonl"
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 3):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)  # after three epochs, within one
        ended(process, 128 + signal.SIGINT)
        lines = len(log.read_text().splitlines())
        ended(start("--resume", stopped))
        yield "", (last := row(f"stopped by SIGINT after {lines} epochs and resumed", stopped, started))
        if not (right and all(last.values())):
            raise Wrong("the searches have different results; expected the same bytes")


# --- 10: steps of an evaluation ---------------------------------------------------------------------------------------


def evaluation_steps(args, device):
    (batch,) = batches(1, args.batch, device)
    problems = []
    for channels, cells in args.networks[-1:]:
        for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
            config, rows = pdarts.EvaluateConfig(channels=channels, depth=cells, dtype=dtype), []
            sides = evaluation_sides(config, device, args.official if dtype == "float32" else None)
            for name in sorted(sides, key=lambda name: name in ("ours", "graph")):  # ours last: see `sides`
                if name == "ours" and dtype == "float32":
                    distances = verify_evaluation(config, *(t[:8] for t in batch), args.official)
                    yield "verified: relative distances of ours in float64 from", distances
                for result in measured(args, device, functools.partial(sides[name], *batch), ("weights",)):
                    problems += [f"{name}: {result['problem']}"] if "problem" in result else []
                    rows.append({"side": name, **step_row(result)})
                    for r in rows:
                        r["to ours"] = ratio_to_ours(r, rows)
                    yield f"C = {channels}, {cells} cells, {dtype}", rows[-1]
    raise_if_any(problems)
