"""Separable convolutions, cells of one step, against plain torch: values, gradients, what is saved, messages."""

import functools
import itertools

import pytest
import torch

import kernels
from kernels import Norm
from kernels.tests.helpers import (
    ALL_CONTIGUOUS,
    FRESH,
    LAYOUTS,
    MAPS,
    DepthwiseConvolutions,
    assert_compiles,
    assert_same_bits,
    layout_of,
    numbers,
    saved_for_backward,
    thinned,
    with_threads,
)

TAPS = (  # kernel, or 0 for none, stride, dilation, padding
    (0, 1, 1, 0),
    (3, 1, 1, 1),
    (3, 2, 2, 2),
    (3, 2, 1, 2),
    (5, 2, 1, 2),
    (5, 1, 2, 4),
    (7, 1, 1, 3),
    (7, 2, 1, 3),
    (7, 2, 2, 7),
    (1, 2, 1, 0),
)


def leaves(device="cpu", dtype=torch.float64):
    """x, depthwise and pointwise."""
    torch.manual_seed(0)
    shapes = (2, 4, 5, 6), (4, 1, 3, 3), (3, 4, 1, 1)
    return [numbers(*shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def statistics(channels, device, dtype=torch.float64):
    """A running mean and a running variance."""
    ends = (-1, 1), (0.5, 2)
    return [torch.linspace(*pair, channels, dtype=torch.float64).to(device, dtype) for pair in ends]


def convolved(function, tensors, taps, dtype, memory=torch.contiguous_format):
    """Result and gradients; tensors: x, pointwise and perhaps depthwise."""
    size, stride, dilation, padding = taps
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    x, pointwise, *depthwise = leaves
    y = function(x.contiguous(memory_format=memory), *depthwise or [None], pointwise, stride, padding, dilation)
    gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y, *torch.autograd.grad(y, leaves, gradient)]


def assert_near(results, rights, bound):
    for mine, right in zip(results, rights, strict=True):
        assert mine.shape == right.shape
        assert (mine.double() - right.double()).norm() <= bound * right.double().norm()


BOUNDS = (torch.float64, 5e-12), (torch.float32, 1e-5)


@pytest.mark.parametrize("type, taps, shape", thinned(itertools.product(BOUNDS, TAPS, [*MAPS, (1, 2, 70, 40)]), 7))
def test_separable_convolution_equals_plain_torch(device, shape, taps, type):
    torch.manual_seed(0)
    (_, channels, *_), size, (dtype, bound) = shape, taps[0], type
    tensors = [numbers(*shape), numbers(6, channels, 1, 1), *[numbers(channels, 1, size, size)] * (size > 0)]
    tensors = [t.to(device, dtype) for t in tensors]
    rights = convolved(kernels.separable_ref, tensors, taps, torch.float64)
    for memory in LAYOUTS:
        results = convolved(kernels.separable, tensors, taps, dtype, memory)
        assert results[0].is_contiguous(memory_format=layout_of(device)) or not results[0].numel()
        assert_near(results, rights, bound)


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("memory", LAYOUTS, ids=str)
def test_where_torch_convolves_the_result_is_the_same(device, taps, memory, steps_by_torch):
    torch.manual_seed(0)
    size = taps[0]
    tensors = [numbers(2, 4, 9, 8), numbers(6, 4, 1, 1), *[numbers(4, 1, size, size)] * (size > 0)]
    tensors = [t.to(device) for t in tensors]
    rights = convolved(kernels.separable_ref, tensors, taps, torch.float64)
    assert_near(convolved(kernels.separable, tensors, taps, torch.float64, memory), rights, 1e-11)


@pytest.mark.parametrize("channels, affine", [(1, False), (3, True), (20, True)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_separable_convolution_normalises_its_input_first(device, channels, affine, training, dtype, bound):
    torch.manual_seed(0)
    shapes = (2, channels, 9, 5), (channels, 1, 3, 3), (6, channels, 1, 1), *[(channels,)] * 2 * affine
    tensors = [numbers(*shape, device=device, dtype=dtype) for shape in shapes]

    def run(function, dtype):
        x, depthwise, pointwise, *values = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        running = statistics(channels, device, dtype)
        y = function(x, depthwise, pointwise, 2, 1, 1, Norm(*running, *values), training, momentum=0.3)
        gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
        return [y, *torch.autograd.grad(y, leaves, gradient), *running]

    assert_near(run(kernels.separable, dtype), run(kernels.separable_ref, torch.float64), bound)


def test_separable_convolution_saves_its_input_weights_and_result(device):
    inputs = leaves(device)
    inputs[0] = inputs[0].detach().contiguous(memory_format=layout_of(device)).requires_grad_()  # others are copied
    saved, y = saved_for_backward(lambda: kernels.separable(*inputs, padding=1))
    assert all(saved.pop(t.data_ptr(), None) == t.numel() for t in (*inputs, y))
    between = inputs[0].numel() if device == "cuda" else 0  # what the pointwise convolution reads
    assert sum(saved.values()) - between <= 3 * 2 * 4  # statistics


@pytest.mark.parametrize("needed", [[0], [1], [2], [3], [4], [0, 2], [1, 4]])
def test_separable_convolution_computes_the_gradients_that_are_asked_for(device, needed):
    inputs = [*leaves(device), *(numbers(4, device=device) for _ in range(2))]

    def gradients(needed):
        tensors = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        *tensors, gamma, beta = tensors
        norm = Norm(*statistics(4, device), gamma, beta)
        y = kernels.separable(*tensors, 1, 1, 1, norm, training=True)
        return torch.autograd.grad(y.square().sum(), [(*tensors, gamma, beta)[i] for i in needed])

    every = gradients(range(5))
    assert all(torch.equal(mine, every[i]) for mine, i in zip(gradients(needed), needed, strict=True))


@pytest.mark.parametrize("norm", [False, True])
def test_separable_convolution_passes_gradcheck_and_compiles(device, norm):
    inputs = leaves(device)
    function = functools.partial(kernels.separable, stride=2, padding=2, dilation=2)
    if norm:  # momentum 0: every call finds the same running statistics
        function = functools.partial(function, norm=Norm(*statistics(4, device)), training=True, momentum=0.0)
    assert torch.autograd.gradcheck(function, inputs)
    assert_compiles(function, inputs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # by torch itself
def test_second_derivative_and_forward_mode_of_separable_convolutions_are_refused(device):
    x, depthwise, pointwise = leaves(device)
    y = kernels.separable(x, depthwise, pointwise)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            kernels.separable(dual, depthwise, pointwise)


def test_separable_convolution_gives_the_same_bits_with_any_number_of_threads_and_at_every_call(device):
    torch.manual_seed(0)
    shapes = (16, 16, 32, 32), (16, 1, 5, 5), (16, 16, 1, 1)
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]

    def run():
        running = [f(16, device=device) for f in FRESH]
        y = kernels.separable(*inputs, padding=2, norm=Norm(*running), training=True)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs), *running]

    assert_same_bits(with_threads(run))


# --- 16 bits ----------------------------------------------------------------------------------------------------------


def test_under_autocast_separable_convolutions_compute_in_the_shorter_type(device):
    inputs, results = leaves(device, torch.float32), []
    for function in kernels.separable, kernels.separable_ref:
        norm = Norm(*statistics(4, device, torch.float32))
        with torch.autocast(device, torch.bfloat16):
            y = function(*inputs, 1, 1, 1, norm, training=True)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    assert [t.dtype for t in results[0]] == [torch.bfloat16, *[torch.float32] * 3]
    assert_near(*results, 2e-2)


@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bfloat16_and_channels_last_are_right(device, size, kernel, autocast):
    """torch's own weight gradient of a dilated depthwise convolution is not, on CPUs with AVX-512."""
    torch.manual_seed(0)
    shapes = (4, 16, size, size), (16, 1, kernel, kernel), (16, 16, 1, 1)
    gradient = torch.randn(4, 16, size, size).to(device, torch.bfloat16, memory_format=torch.channels_last)
    # Values that bfloat16 has: what differs was rounded within the operation.
    tensors = [torch.randn(shape).bfloat16().to(device, memory_format=torch.channels_last) for shape in shapes]

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        with torch.autocast(device, torch.bfloat16, enabled=autocast and dtype == torch.float32):
            y = function(*leaves, 1, kernel - 1, 2)
        return [y, *torch.autograd.grad(y, leaves, gradient.to(y.dtype))]

    with DepthwiseConvolutions() as convolutions:
        results = run(kernels.separable, torch.float32 if autocast else torch.bfloat16)
    assert results[0].dtype == torch.bfloat16
    assert convolutions.seen == ALL_CONTIGUOUS or device == "cuda"
    assert_near(results, run(kernels.separable_ref, torch.float64), 1e-2)


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, depthwise, pointwise, message",
    [
        ((2, 4, 5), (4, 1, 3, 3), (3, 4, 1, 1), "inputs.0. is a Float .2, 4, 5. .* expected a Float .2,C,H,W."),
        (
            (2, 4, 5, 5),
            (3, 1, 3, 3),
            (3, 4, 1, 1),
            "weights.0. is a Float .3, 1, 3, 3.; expected a Float .4, 1, -1, -1.",
        ),
        (
            (2, 4, 5, 5),
            (4, 1, 3, 3),
            (3, 5, 1, 1),
            "weights.1. is a Float .3, 5, 1, 1.; expected a Float .-1, 4, 1, 1.",
        ),
        ((2, 4, 2, 5), (4, 1, 3, 3), (3, 4, 1, 1), "expected a square kernel that is not larger than value 0"),
    ],
)
def test_separable_convolution_names_tensors_that_do_not_fit(device, x, depthwise, pointwise, message):
    tensors = [torch.rand(shape, device=device) for shape in (x, depthwise, pointwise)]
    with pytest.raises(RuntimeError, match=message):
        kernels.separable(*tensors)


@pytest.mark.usefixtures("fused")
def test_separable_convolution_names_settings_that_do_not_fit():
    tensors = [t.detach() for t in leaves()]
    for settings in ({"stride": 2**32 + 1}, {"dilation": 257}, {"padding": -1}):
        with pytest.raises(RuntimeError, match="expected at least 1, 0 and 1, and at most 256"):
            kernels.separable(*tensors, **settings)
