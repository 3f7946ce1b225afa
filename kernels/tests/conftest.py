"""Fixtures of the kernels' tests, and how tests that wait for other processes run while others do."""

import concurrent.futures
import gc
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.tests.helpers import DEVICES

torch.set_num_threads(1)  # the feature maps are small

ARCHITECTURE = "sm_90"
FLAGS = ["-std=c++17", f"-arch={ARCHITECTURE}"] + [  # the -D are torch's
    f"-D__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # of processes that tests start: what other tests set is not in it


@pytest.fixture
def fused():
    """The kernels are on."""
    before = kernels.use("on")
    yield
    kernels.use(before)


@pytest.fixture(params=DEVICES)
def device(request, fused, monkeypatch):
    """The device of a test's tensors. On CUDA all operations are fused, and torch's own are exact and deterministic."""
    monkeypatch.setattr(kernels.runtime, "CHECKED", ())  # an operation that is wrong is to be seen
    assert kernels.fused(request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    before = kernels.use_on_cuda(" ".join(kernels.CUDA_OPERATIONS))
    yield request.param
    kernels.use_on_cuda(before)


@pytest.fixture
def steps_by_torch(monkeypatch):
    """The mixed operation is fused; torch computes convolutions and pooling, as it does in 16 bits."""
    supports = kernels.supports
    for module in (kernels.ops, kernels.modules):
        monkeypatch.setattr(module, "supports", lambda operation, x: operation == "mixed" and supports(operation, x))


def beside(test):
    """A test that waits for processes that it starts: the test runs beside the others, in another thread, from the
    first test of its folder on. It must not touch what they share, such as torch's random state and os.environ."""

    def wait(beside_the_others):
        beside_the_others[test.__name__].result()

    wait.beside, wait.__doc__ = test, test.__doc__
    return wait


def pytest_collection_modifyitems(items):
    def when(item):
        """First the tests that need no kernels, which are built then; last those that have run beside the others."""
        waits = hasattr(getattr(item, "function", None), "beside")
        return waits, item.path.parent in (FOLDER, ROOT / "harness")

    items.sort(key=when)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session):
    # What was imported is not garbage, and going over it again and again took a sixth of the time of the tests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    parents = {item.path.parent for item in session.items}
    if FOLDER in parents and ROOT in parents and not session.config.option.collectonly:
        command = [sys.executable, "-c", "import kernels; kernels.fused('cpu')"]
        session.builds = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)


def pytest_sessionfinish(session):
    if hasattr(session, "builds"):
        session.builds.wait()


def run_beside(folder, request, tmp_path_factory, threads):
    """Yields futures of the tests below `folder` that run beside the others, by name."""
    functions = [getattr(item, "function", None) for item in request.session.items if folder in item.path.parents]
    tests = [function.beside for function in functions if hasattr(function, "beside")]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        yield {test.__name__: pool.submit(test, tmp_path_factory.mktemp(test.__name__)) for test in tests}


@pytest.fixture(scope="session", autouse=True)
def beside_the_others(request, tmp_path_factory):
    yield from run_beside(FOLDER, request, tmp_path_factory, 1)


def nvcc(*arguments):
    result = subprocess.run(["nvcc", *FLAGS, *map(str, arguments)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="session", autouse=True)
def nvcc_beside_the_others(request, tmp_path_factory):
    """Futures of (the PTX of mixed.cu, what the compiler said), and of what the assembler says of it."""
    if shutil.which("nvcc") is None or not any(item.path.name == "test_ptx.py" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("ptx")

    def compiled():
        ptx = folder / "mixed.ptx"
        return ptx, nvcc("-ptx", FOLDER.parent / "csrc/cuda/mixed.cu", "-o", ptx)

    def assembled():
        return nvcc("-cubin", "-Xptxas", "-v", ptx.result()[0], "-o", folder / "mixed.cubin")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ptx = pool.submit(compiled)
        yield ptx, pool.submit(assembled)
