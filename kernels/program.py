"""A cell as a program: what `kernels.cell` takes, and the list of numbers that the operator takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_CANDIDATES = 64  # terms of one mixed operation, see csrc/mixed.h
CUDA_KERNEL_SIZES = 3, 5  # of depthwise convolutions, see with_taps in csrc/cuda/cell.cu


class Norm(NamedTuple):
    """A batch norm: tensors [C]."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None


class Step(NamedTuple):
    """A step that an edge of a cell computes from a value, see `cell`.

    kind "separable" is `separable` with the weights depthwise (or None) and pointwise, "reduce" a factorized reduction
    with the weights of two pointwise convolutions, "max" and "avg" are `pool`.
    """

    source: int
    kind: str = "separable"
    weights: tuple = (None, None)
    stride: int = 1
    padding: int = 0
    dilation: int = 1


class Sum(NamedTuple):
    """A node of a cell, see `cell`."""

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
    steps = {inputs + i: op for i, op in enumerate(operations) if isinstance(op, Step)}
    together = list(outputs)
    for op in operations:
        if isinstance(op, Sum):
            together += op.terms
            known = len(op.terms) <= MAX_CANDIDATES
        else:
            known = op.source not in steps or {op.kind, steps[op.source].kind} == {"separable"}
            known = known and op.stride in (1, 2)
            if op.kind == "separable" and op.weights[0] is not None:
                kernel = op.weights[0].shape[-1]
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
        else:
            program += [KINDS.index(op.kind), op.source, op.stride, op.padding, op.dilation]
            weights += op.weights
    return program, weights
