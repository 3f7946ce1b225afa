"""The mixed operation of differentiable architecture search, fused: forward and backward, on CPU and CUDA.

    from kernels import mixed_sum, mixed_norm_sum, separable, pool

    y = mixed_sum(outputs, probabilities)                 # sum_k probabilities[k] * outputs[k]
    y = mixed_norm_sum(outputs, probabilities, running_means, running_vars, training=True)
                                                    # sum_k probabilities[k] * batch_norm_k(outputs[k])
    y = separable(x, depthwise, pointwise)          # pointwise(depthwise(relu(x)))
    y = pool(x, "max")                              # over 3x3 windows, or "avg"

`mixed_sum_ref`, `mixed_norm_sum_ref`, `separable_ref` and `pool_ref` are the same in plain torch. The folder works
alone, copied into any project.

The extension is compiled when it is first needed (by ninja and a C++ compiler, for CUDA nvcc too) and cached.
`use("auto")`, the default, falls back to plain torch with one warning if that fails, `use("on")` raises instead and
`use("off")` never tries; the environment variable PDARTS_KERNELS sets the mode at the start. On CUDA the fused
operations are those in CUDA_OPERATIONS, or in the environment variable PDARTS_CUDA_OPERATIONS.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import build

MODES = ("auto", "on", "off")
MAX_CANDIDATES = 64  # of one mixed operation, see mixed_op.h

# What is fused on CUDA, for which type, layout and size of x (such as pool:float32:NCHW:16x32x32, C x H x W), for all
# of them where none is named; torch's own operations serve the others. `python bench.py gpu` measures both ways.
CUDA_OPERATIONS = "mixed separable:float32:NCHW pool:float32:NCHW cell:float32:NCHW"

# ----------------------------------------------------------------------------------------------------------------------
# The operations
# ----------------------------------------------------------------------------------------------------------------------


def mixed_sum_ref(outputs, probabilities):
    """Plain torch version of `mixed_sum`."""
    return sum(p.to(y.dtype).view(-1, 1, 1, 1) * y for p, y in zip(probabilities, outputs, strict=True))


def mixed_norm_sum_ref(
    outputs, probabilities, running_means, running_vars, training, momentum=0.1, eps=1e-5, gammas=None, betas=None
):
    """Plain torch version of `mixed_norm_sum`."""
    none = [None] * len(outputs)
    normed = [
        y if mean is None else F.batch_norm(y, mean, var, gamma, beta, training, momentum, eps)
        for y, mean, var, gamma, beta in zip(
            outputs, running_means, running_vars, gammas or none, betas or none, strict=True
        )
    ]
    return mixed_sum_ref(normed, probabilities)


def separable_ref(
    x,
    depthwise,
    pointwise,
    stride=1,
    padding=0,
    dilation=1,
    running_mean=None,
    running_var=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    gamma=None,
    beta=None,
):
    """Plain torch version of `separable`."""
    if running_mean is not None:
        x = F.batch_norm(x, running_mean, running_var, gamma, beta, training, momentum, eps)
    return _convolved(F.relu(x), depthwise, pointwise, stride, padding, dilation)


def _convolved(x, depthwise, pointwise, stride=1, padding=0, dilation=1):
    if depthwise is not None:
        x = F.conv2d(x, depthwise, None, stride, padding, dilation, groups=x.shape[1])
    return F.conv2d(x, pointwise)


def pool_ref(x, kind, stride=1):
    """Plain torch version of `pool`."""
    if kind == "max":
        return F.max_pool2d(x, 3, stride, padding=1)
    return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)


def mixed_sum(outputs, probabilities):
    """sum_k probabilities[k] * outputs[k], read once and written once.

    outputs: 1 to 64 tensors [N,C,H,W] of one dtype: float32, float64, bfloat16 or float16, accumulated in float32 (in
    float64 for float64). probabilities: [K], or [K,N], which weighs
    each image, in float32 or the outputs' dtype. Returns [N,C,H,W] in the memory
    format of the first output, and keeps the outputs for backward only if the probabilities need a gradient.
    Deterministic; RuntimeError for what does not fit together. Differentiable once.
    """
    outputs = _one_dtype(outputs)
    if not serves("mixed", outputs[0]):
        return mixed_sum_ref(outputs, probabilities)
    return torch.ops.pdarts.mixed(outputs, probabilities, [], [], None, [False] * len(outputs), 0.0)[0]


def mixed_norm_sum(
    outputs, probabilities, running_means, running_vars, training, momentum=0.1, eps=1e-5, gammas=None, betas=None
):
    """sum_k probabilities[k] * bn_k(outputs[k]), bn_k a batch norm; stores nothing normalised.

    outputs, probabilities and result as in `mixed_sum`. running_means, running_vars: K tensors [C] in the type that is
    accumulated in, or None where the output is not to be normalised (an identity). gammas, betas: likewise, None where
    a norm has no affine parameters, or None for all. `training`: normalise by the statistics of the batch and move the
    running ones by `momentum` towards them (the variance unbiased), as torch's batch_norm does; otherwise normalise by
    the running ones. Kept for backward: the outputs and 3 numbers per output and channel.
    """
    outputs = _one_dtype(outputs)
    affine = list(gammas or [None] * len(outputs)), list(betas or [None] * len(outputs))
    if not serves("mixed", outputs[0]):
        running = running_means, running_vars
        return mixed_norm_sum_ref(outputs, probabilities, *running, training, momentum, eps, *affine)
    if {len(running_means), len(running_vars), *map(len, affine)} != {len(outputs)}:
        raise RuntimeError(
            f"running_means, running_vars, gammas and betas have {len(running_means)}, {len(running_vars)}, "
            f"{len(affine[0])} and {len(affine[1])} entries; expected {len(outputs)}, one for each of the outputs"
        )
    normalised = [mean is not None for mean in running_means]
    if normalised != [var is not None for var in running_vars]:
        raise RuntimeError("running_means and running_vars are None in different places; expected the same")
    statistics, batch = _normalisation(running_means, running_vars, training, eps)
    y, computed = torch.ops.pdarts.mixed(outputs, probabilities, *affine, statistics, batch, eps)
    _move_running(running_means, running_vars, computed, batch, momentum, y)
    return y


def separable(
    x,
    depthwise,
    pointwise,
    stride=1,
    padding=0,
    dilation=1,
    running_mean=None,
    running_var=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    gamma=None,
    beta=None,
    recompute=True,
):
    """The convolutions of a separable convolution: ReLU, depthwise, pointwise; nothing between them is stored.

    x: [N,C,H,W]; depthwise: weight [C,1,k,k], or None for a pointwise convolution after ReLU; pointwise: weight
    [channels,C,1,1]. Where running_mean and running_var [C] are given, x is first normalised as by a batch norm, with
    gamma and beta [C] if given; training, momentum and eps as in `mixed_norm_sum`. Kept for backward: x and the
    weights; the rest is computed again. Differentiable once.

    Fused, and deterministic, on the CPU in float32 and float64, in channels-last memory format, which the result has.
    On CUDA, where CUDA_OPERATIONS names it and the depthwise convolution has a kernel of 3, 5 or 7 and stride and
    dilation of 1 or 2, fused but for the pointwise product, which is torch's and as deterministic as that; in the
    memory format of x, which the result has. Elsewhere torch's own convolutions serve. There and on CUDA what the
    convolutions read is kept too, and not computed again, unless `recompute`.
    """
    running, affine = (running_mean, running_var), (gamma, beta)
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("one of running_mean and running_var is None; expected both or none")
    kind = x.device.type
    autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    if autocast and kind == "cuda":
        dtype = torch.get_autocast_dtype(kind)
        given = x, depthwise, pointwise
        cast = x.to(dtype), *(w if w is None else w.to(dtype) for w in given[1:])
        ours = _separable_serves(*cast, stride, dilation, running, affine)
        x, depthwise, pointwise = cast if ours else given
    else:
        ours = not autocast and _separable_serves(x, depthwise, pointwise, stride, dilation, running, affine)
    if not ours:
        others = [t for t in (depthwise, pointwise, *running, *affine) if t is not None]
        alike = all(t.dtype == x.dtype and t.device == x.device for t in others)
        recomputed = recompute and kind in ("cpu", "cuda") and (alike or autocast) and fused(kind)
        function = _Recomputed.apply if recomputed else separable_ref
        if kind == "cpu":  # torch's gradients of dilated depthwise convolutions in bfloat16 are wrong in channels-last
            x = x.contiguous()
        return function(x, depthwise, pointwise, stride, padding, dilation, *running, training, momentum, eps, *affine)
    statistics, batch = _normalisation([running_mean], [running_var], training, eps)
    norm = (*affine, statistics, *batch, eps)
    within = pointwise if recompute or kind == "cpu" else None
    y, computed = torch.ops.pdarts.separable(x, depthwise, within, *norm, stride, padding, dilation)
    _move_running([running_mean], [running_var], computed, batch, momentum, x)
    return F.conv2d(y, pointwise) if within is None else y


def _separable_serves(x, depthwise, pointwise, stride, dilation, running, affine):
    """Whether `separable` is fused for these."""
    accumulated = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights, values = ([t for t in ts if t is not None] for ts in ((depthwise, pointwise), (*running, *affine)))
    alike = all(t.dtype == x.dtype for t in weights) and all(t.dtype == accumulated for t in values)
    if not alike or any(t.device != x.device for t in weights + values):
        return False
    known = depthwise is None or (depthwise.shape[2] in (3, 5, 7) and stride in (1, 2) and dilation in (1, 2))
    return serves("separable", x) and (known or x.device.type == "cpu")


class _Recomputed(torch.autograd.Function):
    """`separable_ref`, but what lies between x and the result is computed again in the backward pass."""

    @staticmethod
    def rectified(x, dtype, affine, running, training, momentum, eps):
        """What torch's native_batch_norm returns, its result first, and relu of that in `dtype`."""
        normed = (x,)
        if running is not None:
            normed = torch.ops.aten.native_batch_norm(x, *affine, *running, training, momentum, eps)
        return normed, F.relu(normed[0]).to(dtype)

    @staticmethod
    def convolved(h, depthwise, stride, padding, dilation):
        if depthwise is None:
            return h
        return F.conv2d(h, depthwise.to(h.dtype), None, stride, padding, dilation, groups=h.shape[1])

    @staticmethod
    def gradients(g, x, weight, stride, padding, dilation, groups, of_x, of_weight):
        """Of a convolution's input and weight, None where they are not asked for."""
        g = g.contiguous() if g.is_cpu else g  # see `separable`
        geometry = [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], groups
        asked = [of_x, of_weight, False]
        return torch.ops.aten.convolution_backward(g, x, weight.to(g.dtype), None, *geometry, asked)[:2]

    @staticmethod
    def forward(
        ctx,
        x,
        depthwise,
        pointwise,
        stride,
        padding,
        dilation,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        gamma,
        beta,
    ):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.save_for_backward(x, depthwise, pointwise, running_mean, running_var, gamma, beta)
        ctx.settings = stride, padding, dilation, training, eps
        running = None if running_mean is None else (running_mean, running_var)
        with torch.autocast(kind, enabled=False):  # it would keep the weights in another type, without their history
            _, h = _Recomputed.rectified(x, dtype, (gamma, beta), running, training, momentum, eps)
            return F.conv2d(_Recomputed.convolved(h, depthwise, stride, padding, dilation), pointwise.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, depthwise, pointwise, running_mean, running_var, gamma, beta = ctx.saved_tensors
        stride, padding, dilation, training, eps = ctx.settings
        of_x, of_depthwise, of_pointwise = ctx.needs_input_grad[:3]
        of_affine = ctx.needs_input_grad[-2:]
        of_f = of_x or any(of_affine)
        running = None if running_mean is None else (None, None) if training else (running_mean, running_var)
        grad_depthwise = grad_gamma = grad_beta = None
        with torch.autocast(x.device.type, enabled=False):
            normed, h = _Recomputed.rectified(x, g.dtype, (gamma, beta), running, training, 0.0, eps)
            if of_pointwise:
                z = _Recomputed.convolved(h, depthwise, stride, padding, dilation)
            else:  # only its size matters
                memory_format = torch._prims_common.suggest_memory_format(h)
                size = g.shape[0], x.shape[1], *g.shape[2:]
                z = torch.empty(size, dtype=g.dtype, device=g.device, memory_format=memory_format)
            of_z = of_f or of_depthwise
            g, grad_pointwise = _Recomputed.gradients(g, z, pointwise, 1, 0, 1, 1, of_z, of_pointwise)
            if depthwise is not None and of_z:
                geometry = stride, padding, dilation, x.shape[1]
                g, grad_depthwise = _Recomputed.gradients(g, h, depthwise, *geometry, of_f, of_depthwise)
            if of_f:
                g = torch.ops.aten.threshold_backward(g.to(x.dtype), normed[0], 0)
                if running is not None:
                    settings = *normed[1:], training, eps, [of_x, *of_affine]
                    of_norm = torch.ops.aten.native_batch_norm_backward(g, x, gamma, *running, *settings)
                    g, grad_gamma, grad_beta = (t if of else None for t, of in zip(of_norm, (of_x, *of_affine)))
        grads = g if of_x else None, grad_depthwise, grad_pointwise
        typed = (grad if grad is None else grad.to(t.dtype) for grad, t in zip(grads, (x, depthwise, pointwise)))
        return *typed, *[None] * 8, grad_gamma, grad_beta


def pool(x, kind, stride=1):
    """The largest element ("max") or the mean ("avg") of every 3x3 window; what lies over the borders does not count.

    x: [N,C,H,W] -> [N,C,ceil(H/stride),ceil(W/stride)]. For backward "max" keeps x and the result, which must not be
    changed then, instead of the places of the largest elements, and "avg" nothing. Fused, and deterministic, on the CPU
    in float32 and float64, and on CUDA where CUDA_OPERATIONS names it. Differentiable once.
    """
    if kind not in ("max", "avg"):
        raise ValueError(f"the kind of pooling is {kind!r}; expected max or avg")
    if not serves("pool", x):
        return pool_ref(x, kind, stride)
    return torch.ops.pdarts.pool(x, kind == "max", stride)


class Norm(NamedTuple):
    """A batch norm: tensors [C]."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None


class Step(NamedTuple):
    """What an edge of a cell computes from a value, see `cell`. kind:

    "separable": `separable` with weights depthwise (or None) and pointwise; "reduce": a factorized reduction with the
    weights of two pointwise convolutions; "max" or "avg": `pool`.
    """

    source: int
    kind: str = "separable"
    weights: tuple = (None, None)
    stride: int = 1
    padding: int = 0
    dilation: int = 1


class Sum(NamedTuple):
    """A node of a cell, see `cell`."""

    terms: list[int]


class Dropout(NamedTuple):
    """Inverted dropout of terms of the sums of a cell, see `cell`.

    key: int64 [1], new in every step, from `dropout_key`. rates: float32 [D]. terms: D terms, by the place of their
    probability, in ascending order; each is an input or a sum.
    """

    key: torch.Tensor
    rates: torch.Tensor
    terms: list[int]


KINDS = ("separable", "reduce", "max", "avg")


def dropout_key(device) -> torch.Tensor:
    """A key of dropout masks, int64 [1], from torch's generator of the device: a captured graph draws it anew."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def philox_ref(counter, key):
    """Philox 4x32-10: the 4 words of each counter, (c0, c1, c2, c3) that broadcast; int64, with 32 bits in use."""
    lower = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key & lower, key >> 32 & lower
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64
        c0, c1, c2, c3 = (b >> 32 & lower) ^ c1 ^ k0, b & lower, (a >> 32 & lower) ^ c3 ^ k1, a & lower
        k0, k1 = k0 + 0x9E3779B9 & lower, k1 + 0xBB67AE85 & lower
    return c0, c1, c2, c3


def dropout_masks_ref(key, rates, terms, size):
    """Plain torch version of `dropout_masks`."""
    n, c, h, w = size
    terms = torch.tensor(list(terms), device=key.device)
    ranges = (torch.arange(count, device=key.device) for count in (n, c, (h * w + 7) // 8))
    term, image, channel, group = torch.meshgrid(terms, *ranges, indexing="ij")
    words = philox_ref((group, channel, image, term & 0xFFFFFFFF), key)
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    bits = bits.flatten(-2)[..., : h * w].unflatten(-1, (h, w))  # [terms,N,C,H,W]
    dropped = (rates * 65536 + 0.5).floor().clamp(0, 65536)
    scale = torch.where(dropped < 65536, 65536 / (65536 - dropped), 0)
    dropped, scale = (t.view(-1, 1, 1, 1, 1) for t in (dropped, scale))
    return torch.where(bits < dropped, 0, scale)


def dropout_masks(key, rates, terms, size):
    """What the dropout of terms multiplies by: 0 with probability rates[i], rounded to 2^-16, else 1 / (1 - that).

    key: int64 [1]; rates: float32 [D]; terms: D integers; size: N, C, H, W. Returns float32 [D,N,C,H,W]. A function of
    these alone, the same on every device and for any number of threads: Philox 4x32-10, see philox.h.
    """
    if key.device.type not in ("cpu", "cuda") or not fused(key.device):
        return dropout_masks_ref(key, rates, terms, size)
    return torch.ops.pdarts.dropout_masks(key, rates, terms, size)


def cell_ref(
    inputs, operations, outputs, probabilities, norms=None, training=False, momentum=0.1, eps=1e-5, dropout=None
):
    """Plain torch version of `cell`."""
    plain, settings = (separable_ref, pool_ref, mixed_norm_sum_ref), (training, momentum, eps)
    return _cell_of(*plain, dropout_masks_ref, inputs, operations, outputs, probabilities, norms, *settings, dropout)


def _cell_of(
    separable,
    pool,
    mixed,
    masks,
    inputs,
    operations,
    outputs,
    probabilities,
    norms,
    training,
    momentum,
    eps,
    dropout,
    recompute=True,
):
    """The cell as single operations."""
    rates = dict(zip(dropout.terms, dropout.rates.split(1))) if dropout else {}
    places = itertools.count()

    def term(value):
        place = next(places)
        if place not in rates:
            return value
        return value * masks(dropout.key, rates[place], [place], value.shape)[0].to(value.dtype)

    settings, probabilities = (training, momentum, eps), iter(probabilities)
    reads = [v for op in operations for v in (op.terms if isinstance(op, Sum) else [op.source])] + list(outputs)
    rectifying = [op.source for op in operations if isinstance(op, Step) and op.kind in ("separable", "reduce")]
    norms = [norm or (None,) * 4 for norm in norms or [None] * (len(inputs) + len(operations))]
    fused_sums = mixed is not mixed_norm_sum_ref
    values, rectified = [], {}  # each as often as it is read

    def copies(value, times):
        together = fused_sums and 1 < times <= MAX_CANDIDATES and value.requires_grad and serves("mixed", value)
        return list(_Read.apply(value, times)) if together else [value] * times

    def add(value):
        v = len(values)
        times, shared = reads.count(v), rectifying.count(v)
        # Where torch's convolutions serve, and keep what they read, one ReLU does for all of them.
        once = fused_sums and shared > 1 and not recompute and norms[v][0] is None and _torch_convolves(value)
        values.append(copies(value, times - shared + 1 if once else times))
        if once:
            x = F.relu(values[v].pop())
            rectified[v] = copies(x.contiguous() if x.is_cpu else x, shared)  # contiguous: see `separable`

    for value in inputs:
        add(value)
    for op in operations:
        if isinstance(op, Sum):
            sums = []
            for part in (op.terms[i : i + MAX_CANDIDATES] for i in range(0, len(op.terms), MAX_CANDIDATES)):
                means, vars, *affine = zip(*(norms[v] for v in part))
                p = torch.stack([next(probabilities) for _ in part])
                sums.append(mixed([term(values[v].pop()) for v in part], p, means, vars, *settings, *affine))
            y = sum(sums[1:], sums[0])
        elif op.kind in ("separable", "reduce"):
            once = op.source in rectified
            x, convolve = (rectified[op.source].pop(), _convolved) if once else (values[op.source].pop(), separable)
            if op.kind == "reduce":
                halves = zip(_Diagonals.apply(x), op.weights)
                y = torch.cat([convolve(half, None, weight) for half, weight in halves], dim=1)
            else:
                mean, var, *affine = norms[op.source]
                norm = () if once else (mean, var, *settings, *affine)
                y = convolve(x, *op.weights, op.stride, op.padding, op.dilation, *norm)
        else:
            y = pool(values[op.source].pop(), op.kind, op.stride)
        add(y)
    return torch.cat([values[i].pop() for i in outputs], dim=1) if len(outputs) > 1 else values[outputs[0]].pop()


class _Read(torch.autograd.Function):
    """A tensor as often as it is read. Its gradients are then added up at once, not one after the other."""

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
    inputs,
    operations,
    outputs,
    probabilities,
    norms=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    recompute=True,
    dropout=None,
):
    """A cell, or a part of one, as a whole.

    inputs: tensors [N,C,H,W], the first values. operations: a `Step` or `Sum` for each further value, which reads
    values before it. A sum is `mixed_norm_sum` of its terms; probabilities [K] or [K,N] are those of the terms of all
    sums, one after the other. norms: a `Norm` or None for each value; training, momentum and eps are those of all. A
    separable convolution that reads a value with a norm normalises it first. What a step computes is used once.
    dropout: a `Dropout` of some terms, whose masks are drawn where they are read, again in the backward pass, and never
    stored. Returns the channels of the sums in `outputs`, side by side.

    Fused, and deterministic, on the CPU in float32 and float64, in channels-last memory format, which the result has,
    and on CUDA where CUDA_OPERATIONS names it, in these types, in NCHW, with kernels of 3 or 5 and strides and
    dilations of 1 or 2: what steps read in common is read once, and gradients are added up where they belong instead
    of being written apart. Elsewhere the operations above serve. Kept for backward: all values, and on CUDA what
    pointwise convolutions read; the rest is computed again (by torch's own convolutions only if `recompute`).
    Differentiable once.
    """
    norms = list(norms or [None] * (len(inputs) + len(operations)))
    if len(norms) != len(inputs) + len(operations):
        raise RuntimeError(
            f"norms has {len(norms)} entries; expected {len(inputs)} + {len(operations)}, one for each value"
        )
    for op in operations:
        if isinstance(op, Step) and op.kind not in KINDS:
            raise RuntimeError(f"a step is of kind {op.kind!r}; expected one of {KINDS}")
    on_cuda = inputs[0].device.type == "cuda"
    if not serves_cells(inputs[0]) or (on_cuda and not known_on_cuda(operations, norms, outputs)):
        single = functools.partial(separable, recompute=recompute), pool, mixed_norm_sum, dropout_masks
        settings = training, momentum, eps, dropout, recompute
        return _cell_of(*single, inputs, operations, outputs, probabilities, norms, *settings)
    return run_cell(inputs, *cell_program(operations), outputs, probabilities, norms, training, momentum, eps, dropout)


def known_on_cuda(operations, norms, outputs):
    """Whether `cell` is fused on CUDA for these: see cell_cuda_operators.h."""
    inputs = len(norms) - len(operations)
    steps = {inputs + i: op for i, op in enumerate(operations) if isinstance(op, Step)}
    together = list(outputs)
    for v, op in enumerate(operations, inputs):
        if isinstance(op, Sum):
            together += op.terms
            known = len(op.terms) <= MAX_CANDIDATES
        else:
            known = op.source not in steps or {op.kind, steps[op.source].kind} == {"separable"}
            known = known and op.stride in (1, 2)
            if op.kind == "separable" and op.weights[0] is not None:
                kernel = op.weights[0].shape[-1]
                known = known and kernel in (3, 5) and op.dilation in (1, 2)
                known = known and op.padding <= op.dilation * (kernel - 1)
        if not known:
            return False
    return max(map(together.count, together)) <= MAX_CANDIDATES


def cell_program(operations):
    """The operations as `run_cell` takes them: numbers, and two weights, or None, of each."""
    program, weights = [], []
    for op in operations:
        if isinstance(op, Sum):
            program += [len(KINDS), len(op.terms), *op.terms]
            weights += [None, None]
        else:
            program += [KINDS.index(op.kind), op.source, op.stride, op.padding, op.dilation]
            weights += op.weights
    return program, weights


def run_cell(inputs, program, weights, outputs, probabilities, norms, training, momentum, eps, dropout=None):
    """`cell` where `serves_cells`."""
    key, rates, dropped = dropout or (None, None, [])
    means, vars, gammas, betas = zip(*(norm or (None,) * 4 for norm in norms))
    statistics, batch = _normalisation(means, vars, training, eps)
    norm = weights, gammas, betas, probabilities, statistics
    y, computed, _ = torch.ops.pdarts.cell(
        inputs, *norm, key, rates, dropped, program, outputs, batch, eps, False
    )
    _move_running(means, vars, computed, batch, momentum, y)
    return y


def _on_cpu(x):
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and fused("cpu")


def _torch_convolves(x):
    """Whether torch's convolutions serve `separable`, whatever its geometry."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return not serves("separable", x)
    return kind == "cpu" or not serves("separable", x, torch.get_autocast_dtype(kind))


def serves(operation: str, x, dtype: torch.dtype | None = None) -> bool:
    """Whether "mixed", "separable", "pool" or "cell" is fused for such a tensor, or for it in `dtype`."""
    if x.device.type != "cuda":
        return fused(x.device) if operation == "mixed" else _on_cpu(x)
    _check_named(_cuda_operations)  # by the environment variable
    layout = "channels-last" if _is_last(x) else "NCHW"
    tensors = _cuda_operations.get(operation, ())
    kind = f"{dtype or x.dtype}:{layout}".removeprefix("torch.")
    size = "x".join(map(str, x.shape[1:]))
    return any(t in ("", kind, f"{kind}:{size}") for t in tensors) and fused("cuda")


def _is_last(x):
    """Whether x lies in channels-last and in no other way."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def serves_cells(x) -> bool:
    """Whether `cell` is fused for such a tensor."""
    kind = x.device.type
    known = kind in ("cpu", "cuda") and x.dtype in (torch.float32, torch.float64)
    known = known and (kind == "cpu" or x.numel() > 0)
    return known and not torch.is_autocast_enabled(kind) and serves("cell", x)


@torch.no_grad()
def _normalisation(means, vars, training, eps):
    """How the operators normalise: by `statistics` [3,K,C] (mean, 1 / sqrt(variance + eps), variance) or by the batch.

    means, vars: running ones, None where nothing is to be normalised. Returns statistics, or None, and K flags.
    """
    normalised = [mean is not None for mean in means]
    if training or not any(normalised):
        return None, normalised
    zero, one = (f(next(mean for mean in means if mean is not None)) for f in (torch.zeros_like, torch.ones_like))
    mean, var = (torch.stack([zero if t is None else t for t in running]) for running in (means, vars))
    invstd = torch.where(torch.tensor(normalised, device=var.device)[:, None], (var + eps).rsqrt(), one)
    return torch.stack([mean, invstd, var]), [False] * len(normalised)


def _move_running(means, vars, statistics, batch, momentum, x):
    """The running statistics of what is normalised by the batch, towards those of the batch, unless x is empty."""
    if any(batch) and x.numel():
        means, vars = ([t for t, normalised in zip(running, batch) if normalised] for running in (means, vars))
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


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile
# ----------------------------------------------------------------------------------------------------------------------


def _register_fakes():
    """Shapes and memory formats of the results, for torch.compile."""

    def empty(x):
        channels_last = torch._prims_common.suggest_memory_format(x) == torch.channels_last
        return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def channels_last(x, *size):
        n, c, h, w = size
        return x.new_empty(n, h, w, c).permute(0, 3, 1, 2)

    def feature_map(x, *size):
        return channels_last(x, *size) if x.device.type == "cpu" or _is_last(x) else x.new_empty(size)

    def cell_map(x, *size):
        return x.new_empty(size) if x.device.type == "cuda" else channels_last(x, *size)

    def needed(needs, *makers):
        """What is made for those that are needed."""
        return [make() for need, make in zip(needs, makers, strict=True) if need]

    def fresh(t):
        return lambda: torch.empty_like(t, memory_format=torch.contiguous_format)

    @torch.library.register_fake("pdarts::mixed")
    def _(outputs, probabilities, gammas, betas, statistics, batch, eps):
        x = outputs[0]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return empty(x), x.new_empty(3 if any(batch) else 0, len(outputs), x.shape[1], dtype=dtype)

    @torch.library.register_fake("pdarts::mixed_backward")
    def _(grad, outputs, probabilities, gammas, betas, statistics, batch, needs):
        like = next((y for y in outputs if y is not None), grad)
        affine = [*(gammas or [None] * len(outputs)), *(betas or [None] * len(outputs))]
        return needed(needs, *[lambda: empty(like)] * len(outputs), fresh(probabilities), *map(fresh, affine))

    def convolved(size, kernel, stride, padding, dilation):
        return [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size]

    @torch.library.register_fake("pdarts::separable")
    def _(x, depthwise, pointwise, gamma, beta, statistics, batch, eps, stride, padding, dilation):
        size = x.shape[2:]
        if depthwise is not None:
            size = convolved(size, depthwise.shape[2], stride, padding, dilation)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = feature_map(x, x.shape[0], x.shape[1] if pointwise is None else pointwise.shape[0], *size)
        return y, x.new_empty((3, 1, x.shape[1]) if batch else 0, dtype=dtype)

    @torch.library.register_fake("pdarts::separable_backward")
    def _(grad, x, depthwise, pointwise, gamma, beta, statistics, batch, stride, padding, dilation, needs):
        return needed(needs, lambda: feature_map(x, *x.shape), *map(fresh, (depthwise, pointwise, gamma, beta)))

    @torch.library.register_fake("pdarts::cell")
    def _(
        inputs,
        weights,
        gammas,
        betas,
        probabilities,
        statistics,
        key,
        rates,
        dropped,
        program,
        outputs,
        batch,
        eps,
        keep,
    ):
        sizes, numbers = [x.shape[1:] for x in inputs], iter(program)
        between, on_cuda = [], inputs[0].device.type == "cuda"  # what convolutions leave for the pointwise ones
        pools, again = set(), []  # pools that are there already
        for weight, pointwise in zip(weights[::2], weights[1::2]):
            kind, source = next(numbers), next(numbers)
            if kind == len(KINDS):
                sizes.append(sizes[[next(numbers) for _ in range(source)][0]])
                continue
            (c, *size), (stride, padding, dilation) = sizes[source], (next(numbers) for _ in range(3))
            if KINDS[kind] == "separable":
                if weight is not None:
                    size = convolved(size, weight.shape[2], stride, padding, dilation)
                    between += [(c, *size)] * on_cuda
                c = pointwise.shape[0]
            elif KINDS[kind] == "reduce":
                size = [(n + 1) // 2 for n in size]
                between += [(c, *size)] * 2 * on_cuda
                c = weight.shape[0] + pointwise.shape[0]
            else:
                size = [(n - 1) // stride + 1 for n in size]
                if on_cuda and (kind, source, stride) in pools:
                    again.append(len(sizes))
                pools.add((kind, source, stride))
            sizes.append((c, *size))
        x, (c, *size) = inputs[0], sizes[outputs[0]]
        omitted = outputs if x.device.type == "cpu" or len(outputs) == 1 else ()
        kept = [sizes[v] for v in range(len(inputs), len(sizes)) if v not in (*omitted, *again)] + between
        of_values = x.new_empty((3, len(sizes), c) if statistics is None else 0)
        values = [cell_map(x, len(x), *of) for of in kept] if keep else []
        return cell_map(x, len(x), c * len(outputs), *size), of_values, values

    @torch.library.register_fake("pdarts::cell_backward")
    def _(
        grad,
        y,
        values,
        inputs,
        weights,
        gammas,
        betas,
        probabilities,
        statistics,
        key,
        rates,
        dropped,
        program,
        outputs,
        batch,
        needs,
    ):
        none = [None] * (len(inputs) + len(weights) // 2)
        of_inputs = [lambda x=x: cell_map(grad, *x.shape) for x in inputs]
        return needed(needs, *of_inputs, *map(fresh, (*weights, *(gammas or none), *(betas or none), probabilities)))

    @torch.library.register_fake("pdarts::dropout_masks")
    def _(key, rates, terms, size):
        return rates.new_empty(len(terms), *size)

    @torch.library.register_fake("pdarts::pool")
    def _(x, max, stride):
        return feature_map(x, *x.shape[:2], *((n - 1) // stride + 1 for n in x.shape[2:]))

    @torch.library.register_fake("pdarts::pool_backward")
    def _(grad, x, y, size, stride):
        return feature_map(grad if x is None else x, *size)

    @torch.library.register_fake("pdarts::update_running")
    def _(running_means, running_vars, statistics, batch, momentum):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Which way the operations run
# ----------------------------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_mode = os.environ.get("PDARTS_KERNELS", "auto")


def _parsed(operations: str) -> dict[str, list[str]]:
    """{operation: types, layouts and sizes of x, "" for all}"""
    parsed: dict[str, list[str]] = {}
    for name in operations.replace(",", " ").split():
        operation, _, tensors = name.partition(":")
        parsed.setdefault(operation, []).append(tensors)
    return parsed


def _check_named(operations):
    if not operations.keys() <= {"mixed", "separable", "pool", "cell"}:
        raise ValueError(
            f"the operations on CUDA are {sorted(operations)}; expected mixed, separable, pool or cell, each followed "
            "by a type, NCHW or channels-last and perhaps a size, such as pool:float32:NCHW:16x32x32, if not all "
            "tensors are meant"
        )


_cuda_named = os.environ.get("PDARTS_CUDA_OPERATIONS", CUDA_OPERATIONS)
_cuda_operations = _parsed(_cuda_named)
_served: set[str] = set()  # types of device
_failures: dict[str, str] = {}  # type of device -> why the kernels do not serve it
_warned: set[str] = set()  # types of device
_no_cuda = ""  # why the library serves no CUDA device


def use(mode: str) -> str:
    """Sets how this process runs the operations: "auto", "on" or "off"; "on" builds now and raises if that fails.

    Returns the mode before.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"the mode of the kernels is {mode!r}; expected one of {MODES}")
    if mode == "on":
        load()
    before, _mode = _mode, mode
    return before


def use_on_cuda(operations: str) -> str:
    """Sets what this process fuses on CUDA, as CUDA_OPERATIONS names it; returns what it fused before."""
    global _cuda_named, _cuda_operations
    _check_named(_parsed(operations))
    before, _cuda_named, _cuda_operations = _cuda_named, operations, _parsed(operations)
    return before


def fused(device: str | torch.device = "cpu") -> bool:
    """Whether the kernels serve tensors on `device`; builds them if that is not known yet.

    Call it, or `use("on")`, before torch.compile with fullgraph=True, which cannot look into a build.
    """
    kind = device if isinstance(device, str) else device.type
    if _mode not in MODES:
        raise ValueError(f"PDARTS_KERNELS is {_mode!r}; expected one of {MODES}")
    if _mode == "off":
        return False
    if kind in _served:
        return True
    if _mode == "on":
        load(kind)
        return True
    if kind not in _failures:
        try:
            load(kind)
        except (RuntimeError, OSError, ImportError) as error:
            _failures[kind] = str(error)
        for failed in _failures.keys() - _warned:  # a build for CUDA that fails is told of when the CPU needs it too
            _warned.add(failed)
            where = " on CUDA" if failed == "cuda" else ""
            why = f"plain torch instead of the fused kernels{where}: {_failures[failed]}"
            warnings.warn(why, RuntimeWarning, stacklevel=3)
    return kind in _served


def load(kind: str = "cpu"):
    """Builds, unless that was done before, and loads the library; RuntimeError or OSError if it cannot serve `kind`."""
    global _no_cuda
    if kind not in ("cpu", "cuda"):
        raise RuntimeError(f"the tensors are on a device of type {kind!r}; expected cpu or cuda")
    with _lock:
        if not build.loaded():  # by another copy of this folder
            _no_cuda, failed = build.load_library()
            if failed:
                _failures["cuda"] = _no_cuda
            _register_fakes()
        if not torch._C._dispatch_has_kernel_for_dispatch_key("pdarts::mixed", kind.upper()):
            raise RuntimeError(_no_cuda or "the kernels were built for the CPU only, by another copy of them")
        _served.add(kind)


from .fuse import fuse, memory_format  # noqa: E402  (it needs what is above)

__all__ = ["cell", "cell_ref", "dropout_key", "dropout_masks", "dropout_masks_ref", "philox_ref", "fuse", "fused", "load", "memory_format", "mixed_norm_sum", "mixed_norm_sum_ref"]
__all__ += ["mixed_sum", "mixed_sum_ref", "pool", "pool_ref", "separable", "separable_ref", "serves", "serves_cells"]
__all__ += ["use", "use_on_cuda", "CUDA_OPERATIONS", "Dropout", "Norm", "Step", "Sum"]
