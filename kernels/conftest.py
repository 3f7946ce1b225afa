"""What the tests of the PTX need: nvcc compiles while other tests run."""

import concurrent.futures
import pathlib
import shutil
import subprocess

import pytest

ARCHITECTURE = "sm_90"
FLAGS = ["-std=c++17", f"-arch={ARCHITECTURE}"] + [  # the -D are torch's
    f"-D__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]


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
