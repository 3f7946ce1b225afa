#!/usr/bin/env python3
"""Checks the fused mixed operation, then measures it against torch: python bench.py

The tensors are those of the paper's search: the maps of the three parts of a network at batch 96, with the 8, 5 and 3
candidates of the three stages. Every row is one operation, fused, and how many times longer other ways take:

    eager     the plain torch version, kernels.mixed_sum_ref or kernels.mixed_norm_sum_ref
    compile   torch.compile of it (its compile time is reported apart)
    einsum    the outputs stacked into one tensor, then torch.einsum with the weights
    limit     every input read and every result written once, at the bandwidth of a large copy, measured in this run

All sides run in turn, each with inputs that need gradients; the figure is the median, +- half the distance of the
quartiles. On a GPU every side is captured as a CUDA graph that visits several sets of inputs, so that neither launches
nor the L2 cache decide. The result of each call is allocated anew, as in use.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time

import torch

import kernels

SHAPES = ((96, 16, 32, 32), (96, 32, 16, 16), (96, 64, 8, 8))
CANDIDATES = (8, 5, 3)
OPERATIONS = ("mixed_sum", "mixed_norm_sum")


class Case:
    """The inputs of one operation, and the ways to compute it: `run(side, backward)`."""

    def __init__(self, name, shape, count, device, dtype=torch.float32, channels_last=False):
        def randn():
            x = torch.randn(shape, device=device, dtype=dtype)
            return x.to(memory_format=torch.channels_last) if channels_last else x

        self.name, self.shape, self.count = name, shape, count
        self.outputs = [randn().requires_grad_() for _ in range(count)]
        self.weights = torch.rand(count, device=device, dtype=dtype).softmax(0).requires_grad_()
        self.gradient = randn()
        self.running = []
        if name == "mixed_norm_sum":
            kind = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
            fresh = [[f(shape[1], **kind) for _ in self.outputs] for f in (torch.zeros, torch.ones)]
            self.running = [*fresh, True]
        self.sides = {
            "fused": getattr(kernels, name),
            "eager": getattr(kernels, f"{name}_ref"),
            "einsum": stack_einsum,
        }

    def compile(self):
        """Adds the side "compile" and returns the seconds that it takes to compile."""
        torch.compiler.reset()  # else it soon refuses to compile for one more size
        start = time.perf_counter()
        self.sides["compile"] = torch.compile(self.sides["eager"], fullgraph=True, dynamic=False)
        self.run("compile", backward=True)
        return time.perf_counter() - start

    def run(self, side, backward):
        y = self.sides[side](self.outputs, self.weights, *self.running)
        return [y, *torch.autograd.grad(y, [self.weights, *self.outputs], self.gradient)] if backward else y

    def least_bytes(self, backward):
        """What must move at least: inputs and result, and the same once more with their gradients."""
        tensors = self.count + 1
        if backward:
            tensors += self.count + 1 + self.count
        return tensors * self.gradient.nbytes

    def kept_bytes(self, side):
        """What autograd keeps between forward and backward."""
        kept = {}

        def pack(t):
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.run(side, backward=False)
        return sum(kept.values())


def stack_einsum(outputs, weights, *running):
    if running:
        ones = torch.ones_like(weights)
        outputs = [
            kernels.mixed_norm_sum_ref([y], o[None], [m], [v], True) for y, o, m, v in zip(outputs, ones, *running[:2])
        ]
    return torch.einsum("k,knchw->nchw", weights, torch.stack(outputs))


def verify(device, dtype, channels_last):
    """The largest relative error of results and gradients against float64; SystemExit if it is too large."""
    worst = {}
    for name in OPERATIONS:
        for shape in SHAPES:
            case = Case(name, (8, *shape[1:]), max(CANDIDATES), device, dtype, channels_last)
            right = Case(name, (8, *shape[1:]), max(CANDIDATES), device, torch.float64, channels_last)
            with torch.no_grad():
                for mine, theirs in zip(
                    [case.weights, case.gradient, *case.outputs], [right.weights, right.gradient, *right.outputs]
                ):
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


def measure(functions, seconds):
    """{name: function} -> {name: times in seconds}, called in turn for about `seconds` in all, 5 times at least."""
    for f in functions.values():
        f()
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, f in functions.items():
            start = time.perf_counter()
            result = f()
            times[name].append(time.perf_counter() - start)
            del result
    return times


def measure_cuda(makers, seconds):
    """As `measure`, with a CUDA graph of every function's calls for all sets of inputs: {name: list of functions}."""
    graphs = {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for name, functions in makers.items():
        with torch.cuda.stream(stream):
            for f in functions:
                f()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for f in functions:
                f()
    times = {name: [] for name in makers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / 1e3 / len(makers[name]))
    return times


def copy_bandwidth(device):
    """Bytes per second, read and written, of a copy too large for any cache."""
    a = torch.randn(1 << (28 if device.type == "cuda" else 24), device=device)
    b = torch.empty_like(a)
    if device.type == "cuda":
        (times,) = measure_cuda({"copy": [lambda: b.copy_(a)]}, 0.5).values()
    else:
        (times,) = measure({"copy": lambda: b.copy_(a)}, 0.5).values()
    return 2 * a.nbytes / statistics.median(times)


def operations(args):
    """The rows of the table, each a dict."""
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    kernels.use("on")
    kernels.fused(device)
    print(*header(device), f"{args.dtype}, {'channels-last' if args.channels_last else 'NCHW'}", sep="\n")
    for name, error in verify(device, dtype, args.channels_last).items():
        print(f"verified: {name} and its gradients, largest relative error {error:.1e}")
    bandwidth = copy_bandwidth(device)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print(
        f"{'operation':15}{'shape':16}{'K':>2}  {'pass':9}{'fused ms':>16}{'GB/s':>7}   {'eager':>7}{'compile':>9}",
        end="",
    )
    print(f"{'einsum':>8}{'limit':>7}   kept MB, eager")
    rows, compiling = [], 0.0
    for name in OPERATIONS:
        for shape in SHAPES:
            for count in CANDIDATES:
                sets = 1
                if device.type == "cuda":  # until the L2 cache holds but a small part
                    sets = max(2, math.ceil(3e8 / (2 * count * 4 * math.prod(shape))))
                cases = [Case(name, shape, count, device, dtype, args.channels_last) for _ in range(sets)]
                if args.compile:
                    compiling += cases[0].compile()
                    for case in cases:
                        case.sides = cases[0].sides
                for backward in (False, True):
                    calls = {
                        side: [functools.partial(case.run, side, backward) for case in cases] for side in cases[0].sides
                    }
                    if device.type == "cuda":
                        times = measure_cuda(calls, args.seconds)
                    else:
                        times = measure({side: call[0] for side, call in calls.items()}, args.seconds)
                    rows.append(row(cases[0], backward, times, bandwidth))
                    print(line(rows[-1]), flush=True)
    if args.compile:
        print(f"\ntorch.compile took {compiling:.0f} s to compile, not in the figures (its cache may have helped)")
    print("\ntimes faster than (geometric mean of the sizes)")
    for name in OPERATIONS:
        for direction in ("forward", "fwd+bwd"):
            mine = [r for r in rows if r["operation"] == name and r["pass"] == direction]
            means = {
                side: statistics.geometric_mean(r["ms"][side] / r["ms"]["fused"] for r in mine)
                for side in mine[0]["ms"]
                if side != "fused"
            }
            print(f"{name:15} {direction:8} " + "   ".join(f"{side} {mean:.2f}" for side, mean in means.items()))
    return rows


def row(case, backward, times, bandwidth):
    ms = {side: 1e3 * statistics.median(t) for side, t in times.items()}
    quartiles = {side: statistics.quantiles(t, n=4) for side, t in times.items()}
    moved = case.least_bytes(backward)
    return {
        "operation": case.name,
        "shape": list(case.shape),
        "candidates": case.count,
        "pass": "fwd+bwd" if backward else "forward",
        "ms": ms,
        "spread_ms": {side: 1e3 * (q[2] - q[0]) / 2 for side, q in quartiles.items()},
        "limit_ms": 1e3 * moved / bandwidth,
        "bytes_moved_at_least": moved,
        "bytes_kept": {side: case.kept_bytes(side) for side in ("fused", "eager")},
    }


def line(r):
    ms, fused = r["ms"], r["ms"]["fused"]
    ratio = {side: f"{ms[side] / fused:.2f}x" if side in ms else "-" for side in ("eager", "compile", "einsum")}
    kept = [f"{r['bytes_kept'][side] / 1e6:.1f}" for side in ("fused", "eager")]
    return (
        f"{r['operation']:15}{str(r['shape']):16}{r['candidates']:>2}  {r['pass']:9}"
        f"{fused:>9.3f} +-{r['spread_ms']['fused']:5.3f}{r['bytes_moved_at_least'] / fused / 1e6:>7.1f}   "
        f"{ratio['eager']:>7}{ratio['compile']:>9}{ratio['einsum']:>8}"
        f"{r['limit_ms'] / fused:>6.2f}x   {kept[0]}, {kept[1]}"
    )


def header(device):
    """Device, versions and commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = pathlib.Path("/proc/cpuinfo")
        models = (
            [s.split(":")[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")]
            if info.exists()
            else []
        )
        name = f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"
    here = pathlib.Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return name, f"torch {torch.__version__}, commit {commit or 'unknown'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true", help="the memory format of all tensors")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, default=0.8, metavar="S", help="time for each row (default: 0.8)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    rows = operations(args)
    if args.json:
        head = dict(zip(("device", "versions"), header(torch.device(args.device))))
        pathlib.Path(args.json).write_text(json.dumps({**head, "command": sys.argv, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
