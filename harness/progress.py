"""The lines that a run prints while it trains."""

from __future__ import annotations

import math
import shutil
import sys
import time

import torch

from harness.distributed import gather, processes
from pdarts import InputError


class Meter:
    """Mean loss and accuracy over an epoch; messages name the loss, `what`, and the place in the run, `where`.

    Numbers stay on the device for some steps, so that a GPU need not be waited for in each.
    """

    def __init__(self, what: str, where: str, state=(0, 0.0, 0, 0)):
        self.what, self.where = what, where
        self.steps, self.loss, self.correct, self.images = state  # loss: its sum over the images
        self._unread = []

    def update(self, loss, correct, images: int):
        """Add a step: its mean loss and correct predictions, tensors on the device, and its number of images."""
        self._unread.append((loss, correct, images))
        if len(self._unread) == 20:
            self.read()

    def read(self):
        """Take the numbers from the device; InputError if a loss is not finite."""
        if self._unread:
            losses, corrects, images = zip(*self._unread)
            for loss, correct, n in zip(torch.stack(losses).tolist(), torch.stack(corrects).tolist(), images):
                if not math.isfinite(loss):
                    raise InputError(
                        f"the {self.what} became {loss} in {self.where}, step {self.steps}; expected a finite number "
                        "(a lower lr may help)"
                    )
                self.steps, self.loss = self.steps + 1, self.loss + loss * n
                self.correct, self.images = self.correct + correct, self.images + n
        self._unread = []

    def state(self) -> tuple:
        self.read()
        return self.steps, self.loss, self.correct, self.images

    def result(self, own=False):
        """Return (mean loss, accuracy) of all processes, or of this one only; (None, None) if there were no steps."""
        _, loss, correct, images = self.state()
        parts = [(loss, correct, images)] if own else gather((loss, correct, images))
        loss, correct, images = (sum(values) for values in zip(*parts))
        return (loss / images, correct / images) if images else (None, None)


class Progress:
    """One live line on a terminal, one line per epoch elsewhere, with the time that is left.

    work: of each stage, in any unit; the time left follows from the time of a unit so far. Of several processes only
    rank 0 shows anything.
    """

    def __init__(self, work: list[float], show: bool):
        self.work, self.show = work, show and processes()[0] == 0
        self.live = self.show and sys.stdout.isatty()
        self.start, self.done, self.before, self.last, self.length = time.monotonic(), 0.0, 0.0, 0.0, 0

    def resume(self, work):
        """Note that `work` was done before this process started."""
        self.done = self.before = work

    def step(self, stage, text, work, meter, images_per_second):
        """Show the live line after a step that took `work`, at most five times a second."""
        self.done += work
        now = time.monotonic()
        if not self.live or now - self.last < 0.2:
            return
        self.last = now
        pace = (now - self.start) / (self.done - self.before)
        stage_left = pace * (sum(self.work[: stage + 1]) - self.done)
        whole_left = pace * (sum(self.work) - self.done)
        left = f"left: {duration(whole_left)}"
        if len(self.work) > 1:
            left = f"left: stage {duration(stage_left)}, all {duration(whole_left)}"
        loss, accuracy = meter.result(own=True)
        self._write(f"{text}  loss {loss:.3f}  acc {accuracy:6.1%}  {images_per_second:.0f} images/s  {left}", end="")

    def line(self, text):
        if self.show:
            self._write(text, end="\n")

    def _write(self, text, end):
        erase = "\r" if self.live else ""
        if self.live:  # never longer than the terminal, or \r would not erase it
            text = text[: shutil.get_terminal_size().columns - 1]
        print(f"{erase}{text:<{self.length}}", end=end, flush=True)
        self.length = len(text) if self.live and not end else 0


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def reading():
    """Return a function of (images read, all images) that shows a live line, from its second second on."""
    started, live = time.monotonic(), sys.stdout.isatty() and processes()[0] == 0

    def progress(done, total):
        passed = time.monotonic() - started
        if live and passed > 1 and done:
            left = "" if done < total else " " * 30 + "\n"
            print(f"\rreading images: {done} of {total}, {done / passed:.0f} a second{left}", end="", flush=True)

    return progress
