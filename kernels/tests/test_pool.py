"""Pooling, a cell of one step, against plain torch: values, gradients, what is saved for backward, messages."""

import functools
import itertools
import math

import pytest
import torch

import kernels
from kernels.tests.helpers import (
    LAYOUTS,
    MAPS,
    assert_compiles,
    assert_same_bits,
    layout_of,
    numbers,
    saved_for_backward,
    thinned,
    with_threads,
)

KINDS = pytest.mark.parametrize("kind", ["max", "avg"])


def pooled(function, x, kind, stride, gradient=None):
    """Result and gradient."""
    x = x.detach().requires_grad_()
    y = function(x, kind, stride)
    gradient = torch.ones_like(y) if gradient is None else gradient.to(y)
    return y.detach(), *torch.autograd.grad(y, x, gradient)


TYPES = torch.float64, torch.float32, torch.bfloat16
SHAPES = *MAPS, (2, 8, 2, 1), (3, 2, 5, 300)


@pytest.mark.parametrize(
    "dtype, stride, shape, kind", thinned(itertools.product(TYPES, (1, 2, 3), SHAPES, ("max", "avg")), 5)
)
def test_pool_equals_plain_torch(device, shape, kind, stride, dtype):
    torch.manual_seed(0)
    # Of equal elements the first has the gradient: few values make many of them.
    x = (torch.randint(-2, 3, shape) if kind == "max" else torch.randn(shape)).to(device, dtype)
    gradient = numbers(*kernels.pool_ref(x, kind, stride).shape, device=device)
    right = pooled(kernels.pool_ref, x, kind, stride, gradient)
    for memory in LAYOUTS:
        mine = pooled(kernels.pool, x.contiguous(memory_format=memory), kind, stride, gradient)
        assert mine[0].is_contiguous(memory_format=layout_of(device)) or dtype == torch.bfloat16 or not x.numel()
        assert torch.equal(mine[0], right[0]) or kind == "avg"  # which adds up in another order
        for a, b in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b)


@KINDS
@pytest.mark.parametrize("extra", [math.inf, math.nan])
def test_infinite_elements_and_what_is_not_a_number_are_pooled_as_plain_torch_does(device, kind, extra):
    values = torch.tensor([0.0, 1.0, 2.0, -math.inf, extra])
    x = values[torch.randint(5, (2, 16, 9, 9), generator=torch.Generator().manual_seed(0))].to(device)
    x[0] = -math.inf
    (mine, of_mine), (right, of_right) = (pooled(f, x, kind, 1) for f in (kernels.pool, kernels.pool_ref))
    torch.testing.assert_close(mine, right, equal_nan=True)
    if device == "cuda" or extra == math.inf:  # on the CPU every NaN of a window has the gradient
        torch.testing.assert_close(of_mine, of_right)


@KINDS
def test_pool_saves_its_input_and_result_which_must_not_be_changed(device, kind):
    x = numbers(2, 4, 6, 6, device=device).contiguous(memory_format=layout_of(device)).requires_grad_()
    saved, y = saved_for_backward(lambda: kernels.pool(x, kind))
    assert saved.pop(x.data_ptr()) == saved.pop(y.data_ptr()) == x.numel()
    assert sum(saved.values()) <= 3 * 2 * 4  # statistics
    y = kernels.pool(x, kind)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@KINDS
def test_pool_passes_gradcheck_and_compiles(device, kind):
    torch.manual_seed(0)
    x = numbers(2, 3, 5, 6, device=device).requires_grad_()
    function = functools.partial(kernels.pool, kind=kind, stride=2)
    assert torch.autograd.gradcheck(function, x)
    assert_compiles(function, [x])


@KINDS
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # by torch itself
def test_second_derivative_and_forward_mode_of_pool_are_refused(device, kind):
    x = numbers(2, 3, 5, 6, device=device).requires_grad_()
    (gradient,) = torch.autograd.grad(kernels.pool(x, kind).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            kernels.pool(dual, kind)


@KINDS
def test_pool_gives_the_same_bits_with_any_number_of_threads_and_at_every_call(device, kind):
    x = numbers(16, 16, 32, 32, device=device, dtype=torch.float32)
    assert_same_bits(with_threads(lambda: pooled(kernels.pool, x, kind, 1, x)))


@pytest.mark.parametrize(
    "shape, kind, stride, error, message",
    [
        ((4, 4), "max", 1, RuntimeError, "inputs.0. is a Float .4, 4. on cpu; expected a Float .4,C,H,W."),
        ((1, 1, 4, 0), "max", 1, RuntimeError, "with at least one pixel"),
        ((1, 1, 4, 4), "max", 0, RuntimeError, "of operation 0 are 0, 0 and 1; expected at least 1"),
        ((1, 1, 4, 4), "max", 2**32, RuntimeError, "and at most 256"),
        ((1, 1, 4, 4), "min", 1, ValueError, "the kind of pooling is 'min'; expected max or avg"),
    ],
)
@pytest.mark.usefixtures("fused")
def test_pool_names_what_does_not_fit(shape, kind, stride, error, message):
    with pytest.raises(error, match=message):
        kernels.pool(torch.rand(shape), kind, stride)
