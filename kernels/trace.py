"""Traces a module with torch.fx; code that cannot be traced becomes a call of the innermost module that holds it."""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import operator
import pickle
import random
import sys
import threading
import types

import torch
import torch.fx as fx
import torch.nn as nn

LARGEST_ARRAY = 4096  # bytes of an array that are compared at each call
MOST_HELD = 100_000  # attributes of objects that modules hold
LONGEST = 4096  # rows or entries of a tensor that a loop goes over
FACTORIES = "empty", "full", "ones", "rand", "zeros", "FloatTensor"  # they refuse the sizes of a traced tensor
# What returns new tensors, which may be changed in place if nothing else reads them: functions, and modules.
FRESH = {operator.add, operator.mul, operator.truediv, torch.add, torch.mul, torch.cat}
FRESH |= {getattr(torch, name) for name in FACTORIES}
FRESH_MODULES = {nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.Linear}
OPERATORS = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift"
WRITES = {f"__i{name.strip('_')}__" for name in OPERATORS} | {"__setitem__", "__set__"}  # the last: tensor.data = ...
READS = {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "equal", "allclose"}
STATE = "_kernels_state"  # the attribute of fused modules
UNUSED = {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
UNUSED |= {"_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"}
UNUSED |= {STATE, "_non_persistent_buffers_set"}
OF_EVERY_MODULE = nn.Module().__dict__.keys()
END = object()
CONTAINERS = list, tuple, set, dict, collections.deque
# They hold nothing that is looked into, and most attributes are of them.
PLAIN = {type(None), bool, int, float, str, types.FunctionType, torch.Tensor, nn.Parameter}

lock = threading.RLock()  # fx exchanges methods of nn.Module while it traces


class Untraceable(BaseException):
    """The computation cannot be followed; the message says why. The code that is followed does not catch it."""


class ChangesInPlace(Untraceable):
    """What is changed in place may be what a fused module has saved for backward: nothing within is fused."""


class _Proxy(fx.Proxy):
    __class__ = property(lambda self: torch.Tensor)  # for isinstance in the code that is followed

    def __getattr__(self, name):
        if name in ("is_cuda", "is_cpu", "device"):  # all feature maps and parameters are on one device
            device = self.tracer.device
            return device if name == "device" else device.type == name[3:]
        if name in ("grad", "grad_fn"):
            raise Untraceable(f"the code reads {name} of a feature map")
        if not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setitem__(self, key, value):
        raise ChangesInPlace("the code writes elements of a tensor")

    def __len__(self):
        raise Untraceable("the code takes the length of a tensor")


def _in_place(name):
    function = getattr(operator, name)

    def change(self, other):
        result = function(self, other)
        if not is_size(self.node):
            self.tracer.changes(result.node, self.node)
        return result

    return change


for _name in OPERATORS:
    setattr(_Proxy, f"__i{_name.strip('_')}__", _in_place(_name))


class Tracer(fx.Tracer):
    """device: of the tensors. leaf: classes of modules that are not looked into. shapes: of placeholders, if known.

    own: the nodes of the code of the module itself. changed: those that change a tensor in place. refused: the modules
    that could not be followed, and why. branches: [the node of a condition, which way the code went]. lengths:
    {(placeholder, dimension): the number of rows or entries that a loop went over}.
    """

    proxy_buffer_attributes = True

    def __init__(self, device, leaf=(), shapes=None):
        super().__init__()
        self.device, self.leaf, self.shapes, self.lengths = device, leaf, shapes or {}, {}
        self.changed, self.modes, self.graph = [], modes(), fx.Graph()
        self.refused, self.branches, self.own, self.thread = {}, [], set(), threading.get_ident()

    def follow(self, module, function: str, arguments: dict, held):
        """The graph of module.function(**arguments), whose tensors, None here, are placeholders. held: its Holdings."""
        self.traced_func_name, self.arguments = function, arguments
        factories = {name: getattr(torch, name) for name in FACTORIES}
        with lock, contextlib.ExitStack() as stack:
            for name, factory in factories.items():
                stack.callback(setattr, torch, name, factory)
                setattr(torch, name, self.traced_factory(factory))
            state, copied = random_state(), held.copied()
            if any(map(draws_random_numbers, set(map(type, held.values)))):
                raise Untraceable("the module holds a random generator, whose numbers are not traced")
            try:
                with _NumbersOfTensors():
                    graph = self.trace(module)
                for node in self.changed:
                    if not node.users or any(len(x.users) > 1 for x in without_zeros(node.args[0])):
                        raise ChangesInPlace(f"{node.target} changes a tensor in place that is read elsewhere")
                if not held.are_the_same():
                    raise Untraceable("the code changes what its module holds")
                if random_state() != state:
                    raise Untraceable("the code draws random numbers that are not traced")
                return graph
            except (Exception, Untraceable) as error:  # whatever the code of a user raises on seeing a proxy
                kind = ChangesInPlace if self.changed or isinstance(error, ChangesInPlace) else Untraceable
                raise kind(reason(error)) from error
            finally:
                restore_random_state(*state)
                held.restore(copied)

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
        if isinstance(module, self.leaf) or is_changed(module):
            return True
        kind = type(module)
        containers = nn.Sequential, nn.ModuleList, nn.ModuleDict
        return (is_torchs(kind) or is_torchs(kind.forward)) and not isinstance(module, containers)

    def call_module(self, module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)

        def attempt(*args, **kwargs):
            nodes, notes = len(self.graph.nodes), (self.branches, self.changed)
            known = [len(of_kind) for of_kind in notes]
            try:
                return forward(*args, **kwargs)
            except ChangesInPlace:
                raise
            except (Exception, Untraceable) as error:
                while len(self.graph.nodes) > nodes:
                    self.graph.erase_node(next(iter(reversed(self.graph.nodes))))
                for of_kind, length in zip(notes, known):
                    del of_kind[length:]
                self.refused[module] = reason(error)
                return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)

        return super().call_module(module, attempt, args, kwargs)

    def getattr(self, name, value, cache):
        if threading.get_ident() != self.thread:
            return value
        for known in [known for known, proxy in cache.items() if proxy.node._erased]:
            del cache[known]  # of a module that could not be followed
        return super().getattr(name, value, cache)

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        if modes() != self.modes:
            raise Untraceable("the code switches gradients or autocast on or off")
        if kind == "call_method" and target in ("register_hook", "retain_grad"):
            raise Untraceable(f"the code calls {target} of a feature map")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if not self.module_stack:
            self.own.add(node)
        if "out" in kwargs:
            raise ChangesInPlace(f"{target} writes into a tensor that is there")
        called = kind in ("call_function", "call_method")
        changes = called and is_in_place(target if kind == "call_method" else getattr(target, "__name__", ""))
        changes = changes or kwargs.get("inplace", False)
        changes = changes or (kind == "call_module" and getattr(self.root.get_submodule(target), "inplace", False))
        if changes:
            self.changes(node, (*node.args, None)[0])
        return node

    def changes(self, node, x):
        """Notes a change in place, and refuses it where others may hold the tensor."""
        if not isinstance(x, fx.Node):
            raise ChangesInPlace(f"{node.target} changes a tensor in place")
        *_, x = without_zeros(x)
        module = self.root.get_submodule(x.target) if x.op == "call_module" else None
        fresh = type(module) in FRESH_MODULES and not is_changed(module)
        fresh = fresh or (x.op == "call_function" and x.target in FRESH)
        fresh = fresh or (x.op == "call_module" and nn.Module in self.leaf)  # a first look: results may be copies
        if not fresh:
            raise ChangesInPlace(f"{node.target} changes a tensor in place that others may read")
        self.changed.append(node)

    def proxy(self, node):
        return _Proxy(node, self)

    def create_arg(self, a):
        if type(a) is _Proxy:
            return a.node
        known = isinstance(a, torch.Tensor) and (a in self.tensor_attrs or any(a is b for b in self.root.buffers()))
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and not known:
            raise Untraceable("the code makes a tensor from nothing that is traced")
        return super().create_arg(a)

    def iter(self, proxy):
        name, index = element(proxy.node)
        length = self.shapes[name][len(index)] if len(index) < len(self.shapes.get(name, ())) else None
        if length is not None:
            self.lengths[name, len(index)] = length
        elif name is None:
            length = self.length_of_parameters(proxy.node)
        for i in range(LONGEST if length is None else length):
            yield proxy[i]
        if length is None:
            raise Untraceable("a loop has no end that can be seen")

    def length_of_parameters(self, node):
        """The length of what is computed from parameters only, else None."""
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                return len(value_of(node, self.root))
        except Untraceable:
            return None

    def to_bool(self, proxy):
        """A branch: on what parameters, buffers and numbers say, else refused."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self.branches.append((proxy.node, bool(value_of(proxy.node, self.root))))
        return self.branches[-1][1]


def value_of(node, root):
    """The value of a node that is computed from parameters, buffers and numbers only."""
    if node.op == "get_attr":
        return attribute(root, node.target)
    if node.op not in ("call_function", "call_method"):
        raise Untraceable("a branch depends on an argument")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: value_of(other, root))
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


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
        if name in WRITES or is_in_place(name):
            if isinstance(args[0], torch.Tensor) and type(args[0]) is not _Proxy:
                raise ChangesInPlace(f"{name} changes a tensor that the module holds")
        return function(*args, **(kwargs or {}))


def modes():
    """What the code may switch in a with statement, which a graph does not show."""
    of_devices = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *of_devices


def is_in_place(name):
    """Whether a function of this name changes its first argument, as torch names them."""
    return name.endswith("_") and not name.endswith("__")


def draws_random_numbers(kind):
    return str(kind.__module__).startswith("numpy.random") or issubclass(kind, (random.Random, torch.Generator))


class Holdings:
    """All that modules hold, of what computations may depend on: to be compared with later, and to be put back.

    That is their attributes, those of their classes, and what containers, small arrays, other modules and objects of
    users' classes among them hold, but for modules that hold the first. The values of tensors do not count.
    """

    def __init__(self, modules):
        self.modules = list(modules)
        self.own = set(map(id, self.modules))
        kinds = {kind for of_module in set(map(type, self.modules)) for kind in of_module.__mro__} - {nn.Module, object}
        self.dicts = [m.__dict__ for m in self.modules] + [vars(kind) for kind in kinds]
        self.full, self.empty, self.arrays, known = [], [], [], set(map(id, self.dicts))
        self.keyed = [m.__dict__ for m in self.modules if not is_torchs(type(m))]  # whose keys are compared too
        internal = {id(m.__dict__.get(name)) for m in self.modules for name in OF_EVERY_MODULE}
        array = getattr(sys.modules.get("numpy"), "ndarray", ())
        waiting = [value for d in self.dicts for name, value in d.items() if name not in UNUSED]
        for value in waiting:
            if type(value) in PLAIN:
                continue
            if len(waiting) < MOST_HELD and self.looks_into(value):
                value = vars(value)
            if isinstance(value, CONTAINERS) and id(value) not in known:
                known.add(id(value))
                (self.full if value else self.empty).append(value)
                if value and isinstance(value, dict) and id(value) not in internal:
                    self.keyed.append(value)
                waiting += contents(value)  # while the loop goes on
            elif isinstance(value, array) and value.nbytes <= LARGEST_ARRAY:
                self.arrays.append((value, value.tobytes()))
        full = [contents(container) for container in self.full]
        self.views = [*(d.values() for d in self.dicts), *full, *self.keyed]
        self.values = list(self.now())

    def looks_into(self, value):
        """Whether an attribute's own attributes count."""
        if isinstance(value, nn.Module):
            return id(value) not in self.own and all(module is not self.modules[0] for module in value.modules())
        return is_users(type(value))

    def now(self):
        """All values one after another, and the sign that none follows."""
        return itertools.chain(map(type, self.modules), itertools.chain.from_iterable(self.views), (END,))

    def are_the_same(self):
        same = not any(self.empty) and all(map(operator.is_, self.now(), self.values))
        return same and all(array.tobytes() == content for array, content in self.arrays)

    def copied(self):
        """What the containers hold, for `restore`."""
        mutable = [c for c in (*self.dicts[: len(self.modules)], *self.full, *self.empty) if not isinstance(c, tuple)]
        return [(c, dict(c) if isinstance(c, dict) else list(c)) for c in mutable]

    def restore(self, copied):
        if self.are_the_same():
            return
        for container, before in copied:
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(before)


@functools.lru_cache(4096)
def is_users(kind):
    """Whether the attributes of objects of a class count: those of users' classes and of namespaces."""
    package = str(kind.__module__).partition(".")[0]
    of_others = package in {"torch", "numpy", *sys.stdlib_module_names} or issubclass(kind, (type, torch.Tensor))
    namespace = issubclass(kind, (types.SimpleNamespace, argparse.Namespace))
    return bool(kind.__dictoffset__) and (namespace or not of_others)


def contents(container):
    return container.values() if isinstance(container, dict) else container


def element(node):
    """(the name of the placeholder, the indices) that a node is an element of; (None, ()) if it is none."""
    index = ()
    while node.op == "call_function" and node.target is operator.getitem and type(node.args[1]) is int:
        node, index = node.args[0], (node.args[1], *index)
    return (node.target, index) if node.op == "placeholder" else (None, ())


def is_size(node):
    """Whether a node is a number that is computed from sizes of tensors."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


def without_zeros(node):
    """A node, and what it is where it is the sum of that and the number 0, which nobody computes."""
    yield node
    while node.op == "call_function" and node.target in (operator.add, torch.add) and 0 in node.args:
        (node,) = node.all_input_nodes
        yield node


def attribute(module, path):
    """A parameter, buffer or other tensor of a module, past nn.Module.__getattr__, which fx exchanges."""
    *parents, name = path.split(".")
    for parent in parents:
        module = module._modules[parent]
    return next(d[name] for d in (module._parameters, module._buffers, module.__dict__) if name in d)


def is_torchs(function_or_class):
    return function_or_class.__module__.startswith("torch.")


def is_changed(module):
    """Whether a module is more than its class says: it has hooks, or methods of its own."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    hooked = any(module.__dict__[name] for name in hooks)
    return hooked or any(callable(getattr(type(module), n, None)) for n in module.__dict__.keys() - OF_EVERY_MODULE)
