"""Tests of what a run shows: meters, the live line, and times in words."""

import math
import sys

import pytest
import torch

from harness.progress import Meter, Progress, duration
from pdarts import InputError


def meter_of(*steps, state=(0, 0.0, 0, 0)):
    meter = Meter("training loss", "stage 1, epoch 2", state)
    for loss, correct, size in steps:
        meter.update(torch.tensor(loss), torch.tensor(correct), size)
    return meter


def test_a_meter_weighs_each_step_by_its_images():
    assert meter_of().result() == (None, None)
    assert meter_of((1.0, 4, 4), (4.0, 0, 2)).result() == (2.0, pytest.approx(4 / 6))
    steps = [(float(i), i, 10) for i in range(10)] * 5  # more than it keeps unread
    assert meter_of(*steps).result() == meter_of(*steps).result(own=True) == (4.5, 0.45)


def test_a_meter_goes_on_from_its_state():
    steps = [(0.1 * i, i % 3, 4) for i in range(30)]
    before = meter_of(*steps[:7])
    assert meter_of(*steps[7:], state=before.state()).state() == meter_of(*steps).state()
    assert before.state() == before.state()  # reading changes nothing


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_step(loss):
    meter = meter_of((1.0, 1, 2), (1.0, 1, 2), (loss, 0, 2))
    message = rf"the training loss became {loss} in stage 1, epoch 2, step 2; expected a finite number \(a lower lr may"
    with pytest.raises(InputError, match=message):
        meter.read()


def shown(monkeypatch, capsys, columns, text="stage 1/2", work=(100.0, 300.0), done=50.0):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(list(work), show=True)
    progress.start -= 50  # seconds, for what is done
    progress.step(0, text, done, meter_of((1.5, 3, 4)), 12.3)
    return progress, capsys.readouterr().out


def test_live_line_shows_the_time_left_for_the_stage_and_the_whole(monkeypatch, capsys):
    progress, line = shown(monkeypatch, capsys, 200)
    assert line.startswith("\r") and not line.endswith("\n")
    assert "stage 1/2  loss 1.500  acc  75.0%  12 images/s  left: stage 50 s, all 5 min 50 s" in line
    progress.step(0, "too soon", 1.0, meter_of((1.5, 3, 4)), 12.3)
    assert capsys.readouterr().out == ""
    progress.line("stage 1/2  done")
    written = capsys.readouterr().out
    assert written.startswith("\rstage 1/2  done ") and written.endswith(" \n") and len(written) == len(line) + 1
    assert shown(monkeypatch, capsys, 200, work=[100.0])[1].endswith("left: 50 s")


def test_live_line_is_never_longer_than_the_terminal(monkeypatch, capsys):
    assert len(shown(monkeypatch, capsys, 30)[1]) == len("\r") + 29


def test_time_left_follows_from_what_this_process_did(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    progress = Progress([400.0], show=True)
    progress.resume(300.0)
    progress.start -= 50
    progress.step(0, "epoch 3", 50.0, meter_of((1.5, 3, 4)), 12.3)
    assert capsys.readouterr().out.endswith("left: 50 s")


def test_elsewhere_only_lines_are_shown_and_only_if_asked_for(capsys):
    for show in True, False:
        progress = Progress([1.0], show)
        progress.step(0, "live", 0.5, meter_of((1.5, 3, 4)), 12.3)
        progress.line("a line")
        assert capsys.readouterr().out == "a line\n" * show


def test_durations_in_words():
    seconds = -1, 0.9, 59.9, 60, 3599, 3600, 3700, 360000
    words = ["0 s", "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "1 h 01 min", "100 h 00 min"]
    assert [duration(s) for s in seconds] == words
