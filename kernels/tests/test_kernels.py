"""The fused operators against their plain twins in torch: values, gradients, what is kept, messages; on CPU and CUDA.

`-k cuda` selects what needs a GPU. More elements than 32 bits count, in 20 GB: PDARTS_LARGE=1."""

import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F

import kernels

torch.set_num_threads(1)  # the feature maps are small

CUDA = torch.cuda.is_available()
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]
FRESH = (torch.zeros, torch.ones)  # running means and variances


@pytest.fixture(autouse=True)
def _fused():
    before = kernels.use("on")
    yield
    kernels.use(before)

@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Of the tensors; the fused kernels serve it."""
    assert kernels.fused(request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param

@pytest.fixture(params=["cpu", "cpu apart", *DEVICES[1:]])
def place(request, monkeypatch):
    """A device for convolutions; apart: by torch's own, as on CUDA, which are computed again in the backward pass."""
    kind, *apart = request.param.split()
    assert kernels.fused(kind)
    if apart:
        monkeypatch.setattr(kernels, "_on_cpu", lambda x: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return kind

def leaves(device, count, shape=(2, 3, 4, 5), dtype=torch.float32, seed=0):
    """Probabilities and outputs of `count` candidates."""
    torch.manual_seed(seed)
    tensors = [torch.rand(count, dtype=dtype), *(torch.randn(shape, dtype=dtype) for _ in range(count))]
    return [t.to(device).requires_grad_() for t in tensors]

def summed(probabilities, *outputs):
    return kernels.mixed_sum(list(outputs), probabilities)

def normed(probabilities, *outputs, function=kernels.mixed_norm_sum, none=1):
    """mixed_norm_sum in training, with fresh running statistics; the first `none` outputs are not normalised."""
    dtype = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    fresh = {"dtype": dtype, "device": probabilities.device}
    running = [[None] * none + [f(outputs[0].shape[1], **fresh) for _ in outputs[none:]] for f in FRESH]
    return function(list(outputs), probabilities, *running, True)

def separable_leaves(dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype) for shape in ((2, 4, 5, 6), (4, 1, 3, 3), (3, 4, 1, 1))]
    return [t.to(device, memory_format=torch.channels_last).requires_grad_() for t in tensors]

def with_threads(run):
    """What `run` returns with one, two and three threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    return results

def assert_passes_opcheck(*calls):
    for op, arguments in calls:
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


# --- mixed_sum, mixed_norm_sum: eq. 1 ---------------------------------------------------------------------------------

SHAPES = [((2, 3, 5, 7), 3), ((3, 16, 8, 8), 8), ((4, 36, 9, 9), 40), ((40, 36, 8, 8), 2), ((60, 20, 1, 33), 2),
          ((2, 20, 1, 33), 1), ((3, 2, 150, 150), 2), ((2, 2100, 2, 3), 2), ((5, 70, 1, 1), 3)]

@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape, count", SHAPES)
@pytest.mark.parametrize("norm", [None, "training", "evaluation"])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_fused_mixed_operation_equals_plain_torch(device, memory, shape, count, norm, dtype, bound):
    """norm: None for mixed_sum, else how mixed_norm_sum normalises."""
    torch.manual_seed(0)
    outputs = [torch.randn(shape, dtype=torch.float64).to(device, dtype, memory_format=memory) for _ in range(count)]
    probabilities = torch.rand(count, dtype=torch.float64).to(device, dtype)
    gradient = torch.randn(shape).double().to(device)

    def run(function, dtype):
        p, *ys = (t.detach().clone().to(dtype).requires_grad_() for t in [probabilities, *outputs])
        arguments, running = [], []
        if norm:  # the first candidate of three or more is an identity
            identity = [count > 2 and k == 0 for k in range(count)]
            running = [[None if i else f(shape[1], dtype=dtype, device=device) for i in identity] for f in FRESH]
            arguments = [*running, norm == "training"]
        y = function(ys, p, *arguments)
        assert y.is_contiguous(memory_format=memory)
        gradients = torch.autograd.grad(y, [p, *ys], gradient.to(dtype))
        return [y, *gradients, *(t for statistics in running for t in statistics if t is not None)]

    fused, plain = ((kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref) if norm else
                    (kernels.mixed_sum, kernels.mixed_sum_ref))
    for i, (mine, right) in enumerate(zip(run(fused, dtype), run(plain, torch.float64), strict=True)):
        # A gradient of a probability is a sum in which much cancels.
        assert (mine.double() - right).norm() <= (bound if i == 0 else 5 * bound) * right.norm()

@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape, count", [((4, 36, 9, 9), 40), ((5, 70, 1, 1), 3), ((3, 2, 90, 90), 2),
                                          ((70, 20, 1, 33), 2)])
@pytest.mark.parametrize("affine, norm", [(False, None), (True, "training"), (True, "evaluation"), (False, "training")])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 4e-6)])
def test_fused_mixed_operation_takes_affine_norms_and_probabilities_of_each_image(
        device, memory, shape, count, affine, norm, images, dtype, bound):
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
            running = [[None, *(f(shape[1], dtype=dtype, device=device) for _ in ys[1:])] for f in FRESH]
            values = [[None, None, *v[2:]] for v in (values[:count], values[count:])] if affine else [None, None]
            y = function(ys, p, *running, norm == "training", gammas=values[0], betas=values[1])
            values = [v for v in (values[0] or []) + (values[1] or []) if v is not None]
        else:
            y, running = function(ys, p), [[], []]
        gradients = torch.autograd.grad(y, [p, *ys, *values], gradient.to(dtype))
        return [y.detach(), *gradients, *(t for statistics in running for t in statistics if t is not None)]

    fused, plain = ((kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref) if norm else
                    (kernels.mixed_sum, kernels.mixed_sum_ref))
    for i, (mine, right) in enumerate(zip(run(fused, dtype), run(plain, torch.float64), strict=True)):
        assert mine.shape == right.shape
        assert (mine.double() - right).norm() <= (bound if i == 0 else 5 * bound) * right.norm()

def test_second_derivative_of_the_fused_sum_is_refused(device):
    probabilities, y = leaves(device, 1)
    (gradient,) = torch.autograd.grad(summed(probabilities, y).sum(), probabilities, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()

IMAGE = torch.rand(1, 2, 3, 3)

@pytest.mark.parametrize("outputs, probabilities, message", [
    ([], torch.rand(0), "outputs has 0 tensors; expected 1 to 64"),
    ([torch.rand(2, 3, 4)], torch.rand(1), "outputs.0. has shape .2, 3, 4.; expected .N,C,H,W."),
    ([IMAGE] * 2, torch.rand(3), "probabilities has shape .3.; expected .2."),
    ([IMAGE, torch.rand(1, 2, 3, 4)], torch.rand(2), "outputs.1. has shape"),
    ([IMAGE] * 65, torch.rand(65), "outputs has 65 tensors; expected 1 to 64"),
    ([IMAGE.int()], torch.rand(1), "outputs.0. is Int; expected float32, float64"),
    ([IMAGE, IMAGE.double()], torch.rand(2), "outputs.1. is Double; expected"),
    ([IMAGE], torch.rand(1).double(), "probabilities is Double; expected float32 or Float"),
])
def test_fused_sum_names_what_does_not_fit(device, outputs, probabilities, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.mixed_sum([y.to(device) for y in outputs], probabilities.to(device))

@pytest.mark.parametrize("means, variances, message", [
    ([torch.zeros(2)], [torch.ones(2)], "running_means, running_vars, gammas and betas have 1, 1, 2 and 2 entries"),
    ([torch.zeros(2), None], [torch.ones(2)] * 2, "None in different places"),
    ([torch.zeros(2)] * 2, [torch.ones(3)] * 2, "running_vars.0. is a Float .3.* expected a contiguous Float .2."),
    ([torch.zeros(2).double()] * 2, [torch.ones(2)] * 2, "running_means.0. is a Double"),
])
def test_fused_norm_names_what_does_not_fit(device, means, variances, message):
    running = ([t if t is None else t.to(device) for t in statistics] for statistics in (means, variances))
    with pytest.raises(RuntimeError, match=message):
        kernels.mixed_norm_sum([torch.rand(2, 2, 3, 3).to(device)] * 2, torch.rand(2).to(device), *running, True)

def test_fused_norm_refuses_a_single_value_per_channel(device):
    with pytest.raises(RuntimeError, match="expected more than one value per channel"):
        normed(*leaves(device, 2, (1, 3, 1, 1)))

@pytest.mark.parametrize("function", [summed, normed])
def test_fused_gradients_are_numerical_derivatives(device, function):
    assert torch.autograd.gradcheck(function, leaves(device, 3, dtype=torch.float64))

def test_fused_gradients_of_affine_norms_and_probabilities_of_each_image_are_numerical_derivatives(device):
    _, *outputs = leaves(device, 3, dtype=torch.float64)
    others = [torch.rand(shape, dtype=torch.float64).to(device).requires_grad_() for shape in ((3, 2), *[(3,)] * 3)]

    def function(p, gamma_1, gamma_2, beta_2, *ys):
        running = [[None, *(f(3, dtype=torch.float64, device=device) for _ in ys[1:])] for f in FRESH]
        affine = {"gammas": [None, gamma_1, gamma_2], "betas": [None, None, beta_2]}
        return kernels.mixed_norm_sum(list(ys), p, *running, True, **affine)

    assert torch.autograd.gradcheck(function, [*others, *outputs])

@pytest.mark.parametrize("function", [summed, normed])
def test_fused_mixed_operation_compiles_without_graph_breaks(device, function):
    inputs = leaves(device, 3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mine, right = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, function))
    assert all(map(torch.equal, mine, right))

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
        (ops.mixed_backward, (detached[0], detached, probabilities.detach(), affine, [], statistics, batch, needs)))

def test_fused_mixed_operation_gives_the_same_bits_with_any_number_of_threads(device):
    inputs = leaves(device, 3, (32, 16, 32, 32))

    def run():
        y = normed(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    first, *others = with_threads(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_16_bit_result_is_the_rounded_float32_result(device, dtype):
    probabilities, *outputs = (t.detach() for t in leaves(device, 5, (3, 16, 8, 8)))
    outputs = [y.to(dtype) for y in outputs]
    exact = normed(probabilities, *(y.float() for y in outputs)).to(dtype)
    units = normed(probabilities, *outputs).view(torch.int16).int() - exact.view(torch.int16).int()
    assert units.abs().max() <= 1

def test_fused_mixed_operation_keeps_only_what_its_gradients_need(device):
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

@pytest.mark.skipif("PDARTS_LARGE" not in os.environ, reason="needs 20 GB: set PDARTS_LARGE=1")
def test_fused_mixed_operation_takes_more_elements_than_32_bits_count(device):
    shape = (2, 2, 1 << 15, (1 << 14) + 1)  # 2^31 + 2^17 elements
    x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    x[-1, -1, -1] = 1
    running = [[f(2, device=device)] for f in FRESH]
    probabilities = torch.full((1,), 2.0, device=device, requires_grad=True)
    y = kernels.mixed_sum([x], probabilities)
    assert y[-1, -1, -1].eq(2).all() and y.count_nonzero() == shape[-1]
    (gradient,) = torch.autograd.grad(y, probabilities, x)
    assert gradient.item() == shape[-1]
    del y
    y = kernels.mixed_norm_sum([x], probabilities.detach(), *running, True)
    assert y[-1, -1, -1].gt(100).all() and y[:, 0].eq(0).all()

@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_cuda_graph_and_another_stream_give_the_bits_of_an_eager_step():
    def step(probabilities, *outputs):
        running = [[f(16, device="cuda") for _ in outputs] for f in FRESH]
        y = kernels.mixed_norm_sum(list(outputs), probabilities, *running, True)
        gradients = torch.autograd.grad(y.square().sum(), [probabilities, *outputs])
        return [y.detach(), *gradients, *running[0], *running[1]]  # no grad_fn outlives the step

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


# --- separable --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels, width", [(1, 5), (3, 16), (16, 16), (20, 3), (64, 8)])
@pytest.mark.parametrize(
    "size, stride, dilation", [(0, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 2), (5, 2, 1), (5, 1, 2), (7, 1, 1)])
@pytest.mark.parametrize("norm", [None, "training", "evaluation"])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_fused_separable_convolution_equals_plain_torch(
        place, channels, width, size, stride, dilation, norm, dtype, bound):
    """size 0: without the depthwise convolution; norm: how the input is normalised first."""
    torch.manual_seed(0)
    shapes = [(2, channels, 9, width), (6, channels, 1, 1), *[(channels, 1, size, size)] * (size > 0)]
    inputs = [torch.randn(shape).to(place, dtype) for shape in shapes]
    settings = [stride, dilation * (size // 2), dilation]

    affine = 2 if norm and channels > 1 else 0  # gamma and beta
    inputs += [torch.randn(channels).to(place, dtype) for _ in range(affine)]

    def run(function, dtype):
        x, pointwise, *others = leaves = [t.to(dtype).requires_grad_() for t in inputs]
        depthwise, values = others[: len(others) - affine], dict(zip(("gamma", "beta"), others[len(others) - affine :]))
        between = ((-1, 1), (0.5, 2)) if norm else ()
        running = [torch.linspace(*ends, channels, dtype=torch.float64).to(place, dtype) for ends in between]
        values |= {"training": norm == "training", "momentum": 0.3}
        y = function(x, *depthwise or [None], pointwise, *settings, *running, **values)
        gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(place, dtype)
        return [y, *torch.autograd.grad(y, leaves, gradient), *running]

    if dtype == torch.float32 and not kernels._on_cpu(inputs[0]):
        bound *= 10  # torch's own convolutions
    rights = run(kernels.separable_ref, torch.float64)
    for mine, right in zip(run(kernels.separable, dtype), rights, strict=True):
        assert mine.shape == right.shape and (mine.double() - right).norm() <= 5 * bound * right.norm()

@pytest.mark.parametrize("training", [True, False])
def test_fused_operation_takes_outputs_without_channels(device, training):
    *outputs, p = (torch.rand(shape, device=device, requires_grad=True) for shape in [(2, 0, 4, 4)] * 24 + [(24,)])
    running = [[f(0, device=device) for _ in outputs] for f in FRESH]
    y = kernels.mixed_norm_sum(outputs, p, *running, training)
    *_, of_p = torch.autograd.grad(y.sum(), [*outputs, p])
    assert y.shape == (2, 0, 4, 4) and torch.equal(of_p, torch.zeros_like(p))

def test_fused_separable_convolution_keeps_its_input_and_weights_only(place):
    inputs, kept = separable_leaves(device=place), {}
    layout = torch.channels_last if kernels._on_cpu(inputs[0]) else torch.contiguous_format  # in another it is copied
    inputs[0] = inputs[0].detach().contiguous(memory_format=layout).requires_grad_()
    running = [f(4, dtype=torch.float64, device=place) for f in FRESH]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        kernels.separable(*inputs, 1, 1, 1, *running, training=True)
    assert all(kept.pop(t.data_ptr()) == t.numel() for t in inputs)
    assert sum(kept.values()) <= 3 * 4  # statistics

def test_convolutions_that_are_computed_again_compute_only_what_the_gradients_asked_for_need(device, monkeypatch):
    monkeypatch.setattr(kernels, "_on_cpu", lambda x: False)
    x, depthwise, pointwise = separable_leaves(device=device)
    y = kernels.separable(x, depthwise.detach(), pointwise.detach(), padding=1)
    monkeypatch.setattr(F, "conv2d", lambda *_, **__: pytest.fail("an alpha step computed for a weight's gradient"))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape

def test_separable_convolutions_under_autocast_compute_in_the_shorter_type(device):
    inputs = separable_leaves(torch.float32, device)
    running = [f(4, device=device) for f in FRESH]
    results = []
    for function in kernels.separable, kernels.separable_ref:
        with torch.autocast(device, torch.bfloat16):
            y = function(*inputs, 1, 1, 1, *(t.clone() for t in running), training=True)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    assert [t.dtype for t in results[0]] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, right in zip(*results, strict=True):
        assert (mine.float() - right.float()).norm() <= 2e-2 * right.float().norm()

def test_fused_separable_convolution_passes_gradcheck_opcheck_and_compiles():
    x, depthwise, pointwise = inputs = separable_leaves()
    function = functools.partial(kernels.separable, stride=2, padding=2, dilation=2)
    mean, var = (f(4, dtype=torch.float64) for f in FRESH)
    assert torch.autograd.gradcheck(function, inputs)
    for training in False, True:  # momentum 0: every call finds the same running statistics
        after_norm = functools.partial(function, running_mean=mean, running_var=var, training=training, momentum=0.0)
        assert torch.autograd.gradcheck(after_norm, inputs)
    ops, detached, statistics = torch.ops.pdarts, [t.detach() for t in inputs], torch.rand(3, 1, 4).double() + 0.5
    affine = torch.rand(2, 4).double().unbind()
    gradient = torch.randn(2, 3, 5, 6).double()
    assert_passes_opcheck(
        (ops.separable, (*inputs, None, None, None, False, 0.0, 2, 2, 2)),
        (ops.separable, (*inputs, *affine, None, True, 1e-5, 2, 2, 2)),
        (ops.separable, (*inputs, None, affine[1], statistics, False, 1e-5, 2, 2, 2)),
        (ops.separable, (x, None, pointwise, None, None, None, False, 0.0, 1, 0, 1)),
        (ops.separable_backward, (gradient, *detached, None, None, None, False, 1, 1, 1, [True] * 3 + [False] * 2)),
        (ops.separable_backward, (gradient, *detached, None, None, None, False, 1, 1, 1, [True] + [False] * 4)),
        (ops.separable_backward, (gradient, *detached, *affine, statistics, True, 1, 1, 1, [True, False] + [True] * 3)))
    for f in function, after_norm:
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        mine, right = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, f))
        assert all(map(torch.equal, mine, right))

def test_second_derivative_of_the_convolutions_is_refused(place):
    inputs = separable_leaves(device=place)
    (gradient,) = torch.autograd.grad(kernels.separable(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated? twice"):
        gradient.sum().backward()

def test_fused_separable_convolution_gives_the_same_bits_with_any_number_of_threads():
    torch.manual_seed(0)
    inputs = [torch.randn(s).requires_grad_() for s in ((16, 16, 32, 32), (16, 1, 5, 5), (16, 16, 1, 1))]

    def run():
        mean, var = (f(16) for f in FRESH)
        y = kernels.separable(*inputs, padding=2, running_mean=mean, running_var=var, training=True)
        return [y, *torch.autograd.grad(y.square().sum(), inputs), mean, var]

    first, *others = with_threads(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

@pytest.mark.parametrize("x, depthwise, pointwise, message", [
    ((2, 4, 5), (4, 1, 3, 3), (3, 4, 1, 1), "x has shape .2, 4, 5.; expected .N,C,H,W."),
    ((2, 4, 5, 5), (3, 1, 3, 3), (3, 4, 1, 1), "depthwise is a Float .3, 1, 3, 3.; expected a Float .4,1,k,k."),
    ((2, 4, 5, 5), (4, 1, 3, 3), (3, 5, 1, 1), "pointwise is a Float .3, 5, 1, 1.; expected a Float .channels,4,1,1."),
    ((2, 4, 2, 5), (4, 1, 3, 3), (3, 4, 1, 1), "expected it not to be smaller than the kernel"),
])
def test_fused_separable_convolution_names_what_does_not_fit(x, depthwise, pointwise, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.separable(torch.rand(x), torch.rand(depthwise), torch.rand(pointwise))

@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_fused_convolution_and_pooling_name_what_they_do_not_take():
    x, depthwise, pointwise = (t.detach() for t in separable_leaves(torch.float32))
    separable, ops = kernels.separable, torch.ops.pdarts
    for settings in ({"stride": 2**32 + 1}, {"dilation": 257}, {"padding": -1}):
        with pytest.raises(RuntimeError, match="expected at least 1, 0, 1 and 1, and at most 256"):
            separable(x, depthwise, pointwise, **settings)
    with pytest.raises(RuntimeError, match="one of running_mean and running_var is None; expected both or none"):
        separable(x, depthwise, pointwise, running_mean=torch.zeros(4))
    with pytest.raises(RuntimeError, match="grad has shape .1, 1, 1, 1.; expected .2, 4, 5, 6."):
        ops.pool_backward(torch.zeros(1, 1, 1, 1), None, None, [2, 4, 5, 6], 1)
    with pytest.raises(RuntimeError, match="grad has shape .1, 3, 1, 1.; expected .2, 3, 5, 6."):
        ops.separable_backward(x[:1, :3, :1, :1], x, depthwise, pointwise, *[None] * 3, False, 1, 1, 1, [True] * 5)
    with pytest.raises(RuntimeError, match="x and y are Float .2, 4, 5, 6. and Float .1, 4, 5, 6.; expected Float"):
        ops.pool_backward(x, x, x[:1], [2, 4, 5, 6], 1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        calls = (lambda: separable(dual, depthwise, pointwise)), (lambda: kernels.pool(dual, "avg"))
        for call in (*calls, lambda: summed(torch.ones(1), dual)):
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                call()


# --- pool -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (3, 16, 8, 8), (1, 1, 1, 1), (2, 20, 1, 33), (2, 8, 2, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_pool_equals_plain_torch(device, shape, kind, stride, dtype):
    torch.manual_seed(0)
    # Of equal elements the first has the gradient: few values make many of them.
    x = (torch.randint(-2, 3, shape) if kind == "max" else torch.randn(shape)).to(device, dtype).requires_grad_()
    mine, right = (f(x, kind, stride) for f in (kernels.pool, kernels.pool_ref))
    gradient = torch.randn(right.shape).to(device, dtype)
    assert torch.equal(mine, right) or kind == "avg"  # which adds up in another order
    torch.testing.assert_close(mine, right)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, gradient)[0] for y in (mine, right)))

@pytest.mark.parametrize("kind", ["max", "avg"])
def test_fused_pool_of_infinite_elements_and_of_what_is_not_a_number_is_that_of_plain_torch(kind):
    values = torch.tensor([0.0, 1.0, 2.0, math.inf, -math.inf, math.nan])
    x = values[torch.randint(6, (2, 16, 9, 9), generator=torch.Generator().manual_seed(0))]
    x[0] = -math.inf
    torch.testing.assert_close(kernels.pool(x, kind), kernels.pool_ref(x, kind), equal_nan=True)

def test_fused_pool_passes_gradcheck_opcheck_and_compiles():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).requires_grad_()
    for kind in "max", "avg":
        function = functools.partial(kernels.pool, kind=kind, stride=2)
        assert torch.autograd.gradcheck(function, x)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(*(torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, function)))
        given = [x.detach(), kernels.pool(x, kind, 2).detach()] if kind == "max" else [None, None]
        assert_passes_opcheck(
            (torch.ops.pdarts.pool, (x, kind == "max", 1)),
            (torch.ops.pdarts.pool_backward, (torch.randn(2, 3, 3, 3).double(), *given, [2, 3, 5, 6], 2)))
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            gradient.sum().backward()

@pytest.mark.parametrize("shape, kind, stride, error, message", [
    ((4, 4), "max", 1, RuntimeError, "x has shape .4, 4.; expected .N,C,H,W."),
    ((1, 1, 4, 4), "max", 0, RuntimeError, "stride is 0; expected at least one pixel and 1 to 256"),
    ((1, 1, 4, 4), "max", 2**32, RuntimeError, "1 to 256"),
    ((1, 1, 4, 4), "min", 1, ValueError, "the kind of pooling is 'min'; expected max or avg"),
])
def test_fused_pool_names_what_does_not_fit(shape, kind, stride, error, message):
    with pytest.raises(error, match=message):
        kernels.pool(torch.rand(shape), kind, stride)


# --- separable and pool on CUDA ---------------------------------------------------------------------------------------

@pytest.fixture
def cuda(monkeypatch):
    """Where all operations are ours, whatever the tables say, and torch's part is exact and deterministic."""
    if not CUDA:
        pytest.skip("no CUDA device")
    assert kernels.fused("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    before = kernels.use_on_cuda("mixed separable pool")
    yield "cuda"
    kernels.use_on_cuda(before)

MAPS = [(2, 3, 5, 7), (3, 16, 32, 32), (1, 2, 1, 1), (4, 36, 9, 9), (2, 20, 1, 33), (2, 64, 8, 8), (1, 2, 70, 40),
        (0, 3, 4, 4)]
TAPS = [(0, 1, 1, 0), (3, 1, 1, 1), (3, 2, 2, 2), (3, 2, 1, 2), (5, 2, 1, 2), (5, 1, 2, 4), (7, 1, 1, 3), (7, 2, 1, 3),
        (7, 2, 2, 7)]  # kernel, stride, dilation, padding
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYOUTS = torch.contiguous_format, torch.channels_last

@pytest.mark.parametrize(
    "shape, taps", [(MAPS[(i + j) % len(MAPS)], taps) for i, taps in enumerate(TAPS) for j in (0, 3)])
@pytest.mark.parametrize("norm", [None, "training", "evaluation"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_separable_convolution_on_cuda_equals_plain_torch(cuda, shape, taps, norm, dtype):
    if norm == "training" and shape[0] * shape[2] * shape[3] <= 1:
        pytest.skip("no statistics of a single value")
    torch.manual_seed(0)
    size, *geometry = taps
    channels, accumulated = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
    x, pointwise = torch.randn(shape), torch.randn(6, channels, 1, 1) / channels
    depthwise = [torch.randn(channels, 1, size, size) / size] * (size > 0)
    affine = [torch.rand(channels) + 0.5, torch.randn(channels)] if norm else []
    inputs = [t.to(cuda, dtype) for t in (x, pointwise, *depthwise)] + [t.to(cuda, accumulated) for t in affine]

    def run(function, exact, memory=torch.contiguous_format):
        leaves = [(t.double() if exact else t).requires_grad_() for t in (t.detach().clone() for t in inputs)]
        leaves[0] = leaves[0].detach().to(memory_format=memory).requires_grad_()
        x, pointwise, *others = leaves
        depthwise = others.pop(0) if size else None
        values, running = dict(zip(("gamma", "beta"), others)), []
        if norm:
            ends = (-1, 1), (0.5, 2)
            running = [torch.linspace(*end, channels, dtype=leaves[-1].dtype, device=cuda) for end in ends]
            values |= {"training": norm == "training", "momentum": 0.3}
        stride, dilation, padding = geometry
        y = function(x, depthwise, pointwise, stride, padding, dilation, *running, **values)
        gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(cuda, dtype)
        return [y, *torch.autograd.grad(y, leaves, gradient.to(y.dtype)), *running]

    results = run(kernels.separable_ref, True)
    for memory in LAYOUTS:
        for i, (mine, right) in enumerate(zip(run(kernels.separable, False, memory), results, strict=True)):
            layout = memory if i < 2 and mine.numel() else torch.contiguous_format
            assert mine.shape == right.shape and mine.is_contiguous(memory_format=layout)
            assert (mine.double() - right).norm() <= 5 * ROUNDING[dtype] * right.norm(), memory

@pytest.mark.parametrize("shape", [*MAPS, (3, 2, 5, 300)])
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_pool_on_cuda_equals_plain_torch(cuda, shape, kind, stride, dtype):
    torch.manual_seed(0)
    x = torch.randint(-2, 3, shape) if kind == "max" else torch.randn(shape)  # of equal elements the first
    exact = x.to(cuda, dtype).double().requires_grad_()
    right = kernels.pool_ref(exact, kind, stride)
    gradient = torch.randn(right.shape).to(cuda, dtype)
    results = right, *torch.autograd.grad(right, exact, gradient.double())
    for memory in LAYOUTS:
        x = x.detach().to(cuda, dtype, memory_format=memory).requires_grad_()
        y = kernels.pool(x, kind, stride)
        mine = y, *torch.autograd.grad(y, x, gradient.to(memory_format=memory))
        for a, b in zip(mine, results, strict=True):
            assert a.is_contiguous(memory_format=memory) or not a.numel()
            torch.testing.assert_close(a, b.to(dtype))

def test_pool_on_cuda_treats_infinite_elements_and_what_is_not_a_number_as_torch_does(cuda):
    values = torch.tensor([0.0, 1.0, 2.0, math.inf, -math.inf, math.nan])
    x = values[torch.randint(6, (2, 16, 9, 9), generator=torch.Generator().manual_seed(0))].to(cuda)
    x[0] = -math.inf
    for memory in LAYOUTS:
        x, results = x.detach().to(memory_format=memory).requires_grad_(), []
        for function in kernels.pool, kernels.pool_ref:
            y = function(x, "max", 1)
            results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
        for mine, right in zip(*results, strict=True):
            torch.testing.assert_close(mine, right, equal_nan=True)

@pytest.mark.parametrize("memory", LAYOUTS, ids=["contiguous", "channels_last"])
def test_convolutions_and_pooling_on_cuda_pass_gradcheck_opcheck_and_compile(cuda, memory):
    torch.compiler.reset()  # it compiles a function for a few layouts only
    inputs = [t.detach().contiguous(memory_format=memory).requires_grad_() for t in separable_leaves(device=cuda)]
    x, depthwise, pointwise = inputs
    mean, var = (f(4, dtype=torch.float64, device=cuda) for f in FRESH)
    function = functools.partial(kernels.separable, stride=2, padding=2, dilation=2)
    after_norm = functools.partial(function, running_mean=mean, running_var=var, training=True, momentum=0.0)
    pools = [functools.partial(kernels.pool, kind=kind, stride=2) for kind in ("max", "avg")]
    keeping = [functools.partial(f, recompute=False) for f in (function, after_norm)]
    for f, given in (*((f, inputs) for f in (function, after_norm, *keeping)), *((p, [x]) for p in pools)):
        assert torch.autograd.gradcheck(f, given)
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        mine, right = (torch.autograd.grad(f(*given).square().sum(), given) for f in (compiled, f))
        assert all(map(torch.equal, mine, right))
    ops, detached = torch.ops.pdarts, [t.detach() for t in inputs]
    statistics, affine = torch.rand(3, 1, 4).double().to(cuda) + 0.5, torch.rand(2, 4).double().to(cuda).unbind()
    gradient, of_pool = (torch.randn(shape).double().to(cuda) for shape in ((2, 3, 5, 6), (2, 4, 3, 3)))
    y = kernels.pool(x, "max", 2).detach()
    assert_passes_opcheck(
        (ops.separable, (*inputs, *affine, None, True, 1e-5, 2, 2, 2)),
        (ops.separable, (x, None, pointwise, None, affine[1], statistics, False, 1e-5, 1, 0, 1)),
        (ops.separable, (x, depthwise, None, None, None, None, False, 0.0, 2, 1, 1)),
        (ops.separable_backward, (gradient, *detached, None, None, None, False, 1, 1, 1, [True] * 3 + [False] * 2)),
        (ops.separable_backward, (gradient, *detached, *affine, statistics, True, 1, 1, 1, [True, False] + [True] * 3)),
        (ops.pool, (x, True, 2)), (ops.pool_backward, (of_pool, x.detach(), y, [2, 4, 5, 6], 2)),
        (ops.pool_backward, (of_pool, None, None, [2, 4, 5, 6], 2)))

def test_convolutions_and_pooling_on_cuda_compute_only_the_gradients_that_are_needed(cuda):
    inputs = [t.detach().contiguous() for t in separable_leaves(device=cuda)]
    inputs += [torch.rand(4, dtype=torch.float64, device=cuda) for _ in range(2)]
    running = [f(4, dtype=torch.float64, device=cuda) for f in FRESH]

    def gradients(needed):
        x, depthwise, pointwise, gamma, beta = leaves = [t.clone().requires_grad_(i in needed)
                                                         for i, t in enumerate(inputs)]
        norm = {"running_mean": running[0].clone(), "running_var": running[1].clone(), "training": True}
        y = kernels.separable(x, depthwise, pointwise, padding=1, **norm, gamma=gamma, beta=beta)
        return torch.autograd.grad(y.square().sum(), [leaves[i] for i in needed])

    every = gradients(range(5))
    for needed in ([0], [1], [2], [3], [4], [0, 2], [1, 4]):
        assert all(torch.equal(mine, every[i]) for mine, i in zip(gradients(needed), needed, strict=True))

def test_what_convolutions_on_cuda_keep_is_computed_again_or_not(cuda):
    inputs = [t.detach().contiguous().requires_grad_() for t in separable_leaves(device=cuda)]
    kept, results = {}, []
    for recompute, places in (True, 3), (False, 4):  # x and the weights; and what the pointwise convolution reads
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
            y = kernels.separable(*inputs, padding=1, recompute=recompute)
        assert len(kept) == places
        results.append(torch.autograd.grad(y.square().sum(), inputs))
    assert all(map(torch.allclose, *results))

def test_convolutions_and_pooling_on_cuda_give_the_same_bits_at_every_call(cuda):
    torch.manual_seed(0)
    inputs = [torch.randn(s, device=cuda).requires_grad_() for s in ((96, 16, 32, 32), (16, 1, 5, 5), (16, 16, 1, 1))]

    def run(memory):
        inputs[0] = inputs[0].detach().to(memory_format=memory).requires_grad_()
        mean, var = (f(16, device=cuda) for f in FRESH)
        y = kernels.separable(*inputs, padding=2, running_mean=mean, running_var=var, training=True)
        y = kernels.pool(y, "max") + kernels.pool(y, "avg")
        return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs), mean, var]

    for memory in LAYOUTS:
        first, *others = (run(memory) for _ in range(4))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

def test_convolutions_under_autocast_on_cuda_are_ours_in_the_shorter_type(cuda):
    inputs = [t.detach().contiguous().requires_grad_() for t in separable_leaves(torch.float32, cuda)]
    results = []
    for function in kernels.separable, kernels.separable_ref:
        with torch.autocast(cuda, torch.bfloat16):
            y = function(*inputs, 1, 1, 1, *(f(4, device=cuda) for f in FRESH), training=True)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    assert [t.dtype for t in results[0]] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, right in zip(*results, strict=True):
        assert (mine.float() - right.float()).norm() <= 2e-2 * right.float().norm()

@pytest.mark.parametrize("operations, expected", [
    (kernels.CUDA_OPERATIONS, "mixed mixed16 separable pool cell"), ("mixed", "mixed mixed16"), ("", ""),
    ("separable, pool:bfloat16:channels-last", "separable separable16 pool16"),
    ("separable:float32:NCHW:16x8x8 pool:float32:NCHW:16x9x8 pool:float32:NCHW:16x8x9", "pool"),
])
def test_operations_on_cuda_are_those_that_are_named(monkeypatch, operations, expected):
    class Map:  # a tensor, as far as is asked
        device, shape = torch.device("cuda"), (2, 16, 8, 9)

        def __init__(self, dtype):
            self.dtype, self.format = dtype, torch.contiguous_format
            if dtype == torch.bfloat16:
                self.format = torch.channels_last

        def is_contiguous(self, memory_format=torch.contiguous_format):
            return memory_format == self.format

    monkeypatch.setattr(kernels, "_served", {"cuda"})
    before = kernels.use_on_cuda(operations)
    maps = {"": Map(torch.float32), "16": Map(torch.bfloat16)}
    pairs = [(name, end) for name in ("mixed", "separable", "pool", "cell") for end in maps]
    served = [name + end for name, end in pairs if kernels.serves(name, maps[end])]
    message = "the operations on CUDA are .'mixed', 'pol'.; expected mixed, sep"
    with pytest.raises(ValueError, match=message):
        kernels.use_on_cuda("mixed pol")
    assert (kernels.use_on_cuda(before), served) == (operations, expected.split())
    monkeypatch.setattr(kernels, "_cuda_operations", kernels._parsed("mixed pol"))  # by the environment variable
    with pytest.raises(ValueError, match=message):
        kernels.serves("pool", maps[""])
