"""The mixed operation of differentiable architecture search, fused: forward and backward, on CPU and CUDA.

    from kernels import mixed_sum, mixed_norm_sum, separable, pool

    y = mixed_sum(outputs, probabilities)                 # sum_k probabilities[k] * outputs[k]
    y = mixed_norm_sum(outputs, probabilities, running_means, running_vars, training=True)
                                                    # sum_k probabilities[k] * batch_norm_k(outputs[k])
    y = separable(x, depthwise, pointwise)          # pointwise(depthwise(relu(x))), fused on the CPU only
    y = pool(x, "max")                              # over 3x3 windows, or "avg"; fused on the CPU only

`mixed_sum_ref`, `mixed_norm_sum_ref`, `separable_ref` and `pool_ref` are the same in plain torch. The folder works
alone, copied into any project.

The extension is compiled when it is first needed (by ninja and a C++ compiler, for CUDA nvcc too) and cached.
`use("auto")`, the default, falls back to plain torch with one warning if that fails, `use("on")` raises instead and
`use("off")` never tries; the environment variable PDARTS_KERNELS sets the mode at the start.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings

import torch
import torch.nn.functional as F

from . import build

MODES = ("auto", "on", "off")

# ----------------------------------------------------------------------------------------------------------------------
# The operations
# ----------------------------------------------------------------------------------------------------------------------


def mixed_sum_ref(outputs, probabilities):
    """Plain torch version of `mixed_sum`."""
    return sum(w.to(y.dtype) * y for w, y in zip(probabilities, outputs, strict=True))


def mixed_norm_sum_ref(outputs, probabilities, running_means, running_vars, training, momentum=0.1, eps=1e-5):
    """Plain torch version of `mixed_norm_sum`."""
    statistics = zip(running_means, running_vars, strict=True)
    normed = [
        y if mean is None else F.batch_norm(y, mean, var, None, None, training, momentum, eps)
        for y, (mean, var) in zip(outputs, statistics, strict=True)
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
):
    """Plain torch version of `separable`."""
    if running_mean is not None:
        x = F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    x = F.relu(x)
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
    float64 for float64). probabilities: [K], float32 or the outputs' dtype. Returns [N,C,H,W] in the memory
    format of the first output, and keeps the outputs for backward only if the probabilities need a gradient.
    Deterministic; RuntimeError for what does not fit together. Differentiable once.
    """
    outputs = _one_dtype(outputs)
    if not fused(outputs[0].device):
        return mixed_sum_ref(outputs, probabilities)
    return torch.ops.pdarts.mixed(outputs, probabilities, None, [False] * len(outputs), 0.0)[0]


def mixed_norm_sum(outputs, probabilities, running_means, running_vars, training, momentum=0.1, eps=1e-5):
    """sum_k probabilities[k] * bn_k(outputs[k]), bn_k a batch norm without gamma and beta; stores nothing normalised.

    outputs, probabilities and result as in `mixed_sum`. running_means, running_vars: K tensors [C] in the type that is
    accumulated in, or None where the output is not to be normalised (an identity). `training`: normalise by the
    statistics of the batch and move the running ones by `momentum` towards them (the variance unbiased), as torch's
    batch_norm does; otherwise normalise by the running ones. Kept for backward: the outputs and 3 numbers per output
    and channel.
    """
    outputs = _one_dtype(outputs)
    if not fused(outputs[0].device):
        return mixed_norm_sum_ref(outputs, probabilities, running_means, running_vars, training, momentum, eps)
    if not len(outputs) == len(running_means) == len(running_vars):
        raise RuntimeError(
            f"running_means has {len(running_means)} and running_vars {len(running_vars)} entries; expected "
            f"{len(outputs)}, one for each of the outputs"
        )
    normalised = [mean is not None for mean in running_means]
    if normalised != [var is not None for var in running_vars]:
        raise RuntimeError("running_means and running_vars are None in different places; expected the same")
    means, vars = ([t for t in running if t is not None] for running in (running_means, running_vars))
    if not means:
        return mixed_sum(outputs, probabilities)
    if not training:
        statistics = _running_statistics(means, vars, normalised, eps)
        return torch.ops.pdarts.mixed(outputs, probabilities, statistics, [False] * len(outputs), eps)[0]
    y, statistics = torch.ops.pdarts.mixed(outputs, probabilities, None, normalised, eps)
    count = y.shape[0] * y.shape[2] * y.shape[3]
    torch.ops.pdarts.update_running(means, vars, statistics, normalised, count, momentum)
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
    recompute=True,
):
    """The convolutions of a separable convolution: ReLU, depthwise, pointwise; nothing between them is stored.

    x: [N,C,H,W]; depthwise: weight [C,1,k,k], or None for a pointwise convolution after ReLU; pointwise: weight
    [channels,C,1,1]. Where running_mean and running_var [C] are given, x is first normalised as by a batch norm without
    affine parameters; training, momentum and eps as in `mixed_norm_sum`. Kept for backward: x and the weights; the rest
    is computed again. Differentiable once.

    Fused, and deterministic, on the CPU in float32 and float64, in channels-last memory format, which the result has.
    Elsewhere torch's own convolutions serve, which compute the rest again only if `recompute`.
    """
    running = running_mean, running_var
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("one of running_mean and running_var is None; expected both or none")
    kind = x.device.type
    others = [t for t in (depthwise, pointwise, *running) if t is not None]
    alike = all(t.dtype == x.dtype and t.device == x.device for t in others)
    autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    if not alike or autocast or not _on_cpu(x):
        recomputed = recompute and kind in ("cpu", "cuda") and (alike or autocast) and fused(kind)
        function = _Recomputed.apply if recomputed else separable_ref
        if kind == "cpu":  # torch's gradients of dilated depthwise convolutions in bfloat16 are wrong in channels-last
            x = x.contiguous()
        return function(x, depthwise, pointwise, stride, padding, dilation, *running, training, momentum, eps)
    batch = training and running_mean is not None
    statistics = None
    if running_mean is not None and not training:
        statistics = _running_statistics([running_mean], [running_var], [True], eps)
    y, computed = torch.ops.pdarts.separable(x, depthwise, pointwise, statistics, batch, eps, stride, padding, dilation)
    if batch:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        torch.ops.pdarts.update_running([running_mean], [running_var], computed, [True], count, momentum)
    return y


class _Recomputed(torch.autograd.Function):
    """`separable_ref`, but what lies between x and the result is computed again in the backward pass."""

    @staticmethod
    def rectified(x, dtype, running, training, momentum, eps):
        """What torch's native_batch_norm returns, its result first, and relu of that in `dtype`."""
        normed = (x,)
        if running is not None:
            normed = torch.ops.aten.native_batch_norm(x, None, None, *running, training, momentum, eps)
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
        ctx, x, depthwise, pointwise, stride, padding, dilation, running_mean, running_var, training, momentum, eps
    ):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.save_for_backward(x, depthwise, pointwise, running_mean, running_var)
        ctx.settings = stride, padding, dilation, training, eps
        running = None if running_mean is None else (running_mean, running_var)
        with torch.autocast(kind, enabled=False):  # it would keep the weights in another type, without their history
            _, h = _Recomputed.rectified(x, dtype, running, training, momentum, eps)
            return F.conv2d(_Recomputed.convolved(h, depthwise, stride, padding, dilation), pointwise.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, depthwise, pointwise, running_mean, running_var = ctx.saved_tensors
        stride, padding, dilation, training, eps = ctx.settings
        of_x, of_depthwise, of_pointwise = ctx.needs_input_grad[:3]
        running = None if running_mean is None else (None, None) if training else (running_mean, running_var)
        grad_depthwise = None
        with torch.autocast(x.device.type, enabled=False):
            normed, h = _Recomputed.rectified(x, g.dtype, running, training, 0.0, eps)
            if of_pointwise:
                z = _Recomputed.convolved(h, depthwise, stride, padding, dilation)
            else:  # only its size matters
                memory_format = torch._prims_common.suggest_memory_format(h)
                size = g.shape[0], x.shape[1], *g.shape[2:]
                z = torch.empty(size, dtype=g.dtype, device=g.device, memory_format=memory_format)
            of_z = of_x or of_depthwise
            g, grad_pointwise = _Recomputed.gradients(g, z, pointwise, 1, 0, 1, 1, of_z, of_pointwise)
            if depthwise is not None and of_z:
                geometry = stride, padding, dilation, x.shape[1]
                g, grad_depthwise = _Recomputed.gradients(g, h, depthwise, *geometry, of_x, of_depthwise)
            if of_x:
                g = torch.ops.aten.threshold_backward(g.to(x.dtype), normed[0], 0)
                if running is not None:
                    settings = training, eps, [True, False, False]
                    g = torch.ops.aten.native_batch_norm_backward(g, x, None, *running, *normed[1:], *settings)[0]
        grads = g if of_x else None, grad_depthwise, grad_pointwise
        typed = (grad if grad is None else grad.to(t.dtype) for grad, t in zip(grads, (x, depthwise, pointwise)))
        return *typed, *[None] * 8


def pool(x, kind, stride=1):
    """The largest element ("max") or the mean ("avg") of every 3x3 window; what lies over the borders does not count.

    x: [N,C,H,W] -> [N,C,ceil(H/stride),ceil(W/stride)]. For backward "max" keeps x and the result, which must not be
    changed then, instead of the places of the largest elements, and "avg" nothing. Fused, and deterministic, on the CPU
    in float32 and float64. Differentiable once.
    """
    if kind not in ("max", "avg"):
        raise ValueError(f"the kind of pooling is {kind!r}; expected max or avg")
    if not _on_cpu(x):
        return pool_ref(x, kind, stride)
    return torch.ops.pdarts.pool(x, kind == "max", stride)


def _on_cpu(x):
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and fused("cpu")


@torch.no_grad()
def _running_statistics(means, vars, normalised, eps):
    """Running statistics as the operator takes them: mean, 1 / sqrt(variance + eps), variance [3,K,C]."""
    zero, one, means, vars = torch.zeros_like(means[0]), torch.ones_like(means[0]), iter(means), iter(vars)
    mean, var = (torch.stack([next(t) if n else zero for n in normalised]) for t in (means, vars))
    invstd = torch.where(torch.tensor(normalised, device=var.device)[:, None], (var + eps).rsqrt(), one)
    return torch.stack([mean, invstd, var])


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

    @torch.library.register_fake("pdarts::mixed")
    def _(outputs, probabilities, statistics, batch, eps):
        x = outputs[0]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return empty(x), x.new_empty(3 if any(batch) else 0, len(outputs), x.shape[1], dtype=dtype)

    @torch.library.register_fake("pdarts::mixed_backward")
    def _(grad, outputs, probabilities, statistics, batch, needs_outputs, needs_probabilities):
        like = next((y for y in outputs if y is not None), grad)
        grads = [empty(like) for needs in needs_outputs if needs]
        return grads, probabilities.new_empty(len(outputs) * needs_probabilities)

    @torch.library.register_fake("pdarts::separable")
    def _(x, depthwise, pointwise, statistics, batch, eps, stride, padding, dilation):
        size = x.shape[2:]
        if depthwise is not None:
            size = [(n + 2 * padding - dilation * (depthwise.shape[2] - 1) - 1) // stride + 1 for n in size]
        y = x.new_empty(x.shape[0], *size, pointwise.shape[0])
        return y.permute(0, 3, 1, 2), x.new_empty((3, 1, x.shape[1]) if batch else 0)

    @torch.library.register_fake("pdarts::separable_backward")
    def _(grad, x, depthwise, pointwise, statistics, batch, stride, padding, dilation, needs):
        like = [torch.empty_like(x, memory_format=torch.channels_last), depthwise, pointwise]
        fresh = torch.contiguous_format
        return tuple(
            x.new_empty(0) if not need or t is None else t if t is like[0] else torch.empty_like(t, memory_format=fresh)
            for t, need in zip(like, needs, strict=True)
        )

    @torch.library.register_fake("pdarts::pool")
    def _(x, max, stride):
        return x.new_empty(x.shape[0], *((n - 1) // stride + 1 for n in x.shape[2:]), x.shape[1]).permute(0, 3, 1, 2)

    @torch.library.register_fake("pdarts::pool_backward")
    def _(grad, x, y, size, stride):
        return grad.new_empty(size[0], *size[2:], size[1]).permute(0, 3, 1, 2)

    @torch.library.register_fake("pdarts::update_running")
    def _(running_means, running_vars, statistics, batch, count, momentum):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Which way the operations run
# ----------------------------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_mode = os.environ.get("PDARTS_KERNELS", "auto")
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

__all__ = ["fuse", "fused", "load", "memory_format", "mixed_norm_sum", "mixed_norm_sum_ref", "mixed_sum"]
__all__ += ["mixed_sum_ref", "pool", "pool_ref", "separable", "separable_ref", "use"]
