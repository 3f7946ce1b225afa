"""Custom data sets: any loader, or torch's DataLoader in a way that lets a run resume with the same bits.

    train, val = Batches(half, batch=96, workers=4), Batches(other_half, batch=96, workers=4)
    data = Loaders(train, val, test_batches=DataLoader(test_set, 256), num_classes=10)
    search(SEARCH_PRESETS["cifar10"], data, out="runs/own")

A loader has a length and `epoch(seed, start)`, see pdarts.Data. Of several processes each takes its part of every
batch, see harness.distributed.Shared; a loader with `part(rank, number)`, as `Batches` has it, loads that alone.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import random
import signal
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import default_collate

import pdarts
from harness.distributed import batches_for
from pdarts import InputError, seed_of


def as_it_is(batch, device):
    """Return a pair of tensors on the device; anything else is left to `check_batch`."""
    tensors = isinstance(batch, (tuple, list)) and all(isinstance(part, torch.Tensor) for part in batch)
    return tuple(part.to(device, non_blocking=True) for part in batch) if tensors else batch


class Batches:
    """Batches of a map-style dataset, by torch's DataLoader, in a new order every epoch.

    dataset: `dataset[i]` is (image, label), a float tensor [C,H,W], normalised and augmented, and a class index.
    workers: processes that load; 0: this one. finish: (batch as collated, device) -> images [N,C,H,W], labels [N].
    The random numbers that `dataset[i]` draws from torch, numpy or `random` follow from the seed of the epoch and the
    place of the image in it: neither the number of workers nor an interruption changes a bit. `part` is for several
    processes. A last batch that leaves a process a single image is left out.
    """

    def __init__(self, dataset, batch: int, workers: int = 0, finish: Callable = as_it_is, collate=default_collate):
        self.dataset, self.batch, self.workers = dataset, batch, workers
        self.finish, self.collate, self.device = finish, collate, torch.device("cpu")
        self.rank, self.number = 0, 1
        if not hasattr(dataset, "__len__"):
            raise InputError(f"dataset is a {type(dataset).__name__}; expected one with a length and dataset[i]")
        len(self)  # is refused now if it is

    def part(self, rank: int, number: int) -> Batches:
        """Return the loader of one process: each number-th image of every batch, the same number in all processes."""
        mine = copy.copy(self)
        mine.rank, mine.number = rank, number
        len(mine)  # is refused now if it is
        return mine

    def to(self, device) -> Batches:
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def __len__(self):
        return batches_for(len(self.dataset), self.batch, self.number)

    def epoch(self, seed: int, start: int = 0):
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed)).tolist()

        def sampled():
            for first in range(start * self.batch, len(self) * self.batch, self.batch):
                places = range(first, min(first + self.batch, len(order)))
                places = places[: len(places) // self.number * self.number][self.rank :: self.number]
                yield [(order[place], seed_of(seed, place)) for place in places]

        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            Seeded(self.dataset),
            batch_sampler=sampled(),
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=on_gpu,
            worker_init_fn=leave_signals_to_the_run,
            generator=torch.Generator().manual_seed(0),  # or torch's global one would be drawn from
        )
        for batch in loader:
            yield self.finish(batch, self.device)


def leave_signals_to_the_run(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too, and the step needs its batch


class Seeded:
    """`dataset[i]` with seeded random numbers; the state of the generators is left as it was."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index_and_seed):
        index, seed = index_and_seed
        of_python, of_numpy = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
                return self.dataset[index]
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def check_batch(which: str, batch, size, num_classes: int, device=None):
    """Return images and labels of a batch; InputError if it is anything else. device: where it must be, None: anywhere.
    """
    where = "" if device is None else f" on {device.type}"
    expected = f"images, float32 [N,{','.join(map(str, size))}], and labels, int64 [N]{where}"
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        keys = f" of {', '.join(map(str, batch))}" if isinstance(batch, dict) else ""
        raise InputError(f"{which} yields a {type(batch).__name__}{keys:.80}; expected a pair of {expected}")
    images, labels = batch
    tensors = isinstance(images, torch.Tensor) and isinstance(labels, torch.Tensor)
    found = f"{type(images).__name__} and {type(labels).__name__}"
    if tensors:
        found = " and ".join(f"{t.dtype} {list(t.shape)} on {t.device.type}" for t in (images, labels))
    right = tensors and images.dtype == torch.float32 and images.shape[1:] == size
    right = right and labels.dtype == torch.int64 and labels.shape == images.shape[:1]
    if not right or device and {images.device.type, labels.device.type} != {device.type}:
        raise InputError(f"{which} yields {found.replace('torch.', '')}; expected {expected}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise InputError(
            f"{which} yields labels from {labels.min()} to {labels.max()}; expected 0 to {num_classes - 1}"
        )
    return images, labels


class Checked:
    """A loader whose batches are checked, since a network would take almost any."""

    def __init__(self, loader, which, *form):
        self.loader, self.which, self.form = loader, which, form
        if hasattr(loader, "part"):
            self.part = lambda *part: Checked(loader.part(*part), which, *form)

    def __len__(self):
        return len(self.loader)

    def epoch(self, seed: int, start: int = 0):
        for batch in self.loader.epoch(seed, start):
            yield check_batch(self.which, batch, *self.form)


@dataclasses.dataclass
class Loaders:
    """A data set of custom loaders, in the place of `Images`; they decide how large their batches are.

    train, val: see pdarts.Data; an evaluation needs no `val`. test_batches: an iterable of batches, or (); of several
    processes each takes every n-th. size: (C,H,W) of the images. version: tells this data from other data of the
    same form, since a run resumes with its own data only.
    """

    train: Any
    val: Any = None
    test_batches: Iterable = ()
    num_classes: int = 10
    size: tuple[int, int, int] = (3, 32, 32)
    name: str = "custom loaders"
    version: str = ""
    path: str | None = None
    device: torch.device = torch.device("cpu")
    classes: tuple[str, ...] = ()  # their names, kept with the run as mean and std of the images [C] are
    mean: Any = None
    std: Any = None
    largest = 0

    def __post_init__(self):
        size, classes = self.size, self.num_classes
        try:
            self.size, self.num_classes = tuple(map(operator.index, self.size)), operator.index(self.num_classes)
        except TypeError:  # refused now; numpy's numbers are as good as Python's
            self.size = ()
        if len(self.size) != 3 or min(*self.size, self.num_classes) < 1:
            raise InputError(f"size is {size!r} and num_classes {classes!r}; expected (C,H,W) and a number")
        for which in "train", "val":
            loader = getattr(self, which)
            whole = hasattr(loader, "epoch") and hasattr(loader, "__len__")
            if not whole and (which == "train" or loader is not None):
                batch, workers = (getattr(loader, n, d) for n, d in (("batch_size", 96), ("num_workers", 0)))
                raise InputError(
                    f"{which} is a {type(loader).__name__}; expected a loader with a length and epoch(seed, start), "
                    f"such as harness.data.loaders.Batches(dataset, batch={batch}, workers={workers})"
                )
        iterable = hasattr(self.test_batches, "__iter__") or hasattr(self.test_batches, "__getitem__")
        if not iterable or hasattr(self.test_batches, "__next__"):
            raise InputError(
                f"test_batches is a {type(self.test_batches).__name__}; expected batches that can be read more than "
                "once, such as torch's DataLoader or a list"
            )

    def fingerprint(self) -> str:
        lengths = [len(loader) for loader in (self.train, self.val) if loader is not None]
        return repr((self.name, self.version, lengths, self.num_classes, list(self.size)))

    def to(self, device) -> Loaders:
        moved = [loader.to(device) if hasattr(loader, "to") else loader for loader in (self.train, self.val)]
        return dataclasses.replace(self, train=moved[0], val=moved[1], device=torch.device(device))

    def search_data(self, config: pdarts.SearchConfig) -> pdarts.Data:
        if self.val is None:
            raise InputError("val is None; expected the loader that the alphas learn from")
        return pdarts.Data(self._checked("train"), self.num_classes, self.size[0], self._checked("val"))

    def evaluate_data(self, config: pdarts.EvaluateConfig) -> pdarts.Data:
        if self.test_batches == ():
            raise InputError("test_batches is (); expected the batches on which the network is tested")
        return pdarts.Data(self._checked("train"), self.num_classes, self.size[0])

    def _checked(self, which):
        """Return a checked loader; a batch of it, and a test batch, are read now, not at the end of the first stage."""
        loader = Checked(getattr(self, which), which, self.size, self.num_classes, self.device)
        with torch.random.fork_rng(devices=()):  # from which a DataLoader draws
            if next(loader.epoch(0), None) is None:
                raise InputError(f"{which} yields no batch; expected one or more")
            if which == "train" and self.test_batches != () and next(self.test(), None) is None:
                raise InputError("test_batches yields no batch; expected one or more")
        return loader

    def test(self, limit: int | None = None, part: tuple[int, int] = (0, 1)):
        """Yield the `test_batches` on the device, until `limit` images are reached."""
        rank, number, seen = *part, 0
        for i, batch in enumerate(self.test_batches):
            if limit is not None and seen >= limit:
                return
            images, labels = check_batch("test_batches", batch, self.size, self.num_classes)
            seen += len(labels)
            if i % number == rank:
                yield as_it_is((images, labels), self.device)
