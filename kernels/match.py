"""Finds the parts of a traced graph that the kernels compute; torch computes the rest.

kind    what a node is: a step of a cell, a batch norm of one, a term that is weighed or dropped, a sum, a
        concatenation, a zero, or torch's
real    the node that computes a node's value, past identities
reads   how often each node is read
wanted  the nodes whose values have to be there as tensors, since torch, a concatenation or several parts read them
left    nodes that torch computes although they have a kind
unread  calls whose results nobody reads, but which may change something
part    a program of `cell` for a wanted node, from values that are there: inputs, what torch computes, other parts
members the nodes that a part computes
term    a value in a sum, with its weight (a number times elements of tensors) and its dropout
"""

from __future__ import annotations

import collections
import operator
from typing import NamedTuple

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F

from .program import FactorizedReduce, Norm, Pool, Separable, Sum, known_on_cuda
from .trace import attribute, is_changed, is_torchs

SHIFTED = (slice(None), slice(None), slice(1, None), slice(1, None))
ADD = operator.add, torch.add, "add"
MUL = operator.mul, torch.mul, "mul"
POINTWISE_FUNCTIONS = {torch.sigmoid, torch.tanh, torch.exp, operator.neg, *ADD, *MUL, "sigmoid", "tanh", "exp", "neg"}


class Kind(NamedTuple):
    """name: what a node is. of: its inputs. more: its module or step, its number, the nodes of its weight or rate."""

    name: str
    of: tuple = ()
    more: tuple = ()


TORCH = Kind("torch")
TERMS = {"add", "scale", "dropout", "drop_path"}
FUSED = {"step", "norm", "cat"} | TERMS


def settings_of(norm):
    """Those of a batch norm; None if it cannot be fused: no running statistics, their cumulative mean, 16 bits."""
    tracked = norm.track_running_stats and norm.momentum is not None and norm.running_mean is not None
    wide = tracked and norm.running_mean.dtype in (torch.float32, torch.float64)
    return (norm.training, norm.momentum, norm.eps) if wide else None


class Matcher:
    """Which nodes are what, and how often they are read."""

    def __init__(self, graph: fx.Graph, root: nn.Module, device: torch.device):
        self.root, self.device, self.modules = root, device, dict(root.named_modules(remove_duplicate=False))
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.output = next(node for node in reversed(graph.nodes) if node.op == "output")
        called = [self.modules[node.target] for node in graph.nodes if node.op == "call_module"]
        calls = collections.Counter(inner for module in called for inner in module.modules())
        self.calls = calls  # of norms that are called again the statistics move in turn
        self.tensors = {id(attribute(root, node.target)) for node in graph.nodes if node.op == "get_attr"}
        self.dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), None)
        settings = collections.Counter(settings_of(m) for m in calls if type(m) is nn.BatchNorm2d)
        del settings[None]
        self.settings = settings.most_common(1)[0][0] if settings else (False, 0.1, 1e-5)
        self.kinds, self.left = {}, set()  # left: to torch, though they have a kind
        self.zeros = set()  # products with the number 0 of what is computed anyway
        self.unread = self.dead(graph)

    def dead(self, graph):
        """Calls of modules that the result does not depend on, but that may change something, with all they read.

        A product with the number 0 does not depend on what others compute anyway; else it gives gradients of zeros.
        """
        alive, products = {self.output}, []
        for node in reversed(graph.nodes):
            if node in alive and self.is_product_with_zero(node):
                products.append(node)
            elif node in alive:
                alive.update(node.all_input_nodes)
        for node in products:
            above = ancestors(node) - alive
            if any(other.op in ("call_module", "get_attr", "placeholder") for other in above):
                alive |= above
            else:
                self.zeros.add(node)
        unread = set()
        for node in reversed(graph.nodes):
            effect = node.op == "call_module" and not (self.module(node, nn.ReLU) or self.module(node, nn.Identity))
            effect = effect or node.target in (F.batch_norm, torch.batch_norm)
            if node not in alive and (effect or node in unread):
                unread.update((node, *node.all_input_nodes))
        return unread - alive

    def is_product_with_zero(self, node):
        product = node.op in ("call_function", "call_method") and node.target in MUL and not node.kwargs
        return product and any(type(a) in (int, float) and a == 0 for a in node.args)

    def module(self, node, kind=nn.Module):
        """The module that a node calls with one argument, if it is of exactly this class and not changed."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self.modules[node.target]
        methods = type(module).forward, getattr(type(module), "_conv_forward", type(module).forward)
        changed = is_changed(module) or not all(map(is_torchs, methods))
        return module if not changed and (kind is nn.Module or type(module) is kind) else None

    def real(self, node):
        """The node that computes a node's value: identities compute nothing."""
        while isinstance(node, fx.Node) and node.op in ("call_module", "call_function", "call_method"):
            module, of = self.module(node), [a for a in node.args if isinstance(a, fx.Node)]
            dropout = type(module) is nn.Dropout and (not module.training or module.p == 0)
            others = [a for a in node.args if not isinstance(a, fx.Node)]
            zero = node.target in ADD and len(others) == 1 and type(others[0]) in (int, float) and others[0] == 0
            if len(of) != 1 or node.kwargs or not (type(module) is nn.Identity or dropout or zero):
                break
            node = of[0]
        return node

    def kind(self, node) -> Kind:
        if node not in self.kinds:
            self.kinds[node] = self.recognised(node)
        kind = self.kinds[node]
        of_torch = kind.name == "norm" and self.kind(kind.of[0]).name != "step"
        return TORCH if node in self.left or node in self.unread or of_torch else kind

    def recognised(self, node) -> Kind:
        if node.op in ("placeholder", "get_attr", "output"):
            return TORCH
        for match in (self.step, self.norm, self.dropout, self.drop, self.zero, self.scale, self.sum, self.cat):
            if kind := match(node):
                return kind
        return TORCH

    # --- Steps --------------------------------------------------------------------------------------------------------

    def call(self, node, *targets, keywords=({},)):
        """The arguments of a node that calls one of these functions or methods, with one of these sets of keywords."""
        node = self.real(node)
        called = isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets
        return node.args if called and (keywords is None or node.kwargs in keywords) else None

    def relu(self, node):
        """What a node is the ReLU of."""
        node = self.real(node)
        known = {"inplace": False}, {"inplace": True}, {}
        args = node.args if self.module(node, nn.ReLU) else self.call(node, F.relu, torch.relu, "relu", keywords=known)
        return self.real(args[0]) if args and len(args) == 1 else None

    def convolution(self, node):
        """A convolution without a bias, and what it convolves."""
        node = self.real(node)
        conv = self.module(node, nn.Conv2d)
        settings = conv and (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        pairs = conv and all(isinstance(setting, tuple) and len(setting) == 2 for setting in settings)
        if pairs and conv.bias is None and conv.padding_mode == "zeros":
            return conv, node.args[0]
        return None, None

    def pointwise(self, node, stride=1):
        conv, x = self.convolution(node)
        plain = conv and conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
        return (conv, x) if plain and conv.stride == (stride, stride) else (None, None)

    def depthwise(self, node):
        conv, x = self.convolution(node)
        square = conv and all(len(set(size)) == 1 for size in (conv.kernel_size, conv.stride, conv.dilation))
        padded = square and conv.padding == (conv.padding[0],) * 2
        return (conv, x) if padded and conv.groups == conv.in_channels == conv.out_channels else (None, None)

    def step(self, node):
        pointwise, y = self.pointwise(node)
        if pointwise:
            if (x := self.relu(y)) is not None:
                return self.known(x, Separable(0, None, pointwise.weight))
            depthwise, y = self.depthwise(y)
            if depthwise and (x := self.relu(y)) is not None:
                geometry = (getattr(depthwise, name)[0] for name in ("stride", "padding", "dilation"))
                return self.known(x, Separable(0, depthwise.weight, pointwise.weight, *geometry))
        pool = self.module(node)
        stride = getattr(pool, "stride", None)
        stride = stride[0] if isinstance(stride, tuple) and len(set(stride)) == 1 else stride
        if not isinstance(stride, int):
            return self.reduction(node)
        if type(pool) is nn.MaxPool2d:
            plain = (pool.kernel_size, pool.padding, pool.dilation) in ((3, 1, 1), ((3, 3), (1, 1), (1, 1)))
            if plain and not (pool.return_indices or pool.ceil_mode):
                return self.known(self.real(node.args[0]), Pool(0, "max", stride))
        if type(pool) is nn.AvgPool2d:
            plain = (pool.kernel_size, pool.padding) in ((3, 1), ((3, 3), (1, 1)))
            if plain and not (pool.count_include_pad or pool.ceil_mode or pool.divisor_override):
                return self.known(self.real(node.args[0]), Pool(0, "avg", stride))
        return self.reduction(node)

    def reduction(self, node):
        halves = self.concatenated(node)
        if not halves or len(halves) != 2:
            return None
        (first, x), (second, shifted) = (self.pointwise(half, 2) for half in halves)
        if not (first and second) or first.out_channels != second.out_channels or (of := self.relu(x)) is None:
            return None
        sliced = self.call(shifted, operator.getitem)
        if not sliced or sliced[1] != SHIFTED:
            return None
        padded = self.real(sliced[0])
        if isinstance(padded, fx.Node) and padded.op == "call_function" and padded.target is F.pad:
            by_zero = padded.kwargs in ({}, {"mode": "constant", "value": None})
            padded = self.real(padded.args[0]) if by_zero and padded.args[1:] == ((0, 1, 0, 1),) else None
        if padded is not self.real(x):
            return None
        return self.known(of, FactorizedReduce(0, first.weight, second.weight))

    def known(self, x, step):
        """The kind of a step that reads x, if the kernels know it on this device."""
        if self.device.type == "cuda" and not known_on_cuda([step], [None, None], [1]):
            return None
        return Kind("step", (x,), (step,)) if isinstance(x, fx.Node) else None

    def norm(self, node):
        norm = self.module(node, nn.BatchNorm2d)
        x = self.real(node.args[0]) if norm else None
        known = x is not None and self.calls[norm] == 1 and settings_of(norm) == self.settings
        known = known and self.tensors.isdisjoint(map(id, norm.buffers()))  # nobody reads its statistics
        return Kind("norm", (x,), (norm,)) if known and self.kind(x).name == "step" else None

    # --- Terms --------------------------------------------------------------------------------------------------------

    def dropout(self, node):
        module = self.module(node, nn.Dropout)
        dropped = module and module.p < 1 and not module.inplace
        return Kind("dropout", (self.real(node.args[0]),), (float(module.p),)) if dropped else None

    def drop(self, node):
        """x * (kept / (1 - rate)).to(x.dtype), where kept is rand_like(y) >= rate and y is x or x[:, :1, :1, :1].

        Nothing else may read the mask, since the kernels draw one of their own.
        """
        product = self.call(node, *MUL)
        cast = self.call(product[1], "to") if product else None
        quotient = self.call(cast[0], operator.truediv) if cast and len(cast) == 2 else None
        kept = self.call(quotient[0], operator.ge) if quotient else None
        rest = self.call(quotient[1], operator.sub) if kept else None
        if not rest or rest[0] != 1 or rest[1] is not kept[1] or kept[1].op != "get_attr":
            return None
        drawn, x, dtype = kept[0], product[0], cast[1]
        alone = all(len(node.users) == 1 for node in (product[1], cast[0], quotient[0], drawn))
        one_rate = attribute(self.root, kept[1].target).numel() == 1
        of_x = isinstance(dtype, fx.Node) and dtype.target is getattr and dtype.args == (x, "dtype")
        in_float32 = drawn.target is torch.rand_like and drawn.kwargs in ({}, {"dtype": torch.float32})
        if not (of_x and alone and one_rate and in_float32):
            return None
        like = drawn.args[0]
        one = (slice(None), slice(None, 1), slice(None, 1), slice(None, 1))
        if like is x:
            return Kind("dropout", (self.real(x),), (kept[1],))
        return Kind("drop_path", (self.real(x),), (kept[1],)) if self.call(like, operator.getitem) == (x, one) else None

    def zero(self, node):
        if node in self.zeros:
            return Kind("zero")
        filled = self.call(node, "fill_")
        new = self.real(filled[0]) if filled and filled[1:] == (0,) else node
        makers = (torch.zeros, torch.zeros_like) if new is node else (torch.FloatTensor, torch.empty, "new_empty")
        if self.call(new, *makers, keywords=None) is None:
            return None
        standard = None if new.target in (torch.zeros_like, "new_empty") else torch.get_default_dtype()
        dtype = torch.float32 if new.target is torch.FloatTensor else new.kwargs.get("dtype", standard)
        of_x = isinstance(dtype, fx.Node) and dtype.target is getattr and dtype.args[1] == "dtype"
        wider = self.dtype and dtype and not of_x and torch.promote_types(dtype, self.dtype) != self.dtype
        return None if wider else Kind("zero")

    def weight(self, node):
        """The tensor, and the indices of the number of it, that a node is; None where it is no weight."""
        index, start = (), node
        while isinstance(node, fx.Node) and node.target is operator.getitem and type(node.args[1]) is int:
            node, index = node.args[0], (node.args[1], *index)
        if index:
            return node, index
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            return (node, ()) if attribute(self.root, node.target).dim() == 0 else None
        computed = node.op in ("call_function", "call_method") and node.target in POINTWISE_FUNCTIONS
        numbers = (a for a in node.args if not isinstance(a, fx.Node))
        if computed and node.all_input_nodes and all(type(a) in (int, float) for a in numbers):
            return (start, ()) if all(map(self.weight, node.all_input_nodes)) else None
        return None

    def scale(self, node):
        factors = self.call(node, *MUL)
        if not factors or len(factors) != 2:
            return None
        for weight, x in (factors, factors[::-1]):
            x = self.real(x)
            if isinstance(x, fx.Node) and not self.weight(x):
                if type(weight) in (int, float):
                    return Kind("scale", (x,), (float(weight),))
                if found := self.weight(self.real(weight)):
                    return Kind("scale", (x,), (found,))
        return None

    def sum(self, node):
        terms, by_keyword = self.call(node, *ADD), ({}, {"dim": 0})
        summed = self.call(node, "sum", keywords=by_keyword)
        if summed and (summed[1:], node.kwargs) in (((0,), {}), ((), {"dim": 0})):
            stacked = self.call(summed[0], torch.stack, keywords=by_keyword)
            listed = stacked and len(stacked) == 1 and isinstance(stacked[0], (list, tuple))
            terms = tuple(stacked[0]) if listed else None
        if not terms or len(terms) < 2:
            return None
        terms = tuple(map(self.real, terms))
        return Kind("add", terms) if all(isinstance(x, fx.Node) and not self.weight(x) for x in terms) else None

    def concatenated(self, node):
        joined = self.call(node, torch.cat, torch.concat, keywords=({}, {"dim": 1}))
        by_channels = joined and (joined[1:], self.real(node).kwargs) in (((1,), {}), ((), {"dim": 1}))
        return joined[0] if by_channels and isinstance(joined[0], (list, tuple)) else None

    def cat(self, node):
        parts = tuple(map(self.real, self.concatenated(node) or ()))
        return Kind("cat", parts) if len(parts) > 1 else None


class Part:
    """A program of `cell` for the value of a node.

    inputs: nodes whose values it takes. weights: of the terms of all sums, each a number and the (tensor, indices) that
    it is multiplied by. dropout, drop_path: (place of the term, rate: a number or the node of a tensor).
    """

    def __init__(self, matcher: Matcher, target: fx.Node, members: set, reads: dict):
        self.matcher, self.target, self.members, self.reads = matcher, target, members, reads
        self.inputs, self.operations, self.norms, self.numbers = [], [], {}, {}
        self.weights, self.dropout, self.drop_path, self.nodes = [], [], [], []
        self.unused = []  # the nodes of weights of zeros: they have gradients all the same
        for node in sorted(members - {target}, key=matcher.order.get):
            if matcher.kind(node).name not in TERMS or reads[node] > 1:
                self.value(node)
        kind = matcher.kind(target)
        if kind.name == "cat":
            self.outputs = []
            for x in kind.of:
                v = self.value(x)
                self.outputs.append(v if self.is_plain_sum(v) and v not in self.outputs else self.sum([self.term(v)]))
        else:
            v = self.value(target)
            self.outputs = [v if v not in self.norms else self.sum([self.term(v)])]
        self.finish()

    # A value is a number: -1, -2, ... are the inputs, 0, 1, ... the operations compute. Only a separable convolution
    # and a sum read a value with a norm, and only one of them; the same holds for the value of a step.

    def value(self, node):
        if node not in self.numbers:
            if node not in self.members:
                self.inputs.append(node)
            self.numbers[node] = self.add(node) if node in self.members else -len(self.inputs)
        return self.numbers[node]

    def whole(self, node):
        """The value of a node as everything may read it: of an input or a sum, without a norm."""
        v = self.value(node)
        if v in self.norms or (v >= 0 and not self.is_plain_sum(v)):
            v = self.numbers[node] = self.sum([self.term(v)])
        return v

    def is_plain_sum(self, v):
        return v >= 0 and isinstance(self.operations[v], Sum) and v not in self.norms

    def add(self, node):
        kind = self.matcher.kind(node)
        if kind.name == "step":
            (step,) = kind.more
            v = self.value(kind.of[0]) if isinstance(step, Separable) else self.whole(kind.of[0])
            v = self.operation(step._replace(source=v), node)
        elif kind.name == "norm":
            (x,) = kind.of
            v = self.value(x)
            self.norms[v] = kind.more[0]
        else:
            return self.sum(self.terms(node))
        return self.sum([self.term(v)]) if self.reads[node] > 1 else v

    def operation(self, operation, node=None):
        self.operations.append(operation)
        self.nodes.append(node)
        return len(self.operations) - 1

    def term(self, v, number=1.0, factors=(), dropout=None, drop_path=None):
        return v, number, factors, dropout, drop_path

    def sum(self, terms):
        for _, number, factors, dropout, drop_path in terms:
            place = len(self.weights)
            self.weights.append((number, factors))
            if dropout is not None:
                self.dropout.append((place, dropout))
            if drop_path is not None:
                self.drop_path.append((place, drop_path))
        return self.operation(Sum([v for v, *_ in terms]))

    def terms(self, node, number=1.0, factors=(), top=True):
        """What a node adds to a sum; what others read too is a value of its own."""
        kind = self.matcher.kind(node)
        if node not in self.reads:
            self.unused += weights_of_zero(self.matcher, node)
            return []
        if not (node in self.members and kind.name in TERMS and (top or self.reads[node] == 1)):
            return [self.term(self.value(node), number, factors)]
        if kind.name == "dropout":
            return [self.term(self.whole(kind.of[0]), number, factors, kind.more[0])]
        if kind.name == "drop_path":
            terms = self.terms(kind.of[0], number, factors, top=False)
            if len(terms) > 1 or any(term[-1] is not None for term in terms):
                terms = [self.term(self.sum(terms))]
            return [(*term[:-1], kind.more[0]) for term in terms]
        if kind.name == "scale" and isinstance(kind.more[0], float):
            number *= kind.more[0]
        elif kind.name == "scale":
            factors = (*factors, *kind.more)
        return [term for x in kind.of for term in self.terms(x, number, factors, top=False)]

    def finish(self):
        """Numbers as `cell` has them: first the inputs, then what the operations compute."""
        inputs = len(self.inputs)

        def number(v):
            return -1 - v if v < 0 else v + inputs

        self.operations = [
            Sum([number(v) for v in op.terms]) if isinstance(op, Sum) else op._replace(source=number(op.source))
            for op in self.operations
        ]
        self.modules, norms = list(self.norms.values()), [None] * (inputs + len(self.operations))
        for v, norm in self.norms.items():
            norms[number(v)] = Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias)
        self.norms, self.outputs = norms, [number(v) for v in self.outputs]
        used = [node for _, factors in self.weights for node, _ in factors]
        self.roots = list(dict.fromkeys(used + self.unused))
        del self.matcher, self.reads, self.numbers

    def of_other_channels(self):
        """The nodes of steps that compute another number of channels than most, which `cell` does not take."""
        channels = {}
        for op, node in zip(self.operations, self.nodes):
            if isinstance(op, Separable):
                channels[node] = len(op.pointwise)
            elif isinstance(op, FactorizedReduce):
                channels[node] = len(op.first) + len(op.second)
        common = max(channels.values(), key=[*channels.values()].count, default=0)
        return {node for node, number in channels.items() if number != common}

    def pays(self):
        """Whether there is something to fuse: a step, or a sum of several terms with weights or norms."""
        sums = [len(op.terms) for op in self.operations if isinstance(op, Sum)]
        weighed = self.modules or any(factors for _, factors in self.weights)
        return 0 not in sums and (len(sums) < len(self.operations) or bool(weighed and max(sums) > 1))


def ancestors(node):
    """All nodes that a node is computed from."""
    found, waiting = set(), list(node.all_input_nodes)
    while waiting:
        if (other := waiting.pop()) not in found:
            found.add(other)
            waiting += other.all_input_nodes
    return found


def parts_of(graph: fx.Graph, root: nn.Module, device: torch.device):
    """Nodes that torch computes and parts, in an order in which they can be computed, and the matcher."""
    matcher = Matcher(graph, root, device)
    while True:
        reads, wanted = _reads(matcher)
        norms = {node: matcher.kind(node).of[0] for node in reads if matcher.kind(node).name == "norm"}
        if shared := {norm for norm, x in norms.items() if x in wanted or reads[x] > 1}:
            matcher.left |= shared  # the kernels have a norm of what nothing else reads
            continue
        _until_nothing_is_computed_twice(matcher, reads, wanted)
        instructions = [node for node in sorted(wanted, key=matcher.order.get) if node.op != "placeholder"]
        for i, node in enumerate(instructions):
            if matcher.kind(node).name in FUSED:
                instructions[i] = Part(matcher, node, _members(matcher, node, wanted, reads), reads)
        parts = [i for i in instructions if isinstance(i, Part)]
        left = {node for part in parts for node in (part.of_other_channels() if part.pays() else part.members)}
        if not left:
            return instructions, matcher
        matcher.left |= left


def _reads(matcher):
    """How often each node is read, and those that have to be there as tensors: torch or a concatenation reads them."""
    reads, wanted, seen = {}, set(), set()
    waiting = [(matcher.real(node), True) for node in matcher.output.all_input_nodes]
    waiting += [(node, True) for node in matcher.unread]
    while waiting:
        node, as_tensor = waiting.pop()
        reads[node] = reads.get(node, 0) + 1
        if as_tensor:
            wanted.add(node)
        if node in seen:
            continue
        seen.add(node)
        kind = matcher.kind(node)
        if kind.name in FUSED:
            terms = [x for x in kind.of if not _no_term(matcher, node, x)]
            waiting += [(x, matcher.kind(x).name in ("cat", "torch", "zero")) for x in terms]
            waiting += [(weight, True) for weight in _tensors(kind)]
            zeros = [x for x in kind.of if x not in terms]
            waiting += [(weight, True) for x in zeros for weight in weights_of_zero(matcher, x)]
        else:
            waiting += [(matcher.real(x), True) for x in node.all_input_nodes]
    return reads, wanted


def _no_term(matcher, node, x):
    """Whether x adds nothing to the sum that node is a part of."""
    while matcher.kind(x).name == "scale":
        (x,) = matcher.kind(x).of
    return matcher.kind(x).name == "zero" and matcher.kind(node).name == "add"


def weights_of_zero(matcher, x):
    """The nodes of the weights of something that adds nothing."""
    while matcher.kind(x).name == "scale":
        yield from _tensors(matcher.kind(x))
        (x,) = matcher.kind(x).of


def _tensors(kind):
    """The nodes of weights and rates."""
    for more in kind.more if kind.name in TERMS else ():
        if isinstance(more, fx.Node):
            yield more
        elif isinstance(more, tuple):
            yield more[0]


def _members(matcher, target, wanted, reads):
    """The nodes that a part for target computes."""
    members, waiting = set(), [target]
    while waiting:
        node = waiting.pop()
        there = node is not target and (node in wanted or node not in reads)
        if node in members or there or matcher.kind(node).name not in FUSED:
            continue
        members.add(node)
        waiting += matcher.kind(node).of
    return members


def _until_nothing_is_computed_twice(matcher, reads, wanted):
    """Adds to wanted each value that two parts would compute."""
    more = wanted
    while more:
        seen = {}
        for target in (node for node in wanted if matcher.kind(node).name in FUSED):
            for node in _members(matcher, target, wanted, reads):
                seen[node] = seen.get(node, 0) + 1
        more = {node for node, parts in seen.items() if parts > 1 and reads[node] > 1 and node not in wanted}
        wanted |= more
