"""What all tests of the harness share."""

import dataclasses
import functools
import gc
import importlib
import multiprocessing
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import bench
import harness.cli
import kernels
import pdarts
from harness.fuzz import FUZZ
from harness.images import Images
from harness.search import search
from harness.settings import SearchSettings
from kernels.tests.conftest import ENVIRONMENT, beside, pytest_collection_modifyitems, run_beside  # noqa: F401

torch.set_num_threads(1)  # the feature maps are small
# Freed memory goes back to the system: after a test that is refused 20 GB this process would be too large to fork.
harness.cli.keep_freed_memory = bench.keep_freed_memory = lambda: None
os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start, several at a time

ROOT = pathlib.Path(pdarts.__file__).parent
POOLS = {name: pdarts.OPERATIONS["avg_pool_3x3"] for name in pdarts.PRIMITIVES if "conv" in name}
OF_ONE_NODE = functools.partialmethod(pdarts.Search.__init__, space=pdarts.SearchSpace(nodes=1))
TINY = SearchSettings(
    dataset="shapes",
    cells=(3, 3, 3),
    skip_dropout=(0.1, 0.2, 0.3),
    channels=2,
    epochs=2,
    warmup=1,
    batch=4,
)
PAIRS = [("skip_connect", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_3x3", 2)]
CELL = pdarts.Genotype(PAIRS, [2, 3], PAIRS, [2, 3])  # for fast tests
ONE_STAGE = dataclasses.replace(TINY, cells=(3,), keep=(8,), skip_dropout=(0.3,))
TWO_STAGES = dataclasses.replace(TINY, cells=(3, 3), keep=(8, 3), skip_dropout=(0.2, 0.3))


def random_images(shape=(10, 12, 3), classes=5, n=16) -> Images:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % classes
    return Images.from_arrays(x, y, x, y)


def write_images(folder, n=24):
    """own.npz of `n` training images."""
    x, y = np.random.default_rng(0).integers(0, 255, (n, 8, 8), np.uint8), np.arange(n) % 3
    np.savez(folder / "own.npz", x_train=x, y_train=y, x_test=x[:12], y_test=y[:12])


def python(*arguments, cwd=ROOT, **environment):
    """Runs Python to its end, without the kernels."""
    environment = ENVIRONMENT | {"PDARTS_KERNELS": "off"} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=170)


def in_two_processes(function, *arguments):
    """Runs `function(rank, 2, *arguments)` in both, which are forked from one that has imported what takes seconds."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "harness.conftest"])
    torch.multiprocessing.start_processes(function, (2, *arguments), nprocs=2, start_method="forkserver")


def assert_same(a, b, where="checkpoint"):
    """Equal, bit for bit, but for times."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"times"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Both folders hold the same weights, alphas, optimizers, logs and cells."""
    for name in {p.name for folder in (a, b) for p in folder.glob("*.pt")} - {"checkpoint-before.pt"}:
        assert_same(*(torch.load(folder / name, weights_only=True) for folder in (a, b)), name)
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.suffix in (".json", ".jsonl", ".svg"))
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.suffix in (".json", ".jsonl", ".svg"))
    for file in files:
        assert file.name in ("config.json", "times.jsonl") or (a / file).read_bytes() == (b / file).read_bytes()


@pytest.fixture(scope="session", autouse=True)
def _no_time_for_what_no_test_is_about():
    importlib.import_module("torch._dynamo")  # as the first optimizer does
    gc.freeze()  # many collections would look at all that is imported
    thresholds = gc.get_threshold()
    gc.set_threshold(20_000, 10, 10)  # a test makes little garbage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # no power cut here; whole commands, in their processes, do wait
        for device in torch.cuda, torch.xpu, torch.mtia:
            if not device.is_available():  # or it keeps every seed, with a traceback, for later
                patch.setattr(device, "manual_seed_all", lambda _: None)
        yield
    gc.set_threshold(*thresholds)


@pytest.fixture(scope="session")
def images():
    return random_images()


@pytest.fixture(scope="session")
def unbroken(images, tmp_path_factory):
    """The folder of a search of two stages, and cells of one node, that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    mode = kernels._mode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdarts.Search, "__init__", OF_ONE_NODE)
        search(TWO_STAGES, images, folder)
    kernels._mode = mode
    return folder


def pools_for_convolutions(patch):
    for name, operation in POOLS.items():
        patch.setitem(pdarts.OPERATIONS, name, operation)


@pytest.fixture
def few_weights(monkeypatch):
    """Pools in the place of convolutions: fast, where it does not matter what a network computes."""
    pools_for_convolutions(monkeypatch)


@pytest.fixture
def few_edges(monkeypatch):
    """Searches find cells of one node, of 2 edges instead of 14: fast, where it does not matter what is found."""
    monkeypatch.setattr(pdarts.Search, "__init__", OF_ONE_NODE)


def few_weights_and_edges():
    """Both, for good: in a process that runs a test only."""
    pdarts.OPERATIONS.update(POOLS)
    pdarts.Search.__init__ = OF_ONE_NODE


@pytest.fixture(autouse=True)
def _same_mode_of_the_kernels():
    before = kernels._mode
    yield
    kernels._mode = before


@pytest.fixture(scope="session", autouse=True)
def beside_the_others(request, tmp_path_factory):
    threads = 2 if (os.cpu_count() or 1) > 2 else 1  # a test may start two processes
    yield from run_beside(pathlib.Path(__file__).parent, request, tmp_path_factory, threads)


@pytest.fixture
def limits():
    """Fails a test that hangs or takes a gigabyte."""

    def hangs(*_):
        pytest.fail("hangs")

    def peak():  # in KiB, on a Mac in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)

    before, handler = peak(), signal.signal(signal.SIGALRM, hangs)
    signal.alarm(120 * FUZZ)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert peak() - before < 2**20
