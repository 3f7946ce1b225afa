"""The fused mixed operation against other ways to compute it, on the shapes of the paper's search."""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time

import torch

import kernels
from harness.files import reason
from harness.measure.timing import saved_bytes, time_calls

SHAPES = ((96, 16, 32, 32), (96, 32, 16, 16), (96, 64, 8, 8))  # feature maps of the three parts of a network
CANDIDATES = (8, 5, 3)  # of an edge in the three stages
OPERATIONS = ("mixed_sum", "mixed_norm_sum")


class Case:
    """The inputs of one operation, and the ways to compute it: `run(side, backward)`."""

    def __init__(self, name, shape, count, device, dtype=torch.float32, channels_last=False):
        def randn():
            x = torch.randn(shape, device=device, dtype=dtype)
            return x.to(memory_format=torch.channels_last) if channels_last else x

        self.name, self.shape, self.count = name, shape, count
        self.outputs = [randn().requires_grad_() for _ in range(count)]
        self.probabilities = torch.rand(count, device=device, dtype=dtype).softmax(0).requires_grad_()
        self.gradient = randn()
        self.norms = []  # and whether they normalise by the batch
        if name == "mixed_norm_sum":
            kind = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
            fresh = [[f(shape[1], **kind) for f in (torch.zeros, torch.ones)] for _ in self.outputs]
            self.norms = [[kernels.Norm(*running) for running in fresh], True]
        self.sides = {
            "fused": getattr(kernels, name),
            "eager": getattr(kernels, f"{name}_ref"),
            "einsum": stack_einsum,
        }

    def compile(self):
        """Add the side "compile" and return the seconds that its compilation takes."""
        torch.compiler.reset()  # else torch soon refuses to compile for one more size
        start = time.perf_counter()
        self.sides["compile"] = torch.compile(self.sides["eager"], fullgraph=True, dynamic=False)
        self.run("compile", backward=True)
        return time.perf_counter() - start

    def run(self, side, backward):
        y = self.sides[side](self.outputs, self.probabilities, *self.norms)
        return [y, *torch.autograd.grad(y, [self.probabilities, *self.outputs], self.gradient)] if backward else y

    def minimum_bytes(self, backward):
        """Return the minimum traffic: inputs and result once, and once more with their gradients."""
        tensors = self.count + 1
        if backward:
            tensors += self.count + 1 + self.count
        return tensors * self.gradient.nbytes


def stack_einsum(outputs, probabilities, norms=None, training=True):
    if norms:
        one = torch.ones_like(probabilities[:1])
        outputs = [kernels.mixed_norm_sum_ref([y], one, [norm], training) for y, norm in zip(outputs, norms)]
    return torch.einsum("k,knchw->nchw", probabilities, torch.stack(outputs))


def verify(device, dtype, channels_last) -> dict[str, float]:
    """Return the largest relative error of each operation's results and gradients against float64.

    SystemExit if an error is too large.
    """
    worst = {}
    for name in OPERATIONS:
        for shape in SHAPES:
            case = Case(name, (8, *shape[1:]), max(CANDIDATES), device, dtype, channels_last)
            right = Case(name, (8, *shape[1:]), max(CANDIDATES), device, torch.float64, channels_last)
            with torch.no_grad():
                inputs = [[c.probabilities, c.gradient, *c.outputs] for c in (case, right)]
                for mine, theirs in zip(*inputs):
                    theirs.copy_(mine)
            errors = [
                float(((mine.double() - theirs).norm() / theirs.norm()).detach())
                for mine, theirs in zip(case.run("fused", backward=True), right.run("eager", backward=True))
            ]
            worst[name] = max(worst.get(name, 0.0), *errors)
        allowed = 1e-5 if dtype == torch.float32 else 1e-2
        if not worst[name] <= allowed:
            sys.exit(f"{name}: the relative error is {worst[name]:.1e}; expected at most {allowed:.0e}")
    return worst


def sets_for(nbytes: int, device) -> int:
    """Return how many sets of inputs of `nbytes` a GPU visits in turn, so that its L2 cache holds a small part only."""
    return max(2, math.ceil(3e8 / nbytes)) if device.type == "cuda" else 1


def operation_rows(device, dtype, channels_last, batch, compiled, seconds, bandwidth):
    """Yield the rows of the table, each a dict, as they are measured."""
    for name in OPERATIONS:
        for shape in [(batch, *shape[1:]) for shape in SHAPES]:
            for count in CANDIDATES:
                sets = sets_for(2 * count * 4 * math.prod(shape), device)
                cases = [Case(name, shape, count, device, dtype, channels_last) for _ in range(sets)]
                compiling, problem = None, None
                if compiled:
                    try:
                        compiling = cases[0].compile()
                    except Exception as error:  # a compiler's: the other sides are measured all the same
                        problem = reason(error)
                        del cases[0].sides["compile"]
                    for case in cases:
                        case.sides = cases[0].sides
                for backward in (False, True):
                    calls = {
                        side: [functools.partial(case.run, side, backward) for case in cases] for side in cases[0].sides
                    }
                    times = time_calls(calls, seconds, device)
                    compilation = {"compile_seconds": None if backward else compiling, "compile_problem": problem}
                    yield row(cases[0], backward, times, bandwidth) | compilation


def row(case, backward, times, bandwidth):
    ms = {side: 1e3 * statistics.median(t) for side, t in times.items()}
    quartiles = {side: statistics.quantiles(t, n=4) for side, t in times.items()}
    moved = case.minimum_bytes(backward)
    saved = {side: saved_bytes(functools.partial(case.run, side, backward=False)) for side in ("fused", "eager")}
    return {
        "operation": case.name,
        "shape": list(case.shape),
        "candidates": case.count,
        "pass": "fwd+bwd" if backward else "forward",
        "ms": ms,
        "spread_ms": {side: 1e3 * (q[2] - q[0]) / 2 for side, q in quartiles.items()},
        "limit_ms": 1e3 * moved / bandwidth,
        "minimum_bytes": moved,
        "bytes_saved": saved,
    }
