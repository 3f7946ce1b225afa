"""The small runs, images and processes that the tests of the harness share."""

import dataclasses
import functools
import multiprocessing
import os
import pathlib
import resource
import runpy
import signal
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kernels
import pdarts
from harness.data.images import Images
from harness.fuzz import FUZZ
from harness.search import search
from harness.settings import SearchSettings
from kernels.tests.conftest import ENVIRONMENT, beside, run_beside  # noqa: F401  (for the tests)
from pdarts import SearchSpace

torch.set_num_threads(1)  # the feature maps are small
os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start, several at a time

ROOT = pathlib.Path(pdarts.__file__).parent
ONE_NODE = SearchSpace(nodes=1)  # cells of 2 edges instead of 14: fast, where it does not matter what is found
POOLS = SearchSpace(("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"), nodes=2)  # edges without weights
FUSED = SearchSpace(("none", "skip_connect", "sep_conv_3x3"), nodes=1)  # what is fastest to fuse of all kinds
FASTEST = SearchSpace(("none", "avg_pool_3x3", "skip_connect"), nodes=1)
TINY = SearchSettings(
    dataset="shapes",
    depths=(3, 3, 3),
    keep=(4, 4, 3),  # of POOLS
    skip_dropout=(0.1, 0.2, 0.3),
    # With fewer, torch 2.13 writes beyond the gradients of channels-last convolutions on CPUs without AVX-512.
    channels=8,
    epochs=2,
    alpha_start=1,
    batch_size=4,
)
ONE_STAGE = dataclasses.replace(TINY, depths=(3,), keep=(3,), skip_dropout=(0.3,))  # of FASTEST
TWO_STAGES = dataclasses.replace(TINY, depths=(3, 3), keep=(8, 3), skip_dropout=(0.2, 0.3))  # of ONE_NODE
fast_search = functools.partial(search, space=FASTEST)
# The same on the command line.
FAST_SEARCH = "--primitives none avg_pool_3x3 skip_connect --nodes 1 --depths 3 --keep 3 --skip-dropout 0.1".split()
PAIRS = [("skip_connect", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_3x3", 2)]
CELL = pdarts.Genotype(PAIRS, [2, 3], PAIRS, [2, 3])  # for fast tests
SMALL_CELL = pdarts.Genotype(PAIRS[:2], [2], PAIRS[:2], [2])  # for the fastest, where any cell will do


def random_images(shape=(10, 12, 3), classes=5, n=16) -> Images:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % classes
    return Images.from_arrays(x, y, x, y)


def write_images(folder, n=24):
    """Write own.npz with `n` training images."""
    x, y = np.random.default_rng(0).integers(0, 255, (n, 8, 8), np.uint8), np.arange(n) % 3
    np.savez(folder / "own.npz", x_train=x, y_train=y, x_test=x[:12], y_test=y[:12])


def in_two_processes(function, *arguments):
    """Run `function(rank, 2, *arguments)` in two processes, forked from one that has imported torch."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "harness.conftest"])
    torch.multiprocessing.start_processes(function, (2, *arguments), nprocs=2, start_method="forkserver")


def begin(output, file, *arguments, cwd=ROOT, **environment):
    """Start Python on a file as from a shell, without the kernels; return its process, forked from one with torch.

    The files stdout and stderr in the folder `output` take its output.
    """
    multiprocessing.set_forkserver_preload(["torch._dynamo", "harness.conftest"])
    environment = ENVIRONMENT | {"PDARTS_KERNELS": "off"} | environment
    of_main = output, pathlib.Path(cwd), environment, file, *map(str, arguments)
    process = multiprocessing.get_context("forkserver").Process(target=_main, args=of_main)
    process.start()
    return process


def _main(output, cwd, environment, file, *arguments):
    for descriptor, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pdarts", "harness", "kernels")]:
        del sys.modules[name]  # here they are those beside the file
    folder = (cwd / file).parent
    sys.path = [str(folder), *(path for path in sys.path if pathlib.Path(path).resolve() != ROOT)]
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")


def python(file, *arguments, cwd=ROOT, **environment):
    """Run Python on a file to its end, see `begin`; return its exit status and its output."""
    with tempfile.TemporaryDirectory() as output:
        process = begin(output, file, *arguments, cwd=cwd, **environment)
        process.join(170)
        process.kill()
        stdout, stderr = (pathlib.Path(output, name).read_text() for name in ("stdout", "stderr"))
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)


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


def pytest_collection_modifyitems(items):
    """Tests that run beside the others are waited for last."""
    items.sort(key=lambda item: hasattr(getattr(item, "function", None), "beside"))


CUDA_OPERATIONS = kernels.runtime._cuda_operations


def pytest_runtest_setup(item):
    """What a run has set for its process, no other test sees. Runs are without kernels, but where they ask for them:
    to fuse a network takes longer than the short training of a test."""
    kernels.runtime._mode, kernels.runtime._cuda_operations = "off", CUDA_OPERATIONS


@pytest.fixture(scope="session")
def images():
    return random_images()


@pytest.fixture(scope="session")
def unbroken(images, tmp_path_factory):
    """The folder of a search of two stages, and cells of one node, that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    search(TWO_STAGES, images, folder, space=ONE_NODE)
    return folder


@pytest.fixture
def few_weights(monkeypatch):
    """Pools in the place of convolutions, where cells of all operations are needed and not what they compute."""
    for name in pdarts.PRIMITIVES:
        if "conv" in name:
            monkeypatch.setitem(pdarts.OPERATIONS, name, pdarts.OPERATIONS["avg_pool_3x3"])


@pytest.fixture(autouse=True)
def _same_mode_of_the_kernels():
    before = kernels.use("auto")
    kernels.use(before)
    yield
    kernels.use(before)


@pytest.fixture(scope="session", autouse=True)
def beside_the_others(request, tmp_path_factory):
    threads = 2 if (os.cpu_count() or 1) > 2 else 1  # a test may start two processes
    yield from run_beside(pathlib.Path(__file__).parent, request, tmp_path_factory, threads)


@pytest.fixture
def limits():
    """Fail a test that hangs or takes a gigabyte."""

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
