"""What nvcc makes of the CUDA sources, above all of mixed.cu: no GPU is needed."""

import re
import shutil

import pytest

from kernels.tests.conftest import FOLDER, nvcc

LAYOUTS, PLANES = 3, "LayoutE1E"  # where a row is of one channel, whose values are single ones
IN_FLIGHT = 4  # candidates whose elements a thread loads at once, and with them their probabilities
MASKED = 4  # single loads for a candidate with dropout: probability and rate, and the key for each of two rows
MOST_BYTES = 4096  # of parameters, before CUDA 12.1
VECTORS = {"float": ("f", 4), "double": ("d", 2), "bfloat16": ("13__nv_bfloat16", 8), "half": ("6__half", 8)}
STORE = re.compile(r"\bst\.(?:\w+\.)*?global\.([\w.]+)")
LOAD = re.compile(r"\bld\.(?:\w+\.)*?global\.(?:nc\.)?([\w.]+)")
PARAMETER = re.compile(r"\.param \.(?:align \d+ \.b8 \w+\[(\d+)\]|\w+)")
ONE_HALF = re.compile(r"\bld\.(?:\w+\.)*?global\.(?:nc\.)?[bfus]16\b")
SIXTEEN_BYTES = re.compile(r"(?:\w+\.)*(?:v4\.[bfus]32|v2\.[bfus]64|v8\.[bus]16|b128)")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no CUDA compiler: nvcc is not in PATH")


@pytest.fixture(scope="module")
def compiled(nvcc_beside_the_others):
    """Where the PTX is, and what the compiler said."""
    return nvcc_beside_the_others[0].result()


@pytest.fixture(scope="module")
def kernels(compiled):
    """The PTX of every kernel by its mangled name, parameters first."""
    pattern = r"^(?:\.visible )?\.entry (\w+)\((.*?^\{.*?)^\}"
    return dict(re.findall(pattern, compiled[0].read_text(), re.MULTILINE | re.DOTALL))


def test_no_warnings(compiled):
    assert compiled[1] == ""


def vectorised(kernels, name, dtype):
    mangled, V = VECTORS[dtype]
    found = {kernel: ptx for kernel, ptx in kernels.items() if re.search(rf"\d{name}I.*ELi{V}E{mangled}E", kernel)}
    drops = LAYOUTS - 1  # rows with dropout are of one channel, which V channels side by side are not
    forms = {"mixed_statistics_kernel": LAYOUTS - 1, "mixed_backward_inputs_kernel": LAYOUTS}
    assert len(found) == forms.get(name, LAYOUTS + drops), sorted(kernels)
    return found.items()


@pytest.mark.parametrize("name", ["mixed_forward_kernel", "mixed_backward_inputs_kernel"])
@pytest.mark.parametrize("dtype", VECTORS)
def test_results_are_stored_by_16_bytes(kernels, name, dtype):
    for kernel, ptx in vectorised(kernels, name, dtype):
        stores = STORE.findall(ptx)
        assert stores and all(SIXTEEN_BYTES.fullmatch(store) for store in stores), f"{kernel}: {stores}"


@pytest.mark.parametrize(
    "name",
    ["mixed_statistics_kernel", "mixed_forward_kernel", "mixed_backward_sums_kernel", "mixed_backward_inputs_kernel"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "half"])  # no other operand is so short
def test_elements_are_not_loaded_one_by_one(kernels, name, dtype):
    for kernel, ptx in vectorised(kernels, name, dtype):
        assert not ONE_HALF.findall(ptx), kernel


@pytest.mark.parametrize("name", ["mixed_forward_kernel", "mixed_backward_inputs_kernel"])
@pytest.mark.parametrize("dtype", VECTORS)
def test_means_scales_and_shifts_are_loaded_by_16_bytes_where_channels_lie_side_by_side(kernels, name, dtype):
    for kernel, ptx in vectorised(kernels, name, dtype):
        single = [load for load in LOAD.findall(ptx) if not SIXTEEN_BYTES.fullmatch(load)]
        most = IN_FLIGHT + MASKED * ("Lb1E" in kernel)
        assert PLANES in kernel or len(single) <= most, f"{kernel}: {single}"


def test_parameters_are_no_more_than_older_toolkits_take(kernels):
    for kernel, ptx in kernels.items():
        sizes = [int(size or 8) for size in PARAMETER.findall(ptx.partition("{")[0])]
        assert sizes and sum(sizes) <= MOST_BYTES, f"{kernel}: {sizes}"


def test_no_kernel_spills_registers(nvcc_beside_the_others):
    report = nvcc_beside_the_others[1].result()
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0", "0")}, report


@pytest.mark.slow  # a minute and a half
def test_no_kernel_of_the_cell_spills_registers(tmp_path):
    report = nvcc("-cubin", "-Xptxas", "-v", FOLDER.parent / "csrc/cuda/cell.cu", "-o", tmp_path / "cubin")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0")} and "warning" not in report, report
