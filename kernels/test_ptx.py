"""What nvcc makes of mixed_op.cu: no GPU is needed."""

import pathlib
import re
import shutil
import subprocess

import pytest

ARCHITECTURE = "sm_90"
FLAGS = ["-std=c++17", f"-arch={ARCHITECTURE}"] + [  # the -D are torch's
    f"-D__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]
LAYOUTS = 3
VECTORS = {"float": ("f", 4), "double": ("d", 2), "bfloat16": ("13__nv_bfloat16", 8), "half": ("6__half", 8)}
STORE = re.compile(r"\bst\.(?:\w+\.)*?global\.([\w.]+)")
ONE_HALF = re.compile(r"\bld\.(?:\w+\.)*?global\.(?:nc\.)?[bfus]16\b")
SIXTEEN_BYTES = re.compile(r"(?:\w+\.)*(?:v4\.[bfus]32|v2\.[bfus]64|v8\.[bus]16|b128)")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no CUDA compiler: nvcc is not in PATH")


def nvcc(*arguments):
    result = subprocess.run(["nvcc", *FLAGS, *map(str, arguments)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where the PTX is, and what the compiler said."""
    ptx = tmp_path_factory.mktemp("ptx") / "mixed_op.ptx"
    return ptx, nvcc("-ptx", pathlib.Path(__file__).with_name("mixed_op.cu"), "-o", ptx)


@pytest.fixture(scope="module")
def kernels(compiled):
    """The PTX of every kernel by its mangled name."""
    pattern = r"^(?:\.visible )?\.entry (\w+)\(.*?^\{(.*?)^\}"
    return dict(re.findall(pattern, compiled[0].read_text(), re.MULTILINE | re.DOTALL))


def test_no_warnings(compiled):
    assert compiled[1] == ""


def vectorised(kernels, name, dtype):
    mangled, V = VECTORS[dtype]
    found = {kernel: ptx for kernel, ptx in kernels.items() if re.search(rf"\d{name}I.*ELi{V}E{mangled}E", kernel)}
    assert len(found) == (LAYOUTS - 1 if name == "statistics_kernel" else LAYOUTS), sorted(kernels)
    return found.items()


@pytest.mark.parametrize("name", ["forward_kernel", "backward_inputs_kernel"])
@pytest.mark.parametrize("dtype", VECTORS)
def test_results_are_stored_by_16_bytes(kernels, name, dtype):
    for kernel, ptx in vectorised(kernels, name, dtype):
        stores = STORE.findall(ptx)
        assert stores and all(SIXTEEN_BYTES.fullmatch(store) for store in stores), f"{kernel}: {stores}"


@pytest.mark.parametrize(
    "name", ["statistics_kernel", "forward_kernel", "backward_sums_kernel", "backward_inputs_kernel"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "half"])  # no other operand is so short
def test_elements_are_not_loaded_one_by_one(kernels, name, dtype):
    for kernel, ptx in vectorised(kernels, name, dtype):
        assert not ONE_HALF.findall(ptx), kernel


def test_no_kernel_spills_registers(compiled, tmp_path):
    report = nvcc("-cubin", "-Xptxas", "-v", compiled[0], "-o", tmp_path / "mixed_op.cubin")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0", "0")}, report
