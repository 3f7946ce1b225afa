"""The fused operations: their signatures, what they compute, and which way they run.

Each has a twin in plain torch in reference.py, of the same name and with _ref at its end, which is called where the
kernels do not support a tensor.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .program import MAX_CANDIDATES, FactorizedReduce, Pool, Separable, Sum, cell_program, known_on_cuda
from .reference import dropout_masks_ref, mixed_norm_sum_ref, mixed_sum_ref, pool_ref
from .runtime import runs, supports


def mixed_sum(outputs, probabilities):
    """sum_k probabilities[k] * outputs[k], read once and written once.

    outputs: 1 to 64 tensors [N,C,H,W] of one dtype: float32, float64, bfloat16 or float16, accumulated in float32 (in
    float64 for float64). probabilities: [K], or [K,N], which weighs
    each image, in float32 or the outputs' dtype. Returns [N,C,H,W] in the memory
    format of the first output, and keeps the outputs for backward only if the probabilities need a gradient.
    Deterministic; RuntimeError for what does not fit together. Differentiable once.
    """
    outputs = _one_dtype(outputs)
    if not supports("mixed", outputs[0]):
        return mixed_sum_ref(outputs, probabilities)
    return torch.ops.pdarts.mixed(outputs, probabilities, [], [], None, [False] * len(outputs), 0.0)[0]


def mixed_norm_sum(outputs, probabilities, norms, training, momentum=0.1, eps=1e-5):
    """sum_k probabilities[k] * bn_k(outputs[k]), bn_k a batch norm; stores nothing normalised.

    outputs, probabilities and result as in `mixed_sum`. norms: K entries, a `Norm` in the type that is accumulated in
    or in the outputs', or None where the output is not to be normalised (an identity). `training`: normalise by the
    statistics of the batch and move the running ones by `momentum` towards them (the variance unbiased), as torch's
    batch_norm does; otherwise normalise by the running ones. Saved for backward: the outputs and 3 numbers per output
    and channel.
    """
    outputs = _one_dtype(outputs)
    if not supports("mixed", outputs[0]):
        return mixed_norm_sum_ref(outputs, probabilities, norms, training, momentum, eps)
    if len(norms) != len(outputs):
        raise RuntimeError(f"norms has {len(norms)} entries; expected {len(outputs)}, one for each of the outputs")
    dtype = outputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    _, _, *affine = _columns(norms)
    gammas, betas = ([t.to(wide) if t is not None and t.dtype == dtype else t for t in column] for column in affine)
    statistics, batch = _normalisation(norms, training, eps)
    y, computed = torch.ops.pdarts.mixed(outputs, probabilities, gammas, betas, statistics, batch, eps)
    _move_running(norms, computed, batch, momentum, y)
    return y


def separable(
    x, depthwise, pointwise, stride=1, padding=0, dilation=1, norm=None, training=False, momentum=0.1, eps=1e-5
):
    """The convolutions of a separable convolution: ReLU, depthwise, pointwise; nothing between them is stored.

    x: [N,C,H,W]; depthwise: weight [C,1,k,k], or None for a pointwise convolution after ReLU; pointwise: weight
    [channels,C,1,1]. Where a `Norm` is given, torch's batch norm normalises x first; training, momentum and eps as in
    `mixed_norm_sum`. Saved for backward: x, the weights and the result; the rest is computed again, on the CPU, or
    saved, on CUDA. Differentiable once.

    A cell of one step: fused, and deterministic, where `cell` is, and in its memory format. Elsewhere torch's own
    convolutions run.
    """
    if norm is not None:
        x = F.batch_norm(x, *norm, training, momentum, eps)
    step = Separable(0, depthwise, pointwise, stride, padding, dilation)
    types = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if any(w is not None and w.dtype not in types for w in (depthwise, pointwise)):
        return _alone(step, x)
    return _step("separable", x, step)


def pool(x, kind, stride=1):
    """The largest element ("max") or the mean ("avg") of every 3x3 window; what lies over the borders does not count.

    x: [N,C,H,W] -> [N,C,ceil(H/stride),ceil(W/stride)]. Saved for backward: x and the result, which must not be changed
    then, instead of the places of the largest elements. A cell of one step: fused where `cell` is. Differentiable once.
    """
    step = Pool(0, kind, stride)
    _check_pools([step])
    return _step("pool", x, step)


def _check_pools(operations):
    for op in operations:
        if isinstance(op, Pool) and op.kind not in ("max", "avg"):
            raise ValueError(f"the kind of pooling is {op.kind!r}; expected max or avg")


def _step(operation, x, step):
    """A cell of one step, by torch where it is not fused."""
    if not supports(operation, x) or (x.device.type == "cuda" and not known_on_cuda([step], [None, None], [1])):
        return _alone(step, x)
    return run_cell([x], *cell_program([step]), [1], x.new_empty(0), [None, None], False, 0.0, 0.0)


def _alone(step, x):
    """The result of a step, by torch."""
    return pool_ref(x, step.kind, step.stride) if isinstance(step, Pool) else _convolved(step, F.relu(x))


def _convolved(step, x):
    """The result of the convolutions of a step; x is rectified."""
    if isinstance(step, FactorizedReduce):
        halves = zip(_Diagonals.apply(x), (step.first, step.second))
        return torch.cat([F.conv2d(half, weight) for half, weight in halves], dim=1)
    if step.depthwise is not None:
        x = _conv2d(x, step.depthwise, step.stride, step.padding, step.dilation, x.shape[1])
    return F.conv2d(x, step.pointwise)


def _conv2d(x, weight, stride, padding, dilation, groups):
    if not x.is_cpu:
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)
    # torch's weight gradient of dilated depthwise convolutions in bfloat16 is wrong on the CPU where input, weight or
    # gradient lie in channels-last (2.13.0, 2.14.1): all three are contiguous here.
    weight = weight.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of [C,1,k,k]
    y = F.conv2d(x.contiguous(), weight, None, stride, padding, dilation, groups)
    return _ContiguousGradient.apply(y)


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        return g.contiguous()


def dropout_key(device) -> torch.Tensor:
    """A key of dropout masks, int64 [1], from torch's generator of the device: a captured graph draws it anew."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def dropout_masks(key, rates, terms, size):
    """What the dropout of terms multiplies by: 0 with probability rates[i], rounded to 2^-16, else 1 / (1 - that).

    key: int64 [1]; rates: float32 [D]; terms: D integers; size: N, C, H, W. Returns float32 [D,N,C,H,W]. A function of
    these alone, the same on every device and for any number of threads: Philox 4x32-10, see philox.h.
    """
    if key.device.type not in ("cpu", "cuda") or not runs("cell", key.device):
        return dropout_masks_ref(key, rates, terms, size)
    return torch.ops.pdarts.dropout_masks(key, rates, terms, size)


def _one_by_one(inputs, operations, outputs, probabilities, norms, training, momentum, eps, dropout):
    """The cell where it is not fused: steps by torch, sums by the mixed operation."""
    settings, probabilities = (training, momentum, eps), list(probabilities)
    rates = dict(zip(dropout.terms, dropout.rates.split(1))) if dropout else {}
    reads = [v for op in operations for v in (op.terms if isinstance(op, Sum) else [op.source])] + list(outputs)
    rectifying = [op.source for op in operations if isinstance(op, (Separable, FactorizedReduce))]
    values, rectified = [], {}  # each as often as it is read
    place = 0

    def copies(value, times):
        together = 1 < times <= MAX_CANDIDATES and value.requires_grad and supports("mixed", value)
        return list(_Read.apply(value, times)) if together else [value] * times

    def add(value):
        v = len(values)
        shared = rectifying.count(v)
        once = shared > 1 and norms[v] is None  # one ReLU does for all of them
        values.append(copies(value, reads.count(v) - shared + 1 if once else reads.count(v)))
        if once:
            rectified[v] = copies(F.relu(values[v].pop()), shared)

    def term(v, place):
        x = values[v].pop()
        if place not in rates:
            return x
        return x * dropout_masks(dropout.key, rates[place], [place], x.shape)[0].to(x.dtype)

    for value in inputs:
        add(value)
    for op in operations:
        if isinstance(op, Sum):
            sums = []
            for part in (op.terms[i : i + MAX_CANDIDATES] for i in range(0, len(op.terms), MAX_CANDIDATES)):
                p = torch.stack(probabilities[place : place + len(part)])
                terms = [term(v, place + i) for i, v in enumerate(part)]
                sums.append(mixed_norm_sum(terms, p, [norms[v] for v in part], *settings))
                place += len(part)
            y = sum(sums[1:], sums[0])
        elif op.source in rectified and not isinstance(op, Pool):
            y = _convolved(op, rectified[op.source].pop())
        else:
            x = values[op.source].pop()
            if norms[op.source] is not None:
                x = F.batch_norm(x, *norms[op.source], *settings)
            y = _alone(op, x)
        add(y)
    return torch.cat([values[i].pop() for i in outputs], dim=1) if len(outputs) > 1 else values[outputs[0]].pop()


class _Read(torch.autograd.Function):
    """A tensor as often as it is read, whose gradients are added up at once instead of one after the other."""

    @staticmethod
    def forward(ctx, x, times):
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(times))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        gradients = [g for g in gradients if g is not None]
        if len(gradients) < 3:
            return sum(gradients[1:], *gradients[:1]) if gradients else None, None
        like, dtype = gradients[0], torch.promote_types(gradients[0].dtype, torch.float32)
        return mixed_sum(gradients, torch.ones(len(gradients), dtype=dtype, device=like.device)), None


class _Diagonals(torch.autograd.Function):
    """x[:, :, ::2, ::2] and x[:, :, 1::2, 1::2], whose gradients are written into one tensor, not two that are added.

    x: [N,C,H,W] -> two of [N,C,ceil(H/2),ceil(W/2)]; at odd sizes the second gets a row or column of zeros. It is what
    the two convolutions of a factorized reduction, of stride 2 with a kernel of one pixel, see.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        odd = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
        return x[:, :, ::2, ::2].clone(), F.pad(x[:, :, 1::2, 1::2], odd)

    @staticmethod
    def backward(ctx, first, second):
        _, _, h, w = ctx.shape
        layout = torch.contiguous_format if first.is_contiguous() else torch.channels_last
        gradient = torch.empty(ctx.shape, dtype=first.dtype, device=first.device, memory_format=layout)
        gradient.zero_()[:, :, ::2, ::2] = first
        gradient[:, :, 1::2, 1::2] = second[:, :, : h // 2, : w // 2]
        return gradient


def cell(
    inputs, operations, outputs, probabilities, norms=None, training=False, momentum=0.1, eps=1e-5, dropout=None
):
    """A cell, or a part of one, as a whole.

    inputs: tensors [N,C,H,W], the first values. operations: a step (`Separable`, `FactorizedReduce`, `Pool`) or a `Sum`
    for each further value, which reads values before it. A sum is `mixed_norm_sum` of its terms; probabilities [K] or
    [K,N] are those of the terms of all sums, one after the other. norms: a `Norm` or None for each value; training,
    momentum and eps are those of all. A separable convolution that reads a value with a norm normalises it first. The
    value of a step is used once.
    dropout: a `Dropout` of some terms, whose masks are drawn where they are read, again in the backward pass, and never
    stored. Returns the channels of the values in `outputs` side by side: sums, or one step without a norm.

    Fused, and deterministic, on the CPU in float32 and float64, in channels-last memory format, which the result has,
    and on CUDA where CUDA_OPERATIONS names it, in all four types, in NCHW, with kernels of 3, 5 or 7 and strides
    and dilations of 1 or 2: what steps read in common is read once, and gradients are added up where they belong, not
    written apart. With inputs of 16 bits, weights and norms are in float32 or in their type; all but feature maps is
    computed in float32. Elsewhere sums are mixed operations, and torch's own operations compute the steps. Saved for
    backward: all values, and on CUDA what pointwise convolutions read; the rest is computed again. Differentiable once.
    """
    norms = list(norms or [None] * (len(inputs) + len(operations)))
    if len(norms) != len(inputs) + len(operations):
        raise RuntimeError(
            f"norms has {len(norms)} entries; expected {len(inputs)} + {len(operations)}, one for each value"
        )
    _check_pools(operations)
    settings = training, momentum, eps, dropout
    on_cuda = inputs[0].device.type == "cuda"
    if not supports("cell", inputs[0]) or (on_cuda and not known_on_cuda(operations, norms, outputs)):
        return _one_by_one(inputs, operations, outputs, probabilities, norms, *settings)
    return run_cell(inputs, *cell_program(operations), outputs, probabilities, norms, *settings)


def run_cell(inputs, program, weights, outputs, probabilities, norms, training, momentum, eps, dropout=None):
    """`cell` where it is fused, of a program as `cell_program` gives it."""
    key, rates, dropped = dropout or (None, None, [])
    _, _, gammas, betas = _columns(norms)
    statistics, batch = _normalisation(norms, training, eps)
    norm = weights, gammas, betas, probabilities, statistics
    y, computed, _ = torch.ops.pdarts.cell(
        inputs, *norm, key, rates, dropped, program, outputs, batch, eps, False
    )
    _move_running(norms, computed, batch, momentum, y)
    return y


def _columns(norms):
    """running_means, running_vars, gammas, betas: of each norm, or None."""
    return zip(*(norm or (None,) * 4 for norm in norms))


@torch.no_grad()
def _normalisation(norms, training, eps):
    """How the operators normalise: by `statistics` [3,K,C] (mean, 1 / sqrt(variance + eps), variance) or by the batch.

    Returns statistics, or None, and for each norm whether the batch's statistics normalise.
    """
    normalised = [norm is not None for norm in norms]
    if training or not any(normalised):
        return None, normalised
    means, vars, _, _ = _columns(norms)
    zero, one = (f(next(mean for mean in means if mean is not None)) for f in (torch.zeros_like, torch.ones_like))
    mean, var = (torch.stack([zero if t is None else t for t in running]) for running in (means, vars))
    mean, var, one = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (mean, var, one))
    invstd = torch.where(torch.tensor(normalised, device=var.device)[:, None], (var + eps).rsqrt(), one)
    return torch.stack([mean, invstd, var]), [False] * len(normalised)


def _move_running(norms, statistics, batch, momentum, x):
    """The running statistics of what is normalised by the batch, towards those of the batch, unless x is empty."""
    if any(batch) and x.numel():
        means, vars, _, _ = zip(*(norm for norm in norms if norm))
        torch.ops.pdarts.update_running(means, vars, statistics, batch, momentum)


def _one_dtype(outputs):
    """Under autocast some operations return float32 and others a shorter type: the widest of them, as `+` would."""
    outputs = list(outputs)
    if not outputs:
        raise RuntimeError("outputs has 0 tensors; expected 1 to 64")
    if torch.is_autocast_enabled(outputs[0].device.type):
        dtype = functools.reduce(torch.promote_types, (y.dtype for y in outputs))
        outputs = [y.to(dtype) for y in outputs]
    return outputs
