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

from .ops import cell, dropout_key, dropout_masks, pool, run_cell
from .program import Dropout, FactorizedReduce, Norm, Pool, Separable, Sum, cell_program, known_on_cuda
from .runtime import fused, supports


def memory_format(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.memory_format:
    """The layout of the feature maps of a fused search network.

    Channels-last on the CPU, where the fused convolutions want it; NCHW in 16 bits and under autocast, where torch's
    convolutions run. NCHW on CUDA, where torch has depthwise kernels of its own for it and sends float32 in
    channels-last to cuDNN's slower ones. PDARTS_LAYOUT, for measuring, overrides it: NCHW or channels-last.
    """
    layouts = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
    floating = dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    fused_convolutions = device.type == "cpu" and floating
    name = os.environ.get("PDARTS_LAYOUT") or ("channels-last" if fused_convolutions else "NCHW")
    if name not in layouts:
        raise ValueError(f"PDARTS_LAYOUT is {name!r}; expected {' or '.join(layouts)}")
    return layouts[name]


def fuse(network: nn.Module) -> nn.Module:
    """`network`, changed in place, and unchanged where the kernels do not support its device (see `kernels.use`)."""
    device = next(network.parameters()).device
    if fused(device):
        memory_format(device)  # refuses a wrong PDARTS_LAYOUT now
        for module in reversed(list(network.modules())):  # what a module holds before the module itself
            replacement = next((new for recognises, new in _RULES if recognises(module)), None)
            if replacement:
                module.__class__ = _subclass(replacement, type(module))
                if isinstance(module, _Whole):
                    module.norms = [m for m in module.modules() if _is_norm(m)]
                    module.layers = [m for m in module.modules() if m._parameters or m._buffers]
                    _, program = module.assemble(2)
                    module.on_cuda = known_on_cuda(program.operations, program.norms, program.outputs)
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
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))

    def mixed_op(self, x, probabilities):
        return sum(probabilities[k] * op(x) for k, op in enumerate(self.ops, start=self.skip_none))

    def skip_dropout(self, x):
        return inverted_dropout(x, self.rate, x.shape) if self.training else x  # noqa: F821

    def drop_path(self, x):
        return inverted_dropout(x, self.rate, (x.shape[0], 1, 1, 1)) if self.training else x  # noqa: F821

    def search_cell(self, s0, s1, probabilities):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self.nodes):
            node = sum(self.edges[offset + j](x, probabilities[offset + j]) for j, x in enumerate(states))
            offset += len(states)
            states.append(node)
        return torch.cat(states[2:], dim=1)

    def evaluation_cell(self, s0, s1):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, len(self.sources), 2):
            a = self.drop_paths[i](self._ops[i](states[self.sources[i]]))
            b = self.drop_paths[i + 1](self._ops[i + 1](states[self.sources[i + 1]]))
            states.append(a + b)
        return torch.cat([states[i] for i in self.concat], dim=1)


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


def _is_identity(m):
    return type(m) is nn.Identity


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


def _is_skip_dropout(m):
    return _has(m, "forward", _Recognised.skip_dropout)


def _is_drop_path(m):
    return _has(m, "forward", _Recognised.drop_path)


def _is_search_cell(m):
    return _has(m, "forward", _Recognised.search_cell) and all(isinstance(edge, _FusedMixedOp) for edge in m.edges)


def _is_evaluation_cell(m):
    known = _has(m, "forward", _Recognised.evaluation_cell)
    return known and all(_is_identity(drop) or _is_drop_path(drop) for drop in m.drop_paths)


def _is_whole(m, operations):
    known = (_is_identity(op) or _is_skip_dropout(op) or isinstance(op, _Fused) for op in operations)
    preprocessed = isinstance(m.preprocess0, _Fused) and isinstance(m.preprocess1, _Fused)
    return preprocessed and all(known)


def _is_whole_search_cell(m):
    return _is_search_cell(m) and _is_whole(m, (op for edge in m.edges for op in edge.ops))


def _is_whole_evaluation_cell(m):
    if not (_is_evaluation_cell(m) and _is_whole(m, m._ops)):
        return False
    states = range(2 + len(m._ops) // 2)  # one that nothing reads gets no gradients in plain torch: nor does it here
    return set(states) <= {*m.sources, *m.concat} and len(set(m.concat)) == len(m.concat) and min(m.concat) >= 2


def _is_network(m):
    cells = getattr(m, "cells", [None])
    return _stems(m) and all(isinstance(cell, (_FusedSearchCell, _FusedEvaluationCell)) for cell in cells)


def _stems(network):
    return [getattr(network, name) for name in ("stem", "stem0", "stem1") if hasattr(network, name)]


# --- How it is computed -----------------------------------------------------------------------------------------------


class _Program:
    """A cell, or a node of one, put together: what `kernels.cell` takes, but for inputs and probabilities.

    A value is a number: -1, -2, ... are the inputs, 0, 1, ... what the operations compute.
    """

    def __init__(self):
        self.settings, self.operations, self.norms = None, [], []

    def sum(self, terms):
        return self.step(Sum(terms), None)

    def step(self, operation, norm):
        self.operations.append(operation)
        self.norms.append(norm)
        return len(self.operations) - 1

    def accepts(self, norms):
        """Whether the settings of norms are those of all others; the first ones decide."""
        self.settings = self.settings or next(map(_settings, norms), None)
        return all(_settings(norm) == self.settings is not None for norm in norms)

    def finish(self, inputs, *outputs):
        """For so many inputs: it can be run from now on."""

        def number(value):
            return -1 - value if value < 0 else value + inputs

        self.operations = [
            Sum([number(term) for term in op.terms]) if isinstance(op, Sum) else op._replace(source=number(op.source))
            for op in self.operations
        ]
        self.settings = self.settings or (False, 0.1, 1e-5)
        self.counts = [norm.num_batches_tracked for norm in self.norms if norm]
        norms = [norm and Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias) for norm in self.norms]
        self.norms = [None] * inputs + norms
        self.outputs = [number(value) for value in outputs]
        return self

    def count(self):
        if self.settings[0]:
            torch._foreach_add_(self.counts, 1)


def _settings(norm):
    """Of a batch norm that is fused; None for others: without running statistics, with their mean, in 16 bits."""
    fused = norm.track_running_stats and norm.momentum is not None
    wide = fused and norm.running_mean.dtype in (torch.float32, torch.float64)
    return (norm.training, norm.momentum, norm.eps) if wide else None


def _sum(operations, probabilities):
    """sum_k probabilities[k] * op_k(x_k); operations: pairs of op and x."""
    program, inputs = _Program(), []

    def value(x):
        known = next((i for i, other in enumerate(inputs) if other is x), len(inputs))
        inputs[known:] = inputs[known:] or [x]
        return -1 - known

    terms = []
    for op, x in operations:
        if not isinstance(op, _Fused):
            terms.append(value(op(x)))
        else:
            terms.append(op.add_to(program, value(x)) if program.accepts(op.norms) else value(op.plain(x)))
    program.finish(len(inputs), program.sum(terms))
    program.count()
    return cell(inputs, program.operations, program.outputs, probabilities, program.norms, *program.settings)


def _ones(x, *size):
    return torch.ones(size, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _nothing_drops(rates):
    """Whether all rates are 0; a GPU would have to be waited for."""
    return rates.is_cpu and not rates.any()


class _Fused:
    """An operation; add_to(program, value): what it computes from a value, as steps; norms: those of the steps."""

    norms = ()

    def forward(self, x):
        return _sum([(self, x)], _ones(x, 1))

    def plain(self, x):
        return super().forward(x)


class _FusedPool(_Fused):
    def forward(self, x):
        return pool(x, self.kind, self.stride)

    @property
    def kind(self):
        return "max" if isinstance(self, nn.MaxPool2d) else "avg"

    def add_to(self, program, value, norm=None):
        return program.step(Pool(value, self.kind, self.stride), norm)


class _FusedOperation(_Fused):
    @property
    def norms(self):
        return [layer for layer in self.op if _is_norm(layer)]

    def add_to(self, program, value):
        if isinstance(self.op[0], _FusedPool):
            return self.op[0].add_to(program, value, self.op[1])
        layers = [layer for layer in self.op if not _is_relu(layer)]
        while layers:
            weight, geometry = None, {}
            if _is_depthwise(layers[0]):
                depthwise = layers.pop(0)
                weight = depthwise.weight
                geometry = {name: getattr(depthwise, name)[0] for name in ("stride", "padding", "dilation")}
            pointwise, norm, *layers = layers
            value = program.step(Separable(value, weight, pointwise.weight, **geometry), norm)
        return value


class _FusedFactorizedReduce(_Fused):
    @property
    def norms(self):
        return [self.bn]

    def add_to(self, program, value):
        return program.step(FactorizedReduce(value, self.conv_1.weight, self.conv_2.weight), self.bn)


class _FusedMixedOp:
    def forward(self, x, probabilities):
        return _sum([(op, x) for op in self.ops], probabilities[self.skip_none :])


class _FusedSearchCell:
    def forward(self, s0, s1, probabilities):
        """All candidates of all edges into a node are one sum."""
        states, edges = [self.preprocess0(s0), self.preprocess1(s1)], iter(zip(self.edges, probabilities))
        for _ in range(self.nodes):
            incoming = list(zip(states, edges))  # states first: zip takes no edge too many
            operations = [(op, x) for x, (edge, _) in incoming for op in edge.ops]
            of_node = torch.cat([p[edge.skip_none :] for _, (edge, p) in incoming])
            states.append(_sum(operations, of_node))
        return torch.cat(states[2:], dim=1)


class _FusedEvaluationCell:
    def forward(self, s0, s1):
        """Both operations into a node are one sum; drop-path weighs the images."""
        states, weights = [self.preprocess0(s0), self.preprocess1(s1)], self.weights(s1)
        for i in range(0, len(self.sources), 2):
            incoming = [(op, states[source]) for op, source in zip(self._ops[i : i + 2], self.sources[i : i + 2])]
            states.append(_sum(incoming, weights[i : i + 2]))
        return torch.cat([states[j] for j in self.concat], dim=1)

    def weights(self, x):
        """Of the images of all operations, [operations,N]; [operations] if all are 1."""
        ones = _ones(x, len(self.drop_paths))
        active = [not _is_identity(drop) and drop.training for drop in self.drop_paths]
        if not any(active):
            return ones
        never = torch.zeros((), device=x.device)
        rates = torch.stack([drop.rate.float() if draws else never for drop, draws in zip(self.drop_paths, active)])
        if _nothing_drops(rates):
            return ones
        masks = dropout_masks(dropout_key(x.device), rates, range(len(rates)), (len(x), 1, 1, 1))
        return masks.flatten(1).to(ones.dtype)


_INPUTS = 2  # sums of one term, which come before the nodes: the preprocessed inputs


class _Whole:
    """A cell all of which is known: one program, put together again only when what it depends on has changed."""

    state = None

    def served(self, s0):
        """Whether it can be computed as a whole; else single operations serve."""
        served = supports("cell", s0) and (s0.is_cpu or self.on_cuda)
        return served and _Program().accepts(self.norms)

    def compute(self, s0, s1, probabilities, dropout=None):
        """probabilities [K] or [K,N]: of the nodes."""
        state = [s0 is s1, _settings(self.norms[0])]
        for m in self.layers:
            state += map(id, (*m._parameters.values(), *m._buffers.values()))
        if state != self.state:
            self.made, self.state = self.assemble(1 if s0 is s1 else 2), state
        (numbers, weights), program = self.made
        program.count()
        ones = _ones(s0, _INPUTS, *probabilities.shape[1:])
        probabilities = torch.cat([ones, probabilities])
        return run_cell(
            [s0] if s0 is s1 else [s0, s1],
            numbers,
            weights,
            program.outputs,
            probabilities,
            program.norms,
            *program.settings,
            dropout,
        )

    def assemble(self, inputs):
        program = _Program()
        program.accepts(self.norms)
        pairs = (self.preprocess0, -1), (self.preprocess1, -inputs)
        states = [program.sum([op.add_to(program, value)]) for op, value in pairs]
        program.finish(inputs, *self.add_nodes(program, states))
        return cell_program(program.operations), program


class _WholeSearchCell(_Whole, _FusedSearchCell):
    places = None

    def forward(self, s0, s1, probabilities):
        if not self.served(s0):
            return super().forward(s0, s1, probabilities)
        return self.compute(s0, s1, self.used(probabilities), self.dropout(s0.device))

    def used(self, probabilities):
        """[14, K] -> those of all candidates but "none", edge by edge, by one operation forward and backward."""
        if self.places is None or self.places.device != probabilities.device:
            K = probabilities.shape[1]
            places = [K * i + k for i, edge in enumerate(self.edges) for k in range(edge.skip_none, K)]
            self.places = torch.tensor(places, device=probabilities.device)
        return probabilities.flatten().index_select(0, self.places)

    def dropout(self, device):
        """That of the skip-connects; None where nothing is dropped."""
        operations = enumerate((op for edge in self.edges for op in edge.ops), _INPUTS)
        skips = [(term, op.rate) for term, op in operations if _is_skip_dropout(op) and op.training]
        if not skips:
            return None
        terms, rates = zip(*skips)
        rates = torch.stack(rates).float()
        return None if _nothing_drops(rates) else Dropout(dropout_key(device), rates, terms)

    def add_nodes(self, program, states):
        edges = iter(self.edges)
        for _ in range(self.nodes):
            incoming = zip(list(states), edges)
            operations = [(op, x) for x, edge in incoming for op in edge.ops]
            terms = [op.add_to(program, x) if isinstance(op, _Fused) else x for op, x in operations]
            states.append(program.sum(terms))
        return states[2:]


class _WholeEvaluationCell(_Whole, _FusedEvaluationCell):
    def forward(self, s0, s1):
        if not self.served(s0):
            return super().forward(s0, s1)
        return self.compute(s0, s1, self.weights(s1))

    def add_nodes(self, program, states):
        edges = iter(zip(self._ops, self.sources))
        for pair in zip(edges, edges):
            terms = (states[source] if _is_identity(op) else op.add_to(program, states[source]) for op, source in pair)
            states.append(program.sum(list(terms)))
        return [states[i] for i in self.concat]


def _in_layout(stem, inputs, output):
    return output.contiguous(memory_format=memory_format(output.device, output.dtype))


_RULES = (
    (lambda m: _is_max_pool(m) or _is_avg_pool(m), _FusedPool),
    (_is_operation, _FusedOperation),
    (_is_factorized_reduce, _FusedFactorizedReduce),
    (_is_mixed_op, _FusedMixedOp),
    (_is_whole_search_cell, _WholeSearchCell),
    (_is_search_cell, _FusedSearchCell),
    (_is_whole_evaluation_cell, _WholeEvaluationCell),
    (_is_evaluation_cell, _FusedEvaluationCell),
)
