"""Compiles the sources in this folder when they are first needed, and loads them.

What is compiled lies in TORCH_EXTENSIONS_DIR/pdarts_kernels (else ~/.cache/torch_extensions/pdarts_kernels):

    KEY-DIGEST.so    a library; DIGEST is that of its content, so that a damaged one is known and built again
    KEY.failed       why the compilers refuse the sources, and all that they said; nobody tries again while it is there
    lock, build-*    one process builds at a time, in a folder of its own, while the others wait

KEY is a hash of all that decides what comes out: sources, flags, torch, compilers, processor, kinds of CUDA devices.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER = pathlib.Path(__file__).resolve().parent
SOURCES = FOLDER / "csrc"
_SOURCES = ("cpu/separable.cpp", "torch/operators.cpp", "cpu/mixed.cpp", "cpu/cell.cpp")  # the slowest first
_CUDA_SOURCES = ("cuda/cell.cu", "cuda/mixed.cu")
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
# PDARTS_KERNELS_FLAGS: more of them, such as sanitizers
_FLAGS = ["-O3", _NATIVE, "-fopenmp", "-Wno-psabi", *os.environ.get("PDARTS_KERNELS_FLAGS", "").split()]

# Where CUDA toolkits are; the last is where pip puts the packages nvidia-cuda-nvcc and nvidia-cuda-runtime.
_TOOLKITS = (
    f"/usr/local/cuda-{torch.version.cuda}",
    "/usr/local/cuda",
    "/usr/local/cuda-*",
    "/opt/cuda",
    str(pathlib.Path(torch.__file__).parents[1] / "nvidia" / "cu[0-9]*"),
)

# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def version() -> str:
    """Of the sources in this folder; the library knows it too."""
    content = hashlib.sha256()
    for path in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
        content.update(path.read_bytes())
    return f"v{content.hexdigest()[:16]}"


def loaded() -> bool:
    """Whether the operators are there already; RuntimeError if they are those of other sources.

    Two copies of this folder in one process share them: to register their names twice would end the process.
    """
    if not hasattr(torch.ops.pdarts, "mixed"):
        return False
    if not hasattr(torch.ops.pdarts, "version") or torch.ops.pdarts.version() != version():
        raise RuntimeError(
            f"this process uses the kernels of another folder, whose sources differ from those in {FOLDER}; expected "
            "one version of the kernels per process"
        )
    return True


def load_library() -> tuple[str, bool]:
    """Builds what is not built yet, and loads it: for CUDA too where that is possible, else for the CPU only.

    Returns why CUDA is not served, "" if it is, and whether that is because a build failed. RuntimeError or OSError if
    nothing could be loaded.
    """
    why, toolkit = "torch finds no CUDA device", None
    if torch.version.cuda is not None and torch.cuda.is_available():
        try:
            toolkit = cuda_toolkit()
            _open(_library(toolkit))
            return "", False
        except (RuntimeError, OSError) as error:
            why = str(error)
    _open(_library(None))
    return why, toolkit is not None


def _open(library):
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise RuntimeError(f"{library} cannot be loaded: {error}; delete it to build it again") from error


# ----------------------------------------------------------------------------------------------------------------------
# Compilers
# ----------------------------------------------------------------------------------------------------------------------


def cuda_toolkit() -> pathlib.Path:
    """The folder with nvcc and the headers; torch's guess is neither where nvcc is a script or a link.

    RuntimeError if there is none, naming all that was tried, or if it does not fit torch.
    """
    tried = {}
    for home in map(pathlib.Path, _toolkits()):
        lacks = [part for part in ("bin/nvcc", "include/cuda_runtime_api.h") if not (home / part).exists()]
        if not lacks:
            break
        tried[home] = f"{home} (no {lacks[0]})"
    else:
        raise RuntimeError(
            "there is no CUDA toolkit; expected nvcc in PATH or the toolkit's folder in CUDA_HOME; tried "
            + ", ".join(tried.values())
        )
    release = re.search(r"release (\d+)(\.\d+)?", _asked(_nvcc(home), "--version"))
    if release and release[1] != torch.version.cuda.split(".")[0]:
        raise RuntimeError(
            f"nvcc in {home} is of CUDA {release[1]}{release[2] or ''}, torch {torch.__version__} of CUDA "
            f"{torch.version.cuda}; expected the same major version; CUDA_HOME names another toolkit"
        )
    return home


def _toolkits():
    """Folders that may hold a CUDA toolkit, the likeliest first."""
    from torch.utils import cpp_extension

    guess = cpp_extension.CUDA_HOME  # of the environment variable, or beside the nvcc in PATH
    if guess:
        yield guess
    for nvcc in filter(None, [shutil.which("nvcc", path=f"{guess}/bin"), shutil.which("nvcc")]):
        said = _asked([nvcc], "--dryrun", "-x", "cu", "-c", os.devnull)  # where it really is
        yield from (pathlib.Path(top.strip()).resolve() for top in re.findall(r"\bTOP=(.+)", said))
        yield pathlib.Path(nvcc).resolve().parents[1]
    for pattern in _TOOLKITS:
        found = sorted(glob.glob(pattern), key=lambda home: [int(number) for number in re.findall(r"\d+", home)])
        yield from found[::-1] or [pattern]


def _nvcc(home):
    return shlex.split(os.environ.get("PYTORCH_NVCC", "")) or [str(home / "bin" / "nvcc")]  # as torch does


def _compiler():
    from torch.utils import cpp_extension

    command = cpp_extension.get_cxx_compiler()
    if not shlex.split(command) or shutil.which(shlex.split(command)[0]) is None:
        raise RuntimeError(f"there is no C++ compiler {command!r}; expected one in PATH or named by CXX")
    return shlex.split(command)


def _asked(command, *arguments):
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run([*command, *arguments], **streams).stdout.decode(errors="replace")


def _architectures():
    """nvcc's flags for the devices that are there, the newest also as PTX. TORCH_CUDA_ARCH_LIST is left to torch."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native"):
        return []
    known = (int(re.sub(r"\D", "", name)) for name in torch.cuda.get_arch_list())
    newest = divmod(max(known, default=1000), 10)  # that torch's nvcc knows; its code runs on later ones of its kind
    there = sorted({min(torch.cuda.get_device_capability(i), newest) for i in range(torch.cuda.device_count())})
    names = [f"{major}{minor}" for major, minor in there]
    codes = [(name, f"sm_{name}") for name in names] + [(name, f"compute_{name}") for name in names[-1:]]
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in codes]


def _processor():
    """What a library that was compiled for this machine needs: the cache may be shared with machines of other kinds."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return platform.machine(), features


# ----------------------------------------------------------------------------------------------------------------------
# Building
# ----------------------------------------------------------------------------------------------------------------------


def _library(toolkit):
    """The built library, for CUDA unless `toolkit` is None."""
    from torch.utils import cpp_extension

    cache = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    cache = cache.absolute() / "pdarts_kernels"
    key = _key(toolkit)
    library = _kept(cache, key)
    if library:
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / "lock", "w")
    except OSError as error:
        raise RuntimeError(
            f"the fused kernels cannot be kept in {cache}: {error.strerror}; expected a folder that can be written; "
            "TORCH_EXTENSIONS_DIR names another"
        ) from error
    with lock:
        locked = _locked(lock)
        library = _kept(cache, key)  # by whom this process waited for
        if not library:
            if locked:  # nobody builds, these were killed
                for scratch in cache.glob("build-*"):
                    shutil.rmtree(scratch, ignore_errors=True)
            library = _build(cache, key, toolkit)
    return library


def _key(toolkit):
    parts = [version(), torch.__version__, _processor(), _FLAGS, _asked(_compiler(), "--version")]
    if toolkit:
        read = (
            "TORCH_CUDA_ARCH_LIST",
            "CC",
            "NVCC_CCBIN",
            "NVCC_PREPEND_FLAGS",
            "NVCC_APPEND_FLAGS",
        )  # by torch and nvcc
        parts += [toolkit, _asked(_nvcc(toolkit), "--version"), _architectures(), *map(os.environ.get, read)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _kept(cache, key):
    """The library in the cache, None if there is none; RuntimeError if the sources were refused before."""
    for library in cache.glob(f"{key}-*.so"):
        if library.name == _name(key, library):
            return library
        with contextlib.suppress(OSError):
            library.unlink()
    try:
        why = (cache / f"{key}.failed").read_text().partition("\n")[0]
    except OSError:
        return None
    raise RuntimeError(_failure(why, cache / f"{key}.failed"))


def _name(key, library):
    return f"{key}-{hashlib.sha256(pathlib.Path(library).read_bytes()).hexdigest()[:16]}.so"


def _failure(why, failed):
    return f"the fused kernels could not be built: {why}; delete {failed}, which holds all of the output, to try again"


def _locked(file):
    """Waits for the lock on a file, which its holder's death releases; False where there are none, which is safe."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, AttributeError):
        return False
    return True


def _build(cache, key, toolkit):
    from torch.utils import cpp_extension

    print("compiling the fused kernels, once on this machine ...", file=sys.stderr)
    cuda = toolkit is not None
    with tempfile.TemporaryDirectory(dir=cache, prefix="build-", ignore_cleanup_errors=True) as scratch:
        try:
            with _surroundings(toolkit, pathlib.Path(scratch)):
                built = cpp_extension.load(
                    name="pdarts_kernels",
                    sources=[str(SOURCES / name) for name in _SOURCES + _CUDA_SOURCES * cuda],
                    extra_cflags=[*_FLAGS, f"-DPDARTS_VERSION={version()}", *["-DPDARTS_CUDA"] * cuda],
                    build_directory=scratch,
                    with_cuda=cuda,
                    # Else torch would load the library too, from here, and nothing unloads it if the rest fails.
                    is_python_module=False,
                    is_standalone=True,
                    **(_cuda_settings(toolkit, scratch) if cuda else {"extra_ldflags": ["-shared"]}),
                )
        except Exception as error:  # of any kind: no ninja, a compiler fails, TORCH_CUDA_ARCH_LIST is wrong, ...
            raise RuntimeError(_explained(str(error), cache / f"{key}.failed")) from error
        library = cache / _name(key, built)
        os.replace(built, library)
    return library


def _cuda_settings(toolkit, scratch):
    runtime = list(toolkit.glob("lib*/libcudart.so*"))
    if runtime and not any(path.suffix == ".so" for path in runtime):  # pip's: the linker looks for the short name
        os.symlink(runtime[0], os.path.join(scratch, "libcudart.so"))
    return {"extra_cuda_cflags": ["-O3", *_architectures()], "extra_ldflags": ["-shared", f"-L{scratch}"]}


@contextlib.contextmanager
def _surroundings(toolkit, scratch):
    """What torch reads during a build, put back afterwards."""
    from torch.utils import cpp_extension

    # ninja lies beside this Python even where its folder is not in PATH; compilers are to say "error" in English.
    path = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)])
    before = {name: os.environ.get(name) for name in ("PATH", "LC_ALL", "CXX")}
    home, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, toolkit and str(toolkit)
    os.environ.update(PATH=path, LC_ALL="C")
    if len(_compiler()) > 1:  # torch takes "ccache g++" for the name of one program
        wrapper = scratch / "cxx"
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(_compiler())} "$@"\n')
        wrapper.chmod(0o755)
        os.environ["CXX"] = str(wrapper)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = home
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


# What may have gone when somebody tries again, or does not show in the key: such failures are not kept.
_PASSING = re.compile(
    "no space|quota|out of memory|memory exhausted|allocate memory|killed|signal terminated|due to signal|"
    "permission denied|not permitted|read-only file|no such file|not found|cannot find|input/output|too many open|"
    "interrupted system|temporarily|timed out|stale file|device or resource busy",
    re.IGNORECASE,
)
_ERRORS = r"\b(error|fatal)\b[ #\w-]*:|undefined reference|cannot find -l", r"\berror\b"


def _explained(message, failed):
    """One line that says why a build failed. `failed` keeps it if the compilers would fail again."""
    first, *lines = message.splitlines() or [""]
    if not first.startswith("Error building extension"):
        return f"the fused kernels could not be built: {first}"
    said = [  # by the compilers; ninja's own lines are its progress and, in the line after FAILED, a command
        line.strip()
        for before, line in zip([first, *lines], lines)
        if line.strip() and not line.startswith(("[", "FAILED:", "ninja:")) and not before.startswith("FAILED:")
    ]
    why = next((line for error in _ERRORS for line in said if re.search(error, line, re.IGNORECASE)), None)
    if why is None or any(map(_PASSING.search, said)):
        return f"the fused kernels could not be built: {why or [*said, *lines[-1:], first][0]}"
    with contextlib.suppress(OSError):
        failed.write_text(f"{why}\n\n{message}")
    return _failure(why, failed)
