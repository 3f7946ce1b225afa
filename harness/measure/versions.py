"""The tests on several versions of torch, each in an environment of its own: `python -m harness.measure versions`."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

from harness.measure.timing import ROOT, commit

VERSIONS = ("2.10.0", "2.11.0", "2.13.0", "newest")
COLUMNS = ("torch", "Python", "tests", "passed", "failed", "skipped", "minutes", "date", "commit")


def versions(args):
    """The tests on several versions of torch, each in a fresh environment, and a table of the results.

    pip installs each version, and the other packages as requirements.txt pins them; the kernels are compiled for it.
    An environment takes up to 5 GB in DIR and is deleted after its tests. DIR keeps the output of each version, and
    rows.jsonl the rows of all calls: the table has the last row of each version of torch and Python. `--tests` takes
    arguments of pytest, such as `--tests kernels test_pdarts.py`. With PIP_EXTRA_INDEX_URL pip finds builds of torch
    for the CPU only, which are smaller.
    """
    out = pathlib.Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for version in args.torch:
        row = run_tests(version, args.python, args.tests, out)
        rows.append(row)
        with open(out / "rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    kept = map(json.loads, (out / "rows.jsonl").read_text().splitlines())
    print_table({(row["torch"], row["Python"]): row for row in kept}.values())
    return int(any(row["failed"] or not row["passed"] for row in rows))


def print_table(rows):
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for row in sorted(rows, key=lambda row: [int(n) for n in row["torch"].partition("+")[0].split(".")]):
        print("| " + " | ".join(str(row[name]) for name in COLUMNS) + " |")


def run_tests(version, python, tests, out):
    """Install `version` of torch, run the tests, and return their row."""
    package = "torch" if version == "newest" else f"torch=={version}"
    others = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("torch")]
    log = out / f"torch-{version}.log"
    began = datetime.datetime.now()
    row = {"torch": version, "Python": "", "tests": " ".join(tests) or "all", "commit": commit()}
    row |= {"passed": 0, "failed": 0, "skipped": 0}
    with tempfile.TemporaryDirectory(dir=out) as folder, open(log, "w") as output:
        ours = pathlib.Path(folder, "environment", "bin", "python")
        report = pathlib.Path(folder, "report.xml")
        environment = os.environ | {"TORCH_EXTENSIONS_DIR": os.path.join(folder, "extensions")}

        def run(*command):
            print("+", *command, file=output, flush=True)
            return subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode == 0

        print(f"torch {version}: installs and runs the tests, see {log}", file=sys.stderr)
        if not run(python, "-m", "venv", ours.parents[1]):
            return row | minutes(began)
        if run(ours, "-m", "pip", "install", "--quiet", "--no-compile", package, *others, "pillow"):
            about = "import platform, torch; print(torch.__version__, platform.python_version())"
            answer = subprocess.run([ours, "-c", about], capture_output=True, text=True, check=True)
            row |= dict(zip(("torch", "Python"), answer.stdout.split()))
            run(ours, "-m", "pytest", "-ra", "-p", "no:cacheprovider", f"--junitxml={report}", *tests)
            if report.exists():
                row |= counts(report)
    return row | minutes(began)


def counts(report):
    """Return the numbers of a report in the format of JUnit."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    ran, failures, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return {"passed": ran - failed - skipped, "failed": failed, "skipped": skipped}


def minutes(began):
    now = datetime.datetime.now()
    return {"minutes": round((now - began).total_seconds() / 60, 1), "date": now.date().isoformat()}
