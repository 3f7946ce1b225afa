"""Which way operations run: modes, devices, types."""

import pytest
import torch

import kernels
from kernels import Dropout, Norm, Pool, Separable, Sum, runtime


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "_mode", "perhaps")  # from PDARTS_KERNELS
    with pytest.raises(ValueError, match="PDARTS_KERNELS is 'perhaps'; expected one of"):
        kernels.fused()
    with pytest.raises(ValueError, match="the mode of the kernels is 'maybe'; expected one of"):
        kernels.use("maybe")


@pytest.fixture
def on_cuda(monkeypatch):
    """The kernels support CUDA, as far as the answers of `supports` go."""
    monkeypatch.setattr(runtime, "_served", {"cuda"})
    monkeypatch.setattr(runtime, "CHECKED", ())
    monkeypatch.setattr(runtime, "_mode", "auto")
    monkeypatch.setattr(runtime, "_cuda_operations", None)
    monkeypatch.delenv("PDARTS_CUDA_OPERATIONS", raising=False)


class Map:
    """A tensor on CUDA, as far as `supports` asks."""

    device = torch.device("cuda")

    def __init__(self, dtype, elements=8):
        self.dtype, self.elements = dtype, elements

    def numel(self):
        return self.elements


def supported(x):
    return [name for name in ("mixed", "separable", "pool", "cell") if kernels.supports(name, x)]


@pytest.mark.parametrize(
    "operations, expected",
    [
        ("mixed separable pool cell", ["mixed", "separable", "pool", "cell"]),
        ("pool,mixed", ["mixed", "pool"]),
        ("cell", ["cell"]),
        ("", []),
    ],
)
def test_operations_on_cuda_are_those_that_are_named(on_cuda, monkeypatch, operations, expected):
    assert set(supported(Map(torch.float32))) == kernels.CUDA_OPERATIONS  # without a word of the user's
    assert set(kernels.use_on_cuda(operations).split()) == kernels.CUDA_OPERATIONS
    assert supported(Map(torch.float32)) == supported(Map(torch.float64)) == expected
    assert (
        supported(Map(torch.bfloat16))
        == supported(Map(torch.float32, elements=0))
        == [n for n in expected if n == "mixed"]
    )
    monkeypatch.setattr(runtime, "_cuda_operations", None)
    monkeypatch.setenv("PDARTS_CUDA_OPERATIONS", operations)
    assert supported(Map(torch.float32)) == expected


def test_unknown_operations_on_cuda_are_refused(on_cuda, monkeypatch):
    message = "the operations on CUDA are .'mixed', 'pol'.; expected some of cell, mixed, pool, separable"
    with pytest.raises(ValueError, match=message):
        kernels.use_on_cuda("mixed pol")
    assert kernels.supports("pool", Map(torch.float32))
    monkeypatch.setattr(runtime, "_cuda_operations", None)
    monkeypatch.setenv("PDARTS_CUDA_OPERATIONS", "mixed pol")
    with pytest.raises(ValueError, match=message):
        kernels.supports("pool", Map(torch.float32))


def test_types_and_devices_that_are_supported(fused):
    maps = {dtype: torch.rand(1, 1, 2, 2).to(dtype) for dtype in (torch.float32, torch.float64, torch.float16)}
    assert [supported(x) for x in maps.values()] == [["mixed", "separable", "pool", "cell"]] * 2 + [["mixed"]]
    with torch.autocast("cpu", torch.bfloat16):
        assert supported(maps[torch.float32]) == ["mixed"]
    assert supported(torch.empty(1, 1, 2, 2, device="meta")) == []
    kernels.use("off")
    assert supported(maps[torch.float32]) == []


def test_switched_off_every_operation_is_its_twin():
    torch.manual_seed(0)
    x, depthwise, pointwise = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(4, 4, 1, 1)
    norm, p, key = Norm(torch.zeros(4), torch.ones(4)), torch.rand(3), torch.tensor([7])
    dropout = Dropout(key, torch.tensor([0.5]), [2])
    operations = [Separable(0, depthwise, pointwise, 1, 1), Pool(0, "max"), Sum([1, 2, 0])]
    calls = (
        (kernels.mixed_sum, kernels.mixed_sum_ref, ([x, 2 * x], p[:2])),
        (kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref, ([x], p[:1], [Norm(*map(torch.clone, norm[:2]))], True)),
        (kernels.separable, kernels.separable_ref, (x, depthwise, pointwise, 2, 1, 1, norm)),
        (kernels.pool, kernels.pool_ref, (x, "avg", 2)),
        (kernels.dropout_masks, kernels.dropout_masks_ref, (key, torch.tensor([0.5]), [2], (2, 4, 6, 6))),
        (kernels.cell, kernels.cell_ref, ([x], operations, [3], p, None, False, 0.1, 1e-5, dropout)),
    )
    before = kernels.use("off")
    try:
        for function, twin, arguments in calls:
            torch.testing.assert_close(function(*arguments), twin(*arguments))
    finally:
        kernels.use(before)
