"""The report of a GPU: `python -m harness.measure gpu --out DIR [--official DIR] [--minutes 30]`.

    1 versions and device            5 layouts of convolutions       9 a search again, and resumed
    2 build of the extension         6 steps of a search            10 steps of an evaluation
    3 operators against float64      7 a whole search, projected
    4 captured steps                 8 the mixed operation

Each part runs in a process of its own with a time limit, so that one that fails, hangs or crashes does not stop the
others. DIR/report.md and report.json are written after each part and hold its measurements, however it ended;
part-N.log holds its output. `--parts 1 3` runs some only: the results of other parts in DIR stay in the report. Without
a GPU the same command runs on the CPU, small, and names the parts that do not apply.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from harness.devices import pick_device
from harness.files import reason, write_whole
from harness.measure import gpu_checks, gpu_speed
from harness.measure.gpu_checks import GPU_ONLY, NotApplicable, Wrong
from harness.measure.timing import ROOT, header
from pdarts import InputError


class Part(NamedTuple):
    title: str
    minutes: float  # of 30
    run: Callable  # (args, device) -> iterator of (name of a table, row)


PARTS = {
    1: Part("Versions and device", 0.5, gpu_checks.versions),
    2: Part("Build of the extension", 5, gpu_checks.build),
    3: Part("Operators against float64", 2, gpu_checks.correctness),
    4: Part("Captured steps against plain ones", 2, gpu_checks.captured),
    5: Part("Layouts of torch's convolutions", 2, gpu_checks.layouts),
    6: Part("Steps of a search", 5, gpu_speed.steps),
    7: Part("A whole search, projected", 3, gpu_speed.whole_search),
    8: Part("The mixed operation", 4, gpu_speed.mixed_operation),
    9: Part("A demo search again, and resumed", 3, gpu_speed.demo),
    10: Part("Steps of an evaluation", 1.5, gpu_speed.evaluation_steps),
}


def report(args: Namespace) -> int:
    """Run args.parts, one after the other; return 1 if one of them did not end well."""
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
        content["parts"] = dict(sorted(content["parts"].items(), key=lambda item: int(item[0])))
        content |= {key: part.pop(key) for key in ("device", "versions") if key in part}
        write_whole(folder / "report.json", (json.dumps(content, indent=1) + "\n").encode())
        write_whole(folder / "report.md", markdown(content).encode())
        print(f"{part['status']}, {part['seconds']:.0f} s", flush=True)
        well = well and part["status"] in ("done", GPU_ONLY)
    print(folder / "report.md")
    return 0 if well else 1


def run_part(number: int, args: Namespace, folder: pathlib.Path) -> dict:
    """Run a part in a process of its own and return its entry of the report."""
    limit = args.minutes * 60 * PARTS[number].minutes / 30
    path, log = folder / f"part-{number}.json", folder / f"part-{number}.log"
    path.unlink(missing_ok=True)
    given = {name: value for name, value in vars(args).items() if name != "run"}
    options = json.dumps({**given, "parts": [number], "out": str(folder)})
    date, started, ended = time.strftime("%Y-%m-%d %H:%M:%S %z"), time.monotonic(), None
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "harness.measure.gpu_report", options],
            cwd=ROOT,
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
    """Run a part in this process; write the known rows to a file after each row."""
    (number,) = args.parts
    path = pathlib.Path(args.out, f"part-{number}.json")
    result = {"tables": {}}

    def write():
        write_whole(path, json.dumps(finite(result)).encode())

    try:
        device = pick_device(args.device)
        result |= dict(zip(("device", "versions"), header(device)))
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
    """Return the value with text for infinity and nan, for which JSON has no words."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def markdown(content: dict) -> str:
    """Return the report as text."""
    lines = ["# Measurements", "", f"{content.get('device', 'unknown device')}; {content.get('versions', '')}", ""]
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
