"""Parts 1 to 5 of harness/measure/gpu_report.py: the machine, and checks of the operators on it.

A part is a function of (args, device) that yields (name of a table, row) pairs, and raises Wrong at its end if a row is
wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from argparse import Namespace

import torch
import torch.nn.functional as F

import kernels
import pdarts
from harness.data.images import shapes
from harness.devices import deterministic, pick_kernels
from harness.files import reason
from harness.graphs import CapturedStep
from harness.measure.operations import CANDIDATES, SHAPES, sets_for
from harness.measure.search_steps import NO_DROPOUT, OurStep, batches
from harness.measure.timing import copy_bandwidth, header, time_calls
from pdarts import InputError

GPU_ONLY = "not applicable without a GPU"
SETTING_PREFIXES = ("PDARTS_", "CUDA_", "CUBLAS_", "TORCH_", "PYTORCH_", "OMP_", "NVIDIA_TF32")


class NotApplicable(Exception):
    """A part that this machine cannot run."""


class Wrong(Exception):
    """A part found wrong results, which its rows name."""


def relative(mine, right):
    """Return |mine - right| / |right|, which is nan if mine holds nan."""
    mine, right = mine.detach().double().cpu(), right.detach().double().cpu()
    return float((mine - right).norm() / right.norm().clamp(min=1e-300))


# --- 1, 2: the machine ------------------------------------------------------------------------------------------------


def versions(args, device):
    def row(what, value):
        return "", {"what": what, "value": value if isinstance(value, float) else str(value)}

    def said(*command):
        """Return the last line that a program prints."""
        if not shutil.which(command[0]):
            return "not found"
        return (subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines() or [""])[-1]

    name, commit = header(device)
    yield row("device", name)
    yield row("commit", commit)
    yield row("Python, system", f"{platform.python_version()}, {platform.platform()}")
    yield row("CPU", header(torch.device("cpu"))[0])
    yield row("torch's CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    yield row("nvcc", said("nvcc", "--version"))
    yield row("driver", said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        yield row("GPUs", torch.cuda.device_count())
        yield row("compute capability", f"{about.major}.{about.minor}")
        yield row("memory (GB), multiprocessors", f"{about.total_memory / 1e9:.1f}, {about.multi_processor_count}")
    yield row("torch.backends.cuda.matmul.allow_tf32", torch.backends.cuda.matmul.allow_tf32)
    yield row("torch.backends.cudnn.allow_tf32", torch.backends.cudnn.allow_tf32)
    yield row("torch.get_float32_matmul_precision()", torch.get_float32_matmul_precision())
    yield row("torch.backends.cudnn.benchmark", torch.backends.cudnn.benchmark)
    for variable in sorted(v for v in os.environ if v.startswith(SETTING_PREFIXES)):
        yield row(variable, os.environ[variable])
    yield row("copy bandwidth (GB/s, read and written)", copy_bandwidth(device) / 1e9)


def build(args, device):
    for kind in sorted({"cuda", "cpu"}, key=lambda kind: kind != device.type):
        start, why = time.perf_counter(), None
        try:
            kernels.load(kind)
        except (RuntimeError, OSError, ImportError) as error:
            why = reason(error)
        seconds = time.perf_counter() - start  # of the first: a library that was built before takes less than a second
        yield "", {"device": kind, "supported": why is None, "seconds to build or load": seconds, "why not": why}
        if why and kind == device.type:
            raise Wrong(f"the kernels do not support {kind}: {why}")


# --- 3: operators against float64 on the CPU --------------------------------------------------------------------------

NAMES = "mixed_sum", "mixed_norm_sum", "separable", "pool"
FUSED, PLAIN = (Namespace(**{name: getattr(kernels, name + end) for name in NAMES}) for end in ("", "_ref"))
ALLOWED = {"float64": 1e-11, "float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}


def norm_of(channels, like):
    return kernels.Norm(torch.linspace(-0.5, 0.5, channels).to(like), torch.linspace(0.5, 2, channels).to(like))


def mixed_norm_sum(f, p, *outputs, training):
    norms = [norm_of(y.shape[1], p) for y in outputs[1:]]
    return f.mixed_norm_sum(outputs, p, [None, *norms], training)  # the first: an identity


def separable(f, x, pointwise, *depthwise, stride=1, dilation=1, norm=False):
    depthwise = depthwise[0] if depthwise else None
    padding = 0 if depthwise is None else dilation * (depthwise.shape[2] // 2)
    norm = norm_of(x.shape[1], pointwise) if norm else None
    return f.separable(x, depthwise, pointwise, stride, padding, dilation, norm, training=norm is not None)


def operators(shape):
    """Yield (name, call, shapes of maps, shapes of parameters) for call(FUSED or PLAIN, *parameters, *maps)."""
    channels, many = shape[1], CANDIDATES[0]
    yield "mixed_sum", lambda f, p, *ys: f.mixed_sum(ys, p), [shape] * many, [(many,)]
    for training in (True, False):
        call = functools.partial(mixed_norm_sum, training=training)
        yield f"mixed_norm_sum, {'training' if training else 'evaluation'}", call, [shape] * many, [(many,)]
    pointwise = (channels, channels, 1, 1)
    for size, options in [
        (0, {}), (3, {}), (5, {}), (3, {"dilation": 2}), (5, {"dilation": 2}), (3, {"stride": 2}), (3, {"norm": True})
    ]:
        name = f"separable, {f'{size}x{size}' if size else 'pointwise'}"
        name += "".join(f", {key} {value}" if key != "norm" else ", normalised" for key, value in options.items())

        def call(f, *parameters, options=options):
            *weights, x = parameters
            return separable(f, x, *weights, **options)

        yield name, call, [shape], [pointwise] + [(channels, 1, size, size)] * (size > 0)
    for kind in ("max", "avg"):
        for stride in (1, 2):
            call = functools.partial(lambda f, x, kind, stride: f.pool(x, kind, stride), kind=kind, stride=stride)
            yield f"pool, {kind}, stride {stride}", call, [shape], []


def correctness(args, device):
    pick_kernels("on", device)
    torch.backends.cudnn.allow_tf32 = False
    chosen = kernels.use_on_cuda("mixed separable pool")  # in all types and layouts
    wrong, side = 0, 32 if device.type == "cuda" else 16
    layouts = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
    for dtype, allowed in ALLOWED.items():
        for layout, memory_format in layouts.items():
            for kind in zip(*(operators(shape) for shape in ((8, 16, side, side), (3, 20, 7, 9)))):
                errors = [operator_errors(*case[1:], device, getattr(torch, dtype), memory_format) for case in kind]
                value, gradient = (max(e, key=lambda x: (math.isnan(x), x)) for e in list(zip(*errors))[:2])
                right = value <= allowed and gradient <= allowed
                wrong += not right
                yield "operators", {
                    "operator": kind[0][0],
                    "dtype": dtype,
                    "layout": layout,
                    "error of the result": value,
                    "of gradients": gradient,
                    "allowed": allowed,
                    "right": right,
                    "same bits twice": all(same for *_, same in errors),
                }
    found = []
    for operations in "mixed separable pool", "mixed separable pool cell":  # one at a time, and whole cells
        kernels.use_on_cuda(operations)
        yield from network_rows(args, device, found, operations)
        if device.type != "cuda":
            break
    kernels.use_on_cuda(chosen)
    if wrong + len(found):
        raise Wrong(f"{wrong + len(found)} relative errors are larger than allowed")


def operator_errors(call, maps, parameters, device, dtype, memory_format):
    """Return the relative errors of result and gradients (the largest), and whether two calls give the same bits."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # parameters stay wide, as under autocast
    weights = [torch.randn(s, dtype=wide) / max(1, math.prod(s[1:])) ** 0.5 for s in parameters]
    leaves = [*weights, *(torch.randn(shape).to(dtype) for shape in maps)]
    right = [t.double().requires_grad_() for t in leaves]
    expected = call(PLAIN, *right)
    gradient = torch.randn(expected.shape).to(dtype)
    expected = [expected, *torch.autograd.grad(expected, right, gradient.double())]
    results = []
    for _ in range(2):
        mine = [t.to(device).clone() for t in leaves[: len(weights)]]
        mine += [t.to(device, memory_format=memory_format, copy=True) for t in leaves[len(weights) :]]
        mine = [t.requires_grad_() for t in mine]
        with torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2):
            y = call(FUSED, *mine)
        results.append([y, *torch.autograd.grad(y, mine, gradient.to(y))])
    errors = [relative(*pair) for pair in zip(results[0], expected)]
    return errors[0], max(errors[1:], key=lambda x: (math.isnan(x), x)), all(map(torch.equal, *results))


def network_rows(args, device, wrong, operations):
    """Compare loss and gradients of whole search networks, fused, with plain torch in float64 on the CPU."""
    small = {"depths": (3, 4, 5), "channels": args.channels}
    config = dataclasses.replace(pdarts.CIFAR10, skip_dropout=NO_DROPOUT, **small)  # masks would differ
    ((images, labels),) = batches(1, 8, torch.device("cpu"))
    for stage in args.stages:
        results = {}
        for name, dtype, fused in ("right", "float64", False), ("float64",) * 2 + (True,), ("float32",) * 2 + (True,):
            where = torch.device("cpu") if name == "right" else device
            x, y = images.to(where, getattr(torch, dtype)), labels.to(where)
            side = OurStep(stage, config, x, y, fused)
            parameters = [*side.weights, *side.network.alphas()]
            pdarts.require_gradients(parameters)
            loss, _ = pdarts.loss_and_logits(side.network, x, y)
            gradients = torch.autograd.grad(loss, parameters)
            results[name] = loss, torch.cat([g.flatten() for g in gradients])
        for dtype, allowed in ("float64", 1e-9), ("float32", 1e-2):
            loss, gradients = (relative(*pair) for pair in zip(results[dtype], results["right"]))
            right = loss <= allowed and gradients <= allowed
            wrong += [] if right else [stage]
            row = {"stage": stage, "operations on CUDA": operations, "dtype": dtype}
            row |= {"error of the loss": loss, "of gradients": gradients}
            yield "search networks of 3, 4 and 5 cells", row | {"allowed": allowed, "right": right}


# --- 4: captured steps ------------------------------------------------------------------------------------------------


def captured(args, device):
    if device.type != "cuda":
        raise NotApplicable
    right = True
    with deterministic(True):
        for fused in (False, True):
            for dtype in ("float32", "bfloat16"):
                row = {"network": "ours" if fused else "plain", "dtype": dtype}
                try:
                    row |= compare_captured(args, device, dtype, fused)
                except (InputError, RuntimeError) as error:
                    row |= {"problem": reason(error)}
                right = right and row.get("graphs") == 4 and row["equal bits"]
                yield "a stage of 10 epochs, with tail batches and skip dropout", row
        yield "a step that cannot be captured", (row := uncapturable(device))
    if not (right and all(row.values())):
        raise Wrong("captured steps are not plain ones, or could not be captured")


def compare_captured(args, device, dtype, fused):
    """Compare 5 steps or more of each shape of a batch; the last batch of an epoch is half as large."""
    config = pdarts.SearchConfig(
        depths=(4,),
        keep=(8,),
        skip_dropout=(0.3,),
        channels=args.channels,
        epochs=10,
        alpha_start=5,
        batch_size=32,
        dtype=dtype,
    )
    if fused:
        pick_kernels("on", device)
    images, graphs, results = shapes(160, 10).to(device), [], []

    def capture(step):
        graphs.append(CapturedStep(step, device))
        return graphs[-1]

    prepare = kernels.fuse if fused else pdarts.identity
    for wrap in (pdarts.identity, capture):
        search = pdarts.Search(config, images.search_data(config), device, prepare=prepare, wrap_step=wrap)
        losses = [
            torch.stack([t.double() for t in (event.loss, event.alpha_loss) if t is not None]).cpu()
            for event in search
            if isinstance(event, pdarts.Step)
        ]
        results.append([*losses, search.stages[-1].alphas_normal, search.stages[-1].alphas_reduce])
    differing = [i for i, pair in enumerate(zip(*results)) if not torch.equal(*pair)]
    return {
        "steps": len(results[0]) - 2,
        "graphs": 0 if graphs[0].refused else len(graphs[0].captured),  # with and without alphas, whole batch and tail
        "equal bits": not differing,
        "first different step": differing[0] if differing else None,
    }


def uncapturable(device):
    x = torch.rand(1000, device=device)
    stubborn = CapturedStep(lambda x: [x * float(x.sum())], device)  # which waits for the GPU
    right = x * float(x.sum())
    stays_plain = all(torch.equal(stubborn(x)[0], right) for _ in range(CapturedStep.WARM_UP + 3))
    draws = []
    for step in (CapturedStep(lambda x: [x + torch.rand_like(x)], device), lambda x: [x + torch.rand_like(x)]):
        for seed in range(CapturedStep.WARM_UP + 3):
            torch.manual_seed(seed)
            draws.append(step(x)[0])
    half = len(draws) // 2
    same = all(map(torch.equal, draws[:half], draws[half:]))
    return {"refused": stubborn.refused, "steps stay plain": stays_plain, "the next is captured, equal bits": same}


# --- 5: layouts of torch's own convolutions ---------------------------------------------------------------------------


def layouts(args, device):
    wrong, convolutions = 0, [("pointwise", 1, 1)]
    convolutions += [(f"depthwise {k}x{k}, dilation {d}", k, d) for k in (3, 5) for d in (1, 2)]
    for shape in [(args.batch, *shape[1:]) for shape in SHAPES]:
        for name, size, dilation in convolutions:
            for dtype in (torch.float32, torch.bfloat16):
                for layout in ("NCHW", "channels-last"):
                    convolution = Convolution(shape, size, dilation, dtype, layout, device)
                    error = convolution.error()
                    wrong += not error <= 3e-2
                    times = convolution.times(args.seconds / 10)
                    ms = {what: 1e3 * statistics.median(t) for what, t in times.items()}
                    kind = {"convolution": name, "dtype": str(dtype).removeprefix("torch."), "layout": layout}
                    yield str(list(shape)), {**kind, **ms, "all (ms)": sum(ms.values()), "error": error}
    if wrong:
        raise Wrong(f"{wrong} relative errors are larger than 0.03")


class Convolution:
    """A convolution of torch's and its gradients, on several sets of inputs, more than the L2 cache holds."""

    def __init__(self, shape, size, dilation, dtype, layout, device):
        channels = shape[1]
        groups, padding = (1 if size == 1 else channels), dilation * (size // 2)
        self.geometry = [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], groups
        memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
        sets = sets_for(2 * dtype.itemsize * math.prod(shape), device)
        like = {"device": device, "dtype": dtype}
        self.maps = [
            [torch.randn(shape, **like).to(memory_format=memory_format) for _ in range(2)] for _ in range(sets)
        ]
        self.weight = torch.randn(channels, channels // groups, size, size, **like) / size

    def forward(self, x, gradient, weight):
        _, padding, dilation, *_, groups = self.geometry
        return F.conv2d(x, weight, None, 1, padding, dilation, groups)

    def backward(self, x, gradient, weight, of_x):
        asked = [of_x, not of_x, False]
        return torch.ops.aten.convolution_backward(gradient, x, weight, None, *self.geometry, asked)[not of_x]

    def functions(self):
        of_x, of_weight = (functools.partial(self.backward, of_x=of_x) for of_x in (True, False))
        return {"forward (ms)": self.forward, "gradient of x (ms)": of_x, "of weight (ms)": of_weight}

    def error(self):
        """Return the largest relative error of the three, for some images, against float64 on the CPU."""
        some = [self.maps[0][0][:4], self.maps[0][1][:4], self.weight]
        exact = [t.double().cpu() for t in some]
        return max((relative(f(*some), f(*exact)) for f in self.functions().values()), key=lambda e: (math.isnan(e), e))

    def times(self, seconds):
        calls = {
            name: [functools.partial(f, *maps, self.weight) for maps in self.maps]
            for name, f in self.functions().items()
        }
        return time_calls(calls, seconds, self.weight.device)
