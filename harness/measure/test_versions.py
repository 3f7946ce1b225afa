"""Tests of the tests on several versions of torch, with a Python that only pretends."""

import json

from harness.measure import __main__ as measure

PRETENDS = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*" torch==2.9.0 "*) echo "too old"; exit 1 ;;
  "-c "*) echo "2.10.0+cpu 3.11.7" ;;
  "-m pytest "*)
    for argument; do
      case $argument in
        --junitxml=*)
          echo '<a><testsuite tests="9" failures="1" errors="1" skipped="FOUND"/></a>' > "${argument#*=}" ;;
      esac
    done
    echo "in $TORCH_EXTENSIONS_DIR"; exit 1 ;;
esac
"""


def test_the_table_has_the_last_row_of_each_version_and_the_logs_are_kept(tmp_path, capsys):
    python, out = tmp_path / "python", tmp_path / "out"

    def run(version, skipped):
        python.write_text(PRETENDS.replace("FOUND", str(skipped)))
        python.chmod(0o755)
        arguments = ["versions", "--out", str(out), "--python", str(python), "--torch", version]
        return measure.main([*arguments, "--tests", "-k", "fast"]), capsys.readouterr().out.splitlines()

    assert run("2.10.0", 0)[0] == 1  # for two tests have failed
    assert run("2.10.0", 4)[0] == 1
    status, (head, _, *rows) = run("2.9.0", 0)
    assert status == 1 and head == "| torch | Python | tests | passed | failed | skipped | minutes | date | commit |"
    assert [row.split(" | ")[:6] for row in rows] == [
        ["| 2.9.0", "", "-k fast", "0", "0", "0"],
        ["| 2.10.0+cpu", "3.11.7", "-k fast", "3", "2", "4"],
    ]
    assert "too old" in (out / "torch-2.9.0.log").read_text()
    log = (out / "torch-2.10.0.log").read_text()
    assert "torch==2.10.0 numpy==" in log and "-k fast" in log and f"in {out}/" in log
    assert sorted(path.name for path in out.iterdir()) == ["rows.jsonl", "torch-2.10.0.log", "torch-2.9.0.log"]
    assert [json.loads(line)["skipped"] for line in (out / "rows.jsonl").read_text().splitlines()] == [0, 4, 0]
