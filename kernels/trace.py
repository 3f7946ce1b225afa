"""A module's computation as a graph: torch.fx, as far as code of DARTS networks needs it, and no further.

What cannot be followed (a branch on a value, a loop over a shape) becomes a node of its own: the innermost module that
holds it, which the graph calls.
"""

from __future__ import annotations

import contextlib
import operator
import pickle
import random
import sys
import threading

import torch
import torch.fx as fx
import torch.nn as nn

LONGEST = 4096  # rows or entries of a tensor that a loop goes over
FACTORIES = "empty", "full", "ones", "rand", "zeros", "FloatTensor"  # they refuse the sizes of a traced tensor
FRESH = {operator.add, operator.mul, operator.truediv, torch.add, torch.mul, torch.cat}
FRESH |= {getattr(torch, name) for name in FACTORIES}
NEW = {nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.Linear}  # their results are new tensors
WRITES = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "__set__"}
READS = {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__"}

_lock = threading.RLock()  # fx exchanges methods of nn.Module while it traces


class Untraceable(Exception):
    """The computation cannot be followed; the message says why."""


class ChangesInPlace(Untraceable):
    """What is changed in place may be what a fused module has saved for backward: nothing within is fused."""


class _Proxy(fx.Proxy):
    def __getattr__(self, name):
        if name in ("is_cuda", "is_cpu", "device"):  # all feature maps and parameters are on one device
            device = self.tracer.device
            return device if name == "device" else device.type == name[3:]
        return super().__getattr__(name)


def _in_place(name):
    function = getattr(operator, name)

    def change(self, other):
        result = function(self, other)
        self.tracer.changes(result.node, self.node)
        return result

    return change


for _name in ("add", "sub", "mul", "truediv"):
    setattr(_Proxy, f"__i{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    """device: of the tensors. leaf: classes of modules that are not looked into. shapes: of placeholders, if known.

    refused: the modules that could not be followed, and why. inspected: tensors on whose values the code branched.
    lengths: {(placeholder, dimension): the number of rows or entries that a loop went over}.
    """

    proxy_buffer_attributes = True

    def __init__(self, device, leaf=(), shapes=None):
        super().__init__()
        self.device, self.leaf, self.shapes, self.lengths = device, leaf, shapes or {}, {}
        self.changed, self.modes = [], modes()
        self.refused, self.inspected, self.own, self.thread = {}, [], set(), threading.get_ident()

    def follow(self, module, function: str, arguments: dict):
        """The graph of module.function(**arguments), whose tensors, None here, are placeholders."""
        self.traced_func_name, self.arguments = function, arguments
        factories = {name: getattr(torch, name) for name in FACTORIES}
        with _lock, contextlib.ExitStack() as stack:
            for name, factory in factories.items():
                stack.callback(setattr, torch, name, factory)
                setattr(torch, name, self.traced_factory(factory))
            state, held = random_state(), [(m.__dict__, dict(m.__dict__)) for m in module.modules()]
            try:
                with _NumbersOfTensors():
                    graph = self.trace(module)
                for node in self.changed:
                    if not node.users or len(node.args[0].users) > 1:
                        raise ChangesInPlace(f"{node.target} changes a tensor in place that is read elsewhere")
                if not all(same(*dicts) for dicts in held):
                    raise Untraceable("the code changes what its module holds")
                if random_state() != state:
                    raise Untraceable("the code draws random numbers that are not traced")
                return graph
            except Exception as error:  # whatever the code of a user raises on seeing a proxy
                kind = ChangesInPlace if self.changed or isinstance(error, ChangesInPlace) else Untraceable
                raise kind(reason(error)) from error
            finally:
                restore_random_state(*state)
                for now, before in held:
                    if not same(now, before):
                        now.clear()
                        now.update(before)

    @property
    def notes(self):
        return self.inspected, self.changed

    def traced_factory(self, factory):
        def create(*sizes, **options):
            nodes = []
            fx.node.map_aggregate((sizes, options), lambda a: nodes.append(a) if isinstance(a, fx.Proxy) else None)
            return self.create_proxy("call_function", factory, sizes, options) if nodes else factory(*sizes, **options)

        return create

    def create_args_for_root(self, function, is_module, concrete_args=None):
        values = [
            self.create_proxy("placeholder", name, (), {}) if value is None else value.value
            for name, value in self.arguments.items()
        ]
        return function, [self.root, *values]

    def is_leaf_module(self, module, path):
        if isinstance(module, self.leaf) or "forward" in module.__dict__ or has_hooks(module):
            return True
        containers = nn.Sequential, nn.ModuleList, nn.ModuleDict
        return is_torchs(type(module)) and not isinstance(module, containers)

    def call_module(self, module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)

        def attempt(*args, **kwargs):
            last, known = next(iter(reversed(self.graph.nodes)), None), [(notes, len(notes)) for notes in self.notes]
            try:
                return forward(*args, **kwargs)
            except ChangesInPlace:
                raise
            except Exception as error:
                while (node := next(iter(reversed(self.graph.nodes)), None)) is not last:
                    self.graph.erase_node(node)
                for notes, length in known:
                    del notes[length:]
                self.refused[module] = reason(error)
                return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)

        return super().call_module(module, attempt, args, kwargs)

    def getattr(self, name, value, cache):
        return value if threading.get_ident() != self.thread else super().getattr(name, value, cache)

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        if modes() != self.modes:
            raise Untraceable("the code switches gradients or autocast on or off")
        if kind == "call_method" and target in ("register_hook", "retain_grad"):
            raise Untraceable(f"the code calls {target} of a feature map")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if not self.module_stack:
            self.own.add(node)
        changes = kind == "call_method" and target.endswith("_") and not target.endswith("__")
        changes = changes or kwargs.get("inplace", False)
        changes = changes or (kind == "call_module" and getattr(self.root.get_submodule(target), "inplace", False))
        if changes:
            self.changes(node, node.args[0])
        return node

    def changes(self, node, x):
        """Notes a change in place, and refuses it where others may hold the tensor."""
        module = self.root.get_submodule(x.target) if x.op == "call_module" else None
        fresh = type(module) in NEW and not has_hooks(module)
        fresh = fresh or (x.op == "call_function" and x.target in FRESH)
        if not fresh:
            raise ChangesInPlace(f"{node.target} changes a tensor in place that others may read")
        self.changed.append(node)

    def proxy(self, node):
        return _Proxy(node, self)

    def create_arg(self, a):
        known = isinstance(a, torch.Tensor) and (a in self.tensor_attrs or any(a is b for b in self.root.buffers()))
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and not known:
            raise Untraceable("the code makes a tensor from nothing that is traced")
        return super().create_arg(a)

    def iter(self, proxy):
        name, index = element(proxy.node)
        length = self.shapes[name][len(index)] if len(index) < len(self.shapes.get(name, ())) else None
        if length is not None:
            self.lengths[name, len(index)] = length
        for i in range(LONGEST if length is None else length):
            yield proxy[i]
        if length is None:
            raise Untraceable("a loop has no end that can be seen")

    def to_bool(self, proxy):
        """A branch: on what parameters, buffers and numbers say, else refused."""
        value = self.value(proxy.node)
        if isinstance(value, torch.Tensor):
            self.inspected += self.tensors(proxy.node)
        with torch._C.DisableTorchFunction():
            return bool(value)

    def value(self, node):
        if node.op == "get_attr":
            return attribute(self.root, node.target)
        if node.op not in ("call_function", "call_method"):
            raise Untraceable("a branch depends on an argument")
        args = fx.node.map_arg(node.args, self.value)
        kwargs = fx.node.map_arg(node.kwargs, self.value)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def tensors(self, node):
        if node.op == "get_attr":
            return [attribute(self.root, node.target)]
        return [tensor for argument in node.all_input_nodes for tensor in self.tensors(argument)]


def reason(error):
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, Untraceable) else f"{type(error).__name__}: {text}"


def random_state():
    """That of all generators by which Python code decides, in a form that can be compared."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy and pickle.dumps(numpy.random.get_state()), bytes(torch.get_rng_state().numpy())


def restore_random_state(of_python, of_numpy, of_torch):
    random.setstate(of_python)
    if of_numpy:
        sys.modules["numpy"].random.set_state(pickle.loads(of_numpy))
    torch.set_rng_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8))


class Constant:
    """An argument that is no tensor."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Constant) and type(other.value) is type(self.value) and other.value == self.value


class _NumbersOfTensors(torch.overrides.TorchFunctionMode):
    """Refuses that Python reads a number from a tensor: the trace would keep it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            raise Untraceable("the code takes a number from a tensor")
        if name in WRITES or (name.endswith("_") and not name.endswith("__")):
            if isinstance(args[0], torch.Tensor):
                raise Untraceable(f"{name} changes a tensor that the module holds")
        return function(*args, **(kwargs or {}))


def modes():
    """What the code may switch in a with statement, which a graph does not show."""
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def same(now, before):
    return now.keys() == before.keys() and all(map(operator.is_, now.values(), before.values()))


def element(node):
    """(the name of the placeholder, the indices) that a node is an element of; (None, ()) if it is none."""
    index = ()
    while node.op == "call_function" and node.target is operator.getitem and type(node.args[1]) is int:
        node, index = node.args[0], (node.args[1], *index)
    return (node.target, index) if node.op == "placeholder" else (None, ())


def attribute(module, path):
    """A parameter, buffer or other tensor of a module, past nn.Module.__getattr__, which fx exchanges."""
    *parents, name = path.split(".")
    for parent in parents:
        module = module._modules[parent]
    return next(d[name] for d in (module._parameters, module._buffers, module.__dict__) if name in d)


def is_torchs(function_or_class):
    return function_or_class.__module__.startswith("torch.")


def has_hooks(module):
    d = module.__dict__
    return bool(
        d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]
    )
