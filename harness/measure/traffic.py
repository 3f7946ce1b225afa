"""The launches of kernels and the bytes of a step on CUDA, counted on the CPU: `python -m harness.measure traffic`.

A step runs on the CPU, with few images, in the operations that CUDA would run: "torch's" with torch's convolutions and
pooling and the fused mixed operation, "cells" with whole cells. Bytes of feature maps are scaled to --batch, "saved"
are the bytes that the forward pass saves for the backward pass. An operation counts as one launch that reads its inputs
and writes its results once, a view as none; `KNOWN` has the operations of which more is known, and `Launches` follows
kernels/csrc/torch/cell_cuda.h. A kernel of torch's that reads an input several times, as that of the weights of a
depthwise convolution does for every tap, counts as one that reads it once: minimum traffic is compared.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import sys
import typing
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import pdarts
from harness.measure.search_steps import OurStep, batches
from kernels.program import KINDS

IMAGES = 2  # of the step that is run
RATES = (3.3e12, 4.3e12)  # bytes per second, about those of the memories of an H100 and an H200
SIDES = {"torch's": ("mixed",), "cells": ("mixed", "cell")}  # the operations that are fused
RATE = 0.3  # of the skip dropout


class Part(typing.NamedTuple):
    """A convolution of a launch: what its pointwise product reads, and the kernel and stride before it."""

    n: int
    channels: int
    height: int
    width: int
    out: int
    kernel: int
    stride: int


class Launch(typing.NamedTuple):
    kernel: str  # without cell_ and _kernel, or torch's operation
    bytes: float
    parts: tuple = ()


def launched(kernel, count, moved):
    """Return as many launches, of which the first moves all bytes."""
    return [Launch(kernel, moved if not i else 0.0) for i in range(count)]


def mixed(call, size):
    outputs, *_, batch, _ = call.arguments
    again = sum(size(x) for x, of in zip(outputs, batch) if of)
    return launched("mixed", 3 if any(batch) else 1, size(outputs) + again + size(call.results[0]))


def mixed_backward(call, size):
    grad, outputs, _, _, _, statistics, batch, needs = call.arguments
    inputs = [x for x, need in zip(outputs, needs) if need]
    of_p = needs[len(outputs)]
    sums = [x for x, of in zip(outputs, batch) if x is not None and (of_p or of)]
    again = [x for x, of in zip(outputs, batch) if of and x is not None]
    count = (bool(sums) or of_p) + any(batch) + bool(inputs) + of_p
    moved = bool(sums) * size(grad) + size(sums) + size(grad) + size(again) + size(call.results)
    return launched("mixed", count, moved)


def convolution_backward(call, size):
    grad, x, *_, mask = call.arguments
    return launched("convolution_backward", sum(mask[:2]), sum(mask[:2]) * (size(grad) + size(x)))


def batch_norm(call, size):
    x = call.arguments[0]
    training = call.arguments[5]
    return launched("batch_norm", 1 + training, (2 + training) * size(x))


def batch_norm_backward(call, size):
    return launched("batch_norm", 2, 2 * size(call.arguments[:2]) + size(call.results[0]))


def max_pool_backward(call, size):
    grad, x, *_, indices = call.arguments
    return launched("max_pool", 2, size(grad) + size(indices) + 2 * size(x))  # cleared and then added to


class Launches:
    """The launches of a cell, level by level, and the bytes that they move."""

    def __init__(self, inputs, weights, program, outputs, batch, size):
        self.batch, self.outputs, self.size, self.launches = batch, outputs, size, []
        self.shapes, self.inputs = [x.shape for x in inputs], len(inputs)
        # Of each value: kind, sources, parts, stride, whether there is one that is computed alike.
        self.operations = [("input", [], (), 1, False)] * len(inputs)
        numbers = iter(program)
        for pair in zip(weights[::2], weights[1::2]):
            self.add(KINDS, numbers, *pair)

    def add(self, kinds, numbers, weight, pointwise):
        kind, source = next(numbers), next(numbers)
        if kind == len(kinds):
            terms = [next(numbers) for _ in range(source)]
            self.operations.append(("sum", terms, (), 1, False))
            self.shapes.append(self.shapes[terms[0]])
            return
        kind, (stride, padding, dilation) = kinds[kind], (next(numbers) for _ in range(3))
        n, c, *size = self.shapes[source]
        parts = []  # (shape of what the pointwise product reads, whether it is written, results, size of the kernel)
        if kind == "separable":
            kernel = 1 if weight is None else weight.shape[2]
            size = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in size] if kernel > 1 else size
            parts = [((n, c, *size), kernel > 1, len(pointwise), kernel)]
            c = len(pointwise)
        elif kind == "reduce":
            size, stride = [(s + 1) // 2 for s in size], 2
            parts = [((n, c, *size), True, len(w), 1) for w in (weight, pointwise)]
            c = len(weight) + len(pointwise)
        else:
            size = [(s - 1) // stride + 1 for s in size]
        there = [(op[0], op[1], op[3]) for op in self.operations[self.inputs :]]
        alike = kind in ("max", "avg") and (kind, [source], stride) in there
        self.operations.append((kind, [source], parts, stride, alike))
        self.shapes.append((n, c, *size))

    def saved(self):
        """Return the bytes that are saved on CUDA, less those on the CPU."""
        between = [z for _, _, parts, *_ in self.operations for z, written, *_ in parts if written]
        outputs = [self.shapes[v] for v in self.outputs if len(self.outputs) > 1]
        alike = [shape for shape, (*_, alike) in zip(self.shapes, self.operations) if alike]
        return sum(map(self.of, between + outputs)) - sum(map(self.of, alike))

    def of(self, shape):
        return self.size(torch.empty(shape, device="meta"))

    def launch(self, kernel, *shapes, values=()):
        parts = [
            Part(*z, out, size, self.operations[v][3]) for v in values for z, _, out, size in self.operations[v][2]
        ]
        self.launches.append(Launch(kernel, sum(map(self.of, shapes)), tuple(parts)))

    def small(self, kernel, count=1):
        """Add launches that move next to nothing."""
        self.launches += launched(kernel, count, 0.0)

    def is_state(self, v):
        return v < self.inputs or self.operations[v][0] == "sum"

    def grouped(self, values):
        """Return groups of values whose convolutions are one launch."""
        groups = collections.defaultdict(list)
        for v in values:
            _, (source,), *_, stride, _ = self.operations[v]
            groups[self.shapes[source], self.shapes[v][2:], stride].append(v)
        return groups.values()

    def levels(self, level):
        return [[v for v in range(len(level)) if level[v] == now] for now in range(max(level) + 1)]

    def reads(self, values):
        return [self.shapes[source] for source in {self.operations[v][1][0] for v in values}]

    def forward(self, save):
        shapes, level = self.shapes, [0] * self.inputs
        for _, sources, *_ in self.operations[self.inputs :]:
            level.append(1 + max(level[v] for v in sources))
        self.small("clear", 2 * any(self.batch))  # statistics
        for values in self.levels(level)[1:]:
            kind = {v: self.operations[v][0] for v in values}
            for group in self.grouped(v for v in values if kind[v] in ("separable", "reduce")):
                between = [z for v in group for z, saved, *_ in self.operations[v][2] if save and saved]
                moved = *self.reads(group), *(shapes[v] for v in group), *between
                self.launch("convolution", *moved, values=group)
                self.small("statistics", any(self.batch[v] for v in group))
            for group in self.grouped(v for v in values if kind[v] in ("max", "avg") and not self.operations[v][4]):
                self.launch("pool", *self.reads(group), *(shapes[v] for v in group))
                self.small("statistics", any(self.batch[v] for v in group))
            for v in values:
                if kind[v] == "sum":
                    terms = self.operations[v][1]
                    self.small("rows", not all(map(self.is_state, terms)))
                    self.launch("mixed_forward", *(shapes[u] for u in terms), shapes[v])
        if len(self.outputs) > 1:
            self.launch("cat", *(shapes[v] for v in 2 * self.outputs))

    def backward(self, needs):
        shapes, count = self.shapes, len(self.shapes)
        of_inputs, of_weights, of_probabilities = needs[: self.inputs], needs[self.inputs :], needs[-1]
        wanted, users = list(of_inputs), [[] for _ in shapes]
        for v, (kind, sources, *_) in list(enumerate(self.operations))[self.inputs :]:
            own = of_probabilities if kind == "sum" else any(of_weights[2 * (v - self.inputs) :][:2])
            wanted.append(own or any(wanted[u] for u in sources))
            for u in sources:
                users[u].append(v)
        level = [0] * count
        for v in reversed(range(count)):
            level[v] = max((level[u] + 1 for u in users[v]), default=0)
        weights = 0
        for values in self.levels(level):
            states = [v for v in values if wanted[v] and self.is_state(v)]
            self.gather(states, users, wanted)
            for v in states:
                if v >= self.inputs:
                    self.sum_gradients(v, of_probabilities, wanted)
            steps = [v for v in values if wanted[v] and self.operations[v][0] in ("separable", "reduce")]
            for group in self.grouped(steps):
                weights += self.convolution_gradients(group, users, of_weights, wanted)
        self.small("sums", math.ceil(weights / 64))  # over blocks

    def gather(self, states, users, wanted):
        terms, pools, readers = collections.defaultdict(list), [], []
        for v in states:
            shape, read = self.shapes[v], [u for u in users[v] if wanted[u]]
            kinds = [self.operations[u][0] for u in read]
            if v in self.outputs and len(self.outputs) > 1:  # its part of the gradient is copied
                self.launch("copy", shape, shape)
            # Its gradient is written, and the parts of which it is a sum are read.
            if count := (v in self.outputs) + kinds.count("sum"):
                terms[shape] += [shape] * (count + 1)
            of_pools = [u for u in read if self.operations[u][0] in ("max", "avg")]
            if of_pools:  # what the gradients of their sums are, and their results
                own = [u for u in of_pools if not self.operations[u][4]]
                pools.append([*(self.shapes[u] for u in of_pools + own), *[shape] * 3])
            readers += [u for u in read if self.operations[u][0] in ("separable", "reduce")]
        for shapes in terms.values():
            self.launch("terms", *shapes)
        for shapes in pools:
            self.launch("pool_input", *shapes)
        for group in self.grouped(readers):
            self.launch("input", *self.between(group), *3 * self.reads(group), values=group)

    def sum_gradients(self, v, of_probabilities, wanted):
        terms = self.operations[v][1]
        normed = [u for u in terms if self.batch[u] and wanted[u]]
        read = terms if of_probabilities else normed
        self.small("rows", not all(map(self.is_state, terms)))
        if read:
            self.launch("mixed_backward_sums", *(self.shapes[u] for u in read), self.shapes[v])
        self.small("mixed_channels", bool(normed))
        self.small("mixed_probabilities", of_probabilities)

    def convolution_gradients(self, group, users, of_weights, wanted):
        """Count the launches; return the number of weights that have gradients."""
        shapes = self.shapes
        asked = {v: of_weights[2 * (v - self.inputs) :][:2] for v in group}
        separable = [v for v in group if self.operations[v][0] == "separable"]
        # Terms of a sum read one gradient; and those with a norm read themselves.
        incoming = [*{u: shapes[v] for v in group for u in users[v]}.values()]
        incoming += [shapes[v] for v in group if self.batch[v]]
        kernels = [v for v in separable if self.operations[v][2][0][3] > 1 and asked[v][0]]
        passed = [v for v in group if wanted[self.operations[v][1][0]] or v in kernels]
        if passed:
            self.launch("between", *incoming, *self.between(passed), values=passed)
        pointwise = [v for v in group if asked[v][1] or (v not in separable and asked[v][0])]
        if pointwise:
            self.launch("pointwise", *incoming, *self.between(pointwise), values=pointwise)
        if kernels:
            self.launch("weight", *self.between(kernels), *self.reads(kernels), values=kernels)
        chained = [v for v in group if not self.is_state(self.operations[v][1][0]) and wanted[self.operations[v][1][0]]]
        if chained:
            self.launch("input", *self.between(chained), *2 * self.reads(chained), values=chained)
            self.small("norm")
        return sum(len(self.operations[v][2]) for v in pointwise) + len(kernels)

    def between(self, values):
        return [z for v in values for z, *_ in self.operations[v][2]]


def forward_of(call, size):
    inputs, weights, *_, program, outputs, batch, _, _ = call.arguments
    return Launches(inputs, weights, program, outputs, batch, size)


def cell(call, size):
    launches = forward_of(call, size)
    launches.forward(save=call.arguments[-1])
    return launches.launches


def cell_backward(call, size):
    _, _, _, inputs, weights, *_, program, outputs, batch, needs = call.arguments
    launches = Launches(inputs, weights, program, outputs, batch, size)
    launches.backward(needs)
    return launches.launches


KNOWN = {
    "pdarts::cell": cell,
    "pdarts::cell_backward": cell_backward,
    "pdarts::mixed": mixed,
    "pdarts::mixed_backward": mixed_backward,
    "pdarts::update_running": lambda call, size: launched(
        "update_running", 2 * math.ceil(len(call.arguments[0]) / 48), 2 * size(call.arguments)
    ),
    "aten::convolution_backward": convolution_backward,
    "aten::native_batch_norm": batch_norm,
    "aten::native_batch_norm_backward": batch_norm_backward,
    "aten::max_pool2d_with_indices_backward": max_pool_backward,
}
# Bytes that are saved on CUDA, less those on the CPU.
MORE_SAVED = {
    "pdarts::cell": lambda call, size: forward_of(call, size).saved(),
}
KERNELLESS = ("aten::empty", "aten::detach", "aten::_local_scalar_dense", "aten::new_empty", "aten::lift_fresh")


@dataclasses.dataclass
class Call:
    arguments: tuple
    results: object


class Traffic(TorchDispatchMode):
    """A mode that counts launches and bytes of each operation."""

    of_fused_operators = True

    def __init__(self, images: int, batch: int):
        super().__init__()
        self.images, self.factor = images, batch / images
        self.launches, self.bytes, self.saved = collections.Counter(), collections.Counter(), 0.0
        self.each = []  # all of them, in order

    def size(self, tensors) -> float:
        every = [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]
        return sum(t.nbytes * (self.factor if t.dim() > 1 and len(t) == self.images else 1) for t in every)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function._schema.name
        if function.is_view or name.startswith(KERNELLESS):
            return results
        if name in KNOWN:
            each = KNOWN[name](Call(args, results), self.size)
        else:
            lists = [len(a) for a in args if isinstance(a, (list, tuple)) and name.startswith("aten::_foreach")]
            count = math.ceil(max(lists, default=1) / 48)  # about as many tensors as torch gives to one kernel
            moved = self.size([args, list((kwargs or {}).values()), results])
            each = launched(name.partition("::")[2], count, moved)
        for launch in each:
            parts = tuple(part._replace(n=round(part.n * self.factor)) for part in launch.parts)
            self.each.append(launch._replace(parts=parts))
        self.launches[name] += len(each)
        self.bytes[name] += sum(launch.bytes for launch in each)
        self.saved += MORE_SAVED[name](Call(args, results), self.size) if name in MORE_SAVED else 0
        return results

    def saved_by(self, forward) -> float:
        """Return the bytes that autograd saves of a call for the backward pass."""
        saved = {}

        def pack(t):
            saved[t.untyped_storage().data_ptr()] = self.size(t)
            return t.detach()

        with self, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = forward()  # alive, so that no memory is counted twice or missed
        del result
        return sum(saved.values()) + self.saved


@contextlib.contextmanager
def side(operations):
    """Enter a block in which the operations run one by one, as on CUDA, the named ones by ours."""
    with contextlib.ExitStack() as stack:
        for module in ("kernels.ops", "kernels.modules"):
            stack.enter_context(mock.patch.object(sys.modules[module], "supports", lambda name, x: name in operations))
        yield


def first_step(optimizer):
    """Let the optimizer make its state."""
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()


def rows(stages, channels: int, batch: int, number: int = 1, sides=tuple(SIDES)):
    """Yield a row for every stage, kind of step and side, and the counts of its operations."""
    config = dataclasses.replace(pdarts.CIFAR10, channels=channels)
    ((images, labels),) = batches(1, IMAGES, torch.device("cpu"))
    for stage in stages:
        for name in sides:
            with side(SIDES[name]):
                step = OurStep(stage, config, images, labels, number=number)
                step.network.set_skip_dropout(RATE)
                saved = Traffic(IMAGES, batch).saved_by(step.forward)
                optimizers = {"weights": step.search.weight_optimizer, "alphas": step.search.architect.optimizer}
                for which, optimizer in optimizers.items():
                    first_step(optimizer)
                    with Traffic(IMAGES, batch) as counted:
                        step.run(which)
                    moved = sum(counted.bytes.values())
                    about = {"stage": stage, "step of": which, "convolutions and pooling": name}
                    floors = {f"ms at {rate / 1e12:.1f} TB/s": 1e3 * moved / rate for rate in RATES}
                    numbers = {"launches": sum(counted.launches.values()), "GB": moved / 1e9, "GB saved": saved / 1e9}
                    yield {**about, **numbers, **floors}, counted


def counted_rows(args, sides=tuple(SIDES)):
    """Return the rows that the options ask for, having said what they are of."""
    kernels.use("on")
    torch.set_num_threads(1)  # the tensors are small
    print(f"float32, batch {args.batch}, C = {args.channels}; counted, not measured")
    print(f"candidates of stages 2 and 3: those of search {args.search} of testdata/derive.json", flush=True)
    return rows(args.stages, args.channels, args.batch, args.search, sides)


def print_table(args):
    """Print the table, each row when it is counted, and return the rows."""
    table = []
    for row, counted in counted_rows(args):
        if not table:
            print("\n| " + " | ".join(row) + " | most launches |\n|" + " --- |" * (len(row) + 1))
        most = ", ".join(f"{n} {name.partition('::')[2]}" for name, n in counted.launches.most_common(6))
        cells = (f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values())
        print(f"| {' | '.join(cells)} | {most} |", flush=True)
        table.append(row | {"launches of": dict(counted.launches), "bytes of": dict(counted.bytes)})
    return table
