"""Tests of own loaders: torch's DataLoader with the same bits whatever loads them, and any other loader."""

import dataclasses
import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import kernels
import pdarts
from harness.conftest import CELL, ONE_STAGE, assert_same_run, beside, fast_search, in_two_processes
from harness.data.loaders import Batches, Loaders
from harness.distributed import Shared
from harness.evaluate import evaluate
from harness.run import Stopped
from harness.settings import EvaluateSettings
from pdarts import InputError

SIZE = (3, 8, 8)


class Noisy:
    """A map-style dataset that draws at random from all three."""

    def __init__(self, images=10):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.rand(images, *SIZE, generator=generator), torch.arange(images) % 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + torch.rand(()) + np.random.rand() + random.random(), self.y[i]


def test_batches_depend_on_the_seed_and_not_on_workers_processes_or_where_they_begin():
    state, of_numpy, of_python = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    whole = list(Batches(Noisy(), 4).epoch(5))
    assert [len(y) for _, y in whole] == [4, 4, 2] == [4] * (len(Batches(Noisy(), 4)) - 1) + [2]
    assert torch.equal(torch.cat([y for _, y in whole]).bincount(), Noisy().y.bincount())
    for workers, start in (0, 0), (2, 0), (0, 1), (1, 2):
        for mine, right in zip(Batches(Noisy(), 4, workers).epoch(5, start), whole[start:], strict=True):
            assert all(map(torch.equal, mine, right))
    parts = [list(Batches(Noisy(), 4).part(rank, 2).epoch(5)) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == len(Batches(Noisy(), 4).part(0, 2)) == 2  # 2 left: one for each
    for rank, part in enumerate(parts):
        assert all(torch.equal(x, right[rank::2]) for (x, _), (right, _) in zip(part, whole))
    other = list(Batches(Noisy(), 4).epoch(6))
    assert not torch.equal(other[0][0], whole[0][0])
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == of_python
    assert np.random.get_state()[1].tolist() == of_numpy


def own(workers, **others) -> Loaders:
    train, val = (Batches(Noisy(12), 4, workers) for _ in range(2))
    tested = Noisy(7)
    test = DataLoader(TensorDataset(tested.x, tested.y), 4)
    return Loaders(train, val, test, **{"num_classes": 3, "size": SIZE} | others)


def stop_after(number, method, monkeypatch):
    """The `number`-th step from now on ends with a signal."""
    step, left = getattr(*method), [number]

    def interrupted(self, *arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(*method, interrupted)


def test_a_search_with_data_loaders_goes_on_bit_for_bit_with_other_workers(
    tmp_path, monkeypatch
):
    whole = fast_search(ONE_STAGE, own(0), tmp_path / "whole")
    way = {"out": tmp_path / "run"}
    for number, workers in (2, 0), (3, 1):  # in the first epoch, and in the second, where alphas learn
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(number, (pdarts.Search, "alternate"), patch)
            fast_search(ONE_STAGE, own(workers), **way)
        way = {"resume": tmp_path / "run"}
    again = fast_search(ONE_STAGE, own(2), **way)
    assert again.genotype == whole.genotype and whole.test_accuracies[0] in [n / 7 for n in range(8)]
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    times = (tmp_path / "run/times.jsonl").read_text()
    assert '"waited": ' in times
    with pytest.raises(InputError, match="of another run: data is"):
        fast_search(ONE_STAGE, own(0, version="2"), resume=tmp_path / "run")


def test_an_evaluation_takes_loaders_and_needs_a_test(tmp_path):
    config = EvaluateSettings(depth=3, channels=8, epochs=1, batch_size=4, auxiliary=False)
    result = evaluate(CELL, config, own(0), tmp_path / "run")
    assert result.test_error in [1 - n / 7 for n in range(8)] and result.test_error_top5 == 0  # of 3 classes
    with pytest.raises(InputError, match=r"test_batches is \(\); expected the batches on which"):
        evaluate(CELL, config, dataclasses.replace(own(0), test_batches=()))
    with pytest.raises(InputError, match="val is None; expected the loader that the alphas learn from"):
        fast_search(ONE_STAGE, dataclasses.replace(own(0), val=None))


class Plain:
    """The least that a loader is."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def epoch(self, seed, start=0):
        yield from self.batches[start:]


X, Y = torch.rand(4, *SIZE), torch.arange(4) % 3
CONFIG = EvaluateSettings(depth=3, channels=8, epochs=2, batch_size=4, auxiliary=False)
WRONG = {
    "numpy": ((X.numpy(), Y), r"yields ndarray and Tensor; expected images, float32 \[N,3,8,8\], and labels, int"),
    "channels": ((X[:, :1], Y), r"yields float32 \[4, 1, 8, 8\] on cpu and int64 \[4\] on cpu; expected images, float"),
    "size": ((X[:, :, :6], Y), r"yields float32 \[4, 3, 6, 8\] on cpu"),
    "bytes": (((X * 255).byte(), Y), "yields uint8 .* expected images, float"),
    "double": ((X.double(), Y), "yields float64 .* expected images, float32"),
    "type of labels": ((X, Y.float()), "yields .* float32 .4. on cpu; expected"),
    "shape of labels": ((X, Y[:, None]), r"yields .* int64 \[4, 1\] on cpu; expected"),
    "fewer labels": ((X, Y[:3]), "yields .* int64 .3. on cpu; expected"),
    "labels from 1": ((X, Y + 1), "yields labels from 1 to 3; expected 0 to 2"),
    "negative labels": ((X, Y - 1), "yields labels from -1 to 1; expected 0 to 2"),
    "a dict": ({"image": X, "label": Y}, "yields a dict of image, label; expected a pair of images, float"),
    "three parts": ((X, Y, Y), "yields a tuple; expected a pair of images"),
    "images alone": (X, "yields a Tensor; expected a pair of images"),
}


@pytest.mark.parametrize("which", ["train", "val", "test_batches"])
@pytest.mark.parametrize("batch, message", WRONG.values(), ids=WRONG)
def test_a_wrong_batch_is_named_with_its_loader(which, batch, message):
    wrong = [batch] if which == "test_batches" else Plain([batch])
    data, state = dataclasses.replace(own(0), **{which: wrong}), torch.get_rng_state()
    with pytest.raises(InputError, match=f"^{which} {message}"):
        data.search_data(ONE_STAGE)
    if which != "val":
        with pytest.raises(InputError, match=f"^{which} {message}"):
            data.evaluate_data(CONFIG)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_test_images_are_refused_before_a_run_begins(tmp_path):
    data = dataclasses.replace(own(0), test_batches=[(X, Y + 1)])
    for run in lambda: fast_search(ONE_STAGE, data, tmp_path / "run"), lambda: evaluate(CELL, CONFIG, data, tmp_path):
        with pytest.raises(InputError, match="^test_batches yields labels from 1 to 3; expected 0 to 2"):
            run()
    assert not list(tmp_path.iterdir())


def test_labels_are_checked_in_every_batch():
    later = Plain([(X, Y), (X, Y), (X, Y + 5)])
    with pytest.raises(InputError, match="^train yields labels from 5 to 7; expected 0 to 2"):
        fast_search(ONE_STAGE, dataclasses.replace(own(0), train=later))
    with pytest.raises(InputError, match="^test_batches yields labels from 5 to 7; expected 0 to 2"):
        evaluate(CELL, CONFIG, dataclasses.replace(own(0), test_batches=later.batches))


@pytest.mark.parametrize("change, message", [
    ({"train": DataLoader(TensorDataset(X, Y), 2, num_workers=1)},
     r"train is a DataLoader; expected a loader with a length and epoch.seed, start., such as harness.data.loaders."
     r"Batches\(dataset, batch=2, workers=1\)"),
    ({"val": [(X, Y)]}, "val is a list; expected a loader with a length and epoch"),
    ({"train": SimpleNamespace(epoch=None)}, "train is a SimpleNamespace; expected a loader with a length and epoch"),
    ({"train": Plain([])}, "train yields no batch; expected one or more"),
    ({"test_batches": []}, "test_batches yields no batch; expected one or more"),
    ({"test_batches": ((X, Y) for _ in range(2))}, "test_batches is a generator; .* read more than once, such"),
    ({"test_batches": None}, "test_batches is a NoneType; expected batches that can be read"),
    ({"size": 8}, "size is 8 and num_classes 3; expected .C,H,W. and a number"),
    ({"num_classes": "3"}, "num_classes '3'; expected .C,H,W. and a number"),
], ids=str)  # fmt: skip
def test_what_is_no_loader_is_refused_by_its_name(change, message):
    with pytest.raises(InputError, match=message):
        fast_search(ONE_STAGE, dataclasses.replace(own(0), **change))


@pytest.mark.parametrize("images", [DataLoader(TensorDataset(X, Y)), TensorDataset(X, Y), (X, Y), "data"], ids=str)
def test_what_is_no_data_set_is_refused(images):
    message = f"images is a {type(images).__name__}; expected .*Images.* or .*Loaders"
    with pytest.raises(InputError, match=message):
        fast_search(ONE_STAGE, images)
    with pytest.raises(InputError, match=message):
        evaluate(CELL, CONFIG, images)


class Stream(IterableDataset):
    def __iter__(self):
        yield X[0], Y[0]


def test_numbers_may_be_those_of_numpy():
    data = Loaders(Plain([(X, Y)]), num_classes=np.int64(3), size=np.array(SIZE))
    assert (data.num_classes, data.size) == (3, SIZE) and type(data.num_classes) is int


def test_batches_need_a_dataset_with_a_length():
    with pytest.raises(InputError, match="dataset is a Stream; expected one with a length and dataset.i."):
        Batches(Stream(), 4)


class Short(Plain):
    def __len__(self):
        return 2


def test_a_loader_that_ends_early_or_yields_too_few_is_named():
    with pytest.raises(InputError, match="the loader ended before its 2 batches; expected as many as its length"):
        list(Shared(Short([(X, Y)])).epoch(0))
    with pytest.raises(InputError, match="the loader yields 1 images for 1 processes; expected 2 or more for each"):
        list(Shared(Short([(X[:1], Y[:1])])).epoch(0))
    for images, batch in (1, 4), (4, 1):
        with pytest.raises(InputError, match=f"batch is {batch}, of {images} images, for 1 process; expected 2 images"):
            Batches(Noisy(images), batch)


# --- two processes, with a worker each --------------------------------------------------------------------------------


def of_two(rank, number, folder):
    kernels.use("off")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=number)
    fast_search(ONE_STAGE, own(0), f"{folder}/whole")
    alternate, steps = pdarts.Search.alternate, []

    def interrupted(*arguments):
        steps.append(1)
        if rank == 1 and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return alternate(*arguments)

    pdarts.Search.alternate = interrupted
    with pytest.raises(Stopped):
        fast_search(ONE_STAGE, own(1), f"{folder}/run")
    pdarts.Search.alternate = alternate
    fast_search(ONE_STAGE, own(0), resume=f"{folder}/run")  # workers take seconds to start
    dist.destroy_process_group()
    os._exit(0)


@beside
def test_two_processes_with_data_loaders_stop_and_go_on_bit_for_bit(folder):
    in_two_processes(of_two, folder)
    assert_same_run(folder / "whole", folder / "run")
