"""Fused modules: a traced module computes by its plan as long as it is what was traced, and plainly where it is not."""

from __future__ import annotations

import copyreg
import functools
import inspect
import operator
import warnings
from types import SimpleNamespace

import torch
import torch.fx as fx
import torch.nn as nn

from .match import Part, ancestors, parts_of
from .ops import cell, dropout_key, dropout_masks, run_cell
from .program import Dropout, Sum, cell_program, known_on_cuda
from .runtime import fused, on_cuda, supports
from .trace import (
    STATE,
    ChangesInPlace,
    Constant,
    Holdings,
    Tracer,
    Untraceable,
    attribute,
    element,
    is_changed,
    is_torchs,
    lock,
    modes,
    value_of,
)

PLANS = 16  # that a module keeps: in training and evaluation, of other arguments
TRACES = 20  # of a module; with more, and fewer than 10 calls for each, it stays plain
# Calls that join feature maps: a module that makes one itself, and not only within others, is taken for a cell.
JOINS = {operator.add, torch.add, torch.cat, torch.concat, torch.stack, "sum", "add"}


class Fused(nn.Module):
    """What `fuse` makes of a module's class; its own computation is `_plain_forward`."""

    def forward(self, *args, **kwargs):
        state = self.__dict__.get(STATE)  # not there in what the code of the class makes of its own class
        if state is None or torch.compiler.is_compiling() or is_looked_into(self):
            return self._plain_forward(*args, **kwargs)
        values = arguments(self, args, kwargs)
        plan = values and state.plan(self, values)
        return plan.run(values, state.copies) if plan else self._plain_forward(*args, **kwargs)

    def _plain_forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__:
            return reduced
        return _restored, (plain_class(self),), *reduced[2:]

    def __init_subclass__(cls, **arguments):
        """What the class does for its subclasses is not done for ours."""


def _restored(kind):
    module = kind.__new__(kind)
    module.__class__ = fused_class(kind)
    return module


@functools.cache
def fused_class(kind):
    # Names and the signature are those of the class itself.
    forward = functools.wraps(kind.forward)(lambda self, *args, **kwargs: Fused.forward(self, *args, **kwargs))
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (Fused, kind), names | {"forward": forward})


def plain_class(module):
    return type(module).__mro__[2] if isinstance(module, Fused) else type(module)


def is_looked_into(module):
    """Whether somebody follows what a module computes: a tracer, a transform, a counter, hooks on all modules."""
    hooks = torch.nn.modules.module
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    functions = torch.overrides._get_current_function_mode_stack()
    return (
        any(not getattr(mode, "of_fused_operators", False) for mode in modes)
        or any(type(mode).__name__ != "DeviceContext" for mode in functions)
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks)
        or bool(hooks._global_backward_pre_hooks)
        or getattr(module, "_is_replica", False)
    )


def arguments(module, args, kwargs):
    """The arguments of a call by name, or None if one is neither a tensor nor a plain value."""
    names = signature(plain_class(module).forward)
    if names is None or len(args) > len(names) or not names.keys() >= kwargs.keys():
        return None
    values = names | dict(zip(names, args)) | kwargs
    kinds = torch.Tensor, nn.Parameter, bool, int, float, str, type(None)
    if not all(type(v) in kinds for v in values.values()):
        return None
    return values if any(isinstance(v, torch.Tensor) for v in values.values()) else None


@functools.cache
def signature(forward):
    """{name: default} of the arguments of a method, but for self; None if they are not all positional."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        return None
    return {p.name: p.default for p in parameters}


class State:
    """The plans of one module, the last used first.

    copies: whether results are copies, since others may change them in place; fused operations save their own.
    """

    def __init__(self, leaf=(), copies=False):
        self.leaf, self.copies, self.plans, self.traces, self.hits = leaf, copies, [], 0, 0

    def __reduce__(self):
        return State, (self.leaf, self.copies)

    def plan(self, module, values):
        """The plan for a call, None if it is to be computed plainly."""
        device = next(v.device for v in values.values() if isinstance(v, torch.Tensor))
        if self.traces > TRACES + self.hits // 10 or not fused(device):
            return None
        constants = {name: Constant(v) for name, v in values.items() if not isinstance(v, torch.Tensor)}
        shapes = {name: v.shape for name, v in values.items() if name not in constants}
        values = {name: constants.get(name) for name in values}
        plan = self.known_plan(module, values, device, shapes)
        if not plan or plan.new:
            with lock:
                plan = self.plan_of(module, values, device, shapes)
                if self.plans[0].new:
                    self.plans[0].convert_within(module, device, self)
                return plan
        return plan if plan.instructions else None

    def plan_of(self, module, values, device, shapes=None, held=None):
        """values: a Constant, or None for a tensor, by name. shapes, held: of the tensors and the module, if known."""
        plan = self.known_plan(module, values, device, shapes)
        if plan is None:
            held = held or Holdings(module.modules())
            plan = Plan(module, (device, on_cuda(), modes(), values), values, device, self.leaf, held, shapes)
            self.plans, self.traces = [plan, *self.plans[: PLANS - 1]], self.traces + 1
        return plan if plan.instructions else None

    def known_plan(self, module, values, device, shapes):
        key = device, on_cuda(), modes(), values
        for plan in self.plans:
            # A shallow copy of a module has the same state.
            if plan.key == key and plan.modules[0] is module and plan.fits(shapes) and plan.holds():
                if plan is not self.plans[0]:
                    self.plans = [plan, *(other for other in self.plans if other is not plan)]
                self.hits += 1
                return plan
        return None


class Plan:
    """How a module is computed, and of what: instructions are nodes of its graph that torch computes, and parts."""

    def __init__(self, module, key, values, device, leaf, held, shapes=None):
        self.key, self.instructions, self.parts, self.reason, self.graph = key, [], [], "", None
        self.refused, self.new, self.in_place, self.tried = {}, True, False, True
        self.held, self.modules, self.branches, self.elsewhere = held, held.modules, [], []
        tracer = Tracer(device, leaf, shapes)
        self.lengths, self.longest = tracer.lengths, {}
        try:
            forward = "_plain_forward" if isinstance(module, Fused) else "forward"
            self.graph = tracer.follow(module, forward, values, held)
            self.instructions, matcher = parts_of(self.graph, module, device)
        except Untraceable as error:
            self.reason, self.in_place = str(error), isinstance(error, ChangesInPlace)
            return
        self.parts = [i for i in self.instructions if isinstance(i, Part)]
        self.own = {node for node in tracer.own if node.target in JOINS}
        if not self.parts:
            self.instructions, self.reason = [], "nothing in it is what the kernels compute"
            return
        for node in self.graph.nodes:
            name, index = element(node)
            if node.users and index:
                place = name, len(index) - 1
                self.longest[place] = max(self.longest.get(place, 0), 1 + index[-1])
        self.placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.branches = tracer.branches
        conditions = {node for branch, _ in self.branches for node in (branch, *ancestors(branch))}
        tensors = [attribute(module, node.target) for node in conditions if node.op == "get_attr"]
        self.elsewhere = [(t, facts(t)) for t in tensors if not t.is_cpu]  # to look at their values would take long
        self.refused = tracer.refused
        self.settings, self.real = matcher.settings, matcher.real
        self.attributes = {n: attribute(module, n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.called = {n: module.get_submodule(n.target) for n in self.graph.nodes if n.op == "call_module"}
        # Code that cannot be seen: it may change its arguments in place.
        self.opaque = {n for n, m in self.called.items() if is_changed(m) or m._modules or not is_torchs(type(m))}
        self.tried, self.needed = not self.opaque, ancestors(matcher.output) | matcher.unread
        self.computed = {part.target for part in self.parts}
        self.copied = {node for node in tracer.changed if self.real(node.args[0]) in self.computed}
        self.output = matcher.output.args[0]
        self.runs = {part: Run(part, self.settings, device) for part in self.parts}

    def fits(self, shapes):
        """Whether tensors have as many rows and entries as the code went over."""
        if shapes is None:
            return not self.lengths
        same = all(shapes[name][d : d + 1] == (n,) for (name, d), n in self.lengths.items())
        return same and all(shapes[name][d : d + 1] >= (n,) for (name, d), n in self.longest.items())

    def convert_within(self, module, device, state):
        """Fuses what can be within modules that the plan calls, or, without a plan, within all of the module."""
        self.new = False
        if self.in_place:
            for inner in module.children():
                unfuse(inner)
        else:
            for inner in self.refused if self.instructions else module.children():
                convert(units(inner, device, state.leaf)[0], device, state.copies)
        self.held = Holdings(self.modules)

    def holds(self):
        """Whether the modules are what they were, and the code goes the same way at branches."""
        if not self.held.are_the_same():
            return False
        if not self.branches or self.elsewhere:
            return all(seen == facts(tensor) for tensor, seen in self.elsewhere)
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            return all(bool(value_of(node, self.modules[0])) == before for node, before in self.branches)

    def run(self, values, copies=False):
        env = {node: values[node.target] for node in self.placeholders}
        if not self.tried:
            return self.try_opaque(env)
        for i in self.instructions:
            if isinstance(i, Part):
                y = self.runs[i].compute(env)
                env[i.target] = self.by_torch(i.target, env) if y is None else y
            else:
                env[i] = self.compute(i, env)
        copied = self.computed if copies else ()
        return filled(self.output, lambda node: env[x].clone() if (x := self.real(node)) in copied else env[x])

    def compute(self, node, env):
        def value(node):
            return env[node] if node in env else env[self.real(node)]

        if node.op == "get_attr":
            return self.attributes[node]
        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        if node in self.copied and args:
            args = args[0].clone(), *args[1:]  # a fused operation saves its result for backward
        if node in self.opaque:
            return self.call_opaque(node, args, kwargs)
        if node.op == "call_module":
            return self.called[node](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def try_opaque(self, env):
        """The first call of a plan, in the order of the code, which shows whether modules change their arguments."""
        for node in self.graph.nodes:
            if node in self.needed and node.op != "placeholder":
                env[node] = self.compute(node, env)
        self.tried = True
        return filled(self.output, env.get)

    def call_opaque(self, node, args, kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and not t.is_inference()]
        before = [t._version for t in tensors]
        y = self.called[node](*args, **kwargs)
        if before != [t._version for t in tensors]:
            self.reason = f"{plain_class(self.called[node]).__name__} changes its arguments in place"
            self.instructions, self.in_place, self.new = [], True, True
            if self.tried:  # the order of the plan may be wrong
                raise RuntimeError(f"{self.reason}, and did not before; expected a module that always does it")
        return y

    def by_torch(self, target, env):
        """A part's value by torch, where the kernels do not take its tensors."""
        needed, waiting = set(), [target]
        while waiting:
            node = waiting.pop()
            if node not in env and node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        env = dict(env)
        for node in self.graph.nodes:
            if node in needed:
                env[node] = self.compute(node, env)
        return env[target]


def facts(tensor):
    """What code may branch on, as far as it shows without looking at the values."""
    return tensor._version, tensor.requires_grad, tensor.dtype, tensor.shape, tensor.device


def filled(argument, value):
    """An argument of a node as Python objects: fx has tuples, lists and dictionaries of its own."""
    if isinstance(argument, fx.Node):
        return value(argument)
    if isinstance(argument, dict):
        return {name: filled(a, value) for name, a in argument.items()}
    if isinstance(argument, (list, tuple)):
        inner = [filled(a, value) for a in argument]
        return inner if isinstance(argument, list) else tuple(inner)
    return argument


def units(module, device, leaf):
    """({module to fuse: its state}, {module: why it cannot be}).

    The modules are the outermost ones whose own code joins feature maps, or, where there is none, the innermost ones of
    which something can be fused.
    """
    if isinstance(module, Fused):
        return {}, {}
    own = not is_torchs(type(module)) and not isinstance(module, leaf)
    refused, failed = {}, ""
    if own:
        tracer, held = Tracer(device, (nn.Module,)), Holdings(module.modules())
        try:
            graph = tracer.follow(module, "forward", placeholders(module), held)
            if any(node.target in JOINS for node in graph.nodes):
                state = State(leaf)
                plan = state.plan_of(module, placeholders(module), device, held=held)
                if plan and any(plan.own & part.members for part in plan.parts):
                    return {module: state}, {}
                refused[module] = state.plans[0].reason
                if state.plans[0].in_place:
                    raise ChangesInPlace(refused[module])
        except ChangesInPlace as error:
            later = list(placeholders(module).values()).count(None) > 1
            return {module: State(leaf)} if later else {}, {module: str(error)}
        except Untraceable as error:
            failed = str(error)
            if any(node.target in JOINS for node in tracer.graph.nodes):
                refused[module] = failed
    found = {}
    for child in module.children():
        inner, why = units(child, device, leaf)
        found |= inner
        refused |= why
    if found:
        # With the numbers that a call gives for arguments it may be followed.
        later = failed and list(placeholders(module).values()).count(None) > 1
        return ({module: State(leaf)} if later else {}) | found, refused
    already = any(isinstance(inner, Fused) for inner in module.modules())
    if not already and (own or isinstance(module, nn.Sequential)):
        state = State(leaf)
        if state.plan_of(module, placeholders(module), device):
            return {module: state}, {}
    return {}, refused


def placeholders(module):
    """The arguments of a call that relies on all defaults."""
    defaults = (signature(plain_class(module).forward) or {}).items()
    return {name: None if default is inspect.Parameter.empty else Constant(default) for name, default in defaults}


def convert(modules: dict[nn.Module, State], device, copies):
    for module, state in modules.items():
        state.copies = copies
        module.__dict__[STATE] = state
        module.__class__ = fused_class(type(module))
    for module, state in modules.items():
        for plan in state.plans:
            plan.convert_within(module, device, state)


def unfuse(network: nn.Module) -> nn.Module:
    """`network`, changed in place: what `fuse` made of its modules is undone."""
    for module in network.modules():
        if isinstance(module, Fused):
            module.__class__ = plain_class(module)
            module.__dict__.pop(STATE, None)
    return network


class Run:
    """How a part is run: a program for `cell`, one for each way in which its inputs are the same tensors."""

    def __init__(self, part, settings, device):
        self.part, self.settings, self.programs, self.places, self.warned = part, settings, {}, {}, False
        counts = [norm.num_batches_tracked for norm in part.modules]
        self.counts = [count for count in counts if count is not None]
        self.on_cuda = known_on_cuda(part.operations, part.norms, part.outputs)
        numbers = [1.0, *dict.fromkeys(number for number, _ in part.weights if number != 1)]
        self.columns = [([] if n == 1 else [numbers.index(n)], factors) for n, factors in part.weights]
        self.numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
        self.dropped = torch.tensor([place for place, _ in part.drop_path], dtype=torch.long, device=device)
        rates = {rate for _, rate in part.dropout + part.drop_path if isinstance(rate, float)}
        self.constant_rates = {rate: torch.tensor(rate, device=device) for rate in rates}

    def compute(self, env):
        """The value of the part; None if its tensors are not what the kernels take."""
        inputs = [env[node] for node in self.part.inputs]
        x = inputs[0]
        alike = all(t.dim() == 4 and t.dtype == x.dtype and t.device == x.device for t in inputs)
        weights = self.probabilities(env, x) if alike and supports("mixed", x) else None
        if weights is None:
            return None
        same = tuple(next(j for j, other in enumerate(inputs) if other is t) for t in inputs)
        if same not in self.programs:
            self.programs[same] = self.program(same)
        program = self.programs[same]
        inputs = [t for i, t in enumerate(inputs) if same[i] == i]
        rest = program.outputs, weights, program.norms, *self.settings, self.dropout(env, x)
        fused_whole = supports("cell", x) and (x.is_cpu or self.on_cuda)
        moves = self.settings[0] and not fused_whole  # step by step statistics move before an error shows
        moving = [t for norm in program.norms if norm and moves for t in norm[:2]]
        before = [t.clone() for t in moving]
        try:
            if fused_whole:
                y = run_cell(inputs, *program.numbers, *rest)
            else:
                y = cell(inputs, program.operations, *rest)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # shapes that torch would broadcast, or an error that torch has too
            for t, content in zip(moving, before):
                t.copy_(content)
            if not self.warned:
                self.warned = True
                warnings.warn(f"torch computes what is no cell for the kernels: {error}", RuntimeWarning, stacklevel=3)
            return None
        if self.settings[0] and self.counts:
            torch._foreach_add_(self.counts, 1)
        return y

    def program(self, same):
        """The part's program where inputs are the same tensors."""
        part, distinct = self.part, sorted(set(same))
        number = [distinct.index(j) for j in same]
        number += range(len(distinct), len(distinct) + len(part.operations))
        operations = [
            Sum([number[v] for v in op.terms]) if isinstance(op, Sum) else op._replace(source=number[op.source])
            for op in part.operations
        ]
        norms = [part.norms[j] for j in distinct] + part.norms[len(same) :]
        outputs = [number[v] for v in part.outputs]
        return SimpleNamespace(operations=operations, numbers=cell_program(operations), norms=norms, outputs=outputs)

    def probabilities(self, env, x):
        """The weights of the terms, [K] or [K,N], put together by few operations; None if one is no number."""
        roots = [env[node] for node in self.part.roots]
        shapes = tuple(root.shape for root in roots if isinstance(root, torch.Tensor) and root.device == x.device)
        if len(shapes) != len(roots):
            return None
        if shapes not in self.places:
            self.places[shapes] = self.columns_of(shapes)
        places = self.places[shapes]
        if places is None:
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        table = torch.cat([*(root.flatten() for root in roots), self.numbers.to(dtype)]).to(dtype)
        p = table.index_select(0, places[0])
        for column in places[1:]:
            p = p * table.index_select(0, column)
        if not self.part.drop_path:
            return p
        places, rates = self.rates(env, self.part.drop_path)
        masks = dropout_masks(dropout_key(x.device), rates, places, (len(x), 1, 1, 1)).flatten(1).to(p.dtype)
        of_images = masks.new_ones(len(p), len(x)).index_copy(0, self.dropped, masks)
        return p[:, None] * of_images

    def columns_of(self, shapes):
        """Where the factors of each term lie in the table, column by column."""
        starts = [0]
        for shape in shapes:
            starts.append(starts[-1] + shape.numel())
        rows = []
        for numbers, factors in self.columns:
            row = [starts[-1] + n for n in numbers]
            for node, index in factors:
                root = self.part.roots.index(node)
                shape = shapes[root]
                if len(shape) != len(index) or not all(-size <= i < size for i, size in zip(index, shape)):
                    return None
                place = 0
                for i, size in zip(index, shape):
                    place = place * size + i % size
                row.append(starts[root] + place)
            rows.append(row)
        columns = max([1, *map(len, rows)])
        padded = [row + [starts[-1]] * (columns - len(row)) for row in rows]
        table = torch.tensor(padded, dtype=torch.long, device=self.numbers.device).view(-1, columns)
        return list(table.t().contiguous())

    def rates(self, env, drops):
        places, rates = zip(*drops)
        tensors = [env[r].float().view(()) if isinstance(r, fx.Node) else self.constant_rates[r] for r in rates]
        return list(places), torch.stack(tensors)

    def dropout(self, env, x):
        if not self.part.dropout:
            return None
        places, rates = self.rates(env, self.part.dropout)
        return Dropout(dropout_key(x.device), rates, places)
