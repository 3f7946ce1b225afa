"""Fusion as a converter: `fuse(network)` makes a built network compute by the fused operations what it recognises.

A module is recognised by its code: a method whose statements are those of a method of `_Recognised` below, and layers
of exactly the kinds that are fused. What has been changed, or is unknown, is left alone and runs as it is. Modules stay
where they are, and so do parameters, buffers and state_dict keys: only their class is exchanged for a subclass.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import textwrap

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import fused, mixed_norm_sum, mixed_sum, pool, separable

MAX_CANDIDATES = 64  # of one call, see mixed_op.h


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of the feature maps of a fused search network.

    Channels-last on the CPU, where the fused convolutions want it; under autocast, which they leave to torch, NCHW.
    NCHW on CUDA, where torch has depthwise kernels of its own for it and sends float32 in channels-last to cuDNN's
    slower ones. PDARTS_LAYOUT, for measuring, overrides it: NCHW or channels-last.
    """
    layouts = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
    fused_convolutions = device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    name = os.environ.get("PDARTS_LAYOUT") or ("channels-last" if fused_convolutions else "NCHW")
    if name not in layouts:
        raise ValueError(f"PDARTS_LAYOUT is {name!r}; expected {' or '.join(layouts)}")
    return layouts[name]


def fuse(network: nn.Module, recompute: bool | None = None) -> nn.Module:
    """`network`, changed in place, and unchanged where the kernels do not serve its device (see `kernels.use`).

    recompute: where torch's own convolutions serve, compute again in the backward pass what lies between ReLU and the
    pointwise convolution, instead of keeping it; None: on the CPU only, since a GPU has the memory and not the time.
    """
    device = next(network.parameters()).device
    if fused(device):
        memory_format(device)  # refuses a wrong PDARTS_LAYOUT now
        recompute = device.type == "cpu" if recompute is None else recompute
        for module in reversed(list(network.modules())):  # what a module holds before the module itself
            replacement = next((new for recognises, new in _RULES if recognises(module)), None)
            if replacement:
                module.__class__ = _subclass(replacement, type(module))
                module.recompute = recompute
            if _is_search_network(module):
                module.stem.register_forward_hook(_in_layout)
    return network


@functools.cache
def _subclass(replacement, kind):
    return type(f"Fused{kind.__name__}", (replacement, kind), {})


# --- What is recognised -----------------------------------------------------------------------------------------------


class _Recognised:
    """The methods of pdarts.py that have a fused version: their plain twins."""

    def operation(self, x):
        return self.op(x)

    def factorized_reduce(self, x):
        x = F.relu(x)
        shifted = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))[:, :, 1:, 1:]
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))

    def mixed_op(self, x, probabilities):
        return sum(p * op(x) for p, op in zip(probabilities[self.skip_none :], self.ops))

    def node(self, incoming):
        return sum(edge(x, p) for x, (edge, p) in incoming)


@functools.cache
def _statements(function) -> str | None:
    """The code of a function without comments, docstring and layout; None if its source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    body = definition.body[ast.get_docstring(definition) is not None :]
    return repr([arg.arg for arg in definition.args.args] + [ast.dump(statement) for statement in body])


def _has(module, method: str, twin) -> bool:
    function = getattr(type(module), method, None)
    return function is not None and _statements(function) == _statements(twin)


def _is_depthwise(m):
    square = type(m) is nn.Conv2d and all(len(set(x)) == 1 for x in (m.kernel_size, m.stride, m.dilation))
    padded = square and m.padding_mode == "zeros" and m.padding == (m.padding[0],) * 2
    return padded and m.groups == m.in_channels == m.out_channels and m.bias is None


def _is_pointwise(m, stride=1):
    one = type(m) is nn.Conv2d and m.kernel_size == (1, 1) and m.stride == (stride,) * 2 and m.padding == (0, 0)
    return one and m.groups == 1 and m.bias is None


def _is_max_pool(m):
    plain = type(m) is nn.MaxPool2d and (m.kernel_size, m.padding, m.dilation) == (3, 1, 1)
    return plain and not (m.return_indices or m.ceil_mode)


def _is_avg_pool(m):
    plain = type(m) is nn.AvgPool2d and (m.kernel_size, m.padding) == (3, 1)
    return plain and not (m.count_include_pad or m.ceil_mode or m.divisor_override)


def _is_relu(m):
    return type(m) is nn.ReLU


def _is_norm(m):
    return type(m) is nn.BatchNorm2d


_DEPTHWISE = (_is_relu, _is_depthwise, _is_pointwise, _is_norm)
_POINTWISE = (_is_relu, _is_pointwise, _is_norm)


def _consists_of(layers, unit):
    layers = list(layers)
    whole = layers and len(layers) % len(unit) == 0
    return whole and all(unit[i % len(unit)](layer) for i, layer in enumerate(layers))


def _is_operation(m):
    if not _has(m, "forward", _Recognised.operation) or type(getattr(m, "op", None)) is not nn.Sequential:
        return False
    pooled = len(m.op) == 2 and isinstance(m.op[0], _FusedPool) and _is_norm(m.op[1])
    return pooled or _consists_of(m.op, _DEPTHWISE) or _consists_of(m.op, _POINTWISE)


def _is_factorized_reduce(m):
    code = _has(m, "forward", _Recognised.factorized_reduce)
    return code and _is_pointwise(m.conv_1, 2) and _is_pointwise(m.conv_2, 2) and _is_norm(m.bn)


def _is_mixed_op(m):
    return _has(m, "forward", _Recognised.mixed_op)


def _is_cell(m):
    return _has(m, "node", _Recognised.node) and all(isinstance(edge, _FusedMixedOp) for edge in m.edges)


def _is_search_network(m):
    return hasattr(m, "stem") and all(isinstance(cell, _FusedCell) for cell in getattr(m, "cells", [None]))


# --- How it is computed -----------------------------------------------------------------------------------------------


class _FusedPool:
    def forward(self, x):
        return pool(x, "max" if isinstance(self, nn.MaxPool2d) else "avg", self.stride)


class _FusedOperation:
    """The last batch norm is taken over by the mixed operation, which need not store what it normalises."""

    @property
    def norm(self):
        return self.op[-1]

    def before_norm(self, x):
        layers = list(self.op)
        if isinstance(layers[0], _FusedPool):
            return layers[0](x)
        size, before = 3 if len(layers) == 3 else 4, None  # before: the norm of the unit before
        for first in range(0, len(layers), size):
            *depthwise, pointwise, norm = layers[first + 1 : first + size]
            x, before = _separable(x, depthwise[0] if depthwise else None, pointwise, before, self.recompute), norm
        return x

    def forward(self, x):
        return _normalise(self.before_norm(x), self.norm)


class _FusedFactorizedReduce:
    @property
    def norm(self):
        return self.bn

    def before_norm(self, x):
        # A convolution of stride 2 with a kernel of one pixel sees every second pixel.
        halves = zip(_Diagonals.apply(x), (self.conv_1, self.conv_2))
        return torch.cat([_separable(y, None, conv, None, self.recompute) for y, conv in halves], dim=1)

    def forward(self, x):
        return _normalise(self.before_norm(x), self.bn)


class _Diagonals(torch.autograd.Function):
    """x[:, :, ::2, ::2] and x[:, :, 1::2, 1::2], whose gradients are written into one tensor, not two that are added.

    x: [N,C,H,W] -> two of [N,C,ceil(H/2),ceil(W/2)]; at odd sizes the second gets a row or column of zeros.
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


class _FusedMixedOp:
    def forward(self, x, probabilities):
        return _mixed(*self.terms(x), probabilities[self.skip_none :])

    def terms(self, x):
        """The outputs of the candidates before their last norms, and these norms, None where there is none."""
        split = [isinstance(op, (_FusedOperation, _FusedFactorizedReduce)) and _is_plain(op.norm) for op in self.ops]
        outputs = [op.before_norm(x) if s else op(x) for op, s in zip(self.ops, split)]
        return outputs, [op.norm if s else None for op, s in zip(self.ops, split)]


def _in_layout(stem, inputs, output):
    return output.contiguous(memory_format=memory_format(output.device))


class _FusedCell:
    def node(self, incoming):
        """All candidates of all edges into a node are one sum."""
        outputs, norms, probabilities = [], [], []
        for x, (edge, p) in incoming:
            terms = edge.terms(x)
            outputs += terms[0]
            norms += terms[1]
            probabilities.append(p[edge.skip_none :])
        return _mixed(outputs, norms, torch.cat(probabilities))


def _is_plain(norm):
    """Whether the mixed operation can take the norm's place: no gamma and beta, running statistics with a momentum."""
    return not norm.affine and norm.track_running_stats and norm.momentum is not None


def _mixed(outputs, norms, probabilities):
    """sum_k probabilities[k] * norms[k](outputs[k]); norms: batch norms for which `_is_plain`, or None."""
    if len(outputs) > MAX_CANDIDATES:
        first, rest = slice(MAX_CANDIDATES), slice(MAX_CANDIDATES, None)
        return sum(_mixed(outputs[part], norms[part], probabilities[part]) for part in (first, rest))
    tracked = [norm for norm in norms if norm is not None]
    if not tracked:
        return mixed_sum(outputs, probabilities)
    if len({(norm.training, norm.momentum, norm.eps) for norm in tracked}) > 1:  # such as some that are frozen
        return mixed_sum([y if norm is None else norm(y) for y, norm in zip(outputs, norms)], probabilities)
    norm = tracked[0]
    if norm.training:
        torch._foreach_add_([norm.num_batches_tracked for norm in tracked], 1)
    means = [None if norm is None else norm.running_mean for norm in norms]
    variances = [None if norm is None else norm.running_var for norm in norms]
    return mixed_norm_sum(outputs, probabilities, means, variances, norm.training, norm.momentum, norm.eps)


def _normalise(x, norm):
    """norm(x), where possible as a mixed operation of one candidate: torch's own is less exact in channels-last."""
    return _mixed([x], [norm], x.new_ones(1)) if _is_plain(norm) else norm(x)


def _separable(x, depthwise, pointwise, norm, recompute):
    """pointwise(depthwise(relu(norm(x)))); norm, depthwise: layers, or None where there is none."""
    settings = {"recompute": recompute}
    if norm is not None and not _is_plain(norm):
        x, norm = norm(x), None
    if norm is not None:
        if norm.training:
            norm.num_batches_tracked.add_(1)
        names = "running_mean", "running_var", "training", "momentum", "eps"
        settings |= {name: getattr(norm, name) for name in names}
    if depthwise is not None:
        settings |= {name: getattr(depthwise, name)[0] for name in ("stride", "padding", "dilation")}
    return separable(x, None if depthwise is None else depthwise.weight, pointwise.weight, **settings)


_RULES = (
    (lambda m: _is_max_pool(m) or _is_avg_pool(m), _FusedPool),
    (_is_operation, _FusedOperation),
    (_is_factorized_reduce, _FusedFactorizedReduce),
    (_is_mixed_op, _FusedMixedOp),
    (_is_cell, _FusedCell),
)
