"""Times, memory and the machine: the parts that all measurements share."""

from __future__ import annotations

import functools
import gc
import pathlib
import statistics
import subprocess
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import pdarts
from harness.graphs import CapturedStep

ROOT = pathlib.Path(pdarts.__file__).resolve().parent


def header(device: torch.device) -> tuple[str, str]:
    """Return the name of the device, and the version of torch with the commit of this repository."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = pathlib.Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
        name = f"{model}, {torch.get_num_threads()} threads"
    return name, f"torch {torch.__version__}, commit {commit()}"


def commit() -> str:
    """Return the commit of this repository, and whether files differ from it."""
    described = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


# --- Times ------------------------------------------------------------------------------------------------------------


def time_in_turn(functions, seconds, least=5, before=0):
    """Call all functions, {name: function}, in turn for about `seconds` in all; return {name: times in seconds}.

    Every function is timed at least `least` times. before: the untimed calls in each turn, which find the memory as
    the other functions left it.
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


def time_graphs(calls, seconds):
    """Do the same on a GPU. calls: {name: functions, one for each set of inputs}, which become one CUDA graph each."""
    graphs = {}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for name, functions in calls.items():
        with torch.cuda.stream(stream):
            for f in functions:
                f()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for f in functions:
                f()
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / 1e3 / len(calls[name]))
    return times


def time_calls(calls, seconds, device):
    """Time {name: calls, one for each set of inputs} on the device; the CPU takes the first set only."""
    if device.type == "cuda":
        return time_graphs(calls, seconds)
    return time_in_turn({name: first for name, (first, *_) in calls.items()}, seconds)


def copy_bandwidth(device) -> float:
    """Return the bytes per second, read and written, of a copy that is too large for any cache."""
    a = torch.randn(1 << (28 if device.type == "cuda" else 24), device=device)
    b = torch.empty_like(a)
    (times,) = time_calls({"copy": [lambda: b.copy_(a)]}, 0.5, device).values()
    return 2 * a.nbytes / statistics.median(times)


def matrix_peak(device, dtype: str, seconds) -> float:
    """Return the operations per second of large matrix products."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    (times,) = time_in_turn({"product": lambda: a @ b}, seconds).values()
    return 2 * size**3 / min(times)


# --- Memory and operations --------------------------------------------------------------------------------------------


def saved_bytes(forward) -> int:
    """Return the bytes that autograd saves for the backward pass of a call of `forward`."""
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # a result that its own graph saves would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()  # alive, so that no memory is counted twice or missed
    del result
    return sum(saved.values())


def operations_of(step, which: str) -> int:
    """Return the floating-point operations of a plain step's products and convolutions.

    The gradients of their inputs take as many as the forward pass, and so do, in a step of the weights, those of the
    weights. (torch would count the weights' gradients of depthwise convolutions as if they were dense.)
    """
    with FlopCounterMode(display=False) as counter:
        step.forward()
    return counter.get_total_flops() * (2 if which == "alphas" else 3)


# --- Steps ------------------------------------------------------------------------------------------------------------


def time_steps(makers, kinds, device, seconds, rounds):
    """Build all sides, {name: function that builds one}, and yield a dict for each kind of step and each side.

    On a GPU there is one side at a time, which is alone in memory.
    """
    gc.collect()
    on_cuda, held = device.type == "cuda", 0
    if on_cuda:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
    sides = {name: make() for name, make in makers.items()}
    images = len(next(iter(sides.values())).labels)
    saved = {name: saved_bytes(side.forward) / images for name, side in sides.items()}
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
        times = time_in_turn(calls, seconds, least=rounds, before=0 if on_cuda else 2)
        for name in sides:
            low, median, high = statistics.quantiles(times[name], n=4)
            yield {
                "step": which,
                "side": name,
                "seconds": median,
                "spread": (high - low) / 2,
                "saved_per_image": saved[name],
                "peak": peak,
                "reserved": reserved,
            }
