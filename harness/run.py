"""The parts of any run: device, images, folder, log, checkpoints, signals, several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import platform
import signal
import sys
import threading
import time

import numpy as np
import torch

import pdarts
from harness.checkpoint import Checkpoints, Folder, folder_of
from harness.data.images import DataSet, load
from harness.devices import deterministic, entered, pick_device, pick_kernels
from harness.distributed import Shared, gather, largest, processes, share_buffers
from harness.progress import Meter
from pdarts import InputError


class Stopped(KeyboardInterrupt):
    """A run was asked to stop (SIGINT, SIGTERM); it has finished its step, and saved its state if it has a folder."""

    def __init__(self, signal_number: int, saved: bool):
        nothing = "" if saved else "; nothing is saved, because it has no folder"
        super().__init__(f"stopped by {signal.Signals(signal_number).name}{nothing}")
        self.signal_number, self.saved = signal_number, saved


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

    def __init__(self, kind, config, images, out, device, kernels, resume, **identity):
        path = folder_of(out, resume)
        Folder(path, resume is not None)  # is refused before anything that takes time
        self.config, self.resume, self.device = config, resume, pick_device(device)
        with entered(self.device):
            self.fused = pick_kernels(kernels, self.device)
        images = load(config).first(config.images) if images is None else images
        if not isinstance(images, DataSet):
            raise InputError(
                f"images is a {type(images).__name__}; expected harness.data.images.Images, such as Images.from_arrays "
                "returns, or harness.data.loaders.Loaders"
            )
        identity |= {"kernels": "fused" if self.fused else "plain"}
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "images"}
        about = {"kind": kind, "data": images.fingerprint(), "device": self.device.type}
        if len({repr(i) for i in gather(about | settings | identity)}) > 1:
            raise InputError("the processes have different settings or data; expected the same on every machine")
        self.folder = Folder(path if processes()[0] == 0 else None, resume is not None and processes()[0] == 0)
        self.checkpoints = Checkpoints(self.folder, about | settings | identity)
        self.log, self.times, self.signal = [], [], 0
        self.state = None if resume is None else self.checkpoints.load(resume)
        self.description = _describe(config, images, self.device) | identity
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

        Within it a signal only sets the flag that `stop_if_asked` looks at.
        """
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
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once, however a step hangs

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
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
            pdarts.load_state_dict(training, state["training"])
            self.log, self.times = state["log"], state["times"]
        else:
            self.folder.write("config.json", self.description)
        return state

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
            raise Stopped(number, self.checkpoints.folder.path is not None or processes()[0] > 0)


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
        "path": images.path,
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
