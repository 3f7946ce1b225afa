"""The mixed operation against its plain twin in torch: values, gradients, what is saved for backward, messages.

More elements than 32 bits count, in 20 GB: PDARTS_LARGE=1.
"""

import itertools
import os

import pytest
import torch

import kernels
from kernels import Norm
from kernels.tests.helpers import (
    CUDA,
    FRESH,
    LAYOUTS,
    SLOW,
    assert_compiles,
    assert_passes_opcheck,
    assert_same_bits,
    thinned,
    with_threads,
)

SHAPES = [
    ((2, 3, 5, 7), 3),
    ((3, 16, 8, 8), 8),
    ((4, 36, 9, 9), 40),
    ((40, 36, 8, 8), 2),
    ((60, 20, 1, 33), 2),
    ((2, 20, 1, 33), 1),
    ((3, 2, 150, 150), 2),
    ((2, 2100, 2, 3), 2),
    ((5, 70, 1, 1), 3),
]


def leaves(device, count, shape=(2, 3, 4, 5), dtype=torch.float32, seed=0):
    """Probabilities and outputs of `count` candidates."""
    torch.manual_seed(seed)
    tensors = [torch.rand(count, dtype=dtype), *(torch.randn(shape, dtype=dtype) for _ in range(count))]
    return [t.to(device).requires_grad_() for t in tensors]


def fresh_norm(channels, **options):
    return Norm(*(f(channels, **options) for f in FRESH))


def running(norms):
    """The running statistics."""
    return [t for norm in norms if norm for t in norm[:2]]


def summed(probabilities, *outputs):
    return kernels.mixed_sum(list(outputs), probabilities)


def normed(probabilities, *outputs, function=kernels.mixed_norm_sum, none=1):
    """mixed_norm_sum in training, with fresh running statistics; the first `none` outputs are not normalised."""
    dtype = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    fresh = {"dtype": dtype, "device": probabilities.device}
    norms = [None] * none + [fresh_norm(outputs[0].shape[1], **fresh) for _ in outputs[none:]]
    return function(list(outputs), probabilities, norms, True)


BOUNDS = (torch.float64, 1e-12), (torch.float32, 2e-6)
NORMS = None, "training", "evaluation"


@pytest.mark.parametrize("type, norm, memory, sizes", thinned(itertools.product(BOUNDS, NORMS, LAYOUTS, SHAPES), 5))
def test_fused_mixed_operation_equals_plain_torch(device, memory, sizes, norm, type):
    """norm: None for mixed_sum, else how mixed_norm_sum normalises."""
    torch.manual_seed(0)
    (shape, count), (dtype, bound) = sizes, type
    outputs = [torch.randn(shape, dtype=torch.float64).to(device, dtype, memory_format=memory) for _ in range(count)]
    probabilities = torch.rand(count, dtype=torch.float64).to(device, dtype)
    gradient = torch.randn(shape).double().to(device)

    def run(function, dtype):
        p, *ys = (t.detach().clone().to(dtype).requires_grad_() for t in [probabilities, *outputs])
        arguments, norms = [], []
        if norm:  # the first candidate of three or more is an identity
            identity = [count > 2 and k == 0 for k in range(count)]
            norms = [None if i else fresh_norm(shape[1], dtype=dtype, device=device) for i in identity]
            arguments = [norms, norm == "training"]
        y = function(ys, p, *arguments)
        assert y.is_contiguous(memory_format=memory)
        gradients = torch.autograd.grad(y, [p, *ys], gradient.to(dtype))
        return [y, *gradients, *running(norms)]

    fused, plain = (
        (kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref) if norm else (kernels.mixed_sum, kernels.mixed_sum_ref)
    )
    for i, (mine, right) in enumerate(zip(run(fused, dtype), run(plain, torch.float64), strict=True)):
        # A gradient of a probability is a sum in which much cancels.
        assert (mine.double() - right).norm() <= (bound if i == 0 else 5 * bound) * right.norm()


OF_IMAGES = itertools.product(
    [(torch.float64, 1e-12), (torch.float32, 4e-6)],
    [False, True],
    [(False, None), (True, "training"), (True, "evaluation"), (False, "training")],
    [((4, 36, 9, 9), 40), ((5, 70, 1, 1), 3), ((3, 2, 90, 90), 2), ((70, 20, 1, 33), 2)],
    LAYOUTS,
)


@pytest.mark.parametrize("type, images, norms, sizes, memory", thinned(OF_IMAGES, 5))
def test_fused_mixed_operation_takes_affine_norms_and_probabilities_of_each_image(
    device, memory, sizes, norms, images, type
):
    (shape, count), (affine, norm), (dtype, bound) = sizes, norms, type
    torch.manual_seed(0)
    tensors = [torch.randn(count, *[shape[0]] * images), *torch.randn(count, *shape)]
    tensors += torch.randn(2 * affine * count, shape[1])
    tensors = [t.double().to(device) for t in tensors]
    gradient = torch.randn(shape).double().to(device)

    def run(function, dtype):
        leaves = [t.to(dtype) for t in tensors]
        leaves = [t.contiguous(memory_format=memory) if t.dim() == 4 else t for t in leaves]
        p, *ys = [t.detach().requires_grad_() for t in leaves]
        ys, values = ys[:count], ys[count:]
        if norm:  # the first is an identity, the second has neither gamma nor beta
            norms = [None, *(fresh_norm(shape[1], dtype=dtype, device=device) for _ in ys[1:])]
            values = values[2:count] + values[count + 2 :]
            for k in range(2, count if affine else 2):
                norms[k] = norms[k]._replace(gamma=values[k - 2], beta=values[k - 4 + count])
            y = function(ys, p, norms, norm == "training")
        else:
            y, norms = function(ys, p), []
        gradients = torch.autograd.grad(y, [p, *ys, *values], gradient.to(dtype))
        return [y.detach(), *gradients, *running(norms)]

    fused, plain = (
        (kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref) if norm else (kernels.mixed_sum, kernels.mixed_sum_ref)
    )
    for i, (mine, right) in enumerate(zip(run(fused, dtype), run(plain, torch.float64), strict=True)):
        assert mine.shape == right.shape
        assert (mine.double() - right).norm() <= (bound if i == 0 else 5 * bound) * right.norm()


def test_second_derivative_of_the_fused_sum_is_refused(device):
    probabilities, y = leaves(device, 1)
    (gradient,) = torch.autograd.grad(summed(probabilities, y).sum(), probabilities, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


IMAGE = torch.rand(1, 2, 3, 3)


@pytest.mark.parametrize(
    "outputs, probabilities, message",
    [
        ([], torch.rand(0), "outputs has 0 tensors; expected 1 to 64"),
        ([torch.rand(2, 3, 4)], torch.rand(1), "outputs.0. has shape .2, 3, 4.; expected .N,C,H,W."),
        ([IMAGE] * 2, torch.rand(3), "probabilities has shape .3.; expected .2."),
        ([IMAGE, torch.rand(1, 2, 3, 4)], torch.rand(2), "outputs.1. has shape"),
        ([IMAGE] * 65, torch.rand(65), "outputs has 65 tensors; expected 1 to 64"),
        ([IMAGE.int()], torch.rand(1), "outputs.0. is Int; expected float32, float64"),
        ([IMAGE, IMAGE.double()], torch.rand(2), "outputs.1. is Double; expected"),
        ([IMAGE], torch.rand(1).double(), "probabilities is Double; expected float32 or Float"),
    ],
)
def test_fused_sum_names_what_does_not_fit(device, outputs, probabilities, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.mixed_sum([y.to(device) for y in outputs], probabilities.to(device))


@pytest.mark.parametrize(
    "count, mean, var, message",
    [
        (1, torch.zeros(2), torch.ones(2), "norms has 1 entries; expected 2, one for each of the outputs"),
        (2, torch.zeros(2), torch.ones(3), "running_vars.0. is a Float .3.* expected a contiguous Float .2."),
        (2, torch.zeros(2).double(), torch.ones(2), "running_means.0. is a Double"),
    ],
)
def test_fused_norm_names_what_does_not_fit(device, count, mean, var, message):
    norms = [Norm(mean.to(device), var.to(device))] * count
    with pytest.raises(RuntimeError, match=message):
        kernels.mixed_norm_sum([torch.rand(2, 2, 3, 3).to(device)] * 2, torch.rand(2).to(device), norms, True)


def test_fused_norm_refuses_a_single_value_per_channel(device):
    with pytest.raises(RuntimeError, match="expected more than one value per channel"):
        normed(*leaves(device, 2, (1, 3, 1, 1)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # by torch itself
def test_forward_mode_is_refused(device):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(*[torch.rand(1, 2, 3, 3, device=device)] * 2)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            summed(torch.ones(1, device=device), dual)


@pytest.mark.parametrize("function", [summed, normed])
def test_fused_gradients_are_numerical_derivatives(device, function):
    assert torch.autograd.gradcheck(function, leaves(device, 3, dtype=torch.float64))


def test_fused_gradients_of_affine_norms_and_probabilities_of_each_image_are_numerical_derivatives(device):
    _, *outputs = leaves(device, 3, dtype=torch.float64)
    others = [torch.rand(shape, dtype=torch.float64).to(device).requires_grad_() for shape in ((3, 2), *[(3,)] * 3)]

    def function(p, gamma_1, gamma_2, beta_2, *ys):
        norms = [None, *(fresh_norm(3, dtype=torch.float64, device=device) for _ in ys[1:])]
        norms[1:] = norms[1]._replace(gamma=gamma_1), norms[2]._replace(gamma=gamma_2, beta=beta_2)
        return kernels.mixed_norm_sum(list(ys), p, norms, True)

    assert torch.autograd.gradcheck(function, [*others, *outputs])


@SLOW  # test_dynamic.py compiles it too
@pytest.mark.parametrize("function", [summed, normed])
def test_fused_mixed_operation_compiles_without_graph_breaks(device, function):
    assert_compiles(function, leaves(device, 3))


def test_fused_mixed_operators_pass_opcheck(device):
    ops, (probabilities, *outputs) = torch.ops.pdarts, leaves(device, 3)
    detached, statistics, batch = [y.detach() for y in outputs], torch.rand(3, 3, 3, device=device), [False, True, True]
    running = [[f(3, device=device), f(3, device=device)] for f in FRESH]
    affine, needs = [None, *torch.rand(2, 3, device=device)], [True] * 4 + [False, True, True] + [False] * 3
    assert_passes_opcheck(
        (ops.mixed, (outputs, probabilities, [], [], None, [False] * 3, 0.0)),
        (ops.mixed, (outputs, probabilities, [], affine, statistics, [False] * 3, 0.0)),
        (ops.mixed, (outputs, torch.rand(3, 2, device=device), affine, affine, None, batch, 1e-5)),
        (ops.update_running, (*running, statistics, batch, 0.1)),
        (ops.mixed_backward, (detached[0], detached, probabilities.detach(), affine, [], statistics, batch, needs)),
    )


def test_fused_mixed_operation_gives_the_same_bits_with_any_number_of_threads(device):
    inputs = leaves(device, 3, (32, 16, 32, 32))

    def run():
        y = normed(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    assert_same_bits(with_threads(run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_16_bit_result_is_the_rounded_float32_result(device, dtype):
    probabilities, *outputs = (t.detach() for t in leaves(device, 5, (3, 16, 8, 8)))
    outputs = [y.to(dtype) for y in outputs]
    exact = normed(probabilities, *(y.float() for y in outputs)).to(dtype)
    units = normed(probabilities, *outputs).view(torch.int16).int() - exact.view(torch.int16).int()
    assert units.abs().max() <= 1


def test_fused_mixed_operation_saves_only_what_its_gradients_need(device):
    probabilities, *outputs = leaves(device, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summed(probabilities.detach(), *outputs)
        assert [t.dim() for t in kept] == [1]  # the probabilities
        kept.clear()
        normed(probabilities, *outputs)
    assert sorted(t.dim() for t in kept) == [1, 3, 4, 4, 4]  # probabilities, statistics, outputs


def test_fused_norm_is_no_worse_than_torch_where_the_mean_is_large(device):
    probabilities, *outputs = (t.detach() for t in leaves(device, 3, (32, 16, 16, 16)))
    outputs = [y + 1000 for y in outputs]
    plain = kernels.mixed_norm_sum_ref
    right = normed(probabilities.double(), *(y.double() for y in outputs), function=plain, none=0)
    mine, torchs = (normed(probabilities, *outputs, function=f, none=0) for f in (kernels.mixed_norm_sum, plain))
    assert (mine - right).norm() <= (torchs - right).norm()


def test_fused_mixed_operation_takes_an_empty_batch_and_expanded_gradients(device):
    empty = leaves(device, 2, (0, 3, 4, 4))
    y = normed(*empty)
    assert y.shape == (0, 3, 4, 4) and not any(g.any() for g in torch.autograd.grad(y.sum(), empty))
    inputs = leaves(device, 2, dtype=torch.float64)
    mine = torch.autograd.grad(kernels.mixed_sum(inputs[1:], inputs[0]).sum(), inputs)
    right = torch.autograd.grad(kernels.mixed_sum_ref(inputs[1:], inputs[0]).sum(), inputs)
    assert all(map(torch.allclose, mine, right))


def test_fused_mixed_operation_takes_slices_and_outputs_in_different_memory_formats(device):
    probabilities, *outputs = (t.detach() for t in leaves(device, 4, (4, 6, 8, 8), torch.float64))
    strange = [outputs[0].to(memory_format=torch.channels_last), outputs[1][:, :, ::2].repeat_interleave(2, 2)]
    strange += [outputs[2].transpose(2, 3), outputs[3][:1].expand(4, -1, -1, -1)]
    for order in (strange, strange[::-1], [y[1:3, 1:, ::3, 1:] for y in strange]):
        inputs = [probabilities.clone().requires_grad_(), *(y.detach().requires_grad_() for y in order)]
        mine, right = (normed(*inputs, function=f) for f in (kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref))
        gradient = torch.randn_like(right).transpose(2, 3).contiguous().transpose(2, 3)
        gradients = [torch.autograd.grad(y, inputs, gradient) for y in (mine, right)]
        assert torch.allclose(mine, right) and all(map(torch.allclose, *gradients))


@pytest.mark.parametrize("training", [True, False])
def test_fused_mixed_operation_takes_outputs_and_norms_that_have_memory_in_common(device, training):
    probabilities, x = (t.detach() for t in leaves(device, 1, (5, 6, 8, 8), torch.float64))
    results = []
    for function in kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref:
        leaf, p = x.clone().requires_grad_(), probabilities.repeat(5).requires_grad_()
        norm, other = (fresh_norm(6, dtype=torch.float64, device=device) for _ in range(2))
        outputs = [leaf[:2], leaf[:2], leaf[:2].view_as(leaf[:2]), leaf[1:3], leaf[:1].expand(2, -1, -1, -1)]
        y = function(outputs, p, [norm, None, other, norm, norm], training)
        results.append([y, *torch.autograd.grad(y, [leaf, p], y.detach()), *running([norm, other])])
    for mine, right in zip(*results, strict=True):
        assert torch.allclose(mine, right, rtol=1e-11, atol=1e-12)


def test_fused_mixed_operation_leaves_alone_what_needs_no_gradient(device):
    tensors = leaves(device, 4, dtype=torch.float64)
    every = torch.autograd.grad(normed(*tensors).square().sum(), tensors)
    for needed in ([1], [0], [2, 4], [0, 3]):
        inputs = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        some = torch.autograd.grad(normed(*inputs).square().sum(), [inputs[i] for i in needed])
        assert all(torch.allclose(mine, every[i], rtol=1e-12) for mine, i in zip(some, needed, strict=True))


def test_fused_sum_under_autocast_takes_the_widest_type_of_its_outputs(device):
    probabilities, *outputs = (t.detach() for t in leaves(device, 3))
    mixed = [outputs[0].bfloat16(), outputs[1].bfloat16(), outputs[2]]
    with torch.autocast(device, torch.bfloat16):
        y = summed(probabilities, *mixed)
        assert summed(probabilities[:2], *mixed[:2]).dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert torch.allclose(y, kernels.mixed_sum_ref([x.float() for x in mixed], probabilities), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_fused_operation_takes_outputs_without_channels(device, training):
    *outputs, p = (torch.rand(shape, device=device, requires_grad=True) for shape in [(2, 0, 4, 4)] * 24 + [(24,)])
    norms = [fresh_norm(0, device=device) for _ in outputs]
    y = kernels.mixed_norm_sum(outputs, p, norms, training)
    *_, of_p = torch.autograd.grad(y.sum(), [*outputs, p])
    assert y.shape == (2, 0, 4, 4) and torch.equal(of_p, torch.zeros_like(p))


@pytest.mark.skipif("PDARTS_LARGE" not in os.environ, reason="needs 20 GB: set PDARTS_LARGE=1")
def test_fused_mixed_operation_takes_more_elements_than_32_bits_count(device):
    shape = (2, 2, 1 << 15, (1 << 14) + 1)  # 2^31 + 2^17 elements
    x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    x[-1, -1, -1] = 1
    probabilities = torch.full((1,), 2.0, device=device, requires_grad=True)
    y = kernels.mixed_sum([x], probabilities)
    assert y[-1, -1, -1].eq(2).all() and y.count_nonzero() == shape[-1]
    (gradient,) = torch.autograd.grad(y, probabilities, x)
    assert gradient.item() == shape[-1]
    del y
    y = kernels.mixed_norm_sum([x], probabilities.detach(), [fresh_norm(2, device=device)], True)
    assert y[-1, -1, -1].gt(100).all() and y[:, 0].eq(0).all()


@CUDA
@pytest.mark.usefixtures("fused")
def test_a_cuda_graph_and_another_stream_give_the_bits_of_an_eager_step():
    def step(probabilities, *outputs):
        norms = [fresh_norm(16, device="cuda") for _ in outputs]
        y = kernels.mixed_norm_sum(list(outputs), probabilities, norms, True)
        gradients = torch.autograd.grad(y.square().sum(), [probabilities, *outputs])
        return [y.detach(), *gradients, *running(norms)]  # no grad_fn outlives the step

    batches = [leaves("cuda", 3, (8, 16, 8, 8), seed=seed) for seed in range(3)]
    right = [step(*batch) for batch in batches]
    inputs = [t.detach().clone().requires_grad_() for t in batches[0]]  # what the graph reads
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            there = step(*inputs)
    torch.cuda.synchronize()
    assert all(map(torch.equal, there, right[0]))
    del there
    with torch.cuda.graph(graph):
        captured = step(*inputs)
    for i in (1, 2, 0, 1):
        with torch.no_grad():
            for old, new in zip(inputs, batches[i], strict=True):
                old.copy_(new)
        graph.replay()
        assert all(map(torch.equal, captured, right[i])), f"replay of batch {i}"
