"""Nothing is trusted on a GPU where it has not been checked: there each operation is compared with its twin, once.

That happens in processes of their own, which a wrong address ends instead of the user's. The verdict lies beside the
library, as NAME-DIGEST.KIND.json; KIND is a hash of the GPU's name and its driver.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import torch
from torch.utils import _pytree as pytree

from . import build, ops, reference
from .program import Dropout, FactorizedReduce, Norm, Pool, Separable, Sum
from .runtime import CUDA_OPERATIONS, supports

SECONDS = 120  # until a process is taken for one that hangs; one takes about 10
# The folder is imported as it lies here, whatever package it belongs to.
PROCESS = """if True:
    import importlib.util, sys
    _, folder, library, device, *operations = sys.argv
    spec = importlib.util.spec_from_file_location("checked", folder + "/__init__.py")
    sys.modules["checked"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    from checked import trust
    trust.torch.ops.load_library(library)
    trust.check(device, operations)
"""

# ----------------------------------------------------------------------------------------------------------------------
# Verdicts
# ----------------------------------------------------------------------------------------------------------------------


def verdict(device: torch.device) -> tuple[frozenset[str], str]:
    """The operations that must not run on a device, and why; they are checked unless that was done before."""
    libraries = (pathlib.Path(path) for path in torch.ops.loaded_libraries)
    library = next((path for path in libraries if path.name.startswith(build.fits())), None)
    about = _about(device)
    if library is None:
        return CUDA_OPERATIONS, "the library does not come from the cache; PDARTS_TRUST=1 trusts it unchecked"
    file = library.with_suffix(f".{build.hash_of(about)}.json")

    def kept():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # there is none, or a damaged one
            failures = dict(json.loads(file.read_text())["failures"])
            return failures if CUDA_OPERATIONS.issuperset(failures) else None

    def make():
        failures = _failures(device, library, about[0])
        part = file.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps({"device": about, "torch": torch.__version__, "failures": failures}, indent=1))
            os.replace(part, file)
        return failures

    try:
        try:
            failures = build.once(library.parent, kept, make)
        except OSError:  # nothing can be kept there
            failures = make()
    except RuntimeError as error:
        return CUDA_OPERATIONS, f"no check is possible on {about[0]}: {error}; PDARTS_TRUST=1 skips the check"
    if not failures:
        return frozenset(), ""
    why = f"wrong on {about[0]}: {'; '.join(map(str, failures.values()))}; please report this with {file}; "
    return frozenset(failures), why + "delete it to check again; PDARTS_TRUST=1 skips the check"


def _about(device):
    """What a verdict holds for, beside the library."""
    if device.type == "cpu":
        return ["the CPU", *build.processor()]
    about = torch.cuda.get_device_properties(device)
    try:
        driver = pathlib.Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        driver = f"for CUDA {torch._C._cuda_getDriverVersion()}"
    return [about.name, f"{about.major}.{about.minor}", driver]


def _failures(device, library, name):
    """Why operations fail, by name. A process ends with its first failure, and the next one checks the rest.

    RuntimeError if that is no operation's fault and may pass.
    """
    print(f"checking the fused kernels on {name}, once ...", file=sys.stderr)
    failures, rest = {}, sorted(CUDA_OPERATIONS)
    settings = {"PDARTS_TRUST": "1", "PDARTS_KERNELS": "on", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    settings["PDARTS_CUDA_OPERATIONS"] = " ".join(CUDA_OPERATIONS)
    while rest:
        command = [sys.executable, "-c", PROCESS, str(build.FOLDER), str(library), str(device), *rest]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        try:
            run = subprocess.run(command, **streams, env=os.environ | settings, timeout=SECONDS)
            output, why = run.stdout, f"status {run.returncode}"
            if run.returncode < 0:
                why = signal.Signals(-run.returncode).name
        except subprocess.TimeoutExpired as error:
            output, why = error.stdout or b"", f"no end within {SECONDS} seconds"
        except OSError as error:
            raise RuntimeError(f"Python does not start: {error}") from error
        case, said = "", []
        for line in output.decode(errors="replace").splitlines():
            if line.partition(":")[0] in (*rest, "done"):
                case, said = line, []
            else:
                said.append(line)
        if case == "done":
            break
        if why.startswith("status"):  # of Python, which says more in its last line, or the first one of a long message
            why = [why, *said[-1:], *(line for line in said if re.match(r"[\w.]*Error\b", line))][-1]
        if not case or "out of memory" in why or why in ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM"):
            raise RuntimeError(why)
        operation = case.partition(":")[0]
        failures[operation] = f"{case}: {why}"
        rest = rest[rest.index(operation) + 1 :]
    return failures


# ----------------------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------------------

SIZES = (2, 4, 5, 7), (3, 16, 8, 8)
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}  # relative errors
LAYOUTS = {
    "NCHW": torch.clone,
    "channels-last": lambda t: t.clone(memory_format=torch.channels_last),
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def check(device: str, operations: list[str]):
    """Compares operations with their twins in every type and layout that is fused; an exception ends it.

    Every case is printed when it begins.
    """
    torch.zeros(1, device=device)
    for operation in operations:
        torch.manual_seed(0)
        cases = enumerate(case for size in SIZES for case in CASES[operation](size))
        for (i, (name, arguments)), (dtype, allowed) in itertools.product(cases, ALLOWED.items()):
            if not supports(operation, torch.empty(1, dtype=dtype, device=device)):
                continue
            right = _results(getattr(reference, f"{name}_ref"), _copies(arguments, "cpu", dtype, exact=True))
            for layout, lay in LAYOUTS.items():
                print(f"{operation}: case {i}, {dtype}, {layout}", flush=True)
                mine = _results(getattr(ops, name), _copies(arguments, device, dtype, lay))
                for j, (m, r) in enumerate(zip(mine, right, strict=True)):
                    error = float((m - r).norm() / r.norm().clamp_min(1e-30))
                    if not error <= allowed:
                        raise ArithmeticError(f"result {j} has a relative error of {error:.1e}; expected <= {allowed}")
    print("done", flush=True)


def _copies(arguments, device, dtype, lay=torch.clone, exact=False):
    """With float64 tensors in `dtype`, or in that of sums if they are neither feature maps nor weights of convolutions.

    exact: rounded like that, but float64 again.
    """

    def copy(t):
        to = dtype if t.dim() == 4 else torch.promote_types(dtype, torch.float32)
        copied = t.detach().to(device, to if t.dtype == torch.float64 else t.dtype, copy=True)
        copied = copied.to(t.dtype) if exact else lay(copied) if t.dim() == 4 else copied
        return copied.requires_grad_(t.requires_grad)

    return pytree.tree_map_only(torch.Tensor, copy, arguments)


def _results(function, arguments):
    """The result, the gradients, and the running statistics afterwards."""
    tensors = [t for t in pytree.tree_leaves(arguments) if torch.is_tensor(t)]
    y = function(*arguments)
    gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    gradients = torch.autograd.grad(y, [t for t in tensors if t.requires_grad], gradient)
    return [t.detach().cpu().double() for t in (y, *gradients, *(t for t in tensors if not t.requires_grad))]


def _random(*size):
    return torch.randn(size, dtype=torch.float64).requires_grad_()


def _norm(channels):
    return Norm(_random(channels).detach(), _random(channels).detach().exp(), _random(channels), _random(channels))


def _mixed(size):
    n, c, *_ = size
    for training, p in (True, _random(4)), (False, _random(4, n)):
        yield "mixed_norm_sum", [[_random(*size) for _ in range(4)], p, [None, _norm(c), _norm(c), None], training]
    yield "mixed_sum", [[_random(*size)], _random(1)]


def _pool(size):
    for kind, stride in itertools.product(("max", "avg"), (1, 2)):
        yield "pool", [_random(*size), kind, stride]


def _separable(size):
    c = size[1]
    for k, stride, dilation in (3, 1, 1), (3, 2, 2), (5, 1, 2), (5, 2, 1), (7, 1, 1):
        weights = _random(c, 1, k, k), _random(c + 4, c, 1, 1)
        yield "separable", [_random(*size), *weights, stride, k // 2 * dilation, dilation]
    yield "separable", [_random(*size), None, _random(c, c, 1, 1)]


def _cell(size):
    """Cells with every kind of step, chained ones, sums of sums, dropout."""
    n, c, h, w = size
    for stride, training, images in (1, True, []), (2, True, [n]), (2, False, []):
        large = (h, w) if stride == 1 else (2 * h - 1, 2 * w)
        inputs = [_random(n, c, *large), _random(n, c + 4, *large), _random(*size)]
        operations = [
            Separable(0, _random(c, 1, 3, 3), _random(c, c, 1, 1), stride, 1),  # 3
            Separable(3, _random(c, 1, 7, 7), _random(c, c, 1, 1), 1, 3),  # 4
            Separable(1, _random(c + 4, 1, 5, 5), _random(c, c + 4, 1, 1), stride, 4, 2),  # 5
            Pool(0, "max", stride),  # 6
            Separable(2, None, _random(c, c, 1, 1)),  # 7
            Sum([4, 2, 5, 6, 7]),  # 8
            Pool(8, "avg"),  # 9
            Sum([9, 8, 2]),  # 10
        ]
        norms = [None, None, None, *(_norm(c) for _ in range(5)), None, _norm(c), None]
        if stride == 2:
            halves = _random(c // 2, c + 4, 1, 1), _random(c // 2, c + 4, 1, 1)
            operations += [FactorizedReduce(1, *halves), Sum([11, 10])]
            norms += [_norm(c), None]
        dropout = Dropout(torch.tensor([2**40 + 7]), torch.tensor([0.3, 0.6]), [1, 6])
        p = _random(8 + stride // 2 * 2, *images)
        yield "cell", [inputs, operations, [8, len(norms) - 1], p, norms, training, 0.1, 1e-5, dropout]


CASES = {"mixed": _mixed, "pool": _pool, "separable": _separable, "cell": _cell}
