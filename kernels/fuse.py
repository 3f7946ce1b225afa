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

from . import Norm, Step, fused, node, pool, separable

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
            for stem in _stems(module) if _is_network(module) else ():
                stem.register_forward_hook(_in_layout)
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

    def search_node(self, incoming):
        return sum(edge(x, p) for x, (edge, p) in incoming)

    def evaluation_node(self, incoming, drop_path):
        return sum(self.edge(op, x, drop_path) for op, x in incoming)

    def edge(self, op, x, drop_path):
        if isinstance(op, nn.Identity) or not self.training:
            return op(x)
        return inverted_dropout(op(x), drop_path, (len(x), 1, 1, 1))  # noqa: F821


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


def _is_search_cell(m):
    return _has(m, "node", _Recognised.search_node) and all(isinstance(edge, _FusedMixedOp) for edge in m.edges)


def _is_evaluation_cell(m):
    return _has(m, "node", _Recognised.evaluation_node) and _has(m, "edge", _Recognised.edge)


def _is_network(m):
    cells = getattr(m, "cells", [None])
    return _stems(m) and all(isinstance(cell, (_FusedSearchCell, _FusedEvaluationCell)) for cell in cells)


def _stems(network):
    return [getattr(network, name) for name in ("stem", "stem0", "stem1") if hasattr(network, name)]


# --- How it is computed -----------------------------------------------------------------------------------------------


class _Value:
    """Of a node, see kernels.node: a tensor, or what a step computes from the value `source`; norm: its batch norm."""

    def __init__(self, x=None, source=None, norm=None, **step):
        self.x, self.source, self.norm, self.step = x, source, norm, step

    def chain(self):
        """What it is computed from, and itself."""
        return [*(self.source.chain() if self.source else ()), self]


# Of the operations: `norms`, all of them; value(state), what they compute from a tensor; plain(x), by their layers.


class _FusedPool:
    norms = ()

    @property
    def kind(self):
        return "max" if isinstance(self, nn.MaxPool2d) else "avg"

    def forward(self, x):
        return pool(x, self.kind, self.stride)

    def value(self, state):
        return _Value(source=state, kind=self.kind, stride=self.stride)


class _FusedOperation:
    @property
    def norms(self):
        return [layer for layer in self.op if _is_norm(layer)]

    def forward(self, x):
        return _node([(self, x)], _ones(x, 1), self.recompute)

    def plain(self, x):
        return super().forward(x)

    def value(self, state):
        first, *others = self.op
        if isinstance(first, _FusedPool):
            value = first.value(state)
            (value.norm,) = others
            return value
        for layer in self.op:
            if _is_relu(layer):
                step = {}
            elif _is_norm(layer):
                state = _Value(source=state, norm=layer, **step)
            elif _is_pointwise(layer):
                step["pointwise"] = layer.weight
            else:
                geometry = {name: getattr(layer, name)[0] for name in ("stride", "padding", "dilation")}
                step |= geometry | {"depthwise": layer.weight}
        return state


class _FusedFactorizedReduce:
    @property
    def norms(self):
        return [self.bn]

    def forward(self, x):
        return _node([(self, x)], _ones(x, 1), self.recompute)

    def plain(self, x):
        return super().forward(x)

    def value(self, state):
        # A convolution of stride 2 with a kernel of one pixel sees every second pixel.
        halves = zip(_Diagonals.apply(state.x), (self.conv_1, self.conv_2))
        reduced = [separable(x, None, conv.weight, recompute=self.recompute) for x, conv in halves]
        return _Value(torch.cat(reduced, dim=1), norm=self.bn)


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
        return _node([(op, x) for op in self.ops], probabilities[self.skip_none :], self.recompute)


class _FusedSearchCell:
    def node(self, incoming):
        """All candidates of all edges into a node are one sum."""
        operations = [(op, x) for x, (edge, _) in incoming for op in edge.ops]
        probabilities = torch.cat([p[edge.skip_none :] for _, (edge, p) in incoming])
        return _node(operations, probabilities, self.recompute)


class _FusedEvaluationCell:
    def node(self, incoming, drop_path):
        """Both operations are one sum; drop-path weighs the images."""
        ones = _ones(incoming[0][1], len(incoming[0][1]), 1, 1, 1)
        kept = [ones if isinstance(op, nn.Identity) else self.edge(lambda _: ones, x, drop_path) for op, x in incoming]
        dropped = any(k is not ones for k in kept)
        probabilities = torch.stack([k.flatten() for k in kept]) if dropped else ones.new_ones(len(incoming))
        return _node(incoming, probabilities, self.recompute)


def _in_layout(stem, inputs, output):
    return output.contiguous(memory_format=memory_format(output.device))


def _ones(x, *size):
    return torch.ones(size, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _settings(norm):
    """Of a batch norm that a node can take over; None for others: without running statistics, or with their mean."""
    plain = norm.track_running_stats and norm.momentum is not None
    return (norm.training, norm.momentum, norm.eps) if plain else None


def _node(operations, probabilities, recompute):
    """sum_k probabilities[k] * op_k(x_k); operations: pairs of op and x."""
    if len(operations) > MAX_CANDIDATES:
        parts = slice(MAX_CANDIDATES), slice(MAX_CANDIDATES, None)
        return sum(_node(operations[part], probabilities[part], recompute) for part in parts)
    states, terms, settings = {}, [], None

    def state(x):
        return states.setdefault(id(x), _Value(x))

    for op, x in operations:
        known = isinstance(op, (_FusedPool, _FusedOperation, _FusedFactorizedReduce))
        differ = {_settings(norm) for norm in op.norms} if known else set()
        settings = settings or next(iter(differ), None)
        if not known:
            terms.append(state(op(x)))
        elif differ - {settings} or None in differ:  # such as norms that are frozen
            terms.append(state(op.plain(x)))
        else:
            terms.append(op.value(state(x)))
    values = sorted(dict.fromkeys(v for term in terms for v in term.chain()), key=lambda v: v.source is not None)
    number = {value: i for i, value in enumerate(values)}
    norms = [value.norm for value in values]
    training, momentum, eps = settings or (False, 0.1, 1e-5)
    if training:
        torch._foreach_add_([norm.num_batches_tracked for norm in norms if norm], 1)
    return node(
        [value.x for value in values if value.source is None],
        [Step(number[value.source], **value.step) for value in values if value.source],
        [number[term] for term in terms],
        probabilities,
        [norm and Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias) for norm in norms],
        training,
        momentum,
        eps,
        recompute,
    )


_RULES = (
    (lambda m: _is_max_pool(m) or _is_avg_pool(m), _FusedPool),
    (_is_operation, _FusedOperation),
    (_is_factorized_reduce, _FusedFactorizedReduce),
    (_is_mixed_op, _FusedMixedOp),
    (_is_search_cell, _FusedSearchCell),
    (_is_evaluation_cell, _FusedEvaluationCell),
)
