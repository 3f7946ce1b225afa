"""Which way the operations run: plain torch or the kernels, which are built and loaded when they are first needed."""

from __future__ import annotations

import os
import threading
import warnings

import torch

MODES = ("auto", "on", "off")
CUDA_OPERATIONS = frozenset({"mixed", "separable", "pool", "cell"})  # all that can be fused on CUDA
CHECKED = () if os.environ.get("PDARTS_TRUST") == "1" else ("cuda",)  # devices on which no operation is trusted yet

_lock = threading.RLock()
_mode = os.environ.get("PDARTS_KERNELS", "auto")


def _parsed(operations: str) -> frozenset[str]:
    names = frozenset(operations.replace(",", " ").split())
    if not names <= CUDA_OPERATIONS:
        raise ValueError(
            f"the operations on CUDA are {sorted(names)}; expected some of {', '.join(sorted(CUDA_OPERATIONS))}"
        )
    return names


_cuda_operations: frozenset[str] | None = None  # as PDARTS_CUDA_OPERATIONS names them, until they are first asked for
_served: set[str] = set()  # types of device
_failures: dict[str, str] = {}  # type of device -> why the kernels do not serve it
_warned: set[str] = set()  # types of device
_distrusted: dict[int, tuple[frozenset[str], str]] = {}  # index of device -> operations that failed, and why
_no_cuda = ""  # why the library serves no CUDA device


def use(mode: str) -> str:
    """Sets how this process runs the operations: "auto", "on" or "off"; "on" builds now and raises if that fails.

    Returns the mode before.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"the mode of the kernels is {mode!r}; expected one of {MODES}")
    if mode == "on":
        load()
    before, _mode = _mode, mode
    return before


def use_on_cuda(operations: str) -> str:
    """Sets which of CUDA_OPERATIONS this process fuses on CUDA, such as "mixed cell"; returns those before."""
    global _cuda_operations
    before, _cuda_operations = " ".join(sorted(on_cuda())), _parsed(operations)
    return before


def on_cuda() -> frozenset[str]:
    """The operations that are fused on CUDA."""
    global _cuda_operations
    if _cuda_operations is None:
        _cuda_operations = _parsed(os.environ.get("PDARTS_CUDA_OPERATIONS", " ".join(CUDA_OPERATIONS)))
    return _cuda_operations


def fused(device: str | torch.device = "cpu") -> bool:
    """Whether the kernels serve tensors on `device`; builds and checks them if that is not known yet.

    Call it, or `use("on")`, before torch.compile with fullgraph=True, which cannot look into a build.
    """
    if isinstance(device, str):
        device = torch.device(device)
    kind = device.type
    if _mode not in MODES:
        raise ValueError(f"PDARTS_KERNELS is {_mode!r}; expected one of {MODES}")
    if _mode == "off":
        return False
    if kind == "cuda":
        on_cuda()  # refuses a wrong PDARTS_CUDA_OPERATIONS now
    if kind not in _served and _mode == "on":
        load(kind)
    if kind not in _served and kind not in _failures:
        try:
            load(kind)
        except (RuntimeError, OSError, ImportError) as error:
            _failures[kind] = str(error)
        for failed in _failures.keys() - _warned:  # a build for CUDA that fails is told of when the CPU needs it too
            _warned.add(failed)
            where = " on CUDA" if failed == "cuda" else ""
            _warn(f"the fused kernels{where}: {_failures[failed]}")
    if kind not in _served:
        return False
    if kind not in CHECKED:
        return True
    operations, why = distrusted(device)
    if operations & on_cuda() and _mode == "on":
        raise RuntimeError(why)
    return not operations >= CUDA_OPERATIONS


def distrusted(device: torch.device) -> tuple[frozenset[str], str]:
    """The operations that have failed their checks on a device, and why; makes the checks if that is not known yet."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    if index not in _distrusted:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return CUDA_OPERATIONS, "there are no checks while a graph is captured"
        from . import trust

        with _lock:
            if index not in _distrusted:
                _distrusted[index] = trust.verdict(torch.device(device.type, index))
                if _distrusted[index][0] & on_cuda() and _mode != "on":
                    _warn(f"{', '.join(sorted(_distrusted[index][0]))}: {_distrusted[index][1]}")
    return _distrusted[index]


def _warn(why):
    warnings.warn(f"plain torch instead of {why}", RuntimeWarning, stacklevel=4)


def load(kind: str = "cpu"):
    """Builds, unless that was done before, and loads the library; RuntimeError or OSError if it cannot serve `kind`."""
    global _no_cuda
    if kind not in ("cpu", "cuda"):
        raise RuntimeError(f"the tensors are on a device of type {kind!r}; expected cpu or cuda")
    from . import build, fake  # here, since `python -m kernels.build` imports the package first

    with _lock:
        if not build.loaded():  # by another copy of this folder
            _no_cuda, failed = build.load_library()
            if failed:
                _failures["cuda"] = _no_cuda
            fake.register()
        if not torch._C._dispatch_has_kernel_for_dispatch_key("pdarts::mixed", kind.upper()):
            raise RuntimeError(_no_cuda or "the kernels were built for the CPU only, by another copy of them")
        _served.add(kind)


def supports(operation: str, x) -> bool:
    """Whether "mixed", "separable", "pool" or "cell" is fused for a tensor like x."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and operation not in on_cuda()):
        return False
    if operation != "mixed":
        floating = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(kind)
        if not floating or (kind == "cuda" and not x.numel()):
            return False
    return runs(operation, x.device)


def runs(operation: str, device: torch.device) -> bool:
    """Whether the kernels of an operation serve `device` and can be trusted there."""
    return fused(device) and (device.type not in CHECKED or operation not in distrusted(device)[0])
