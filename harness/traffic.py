"""Counts the launches of kernels and the bytes that a step moves on CUDA: `python bench.py traffic`. No GPU is needed.

A step runs on the CPU, with few images, in the operations that CUDA would run: "torch's" with its own convolutions
and pooling and gradients of a state that are added one after the other, "ours" with the kernels for all of that;
bytes of feature maps are scaled to --batch. An operation counts as one launch that reads its inputs and writes its
results once, views as none, and what is known better as `KNOWN` has it. A kernel of torch's that reads an input
several times, as that of the weights of a depthwise convolution does for every tap, counts as one that reads it once:
it is the least that is compared.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import kernels
import pdarts

IMAGES = 4  # of the step that is run
RATES = (3.3e12, 4.3e12)  # bytes per second, about those of the memories of an H100 and an H200
SIDES = {"torch's": ("mixed",), "ours": ("mixed", "separable", "pool")}


def mixed(call, size):
    outputs, *_, batch, _ = call.arguments
    again = sum(size(x) for x, of in zip(outputs, batch) if of)
    return 3 if any(batch) else 1, size(outputs) + again + size(call.results[0])


def mixed_backward(call, size):
    grad, outputs, _, _, _, statistics, batch, needs = call.arguments
    inputs = [x for x, need in zip(outputs, needs) if need]
    of_p = needs[len(outputs)]
    sums = [x for x, of in zip(outputs, batch) if x is not None and (of_p or of)]
    again = [x for x, of in zip(outputs, batch) if of and x is not None]
    launches = (bool(sums) or of_p) + any(batch) + bool(inputs) + of_p
    moved = bool(sums) * size(grad) + size(sums) + size(grad) + size(again) + size(call.results)
    return launches, moved


def between(x, y, pointwise, size):
    """Bytes of what the pointwise convolution reads, which is kept."""
    return size(y) // pointwise.shape[0] * x.shape[1]


def separable(call, size):
    x, _, pointwise, *_, batch, _, _, _, _ = call.arguments
    y = call.results[0]
    return 2 + 2 * batch, (1 + batch) * size(x) + 2 * between(x, y, pointwise, size) + size(y)


def separable_backward(call, size):
    grad, x, _, pointwise, _, _, statistics, batch, *_, needs = call.arguments
    of_f, z, n = needs[0] or needs[3] or needs[4], between(x, grad, pointwise, size), size(x)
    parts = [
        (needs[2], 1, size(grad) + z),
        (of_f or needs[1], 1, size(grad) + z),
        (of_f, 1, z + 2 * n),
        (needs[1], 2, n + z),
        (of_f and statistics is not None, 4 if batch else 3, 5 * n),
    ]
    return sum(p[1] for p in parts if p[0]), sum(p[2] for p in parts if p[0])


def convolution_backward(call, size):
    grad, x, *_, mask = call.arguments
    return sum(mask[:2]), sum(mask[:2]) * (size(grad) + size(x))


def batch_norm(call, size):
    x = call.arguments[0]
    training = call.arguments[5]
    return 1 + training, (2 + training) * size(x)


def batch_norm_backward(call, size):
    return 2, 2 * size(call.arguments[:2]) + size(call.results[0])


def max_pool_backward(call, size):
    grad, x, *_, indices = call.arguments
    return 2, size(grad) + size(indices) + 2 * size(x)  # cleared and then added to


KNOWN = {
    "pdarts::mixed": mixed,
    "pdarts::mixed_backward": mixed_backward,
    "pdarts::separable": separable,
    "pdarts::separable_backward": separable_backward,
    "pdarts::pool_backward": lambda call, size: (1, size(call.arguments[:2]) + size(call.results)),
    "pdarts::update_running": lambda call, size: (2, 2 * size(call.arguments)),
    "aten::convolution_backward": convolution_backward,
    "aten::native_batch_norm": batch_norm,
    "aten::native_batch_norm_backward": batch_norm_backward,
    "aten::max_pool2d_with_indices_backward": max_pool_backward,
}
KERNELLESS = ("aten::empty", "aten::detach", "aten::_local_scalar_dense", "aten::new_empty", "aten::lift_fresh")


@dataclasses.dataclass
class Call:
    arguments: tuple
    results: object


class Traffic(TorchDispatchMode):
    """Counts launches and bytes, of all operations and of each."""

    def __init__(self, images: int, batch: int):
        super().__init__()
        self.images, self.factor = images, batch / images
        self.launches, self.bytes = collections.Counter(), collections.Counter()

    def size(self, tensors) -> float:
        every = [t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)]
        return sum(t.nbytes * (self.factor if t.dim() > 1 and len(t) == self.images else 1) for t in every)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function._schema.name
        if function.is_view or name.startswith(KERNELLESS):
            return results
        if name in KNOWN:
            launches, moved = KNOWN[name](Call(args, results), self.size)
        else:
            lists = [len(a) for a in args if isinstance(a, (list, tuple)) and name.startswith("aten::_foreach")]
            launches = math.ceil(max(lists, default=1) / 48)  # about as many tensors as torch gives to one kernel
            moved = self.size([args, list((kwargs or {}).values()), results])
        self.launches[name] += launches
        self.bytes[name] += moved
        return results


class OneByOne:
    """Instead of `kernels._Read`."""

    @staticmethod
    def apply(x, times):
        return (x,) * times


@contextlib.contextmanager
def side(operations):
    """Where the operations are computed as on CUDA, each by itself; those that are named by ours."""
    with contextlib.ExitStack() as stack:
        patch = functools.partial(mock.patch.object, kernels)
        stack.enter_context(patch("_on_cpu", lambda x: False))
        stack.enter_context(patch("serves", lambda operation, x: operation in operations))
        if "separable" not in operations:
            stack.enter_context(patch("_Read", OneByOne))
        yield


def rows(stages, channels: int, batch: int):
    """A row for every stage, kind of step and side; and the counts of its operations."""
    config = dataclasses.replace(pdarts.CIFAR10, channels=channels)
    ((images, labels),) = bench.batches(1, IMAGES, torch.device("cpu"))
    for stage in stages:
        for name, operations in SIDES.items():
            with side(operations):
                step = bench.OurStep(stage, config, images, labels, recompute=False)
                for which in ("weights", "alphas"):
                    step.run(which)  # what an optimizer makes at its first step
                    with Traffic(IMAGES, batch) as counted:
                        step.run(which)
                    moved = sum(counted.bytes.values())
                    about = {"stage": stage, "step of": which, "convolutions and pooling": name}
                    floors = {f"ms at {rate / 1e12:.1f} TB/s": 1e3 * moved / rate for rate in RATES}
                    yield {**about, "launches": sum(counted.launches.values()), "GB": moved / 1e9, **floors}, counted


def traffic(args):
    """Prints the table and returns its rows."""
    kernels.use("on")
    print(f"float32, batch {args.batch}, C = {args.channels}; counted, not measured")
    print("candidates of stages 2 and 3: those of the first search of testdata/derive.json")
    table = []
    for row, counted in rows(args.stages, args.channels, args.batch):
        if not table:
            print("\n| " + " | ".join(row) + " | most launches |\n|" + " --- |" * (len(row) + 1))
        most = ", ".join(f"{n} {name.partition('::')[2]}" for name, n in counted.launches.most_common(6))
        cells = (f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values())
        print(f"| {' | '.join(cells)} | {most} |", flush=True)
        table.append(row | {"launches of": dict(counted.launches), "bytes of": dict(counted.bytes)})
    return table
