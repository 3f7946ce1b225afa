"""Measurements of other tools, each in a process of an environment that has their packages at pinned versions."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
MARK = "row: "  # before the row, in what a process prints
LIMIT = 3600  # seconds of a process


def environment(out: pathlib.Path, packages, python: str) -> tuple[pathlib.Path, list[str]]:
    """Make an environment in the folder, unless it is there; return its Python and the packages that pip refused."""
    ours, log = out / "environment" / "bin" / "python", open(out / "pip.log", "a")
    if not ours.exists():
        subprocess.run([python, "-m", "venv", ours.parents[1]], check=True)
    refused = []
    for some in packages:
        print(f"installs {some}", file=sys.stderr)
        command = [ours, "-m", "pip", "install", "--quiet", "--no-compile", *some.split()]
        if subprocess.run(command, stdout=log, stderr=log).returncode:
            refused.append(some)
    return ours, refused


def run(python, module: str, function: str, *arguments, log) -> list[dict]:
    """Return the rows of module.function(*arguments) in a process of its own, or one that says why there are none."""
    print(f"{function} {arguments[0]}", file=sys.stderr)
    command = [python, "-W", "ignore", "-m", "harness.measure.elsewhere", module, function, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=LIMIT,
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        output, why = done.stdout, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, why = str(error.stdout), f"no result in {LIMIT} s"
    log.write(f"+ {command}\n{output}\n")
    log.flush()
    rows = [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]
    last = ([line for line in output.splitlines() if line.strip()] or [""])[-1]
    return rows or [{"row": arguments[0], "result": f"{why}: {last:.200}"}]


def print_table(rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(name, "")).replace("|", "/") for name in columns) + " |")


def measure(args, module: str, tables: dict[str, list], *more):
    """Print a table for each function of the module and the arguments of its rows."""
    out = pathlib.Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    packages = importlib.import_module(f"harness.measure.{module}").PACKAGES
    python, refused = environment(out, packages, args.python)
    with open(out / f"{module}.log", "a") as log:
        for function, names in tables.items():
            print_table([row for name in names for row in run(python, module, function, name, *more, log=log)])
    for some in refused:
        print(f"pip could not install {some}, see {out / 'pip.log'}")


if __name__ == "__main__":
    module, function, *arguments = sys.argv[1:]
    found = getattr(importlib.import_module(f"harness.measure.{module}"), function)(*arguments)
    for row in found if isinstance(found, list) else [found]:
        print(f"\n{MARK}{json.dumps(row)}", flush=True)
