"""What a person with a GPU for half an hour runs: `python bench.py gpu --out DIR [--official DIR] [--minutes 30]`.

    1 versions and device            4 captured steps                7 a whole search, projected
    2 build of the extension         5 layouts of convolutions       8 the mixed operation
    3 operators against float64      6 steps of a search             9 a search again, and resumed

Each part runs in a process of its own with a time limit, so that one that fails, hangs or crashes does not stop the
others. DIR/report.md and report.json are written after each part and hold what it measured, however it ended;
part-N.log is what it printed. `--parts 1 3` runs some only: what other parts left in DIR before stays in the report.
Without a GPU the same command runs on the CPU, small, and says what does not apply.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import torch

import bench
import pdarts
from harness import gpu_checks
from harness.devices import pick_device, pick_kernels
from harness.files import reason, write_whole
from harness.gpu_checks import NotApplicable, Wrong
from pdarts import InputError

GPU_ONLY = "not applicable without a GPU"

# --- 6, 7: steps of a search ------------------------------------------------------------------------------------------


def sides(args, device, config, batch):
    """{name: stage -> function that builds it}; None for what needs a GPU where there is none."""

    def ours(**ways):
        return lambda stage: functools.partial(bench.OurStep, stage, config, *batch, **ways)

    def official(stage):
        return functools.partial(bench.OfficialStep, args.official, stage, config, *batch)

    on_cuda = device.type == "cuda"
    return {
        # What is not ours first: an error in a kernel may end the use of the GPU for this process.
        **({"official": official} if args.official and config.dtype == "float32" else {}),
        "plain": ours(fused=False),
        "plain, graph": ours(fused=False, graph=True) if on_cuda else None,
        "ours": ours(recompute=False),
        "ours, graph": ours(recompute=False, graph=True) if on_cuda else None,
        "ours, recompute": ours(recompute=True),
        "ours, recompute, graph": ours(recompute=True, graph=True) if on_cuda else None,
    }


def measured(args, device, make, stage, kinds):
    """Rows of one side in one stage, or one with the reason why there are none."""
    try:
        yield from bench.measure_steps({"": make(stage)}, kinds, device, args.seconds, args.rounds)
    except Exception as error:
        yield {"problem": reason(error)}
        traceback.print_exc()
    gc.collect()  # what the failed side held


def steps(args, device):
    config = dataclasses.replace(pdarts.CIFAR10, channels=args.channels)
    (batch,) = bench.batches(1, args.batch, device)
    problems, rows = [], []
    for name, make in sides(args, device, config, batch).items():
        for stage in args.stages:
            if name == "ours":  # as late as that: see `sides`
                loss, gradients = bench.verify_step(stage, config, *batch)
                distances = {"loss": loss, "gradients": gradients}
                yield "verified: relative distances of ours from plain", {"stage": stage, **distances}
            about = {"stage": stage, "step of": None, "side": name}
            if make is None:
                yield f"stage {stage}", about | {"problem": GPU_ONLY}
                continue
            for result in measured(args, device, make, stage, ("weights", "alphas")):
                problem = result.get("problem")
                problems += [f"{name}: {problem}"] if problem else []
                row = about | {
                    "step of": result.get("step"),
                    "ms": milliseconds(result.get("seconds")),
                    "+- ms": milliseconds(result.get("spread")),
                    "to ours": None,
                    "kept MB/image": megabytes(result.get("kept_per_image")),
                    "peak MB": megabytes(result.get("peak")),
                    "reserved MB": megabytes(result.get("reserved")),
                    "problem": problem,
                }
                rows.append(row)
                for r in rows:
                    r["to ours"] = ratio_to_ours(r, rows)
                yield f"stage {stage}", row
    if problems:
        raise Wrong(f"{len(problems)} of the sides cannot be measured: {problems[0]}")


def milliseconds(seconds):
    return None if seconds is None else 1e3 * seconds


def megabytes(size):
    return None if size is None else size / 1e6


def ratio_to_ours(row, rows):
    base = [r["ms"] for r in rows if r["side"] == "ours" and all(r[k] == row[k] for k in ("stage", "step of"))]
    return row["ms"] / base[0] if base and base[0] and row["ms"] else None


def whole_search(args, device):
    """Projected from steps on one batch: augmentation, checkpoints and tests are not in it."""
    (batch,) = bench.batches(1, args.batch, device)
    paper, problems = pdarts.CIFAR10, []
    number = math.ceil(25000 / args.batch)
    for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
        config = dataclasses.replace(paper, channels=args.channels, dtype=dtype)
        every = sides(args, device, config, batch)
        for name in ("official", "plain", "plain, graph", "ours", "ours, graph"):
            if (make := every.get(name)) is None:
                continue
            hours, whole = 0.0, True
            for stage in args.stages:
                seconds = {}
                for result in measured(args, device, make, stage, ("weights", "both")):
                    if "problem" in result:
                        problems.append(f"{name}: {result['problem']}")
                        whole = False
                    else:
                        seconds[result["step"]] = result["seconds"]
                if len(seconds) == 2:
                    epochs = {"weights": paper.warmup, "both": paper.epochs - paper.warmup}
                    hours += sum(seconds[which] * number * epochs[which] for which in seconds) / 3600
                ms = {f"{which} (ms)": milliseconds(seconds.get(which)) for which in ("weights", "both")}
                yield "steps", {"dtype": dtype, "side": name, "stage": stage, **ms}
            stages = " ".join(map(str, args.stages))
            yield "projected hours", {"dtype": dtype, "side": name, "stages": stages, "hours": hours if whole else None}
    if problems:
        raise Wrong(f"{len(problems)} of the sides cannot be measured: {problems[0]}")


# --- 8: the mixed operation -------------------------------------------------------------------------------------------


def mixed_operation(args, device):
    pick_kernels("on", device)
    bandwidth = bench.copy_bandwidth(device)
    on_cuda = device.type == "cuda"
    for dtype in ("float32", "bfloat16") if on_cuda else ("float32",):
        bench.verify(device, getattr(torch, dtype), False)
        compiled = args.compile and on_cuda and dtype == "float32"  # it takes minutes
        settings = device, getattr(torch, dtype), False, args.batch, compiled, args.seconds / 5, bandwidth
        for r in bench.operation_rows(*settings):
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
    """A search of the demo, each a process of its own: twice, and once stopped by SIGINT and resumed."""
    options = ["--deterministic", "--device", str(device)]
    if device.type == "cpu":  # small
        sizes = {"images": 64, "epochs": 2, "warmup": 1, "batch": 16, "channels": min(args.channels, 4)}
        options += ["--cells", *"333", *(str(part) for name, value in sizes.items() for part in (f"--{name}", value))]
    with tempfile.TemporaryDirectory() as folder:
        first, second, stopped = (pathlib.Path(folder, name) for name in ("first", "second", "stopped"))

        def start(*where):
            command = [sys.executable, bench.HERE / "pdarts.py", "search", "--preset", "demo", *options, *where]
            return subprocess.Popen(command, stdout=sys.stderr)

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


# --- The report -------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    title: str
    minutes: float  # of 30
    run: Callable  # (args, device) -> iterator of (name of a table, row)


PARTS = {
    1: Part("Versions and device", 1, gpu_checks.versions),
    2: Part("Build of the extension", 5, gpu_checks.build),
    3: Part("Operators against float64", 2, gpu_checks.correctness),
    4: Part("Captured steps against plain ones", 2, gpu_checks.captured),
    5: Part("Layouts of torch's convolutions", 2, gpu_checks.layouts),
    6: Part("Steps of a search", 6, steps),
    7: Part("A whole search, projected", 3, whole_search),
    8: Part("The mixed operation", 6, mixed_operation),
    9: Part("A demo search again, and resumed", 3, demo),
}


def report(args: Namespace) -> int:
    """Runs args.parts, one after the other; returns 1 if one of them did not end well."""
    folder = pathlib.Path(args.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    content = {"parts": {}}
    if (folder / "report.json").exists():
        try:
            content = json.loads((folder / "report.json").read_text())
            markdown(content)
        except Exception as error:  # whatever another file of this name leads to
            raise InputError(f"{folder}/report.json is no report ({reason(error)}); expected another --out") from None
    if args.official:
        args.official = str(pathlib.Path(args.official).resolve())
    well = True
    for number in sorted(set(args.parts)):
        print(f"{number}  {PARTS[number].title} ...", end=" ", flush=True)
        part = run_part(number, args, folder)
        content["parts"][str(number)] = part
        content["parts"] = dict(sorted(content["parts"].items()))
        content |= {key: part.pop(key) for key in ("device", "versions") if key in part}
        write_whole(folder / "report.json", (json.dumps(content, indent=1) + "\n").encode())
        write_whole(folder / "report.md", markdown(content).encode())
        print(f"{part['status']}, {part['seconds']:.0f} s", flush=True)
        well = well and part["status"] in ("done", GPU_ONLY)
    print(folder / "report.md")
    return 0 if well else 1


def run_part(number: int, args: Namespace, folder: pathlib.Path) -> dict:
    """What the report holds of a part, which runs in a process of its own."""
    limit = args.minutes * 60 * PARTS[number].minutes / 30
    path, log = folder / f"part-{number}.json", folder / f"part-{number}.log"
    path.unlink(missing_ok=True)
    options = json.dumps({**vars(args), "parts": [number], "stages": list(args.stages), "out": str(folder)})
    date, started, ended = time.strftime("%Y-%m-%d %H:%M:%S %z"), time.monotonic(), None
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "harness.gpu_report", options],
            cwd=bench.HERE,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end it with all that it started
        )
        try:
            ended = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if ended is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    part = {"title": PARTS[number].title, "tables": {}}
    part |= json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    if ended is None:
        part["status"] = f"ended by its limit of {limit:.4g} s"
    elif ended < 0:
        part["status"] = f"failed: ended by {signal.Signals(-ended).name}"
    elif ended > 0 and "status" not in part:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        part["status"] = f"failed: {lines[-1].strip() if lines else f'exit status {ended}'}"
    return part | {"seconds": time.monotonic() - started, "limit": limit, "date": date, "command": args.command}


def measure_part(args: Namespace):
    """A part, in its own process: leaves in a file what is known after each row."""
    (number,) = args.parts
    path = pathlib.Path(args.out, f"part-{number}.json")
    result = {"tables": {}}

    def write():
        write_whole(path, json.dumps(finite(result)).encode())

    try:
        device = pick_device(args.device)
        result |= dict(zip(("device", "versions"), bench.header(device)))
        write()
        for table, row in PARTS[number].run(args, device):
            print(table, row, flush=True)
            result["tables"].setdefault(table, []).append(row)  # which may be filled in later
            write()
        result["status"] = "done"
    except NotApplicable:
        result["status"] = GPU_ONLY
    except Exception as error:
        traceback.print_exc()
        plain = isinstance(error, (InputError, Wrong))
        result["status"] = f"failed: {' '.join(str(error).split()) if plain else reason(error)}"
    write()


def finite(value):
    """JSON has no words for infinity and nan."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def markdown(content: dict) -> str:
    """The report as text."""
    lines = ["# What was measured", "", f"{content.get('device', 'unknown device')}; {content.get('versions', '')}", ""]
    parts = content["parts"]
    summary = [
        {"part": f"{n}. {p['title']}", "result": p["status"], "seconds": p["seconds"], "limit": p["limit"]}
        for n, p in parts.items()
    ]
    lines += table(summary)
    for number, part in parts.items():
        lines += ["", f"## {number}. {part['title']}", "", f"{part['date']}: `{part['command']}`: {part['status']}"]
        for name, rows in part["tables"].items():
            lines += ["", *([f"**{name}**", ""] if name else []), *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: list[dict]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in columns if any(row.get(key) is not None for row in rows)]
    cells = [[text(row.get(key)) for key in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def text(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    measure_part(Namespace(**json.loads(sys.argv[1])))
