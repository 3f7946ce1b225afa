"""The parts of any run: device, images, folder, log, checkpoints, signals, several processes."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import signal
import sys
import threading
import time

import numpy as np
import torch

import pdarts
from harness.checkpoint import Checkpoints, Folder
from harness.data.images import DataSet, load
from harness.devices import deterministic, entered, fused, pick_device, pick_kernels
from harness.distributed import Shared, gather, largest, processes, share_buffers
from harness.files import reason
from harness.progress import Meter
from pdarts import InputError


class Stopped(KeyboardInterrupt):
    """A run was asked to stop (SIGINT, SIGTERM); it has finished its step, and saved its state if it has a folder."""

    def __init__(self, signal_number: int, saved: bool):
        nothing = "" if saved else "; nothing is saved, because it has no folder"
        super().__init__(f"stopped by {signal.Signals(signal_number).name}{nothing}")
        self.signal_number, self.saved = signal_number, saved


END = b"\0"  # no signal has this number
_watching = False  # whether signals are written to the pipe of `_second_signal_ends`

if hasattr(os, "register_at_fork"):  # a Ctrl-C that reaches a process that loads images too must not count twice
    os.register_at_fork(after_in_child=lambda: _watching and signal.set_wakeup_fd(-1))


@contextlib.contextmanager
def _second_signal_ends(numbers):
    """Enter a block in which the second signal of these ends the process, even within one long call.

    Python's handlers wait until the main thread's present call returns. The pipe gets each signal's number at once.
    """
    global _watching
    if not hasattr(os, "register_at_fork"):  # Windows
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch():
        seen = 0
        while (number := os.read(reader, 1)) != END:
            seen += number[0] in numbers
            if seen == 2:
                with contextlib.suppress(Exception):  # signal.signal is for the main thread only
                    ctypes.CDLL(None).signal(number[0], None)
                    os.kill(os.getpid(), number[0])
                os._exit(128 + number[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.set_wakeup_fd(before)
        os.write(writer, END)
        thread.join()
        os.close(reader)
        os.close(writer)


_running = threading.Lock()  # held by the run that is in its block


class Clock:
    """The clock of an epoch."""

    def __init__(self):
        self.started, self.images = time.monotonic(), 0

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def rate(self, images: int) -> float:
        """Add images and return the images per second."""
        self.images += images
        return self.images / max(self.seconds(), 1e-9)


class Run:
    """The common part of a search and an evaluation: device, images, folder, log, checkpoints and signals.

    kind: "search" or "evaluate"; identity: all that decides the result besides settings, data and type of device. Of
    several processes rank 0 reads and writes.
    """

    def __init__(self, kind, config, images, folder: Folder, device, kernels, **identity):
        self.config, self.folder, self.device = config, folder, pick_device(device)
        with entered(self.device):
            self.fused = pick_kernels(kernels, self.device)
        images = load(config).first(config.images) if images is None else images
        if not isinstance(images, DataSet):
            raise InputError(
                f"images is a {type(images).__name__}; expected harness.data.images.Images, such as Images.from_arrays "
                "returns, or harness.data.loaders.Loaders"
            )
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "images"}
        about = {"kind": kind, "data": images.fingerprint(), "device": self.device.type}
        ways = {"kernels": "fused" if self.fused else "plain"}  # which may be others when the run is resumed
        if len({repr(i) for i in gather(about | settings | identity | ways)}) > 1:
            raise InputError("the processes have different settings or data; expected the same on every machine")
        self.checkpoints = Checkpoints(self.folder, about | settings | identity)
        self.log, self.times, self.signal = [], [], 0
        self.state = None if folder.resume is None else self.checkpoints.load(folder.resume)
        self.description, self.changes = _describe(config, images, self.device) | identity | ways, {}
        if self.fused:
            self.description["kernels/csrc"] = fused.build.version()
        self.images = images.to(self.device)

    def shared(self, data: pdarts.Data) -> pdarts.Data:
        """Return the data with loaders of this process's part of every batch."""
        self.loaders = [Shared(loader) for loader in (data.train, data.val) if loader is not None]
        return data._replace(**dict(zip(("train", "val"), self.loaders)))

    def test_accuracies(self, network, limit: int | None = None, top=(1,)) -> list[float | None]:
        """Return for each k of `top` the share of test images whose class is among the k largest logits."""
        batches = self.images.test(limit, processes())
        counts = gather(pdarts.correct_predictions(network, batches, self.config.dtype, top))
        *correct, total = (sum(n) for n in zip(*counts))
        return [n / total if total else None for n in correct]

    @contextlib.contextmanager
    def block(self):
        """Enter a block that leaves the caller's random state, device and signals as they were.

        Within it a signal only sets the flag that `stop_if_asked` looks at. InputError if another thread is in one.
        """
        if not _running.acquire(blocking=False):
            raise InputError(
                "another run of this process is under way, and torch's random state is one for all threads; expected "
                "one run after the other, or each in a process of its own"
            )
        try:
            with self._block():
                yield
        finally:
            _running.release()

    @contextlib.contextmanager
    def _block(self):
        generators = torch.random.fork_rng(range(torch.cuda.device_count()))
        with generators, entered(self.device), deterministic(self.config.deterministic), self._signals():
            yield

    @contextlib.contextmanager
    def _signals(self):
        if threading.current_thread() is not threading.main_thread():
            yield  # the other threads get no signals
            return

        def note(number, _):
            self.signal = number
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with _second_signal_ends(before):
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def time(self, clock, **where):
        """Add an epoch's seconds to the log of times, and the seconds of waiting for its batches."""
        seconds, waited = clock.seconds(), sum(loader.waited for loader in self.loaders)
        self.times.append(where | {"seconds": round(seconds, 3), "waited": round(waited, 3)})
        for loader in self.loaders:
            loader.waited = 0.0
        return seconds

    def begin(self, training) -> dict | None:
        """Load the saved state into the training and return it, or begin the folder of a new run."""
        state, self.state = self.state, None
        if state:
            try:
                pdarts.load_state_dict(training, state["training"])
            except Exception as error:  # whatever a state that lacks something leads to
                raise InputError(
                    f"cannot resume {self.folder.path} ({reason(error)}); expected a checkpoint of this version"
                ) from None
            self.log, self.times = state["log"], state["times"]
        if self.folder.resume:
            self._compare(state)
        if not state or self.changes:
            self.folder.write("config.json", self.description)
        return state

    def _compare(self, state):
        """Note what is not as it was when the run began or was last resumed."""
        if not self.folder.writes:
            return
        before = read_description(self.folder.path)
        self.changes = {
            name: [old, new]
            for name, new in _flat(self.description).items()
            if name in COMPARED and (old := _flat(before).get(name, new)) != new
        }
        self.description["command"] = before.get("command", self.description["command"])
        self.description["resumed"] = before.get("resumed", [])
        if self.changes:
            done = {"epochs_done": len(self.log), "step": state["step"] if state else 0}
            self.description["resumed"] = [*self.description["resumed"], done | {"changed": self.changes}]

    def changed(self) -> list[str]:
        """Return a line for each difference from the process that this one resumes."""
        changes = self.changes.items()
        return [f"changed since the run was left: {name}, from {old} to {new}" for name, (old, new) in changes]

    def meters(self, names: dict[str, str], state: dict | None) -> list[Meter]:
        """Return the meters of an epoch: new ones, or in the state of the interruption."""
        if state and state["meters"]:
            states = state["meters"][processes()[0]]
            return [Meter(*name, of) for name, of in zip(names.items(), states)]
        return [Meter(*name) for name in names.items()]

    def save(self, training, meters=(), **more):
        """Save everything that the run needs to resume; meters: of an epoch that is interrupted."""
        states = gather([meter.state() for meter in meters]) if meters else []
        self.folder.write("log.jsonl", _lines(self.log))
        self.folder.write("times.jsonl", _lines(self.times))
        state = {"training": pdarts.state_dict(training), "step": training.step, "meters": states, **more}
        # The checkpoint last: whoever is killed before it does this epoch again.
        self.checkpoints.save(state | {"log": self.log, "times": self.times})

    def stop_if_asked(self, training, meters, **more):
        """Save the state and raise `Stopped` if any process got a signal."""
        if number := largest(self.signal):
            share_buffers(training.network)
            self.save(training, meters, **more)
            raise Stopped(number, self.folder.path is not None)


# What may change a result without deciding it: these differences are shown when a run is resumed.
COMPARED = "python torch numpy threads processes device kernels kernels/csrc pdarts.py path".split()


def _flat(description: dict) -> dict:
    return description | description.get("versions", {})


def read_description(folder: pathlib.Path) -> dict:
    """Return the content of the config.json in the folder of a run."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("versions", {}), dict):
            raise ValueError("no object with the settings")
        return content
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file} ({reason(error)}); expected the settings of a run") from None


def _lines(records: list[dict]) -> str:
    """Return the records as lines of JSON, the same bytes in equal runs."""
    return "".join(json.dumps(record) + "\n" for record in records)


def _describe(config, images: DataSet, device: torch.device) -> dict:
    """Return the content of config.json."""

    def numbers(values):
        return None if values is None else torch.as_tensor(values).tolist()

    return {
        "settings": dataclasses.asdict(config),
        "data": images.name,
        "path": images.path and os.path.abspath(images.path),  # to resume from any folder
        "options": getattr(images, "options", {}),
        "classes": list(images.classes or map(str, range(images.num_classes))),
        "shape": list(images.size),
        "mean": numbers(images.mean),
        "std": numbers(images.std),
        "largest": images.largest,
        "device": str(device) if device.type != "cuda" else f"{device}: {torch.cuda.get_device_name(device)}",
        "processes": processes()[1],
        "threads": torch.get_num_threads(),  # torch adds up in another order with another number
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "pdarts.py": hashlib.sha256(pathlib.Path(pdarts.__file__).read_bytes()).hexdigest(),
        "command": sys.argv,
    }
