"""What tests that wait for other processes share: these work while other tests run."""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ARCHITECTURE = "sm_90"
FLAGS = ["-std=c++17", f"-arch={ARCHITECTURE}"] + [  # the -D are torch's
    f"-D__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]

FOLDER = pathlib.Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # of processes that tests start: what other tests set is not in it


def beside(test):
    """A test that waits for processes that it starts: it runs beside the others, in another thread, from the first
    test of its folder on. It must not touch what they share, such as torch's random state and os.environ."""

    def wait(beside_the_others):
        beside_the_others[test.__name__].result()

    wait.beside, wait.__doc__ = test, test.__doc__
    return wait


def pytest_collection_modifyitems(items):
    def when(item):
        """First what needs no kernels, which are built then; last what has run beside the others."""
        waits = hasattr(getattr(item, "function", None), "beside")
        return waits, item.path.parent in (FOLDER, FOLDER.parent / "harness")

    items.sort(key=when)


def pytest_collection_finish(session):
    parents = {item.path.parent for item in session.items}
    if FOLDER in parents and FOLDER.parent in parents and not session.config.option.collectonly:
        command = [sys.executable, "-c", "import kernels; kernels.fused('cpu')"]
        session.builds = subprocess.Popen(command, cwd=FOLDER.parent, env=ENVIRONMENT)


def pytest_sessionfinish(session):
    if hasattr(session, "builds"):
        session.builds.wait()


def run_beside(folder, request, tmp_path_factory, threads):
    """Yields futures of the tests in `folder` that run beside the others, by name."""
    functions = [getattr(item, "function", None) for item in request.session.items if item.path.parent == folder]
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
    """Futures of (the PTX of mixed_op.cu, what the compiler said), and of what the assembler says of it."""
    if shutil.which("nvcc") is None or not any(item.path.name == "test_ptx.py" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("ptx")

    def compiled():
        ptx = folder / "mixed_op.ptx"
        return ptx, nvcc("-ptx", pathlib.Path(__file__).with_name("mixed_op.cu"), "-o", ptx)

    def assembled():
        return nvcc("-cubin", "-Xptxas", "-v", ptx.result()[0], "-o", folder / "mixed_op.cubin")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ptx = pool.submit(compiled)
        yield ptx, pool.submit(assembled)
