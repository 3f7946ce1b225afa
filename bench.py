#!/usr/bin/env python3
"""Measures what the kernels are for: the mixed operation, the steps of a search and an evaluation, a whole search.

    python bench.py                       # the fused mixed operation against torch, once it is found right
    python bench.py step [--official DIR] # a step of the weights and one of the alphas, in each stage
    python bench.py evaluate [--official DIR] # a step of an evaluation: training the network of the P-DARTS cell
    python bench.py search                # seconds per epoch of each stage, and what the paper's search would take
    python bench.py losses [--data DIR]   # the losses of training with and without the kernels, side by side
    python bench.py traffic               # launches and bytes of a step on CUDA, counted without a GPU
    python bench.py gpu --out DIR         # all of that and more on a GPU, in half an hour: see harness/gpu_report.py
    python bench.py claims --data DIR --out DIR # the paper's claims, in hours: see harness/claims.py

The mixed operation: the tensors are those of the paper's search, the feature maps of the three parts of a network at
batch 96, with the 8, 5 and 3 candidates of the three stages. Every row is one operation, fused, and how many times
longer other ways take:

    eager     the plain torch version, kernels.mixed_sum_ref or kernels.mixed_norm_sum_ref
    compile   torch.compile of it (its compile time is reported apart)
    einsum    the outputs stacked into one tensor, then torch.einsum with the probabilities
    limit     every input read and every result written once, at the bandwidth of a large copy, measured in this run

All sides run in turn, each with inputs that need gradients; the figure is the median, +- half the distance of the
quartiles. On a GPU every side is captured as a CUDA graph that visits several sets of inputs, so that neither launches
nor the L2 cache decide. The result of each call is allocated anew, as in use.

The step: forward, backward and optimizer on one batch of generated images, without skip dropout (though on a GPU ours
and plain draw its random numbers, as in use), once loss and gradients are found right. On the CPU all sides take
turns, and of three calls the third counts: two find the memory as the other sides left it. On a GPU one side after the
other is alone in memory.

    ours      with the kernels
    graph     ours, replayed as a CUDA graph
    plain     the same network in plain torch
    official  the code of a checkout of github.com/chenxin061/pdarts in the folder DIR, always in float32

"Of peak" is the share of the rate of this machine's own matrix products, of 2048 x 2048 (8192 x 8192 on a GPU), that a
side reaches: the operations of the step's products and convolutions in the time it takes.

The first stage has all candidates; stages 2 and 3, in all sides, have those that the official code keeps in the first
search of testdata/derive.json.

The evaluation: the same for its networks, C x cells, with auxiliary head and drop-path of 0.2; found right in float64,
against the official code too, which takes ours' state_dict. "Official-cl" is that code in channels-last.

The losses: a step of the weights and one of the alphas in turn, on the same images (of CIFAR-10 in DIR, or generated
ones), from the same start, without dropout, by their relative distance from plain torch in float64. "Last bit" is plain
torch too, from weights of which the last bits were changed: how far rounding alone carries a network away from itself.
The exit status is 1 if the kernels' losses in float64 are not the same to 4 digits.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import math
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels
import pdarts
from harness.devices import keep_freed_memory, pick_device, pick_kernels, ways_to_compute
from harness.files import reason
from harness.graphs import CapturedStep
from harness.images import load, shapes
from harness.settings import SearchSettings
from pdarts import InputError

HERE = pathlib.Path(__file__).resolve().parent

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
        self.probabilities = torch.rand(count, device=device, dtype=dtype).softmax(0).requires_grad_()
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
        y = self.sides[side](self.outputs, self.probabilities, *self.running)
        return [y, *torch.autograd.grad(y, [self.probabilities, *self.outputs], self.gradient)] if backward else y

    def least_bytes(self, backward):
        """What must move at least: inputs and result, and the same once more with their gradients."""
        tensors = self.count + 1
        if backward:
            tensors += self.count + 1 + self.count
        return tensors * self.gradient.nbytes

    def kept_bytes(self, side):
        """What autograd keeps between forward and backward."""
        return kept_bytes(lambda: self.run(side, backward=False))


def kept_bytes(forward):
    """What autograd keeps of a call of `forward` for the backward pass."""
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # a result that its own graph kept would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()  # alive, so that no memory is counted twice or missed
    del result
    return sum(kept.values())


def stack_einsum(outputs, probabilities, *running):
    if running:
        ones = torch.ones_like(probabilities)
        outputs = [
            kernels.mixed_norm_sum_ref([y], o[None], [m], [v], True) for y, o, m, v in zip(outputs, ones, *running[:2])
        ]
    return torch.einsum("k,knchw->nchw", probabilities, torch.stack(outputs))


def verify(device, dtype, channels_last):
    """The largest relative error of results and gradients against float64; SystemExit if it is too large."""
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


def measure(functions, seconds, least=5, before=0):
    """{name: function} -> {name: times in seconds}, called in turn for about `seconds` in all, but `least` times.

    before: calls in each turn that do not count: they find the memory as other sides left it.
    """

    def synchronise():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for f in functions.values() if not before else ():
        f()
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, f in functions.items():
            for _ in range(before):
                f()
            synchronise()
            start = time.perf_counter()
            result = f()
            synchronise()
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


def operation_rows(device, dtype, channels_last, batch, compiled, seconds, bandwidth):
    """The rows of the table, each a dict, as they are measured."""
    for name in OPERATIONS:
        for shape in [(batch, *shape[1:]) for shape in SHAPES]:
            for count in CANDIDATES:
                sets = 1
                if device.type == "cuda":  # until the L2 cache holds but a small part
                    sets = max(2, math.ceil(3e8 / (2 * count * 4 * math.prod(shape))))
                cases = [Case(name, shape, count, device, dtype, channels_last) for _ in range(sets)]
                compiling, problem = None, None
                if compiled:
                    try:
                        compiling = cases[0].compile()
                    except Exception as error:  # of a compiler: no reason to measure nothing else
                        problem = reason(error)
                        del cases[0].sides["compile"]
                    for case in cases:
                        case.sides = cases[0].sides
                for backward in (False, True):
                    calls = {
                        side: [functools.partial(case.run, side, backward) for case in cases] for side in cases[0].sides
                    }
                    if device.type == "cuda":
                        times = measure_cuda(calls, seconds)
                    else:
                        times = measure({side: call[0] for side, call in calls.items()}, seconds)
                    compilation = {"compile_seconds": None if backward else compiling, "compile_problem": problem}
                    yield row(cases[0], backward, times, bandwidth) | compilation


def operations(args):
    """Prints the table and returns its rows."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    pick_kernels("on", device)
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
    rows = []
    for r in operation_rows(device, dtype, args.channels_last, 96, args.compile, args.seconds, bandwidth):
        rows.append(r)
        print(line(r), flush=True)
    compiling = sum(r["compile_seconds"] or 0.0 for r in rows)
    if args.compile:
        print(f"\ntorch.compile took {compiling:.0f} s to compile, not in the figures (its cache may have helped)")
    for problem in sorted({r["compile_problem"] for r in rows} - {None}):
        print(f"torch.compile failed: {problem}")
    print("\ntimes faster than (geometric mean of the sizes)")
    for name in OPERATIONS:
        for direction in ("forward", "fwd+bwd"):
            mine = [r for r in rows if r["operation"] == name and r["pass"] == direction]
            means = {
                side: statistics.geometric_mean(r["ms"][side] / r["ms"]["fused"] for r in mine if side in r["ms"])
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


# ----------------------------------------------------------------------------------------------------------------------
# The step of a search
# ----------------------------------------------------------------------------------------------------------------------


def batches(count, batch, device, folder=None):
    """`count` batches of (images, labels), of CIFAR-10 in `folder` or generated."""
    n = count * batch
    data = load(SearchSettings(), folder) if folder else shapes(max(n, 100), 1)
    if len(data.x_train) < n:
        raise InputError(f"{data.name} has {len(data.x_train)} images; expected {n} or more for {count} batches")
    x, y = data.x_train[:n].to(device), data.y_train[:n].to(device)
    images = pdarts.Loader(x, y, pdarts.CIFAR10, data.mean, data.std).normalise(x)
    return list(zip(images.split(batch), y.split(batch)))


@functools.cache
def candidates(stage):
    """Of the edges of normal and reduction cells in a stage (from 1): see the head of this file."""
    if stage == 1:
        return ((pdarts.PRIMITIVES,) * len(pdarts.SPACE.edges),) * 2
    golden = json.loads((HERE / "testdata" / "derive.json").read_text())[0]["kept"][stage - 2]
    return tuple(tuple(tuple(pdarts.PRIMITIVES[int(k)] for k in edge) for edge in cell.split()) for cell in golden)


class OurStep:
    """A stage (from 1) as a search trains it: `run` makes a step of the weights, of the alphas, or of both."""

    def __init__(self, stage, config, images, labels, fused=True, graph=False, recompute=None):
        device, self.images, self.labels = images.device, images, labels
        if fused:
            pick_kernels("on", device)

        def prepare(network):
            network = network.to(images.dtype)
            return kernels.fuse(network, recompute) if fused else network

        def wrap(step):
            self.graphs.append(CapturedStep(step, device)) if graph else None
            return self.graphs[-1] if graph else step

        self.graphs = []
        self.search = pdarts.Search(config, pdarts.Data(None, 10, val=()), device, prepare=prepare, wrap_step=wrap)
        kept = candidates(stage)
        alphas = [torch.zeros(len(cell), len(cell[0])) for cell in kept]
        # The stage before has as many candidates as this one keeps: it keeps all of them.
        self.search.stages = [pdarts.Stage(*kept, *alphas)] * (stage - 1)
        self.search.begin_stage()
        self.network, self.weights = self.search.network, self.search.weights
        self.architecture_step = wrap(self.search.architect.update)

    def run(self, which):
        """Returns the loss, and more."""
        batch = self.images, self.labels
        if which == "alphas":
            return self.architecture_step(*batch)
        return self.search.run_step(*batch, *batch) if which == "both" else self.search.run_step(*batch)

    def forward(self):
        pdarts.require_gradients(self.weights, not_of=self.network.alphas())
        return pdarts.loss_and_logits(self.network, self.images, self.labels, self.search.config.dtype)

    def check(self):
        if any(graph.refused for graph in self.graphs):
            raise InputError("the step could not be captured as a CUDA graph; expected one (the warning says why not)")


class OfficialStep:
    """The same of the official code in float32, every backward pass of which computes all gradients."""

    def __init__(self, folder, stage, config, images, labels):
        official = official_module(folder, "model_search")
        torch.manual_seed(0)
        self.images, self.labels, self.clip = images, labels, config.clip
        normal, reduce = (
            [[name in names for name in pdarts.PRIMITIVES] for names in cell] for cell in candidates(stage)
        )
        # It moves its alphas to the GPU, whether there is one or not.
        on_cpu = mock.patch.object(torch.Tensor, "cuda", lambda t: t)
        with on_cpu if images.device.type == "cpu" else contextlib.nullcontext():
            self.network = official.Network(
                config.channels,
                10,
                config.depths[stage - 1],
                F.cross_entropy,
                switches_normal=normal,
                switches_reduce=reduce,
                p=0.0,
            ).to(images.device)
        of_alphas = self.network.arch_parameters()
        of_weights = [p for p in self.network.parameters() if all(p is not a for a in of_alphas)]
        sgd = torch.optim.SGD(of_weights, config.lr, config.momentum, weight_decay=config.weight_decay)
        adam = torch.optim.Adam(
            of_alphas, config.alpha_lr, betas=(0.5, 0.999), weight_decay=config.alpha_weight_decay
        )
        self.steps = {"weights": (of_weights, sgd), "alphas": (of_alphas, adam)}

    def forward(self):
        return F.cross_entropy(self.network(self.images), self.labels)

    def run(self, which):
        for name in ("alphas", "weights") if which == "both" else (which,):
            parameters, optimizer = self.steps[name]
            optimizer.zero_grad()
            self.forward().backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()

    def check(self):
        pass


def official_module(folder, name):
    """A module of the official code."""
    if not (pathlib.Path(folder) / f"{name}.py").is_file():
        raise InputError(f"no {name}.py in {folder}; expected a checkout of github.com/chenxin061/pdarts")
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        unused = "torchvision", "torchvision.transforms", "torchvision.datasets"  # but imported
        sys.modules.update({missing: mock.MagicMock() for missing in unused})
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        return importlib.import_module(name)


def verify_step(stage, config, images, labels):
    """Relative distances of the loss and of all gradients, fused and plain; InputError if they are too large."""
    results, allow_tf32 = [], torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # both round, but not alike
    for fused in (False, True):
        side = OurStep(stage, config, images, labels, fused)
        parameters = [*side.weights, *side.network.alphas()]
        pdarts.require_gradients(parameters)
        loss, _ = pdarts.loss_and_logits(side.network, images, labels, config.dtype)
        gradients = torch.autograd.grad(loss, parameters)
        results.append([loss.detach(), torch.cat([g.flatten() for g in gradients])])
    torch.backends.cudnn.allow_tf32 = allow_tf32
    distances = [float((mine - right).norm() / right.norm()) for right, mine in zip(*results)]
    allowed = (1e-4, 1e-2) if config.dtype == "float32" else (2e-2, 0.5)
    if not all(d <= a for d, a in zip(distances, allowed)):
        raise InputError(
            f"stage {stage}: loss and gradients of the kernels have relative distances {distances} from plain torch; "
            f"expected at most {allowed}"
        )
    return distances


def measure_steps(makers, kinds, device, seconds, rounds):
    """Builds all sides, {name: function that makes it}, and yields a dict for each kind of step and side.

    On a GPU only one side, which is then alone in memory.
    """
    gc.collect()
    on_cuda, held = device.type == "cuda", 0
    if on_cuda:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
    sides = {name: make() for name, make in makers.items()}
    images = len(next(iter(sides.values())).labels)
    kept = {name: kept_bytes(side.forward) / images for name, side in sides.items()}
    for which in kinds:
        calls = {name: functools.partial(side.run, which) for name, side in sides.items()}
        peak = reserved = None
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            for call in [*calls.values()] * (CapturedStep.WARM_UP + 2):  # with a capture
                call()
            peak, reserved = torch.cuda.max_memory_allocated() - held, torch.cuda.memory_reserved()
        for side in sides.values():
            side.check()
        times = measure(calls, seconds, least=rounds, before=0 if on_cuda else 2)
        for name in sides:
            low, median, high = statistics.quantiles(times[name], n=4)
            yield {
                "step": which,
                "side": name,
                "seconds": median,
                "spread": (high - low) / 2,
                "kept_per_image": kept[name],
                "peak": peak,
                "reserved": reserved,
            }


def steps(args):
    """Prints the table of steps and returns its rows."""
    device = torch.device(args.device)
    if args.official:
        official_module(args.official, "model_search")
    pick_kernels("on", device)
    config = dataclasses.replace(pdarts.CIFAR10, channels=args.channels, dtype=args.dtype)
    print(*header(device), f"{args.dtype}, batch {args.batch}, C = {args.channels}", sep="\n")
    print("candidates of stages 2 and 3: those of the first search of testdata/derive.json")
    ((images, labels),) = batches(1, args.batch, device)
    peak = matrix_peak(device, args.dtype, min(1, args.seconds))
    rows = []
    for stage in args.stages:
        distances = verify_step(stage, config, images, labels)
        print("\nverified: relative distances of loss {:.1e} and gradients {:.1e} from plain torch".format(*distances))
        ours = functools.partial(OurStep, stage, config)
        makers = {"ours": ours}
        if device.type == "cuda":
            makers["graph"] = functools.partial(ours, graph=True)
        makers["plain"] = functools.partial(ours, fused=False)
        if args.official:
            makers["official"] = functools.partial(OfficialStep, args.official, stage, config)
        about = {"stage": stage, "cells": config.depths[stage - 1], "K": config.keep[stage - 1]}
        rows += print_steps(args, about, makers, ("weights", "alphas"), images, labels, peak)
    return rows


def print_steps(args, about, makers, kinds, images, labels, peak):
    """Prints a table of what `measure_steps` yields, ours first, and returns its rows."""
    print("".join(f"{name:>7}" for name in about), f"  {'step of':9}{'side':12}", end="")
    print(f"{'seconds':>17}{'to ours':>10}{'of peak':>9}{'kept MB/image':>15}")
    work = {which: operations_of(makers["plain"](images[:2], labels[:2]), which) * len(labels) / 2 for which in kinds}
    makers = {name: functools.partial(make, images, labels) for name, make in makers.items()}
    together = [makers] if images.device.type == "cpu" else [{name: make} for name, make in makers.items()]
    least, rows = {}, []
    for group in together:
        for r in measure_steps(group, kinds, images.device, args.seconds, args.rounds):
            seconds, ours = r["seconds"], least.setdefault(r["step"], r["seconds"])
            share = work[r["step"]] / seconds / peak
            rows.append({**about, **r, "times_ours": seconds / ours, "of_peak": share})
            print("".join(f"{value:>7}" for value in about.values()), f"  {r['step']:9}{r['side']:12}", end="")
            print(f"{seconds:>9.4f} +-{r['spread']:6.4f}{seconds / ours:>8.2f} x{share:>8.1%}", end="")
            print(f"{r['kept_per_image'] / 1e6:>15.1f}" + (f"   peak {r['peak'] / 1e6:.0f} MB" if r["peak"] else ""))
            sys.stdout.flush()
    return rows


def operations_of(step, which):
    """The floating-point operations of a plain step's products and convolutions: those of its forward pass, as many for
    the gradients of their inputs, and in a step of the weights as many for those. (torch would count the weights'
    gradients of depthwise convolutions as if they were dense.)"""
    with FlopCounterMode(display=False) as counter:
        step.forward()
    return counter.get_total_flops() * (2 if which == "alphas" else 3)


def matrix_peak(device, dtype, seconds):
    """Operations per second of large matrix products."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    (times,) = measure({"product": lambda: a @ b}, seconds).values()
    return 2 * size**3 / min(times)


# ----------------------------------------------------------------------------------------------------------------------
# The step of an evaluation
# ----------------------------------------------------------------------------------------------------------------------

DROP_PATH = 0.2


class OurEvaluation:
    """The network of the P-DARTS cell as an evaluation trains it."""

    def __init__(self, config, images, labels, fused=True, graph=False):
        device, self.images, self.labels = images.device, images, labels

        def prepare(network):
            network = network.to(images.dtype)
            return kernels.fuse(network) if fused else network

        wrap = functools.partial(CapturedStep, device=device) if graph else pdarts.identity
        genotype, data = pdarts.GENOTYPES["PDARTS"], pdarts.Data(None, 10)
        self.training = pdarts.Evaluation(genotype, config, data, device, prepare, wrap_step=wrap)
        self.network, self.weights = self.training.network, self.training.weights
        self.set_drop_path(DROP_PATH)

    def set_drop_path(self, rate):
        self.network.set_drop_path(rate)

    def forward(self):
        config = self.training.config
        return pdarts.loss_and_logits(self.network, self.images, self.labels, config.dtype, config.auxiliary_weight)

    def run(self, which):
        return self.training.run_step(self.images, self.labels)

    def check(self):
        if getattr(self.training.run_step, "refused", False):
            raise InputError("the step could not be captured as a CUDA graph; expected one (the warning says why not)")


class OfficialEvaluation:
    """The same of the official code, in float32."""

    def __init__(self, folder, config, images, labels, channels_last=False):
        official = official_module(folder, "model")
        self.config, self.images, self.labels = config, images, labels
        torch.manual_seed(0)
        genotype = pdarts.GENOTYPES["PDARTS"]
        network = official.NetworkCIFAR(config.channels, 10, config.depth, config.auxiliary, genotype)
        self.network = network.to(images.device, images.dtype)
        self.set_drop_path(DROP_PATH)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
            self.images = images.contiguous(memory_format=torch.channels_last)
        self.weights = list(self.network.parameters())
        self.optimizer = torch.optim.SGD(
            self.weights, config.lr, config.momentum, weight_decay=config.weight_decay
        )

    def set_drop_path(self, rate):
        self.network.drop_path_prob = rate

    def forward(self):
        on_cpu = mock.patch.object(torch.cuda, "FloatTensor", torch.FloatTensor)  # of which it makes drop-path's mask
        with on_cpu if self.images.device.type == "cpu" else contextlib.nullcontext():
            logits, auxiliary_logits = self.network(self.images)
        loss = F.cross_entropy(logits, self.labels)
        if auxiliary_logits is not None:
            loss = loss + self.config.auxiliary_weight * F.cross_entropy(auxiliary_logits, self.labels)
        return loss, logits

    def run(self, which):
        self.optimizer.zero_grad()
        self.forward()[0].backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        self.optimizer.step()

    def check(self):
        pass


def verify_evaluation(config, images, labels, folder=None):
    """{side: largest relative distance of loss, logits and gradients from ours in float64}; InputError if too large."""
    config = dataclasses.replace(config, dtype="float32")
    makers = {"ours": OurEvaluation, "plain": functools.partial(OurEvaluation, fused=False)}
    if folder:
        makers["official"] = functools.partial(OfficialEvaluation, folder)
    distances, right = {}, None
    for name, make in makers.items():
        side = make(config, images.double(), labels)
        if name == "ours":
            state = side.network.state_dict()
        side.network.load_state_dict(state)
        side.set_drop_path(0.0)
        loss, logits = side.forward()
        gradients = torch.autograd.grad(loss, list(side.network.parameters()))
        results = [loss.detach(), logits.detach(), torch.cat([g.flatten() for g in gradients])]
        right = right or results
        distances[name] = max(float((mine - r).norm() / r.norm()) for mine, r in zip(results, right))
    if not max(distances.values()) <= 1e-9:
        raise InputError(f"in float64 the distances from ours are {distances}; expected at most 1e-9")
    del distances["ours"]
    return distances


def evaluation_sides(config, device, official):
    """{name: function of images and labels that builds it}"""
    ours = functools.partial(OurEvaluation, config)
    sides = {"ours": ours}
    if device.type == "cuda":
        sides["graph"] = functools.partial(ours, graph=True)
    sides["plain"] = functools.partial(ours, fused=False)
    if official:
        sides["official"] = functools.partial(OfficialEvaluation, official, config)
        sides["official-cl"] = functools.partial(sides["official"], channels_last=True)
    return sides


def evaluations(args):
    """Prints the table of the evaluation's steps and returns its rows."""
    device = torch.device(args.device)
    if args.official:
        official_module(args.official, "model")
    pick_kernels("on", device)
    print(*header(device), f"{args.dtype}, batch {args.batch}, the P-DARTS cell", sep="\n")
    ((images, labels),) = batches(1, args.batch, device)
    peak, rows = matrix_peak(device, args.dtype, min(1, args.seconds)), []
    for channels, cells in args.networks:
        config = pdarts.EvaluateConfig(channels=channels, depth=cells, dtype=args.dtype)
        distances = verify_evaluation(config, images[:8], labels[:8], args.official)
        for side, distance in distances.items():
            print(f"\nverified: in float64 ours has a relative distance of {distance:.1e} from {side}", end="")
        print()
        makers = evaluation_sides(config, device, args.official)
        rows += print_steps(args, {"C": channels, "cells": cells}, makers, ("weights",), images, labels, peak)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# A whole search
# ----------------------------------------------------------------------------------------------------------------------


def search(args):
    """Prints the table of epochs: a search of the paper's networks on a few images, and what follows from it."""
    device = torch.device(args.device)
    half = args.batch * (20 if device.type == "cuda" else 1)  # images of each half
    paper = pdarts.CIFAR10
    # The second epoch of weights and the second with alphas count: the first ones warm up.
    config = dataclasses.replace(
        paper, channels=args.channels, dtype=args.dtype, batch_size=args.batch, epochs=4, alpha_start=2
    )
    sizes = f"{args.dtype}, batch {args.batch}, C = {args.channels}, {half} images in each half"
    print(*header(device), sizes, sep="\n")
    fused = pick_kernels("on", device)
    images = shapes(max(2 * half, 100), 1).to(device)
    x, y = images.x_train[: 2 * half], images.y_train[: 2 * half]
    data = pdarts.search_data(x, y, config, 10, images.mean, images.std)
    seconds, start = [], time.perf_counter()
    for event in pdarts.Search(config, data, device, **ways_to_compute(device, fused, args.graphs, None)):
        if isinstance(event, pdarts.Epoch):
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append((now - start) * 25000 / half)
            start = now
    print(f"\n{'stage':7}{'cells':>5}{'K':>3}{'weights only':>16}{'with alphas':>15}   (seconds per 25,000 images)")
    rows, whole = [], 0.0
    for stage in range(3):
        plain, both = seconds[4 * stage + 1], seconds[4 * stage + 3]
        rows.append({"stage": stage + 1, "epoch": plain, "epoch_with_alphas": both})
        print(f"{stage + 1:<7}{config.depths[stage]:>5}{config.keep[stage]:>3}{plain:>16.1f}{both:>15.1f}")
        whole += paper.alpha_start * plain + (paper.epochs - paper.alpha_start) * both
    print(f"\nprojected, not measured: {whole / 3600:.2f} hours for the 75 epochs of the paper's search")
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def losses(args):
    """Prints the table of losses and returns its rows; SystemExit if float64 tells the two ways apart."""
    device = torch.device(args.device)
    config = dataclasses.replace(pdarts.CIFAR10, channels=args.channels)
    data = batches(2 * args.steps, args.batch, device, args.data)
    source = "CIFAR-10" if args.data else "generated images"
    print(*header(device), f"batch {args.batch}, C = {args.channels}, {source}", sep="\n")
    print("candidates of stages 2 and 3: those of the first search of testdata/derive.json")
    rows = []
    for stage in args.stages:

        def side(dtype, fused, stage=stage):
            images, labels = data[0]
            return OurStep(stage, config, images.to(dtype), labels, fused)

        sides = {
            "plain, float64": side(torch.float64, False),
            "kernels, float64": side(torch.float64, True),
            "last bit": side(torch.float64, False),
            "plain, float32": side(torch.float32, False),
            "kernels, float32": side(torch.float32, True),
        }
        torch.manual_seed(0)
        with torch.no_grad():
            for w in sides["last bit"].weights:
                w.mul_(1 + 2e-16 * torch.randn_like(w))
        names = list(sides)[1:]
        print(f"\n{'stage':7}{'step':6}{'of':9}{'plain, float64':>14}   distance from it:", end="")
        print("".join(f"{name:>18}" for name in names))
        for i, (images, labels) in enumerate(data):
            which = "alphas" if i % 2 else "weights"
            values = {}
            for name, side in sides.items():
                side.images, side.labels = images.to(side.images.dtype), labels
                values[name] = float(side.run(which)[0])
            right = values["plain, float64"]
            distance = {name: abs(values[name] - right) / abs(right) for name in names}
            rows.append({"stage": stage, "step": i // 2 + 1, "of": which, "loss": right, "distance": distance})
            if rows[-1]["step"] in (1, 2, 5, args.steps) or rows[-1]["step"] % 10 == 0:
                print(f"{stage:<7}{i // 2 + 1:<6}{which:9}{right:>14.10f}{'':20}", end="")
                print("".join(f"{distance[name]:>18.1e}" for name in names), flush=True)
    worst, itself = (max(r["distance"][name] for r in rows) for name in ("kernels, float64", "last bit"))
    print(f"\nlargest distance in float64: {worst:.1e}; of plain torch from itself, last bit changed: {itself:.1e}")
    if not worst < 1e-4:
        sys.exit("the kernels' losses are not plain torch's to 4 digits; expected that as long as the last bit's are")
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


def header(device):
    """Device; version and commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = pathlib.Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
        name = f"{model}, {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return name, f"torch {torch.__version__}, commit {commit.stdout.strip() or 'unknown'}"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"bench.py: error: {' '.join(message.split())}\n")


def network_size(text):
    """'36x20' -> (36, 20)"""
    channels, _, cells = text.partition("x")
    # With 3 cells the official auxiliary head would change, in place, what the classifier reads.
    if not (channels.isdecimal() and cells.isdecimal() and int(channels) >= 1 and int(cells) >= 4):
        raise argparse.ArgumentTypeError(f"{text!r}; expected CxCELLS, such as 36x20, with 4 cells or more")
    return int(channels), int(cells)


def _parser():
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="operations", choices=(*TABLES, "gpu", "claims"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="time for each row (default: 0.8; a step: 10; gpu: 2 and less)"
    )
    group = parser.add_argument_group("operations")
    group.add_argument("--channels-last", action="store_true", help="the memory format of all tensors")
    group.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    group = parser.add_argument_group("step, evaluate, search, losses and gpu")
    group.add_argument("--batch", type=int, metavar="N", help="images per step (default: 96; on the CPU 32, gpu: 8)")
    group.add_argument("--channels", type=int, default=16, metavar="C", help="of the first cell (default: 16)")
    group.add_argument(
        "--networks",
        type=network_size,
        nargs="+",
        default=((16, 8), (36, 20)),
        metavar="CxCELLS",
        help="evaluate: networks (default: 16x8 36x20)",
    )
    group.add_argument("--stages", type=int, nargs="+", default=(1, 2, 3), choices=(1, 2, 3), help="(default: all)")
    group.add_argument("--rounds", type=int, default=3, help="measurements of each step at least (default: 3)")
    group.add_argument("--official", metavar="DIR", help="a checkout of github.com/chenxin061/pdarts to measure too")
    group.add_argument("--no-graphs", dest="graphs", action="store_false", help="search: no CUDA graphs")
    group.add_argument("--data", metavar="DIR", help="losses, claims: the folder of CIFAR-10 (losses: or generated)")
    group.add_argument(
        "--steps", type=int, default=50, metavar="N", help="losses: of the weights (default: 50, minutes)"
    )
    group = parser.add_argument_group("claims")
    group.add_argument("--scale", default="small", choices=("small", "paper"), help="sizes (default: small)")
    group.add_argument("--seeds", type=int, default=3, metavar="N", help="searches of each kind (default: 3)")
    group = parser.add_argument_group("gpu and claims")
    group.add_argument("--out", metavar="DIR", help="folder of the results; goes on with those there")
    group.add_argument("--minutes", type=float, default=30, metavar="M", help="for all parts together (default: 30)")
    group.add_argument(
        "--parts", type=int, nargs="+", default=range(1, 12), choices=range(1, 12), help="(default: all)"
    )
    return parser


def traffic(args):
    from harness.traffic import traffic  # which imports this file again, as `bench`

    return traffic(args)


TABLES = {"operations": operations, "step": steps, "evaluate": evaluations, "search": search, "losses": losses}
TABLES["traffic"] = traffic


def main(arguments=None):
    keep_freed_memory()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    args.command = shlex.join(["python", "bench.py", *arguments])
    types = {"operations": (args.dtype,), "losses": ("float32",), "gpu": ("float32",), "traffic": ("float32",)}
    allowed = types.get(args.what, ("float32", "bfloat16"))
    if args.dtype not in allowed:
        parser.error(f"{args.what} in {args.dtype}; expected {' or '.join(allowed)}")
    least = {"rounds": 2, "steps": 1, "channels": 1, "batch": 2, "seeds": 1}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            parser.error(f"--{name} is {value}; expected {bound} or more")
    if args.what == "gpu" and not (args.out and args.minutes > 0):
        parser.error(f"gpu with --out {args.out} and --minutes {args.minutes}; expected --out DIR, more than 0 minutes")
    if args.what == "claims" and not (args.data and args.out):
        parser.error("claims without --data and --out; expected both")
    args.seconds = args.seconds or {"operations": 0.8, "gpu": 2}.get(args.what, 10)
    try:
        if args.what != "gpu" or not torch.cuda.is_available():  # the report's own process must not use the GPU
            pick_device(args.device)
        on_cpu = torch.device(args.device).type == "cpu"
        large = args.what == "traffic" or not on_cpu
        args.batch = args.batch or (96 if large else 8 if args.what == "gpu" else 32)
        if args.what == "gpu":
            from harness.gpu_report import report  # which imports this file again, as `bench`

            return report(args)
        if args.what == "claims":
            from harness.claims import Claims

            try:
                return Claims(args.out, args.scale, args.seeds, args.data, args.device).run()
            except KeyboardInterrupt as stopped:
                print(f"bench.py: {str(stopped) or 'interrupted'}; the same command goes on", file=sys.stderr)
                return 130
        rows = TABLES[args.what](args)
    except InputError as error:
        parser.error(str(error))
    if args.json:
        head = dict(zip(("device", "versions"), header(torch.device(args.device))))
        pathlib.Path(args.json).write_text(json.dumps({**head, "command": args.command, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
