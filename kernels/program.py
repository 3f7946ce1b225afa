"""A cell as a program: what `kernels.cell` takes, and the list of numbers that the operator takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_CANDIDATES = 64  # terms of one mixed operation, see csrc/mixed.h
CUDA_KERNEL_SIZES = 3, 5, 7  # of depthwise convolutions, PdartsKernels of csrc/cuda/cell.cuh


class Norm(NamedTuple):
    """A batch norm: tensors [C]."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None


class Separable(NamedTuple):
    """A step of a cell: `separable` of a value; without depthwise a pointwise convolution after ReLU."""

    source: int
    depthwise: torch.Tensor | None
    pointwise: torch.Tensor
    stride: int = 1
    padding: int = 0
    dilation: int = 1


class FactorizedReduce(NamedTuple):
    """A step of a cell: two pointwise convolutions of stride 2 after ReLU, the second one pixel on, side by side."""

    source: int
    first: torch.Tensor
    second: torch.Tensor


class Pool(NamedTuple):
    """A step of a cell: `pool` of a value; kind is "max" or "avg"."""

    source: int
    kind: str
    stride: int = 1


class Sum(NamedTuple):
    """A node of a cell: the mixed operation of values."""

    terms: list[int]


class Dropout(NamedTuple):
    """Inverted dropout of terms of the sums of a cell, see `cell`.

    key: int64 [1], new in every step, from `dropout_key`. rates: float32 [D]. terms: D terms, by the place of their
    probability, in ascending order; each is an input or a sum.
    """

    key: torch.Tensor
    rates: torch.Tensor
    terms: list[int]


KINDS = ("separable", "reduce", "max", "avg")  # in the order of PdartsOperation::Kind, after which a sum follows


def known_on_cuda(operations, norms, outputs):
    """Whether `cell` supports these on CUDA, see csrc/torch/cell_cuda.h."""
    inputs = len(norms) - len(operations)
    steps = {inputs + i: op for i, op in enumerate(operations) if not isinstance(op, Sum)}
    together = list(outputs)
    for op in operations:
        if isinstance(op, Sum):
            together += op.terms
            known = len(op.terms) <= MAX_CANDIDATES
        else:
            chained = isinstance(op, Separable) and isinstance(steps.get(op.source), Separable)
            known = op.source not in steps or chained
            known = known and (isinstance(op, FactorizedReduce) or op.stride in (1, 2))
            if isinstance(op, Separable) and op.depthwise is not None:
                kernel = op.depthwise.shape[-1]
                known = known and kernel in CUDA_KERNEL_SIZES and op.dilation in (1, 2)
                known = known and op.padding <= op.dilation * (kernel - 1)
        if not known:
            return False
    return max(map(together.count, together)) <= MAX_CANDIDATES


def cell_program(operations):
    """The operations as `run_cell` takes them: numbers, and two weights, or None, of each."""
    program, weights = [], []
    for op in operations:
        if isinstance(op, Sum):
            program += [len(KINDS), len(op.terms), *op.terms]
            weights += [None, None]
        elif isinstance(op, Pool):
            program += [KINDS.index(op.kind), op.source, op.stride, 0, 1]
            weights += [None, None]
        elif isinstance(op, FactorizedReduce):
            program += [KINDS.index("reduce"), op.source, 1, 0, 1]
            weights += [op.first, op.second]
        else:
            program += [KINDS.index("separable"), op.source, op.stride, op.padding, op.dilation]
            weights += [op.depthwise, op.pointwise]
    return program, weights
