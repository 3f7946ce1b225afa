"""The device of a run, and the ways to compute on it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings

import torch

from harness.distributed import processes
from harness.files import reason, short
from harness.graphs import CapturedStep
from pdarts import InputError

try:
    import kernels as fused

    fused.fuse  # noqa: B018  (there are other packages of this name)
    missing = ""
except ModuleNotFoundError as error:
    fused, missing = None, "no folder kernels lies beside pdarts.py" if error.name == "kernels" else str(error)
except (ImportError, AttributeError) as error:
    fused, missing = None, f"the folder kernels cannot be imported ({reason(error)})"


def pick_device(name: str) -> torch.device:
    """Return the device `name`; "auto" is the GPU if there is one. InputError if torch cannot use it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old names, which are refused
            device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()  # meta tensors hold no number
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    except Exception as error:  # whatever one of torch's backends leads to
        raise InputError(
            f"device {name!r} cannot be used ({reason(error)}); expected auto, cpu, cuda, cuda:1, ..."
        ) from None
    return device


def keep_freed_memory():
    """Make glibc keep the memory that this process frees for the next step.

    Otherwise large tensors go back to the system, which has to clear the pages when they come again.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        c = ctypes.CDLL(None)
        c.gnu_get_libc_version  # noqa: B018  (other libraries have other numbers)
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        c.mallopt(M_MMAP_MAX, 0)
        c.mallopt(M_TRIM_THRESHOLD, -1)
        c.mallopt(M_TOP_PAD, 64 << 20)


def entered(device: torch.device):
    """Return a block in which `device` is the current one, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def deterministic(on: bool):
    """Enter a block in which torch, if `on`, only uses operations that give the same bits every time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product of the process
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pick_kernels(mode: str | None, device: torch.device) -> bool:
    """Set whether this process uses the kernels: "on", "off", or "auto", which falls back to plain torch.

    mode may also name the operations that are fused on CUDA, as kernels.CUDA_OPERATIONS does, and means "on" then.
    None: as before, at first PDARTS_KERNELS or "auto". Return whether the kernels are used, built if they are.
    """
    named = mode is not None and mode not in ("auto", "on", "off")
    if named and device.type != "cuda":
        raise InputError(f"kernels is {short(mode)}; expected auto, on or off, or, on CUDA, operations")
    if fused is None:
        if named or mode == "on":
            raise InputError(f"kernels is {mode!r}, but {missing}; expected that folder, or auto or off")
        return False
    try:
        fused.runtime.on_cuda()  # a wrong PDARTS_CUDA_OPERATIONS is refused now, on a CPU too
        if named:
            fused.use_on_cuda(mode)
        if mode is not None:
            fused.use("on" if named else mode)
        return fused.fused(device)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise InputError(f"the kernels cannot be used: {error}") from None


def ways_to_compute(device: torch.device, kernels: bool, graphs: bool) -> dict:
    """Return the arguments `prepare` and `wrap_step` of a Search or an Evaluation.

    Graphs are for one process on a GPU: several processes wait for each other within a step.
    """
    ways = {}
    if kernels:
        ways["prepare"] = fused.fuse
    if graphs and device.type == "cuda" and processes()[1] == 1:
        ways["wrap_step"] = functools.partial(CapturedStep, device=device)
    return ways
