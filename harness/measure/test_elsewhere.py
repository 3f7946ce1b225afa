"""Tests of harness/measure/elsewhere.py: rows of other processes and tables, with a Python that only pretends."""

from harness.measure import __main__ as measure
from harness.measure import counters

PRETENDS = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*"==6"*) echo "too new"; exit 1 ;;
  "-m pip "*) ;;
  *thop*) echo "remark"; echo 'row: {"counter": "thop", "millions": "5|6"}' ;;
  *fvcore*) echo "cannot count"; exit 3 ;;
esac
"""


def test_a_table_has_a_row_of_each_process_and_names_what_was_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(counters, "PACKAGES", ("thop==5", "fvcore==6"))
    monkeypatch.setattr(counters, "COUNTERS", ("thop", "fvcore"))
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PRETENDS)
    python.chmod(0o755)
    assert measure.main(["counters", "--out", str(out), "--python", str(python)]) == 0
    text = capsys.readouterr().out
    assert "| counter | millions | row | result |\n| --- | --- | --- | --- |\n| thop | 5/6 |  |  |\n" in text
    assert "|  |  | fvcore | exit status 3: cannot count |" in text
    assert f"pip could not install fvcore==6, see {out}/pip.log" in text and "too new" in (out / "pip.log").read_text()
    assert "remark" in (out / "counters.log").read_text()
