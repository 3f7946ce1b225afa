"""Compiles the sources in this folder when they are first needed, and loads them.

What is compiled lies in TORCH_EXTENSIONS_DIR/pdarts_kernels (else ~/.cache/torch_extensions/pdarts_kernels):

    NAME-DIGEST.so   a library; DIGEST is that of its content, so that a damaged one is known and built again
    NAME.failed      why the compilers refuse the sources, and all that they said; nobody tries again while it is there
    *.json           verdicts, see trust.py
    lock, build-*    one process builds at a time, in a folder of its own, while the others wait

NAME is FITS-CODES-COMPILERS: a hash of the sources, flags, torch and the processor; "cpu", or the architectures of CUDA
that are compiled for, such as compute_90+sm_80+sm_90; a hash of the compilers. Where there are none, or they fail, the
newest library that fits and runs here serves, whatever compiled it. A library can be built ahead of time:

    python -m kernels.build [--cuda 8.0 9.0]
"""

from __future__ import annotations

import argparse
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
import time

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
_FLAGS = ["-O3", _NATIVE, "-Wno-psabi", *os.environ.get("PDARTS_KERNELS_FLAGS", "").split()]

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


class NoCompiler(RuntimeError):
    """There is no compiler, or none that fits torch."""


def load_library() -> tuple[str, bool]:
    """Builds what is not built yet, and loads it: for CUDA too where that is possible, else for the CPU only.

    Returns why CUDA is not served, "" if it is, and whether that is because a build failed. RuntimeError or OSError if
    nothing could be loaded.
    """
    why = NoCompiler("torch finds no CUDA device")
    if torch.version.cuda is not None and torch.cuda.is_available():
        try:
            _open(_available(True))
            return "", False
        except (RuntimeError, OSError) as error:
            why = error
    _open(_available(False))
    return str(why), not isinstance(why, NoCompiler)


def _available(cuda):
    """The library, built now if need be; else, where nothing can be built, the newest one that runs here."""
    try:
        return _library(cuda_toolkit() if cuda else None)
    except RuntimeError:
        library = _kept(f"{fits()}-*", lambda codes: _runs(codes) if cuda else codes == {"cpu"})
        if library is None:
            raise
        return library


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
    if torch.version.cuda is None:
        raise NoCompiler("this torch is built without CUDA")
    tried = {}
    for home in map(pathlib.Path, _toolkits()):
        lacks = [part for part in ("bin/nvcc", "include/cuda_runtime_api.h") if not (home / part).exists()]
        if not lacks:
            break
        tried[home] = f"{home} (no {lacks[0]})"
    else:
        raise NoCompiler(
            "there is no CUDA toolkit; expected nvcc in PATH or the toolkit's folder in CUDA_HOME; tried "
            + ", ".join(tried.values())
        )
    release = re.search(r"release (\d+)(\.\d+)?", _asked(_nvcc(home), "--version"))
    if release and release[1] != torch.version.cuda.split(".")[0]:
        raise NoCompiler(
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
        raise NoCompiler(f"there is no C++ compiler {command!r}; expected one in PATH or named by CXX")
    return shlex.split(command)


def _asked(command, *arguments):
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run([*command, *arguments], **streams).stdout.decode(errors="replace")


def _architectures(toolkit):
    """The code that the devices here need, and all that nvcc makes, such as sm_90 and compute_90, which is PTX.

    For each device that is the newest that nvcc knows and the device runs; TORCH_CUDA_ARCH_LIST is left to torch.
    """
    from torch.utils import cpp_extension

    if os.environ.get("TORCH_CUDA_ARCH_LIST", "native") not in ("", "native"):
        try:
            flags = cpp_extension._get_cuda_arch_flags()
        except ValueError as error:
            raise RuntimeError(f"the fused kernels could not be built: {error}") from error
        codes = set(re.findall(r",code=(\w+)", " ".join(flags)))
        return codes, codes
    known = [divmod(int(n), 10) for n in re.findall(r"compute_(\d+)\b", _asked(_nvcc(toolkit), "--list-gpu-arch"))]
    best = {device: max((k for k in known if k <= device), default=device) for device in sorted(_devices())}
    needed = {_code("sm" if k[0] == device[0] else "compute", *k) for device, k in best.items()}
    return needed, needed | {_code("compute", *max(best.values()))}


def _devices():
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def _code(kind, major, minor):
    return f"{kind}_{major}{minor}"


def _runs(codes):
    """Whether every device here runs some of this code: such as is made for its major version, or PTX; not newer."""
    return codes != {"cpu"} and all(
        any(_code("sm", major, m) in codes for m in range(minor + 1))
        or any(_code("compute", *divmod(n, 10)) in codes for n in range(10 * major + minor + 1))
        for major, minor in _devices()
    )


def processor():
    """What a library that was compiled for this machine needs: the cache may be shared with machines of other kinds.

    Flags of the user's that name a processor, such as -march=x86-64-v3, make one library for all that have it.
    """
    if any(flag.startswith(("-march=", "-mcpu=")) for flag in _FLAGS if flag != _NATIVE):
        return platform.machine()
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
    needed, made = _architectures(toolkit) if toolkit else ({"cpu"}, {"cpu"})
    compilers = _compilers(toolkit)
    name = f"{fits()}-{'+'.join(sorted(made))}-{compilers}"

    def kept():
        return _kept(f"{fits()}-*-{compilers}", needed.issubset, name)

    try:
        return once(cache(), kept, lambda: _build(name, toolkit, made))
    except OSError as error:
        raise RuntimeError(
            f"the fused kernels cannot be kept in {cache()}: {error.strerror}; expected a folder that can be written; "
            "TORCH_EXTENSIONS_DIR names another"
        ) from error


def cache() -> pathlib.Path:
    from torch.utils import cpp_extension

    folder = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    return folder.absolute() / "pdarts_kernels"


def once(folder, find, make):
    """What `find` finds, else what one process makes while others wait; OSError if nothing can be kept in `folder`.

    Locks may not reach from machine to machine: two may make the same.
    """
    found = find()
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            with contextlib.suppress(OSError, AttributeError):  # where there are no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            found = find()
            if found is None:
                found = make()
    return found


def hash_of(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def fits() -> str:
    """What a library must have been made for to run here, the devices aside: the beginning of its name."""
    return hash_of(version(), torch.__version__, processor(), _FLAGS)


def _compilers(toolkit):
    parts = [_asked(_compiler(), "--version")]
    if toolkit:
        read = ("CC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # by torch and nvcc
        parts += [toolkit, _asked(_nvcc(toolkit), "--version"), *map(os.environ.get, read)]
    return hash_of(*parts)


def _kept(names, serves, name=None):
    """The newest library of these names in the cache whose codes serve, None if there is none.

    RuntimeError if the sources were refused before, under `name`.
    """
    for library in sorted(cache().glob(f"{names}-*.so"), key=os.path.getmtime, reverse=True):
        beginning, _ = library.name.rsplit("-", 1)
        if not serves(set(beginning.split("-")[1].split("+"))):
            continue
        if library.name == _name(beginning, library):
            return library
        with contextlib.suppress(OSError):
            library.unlink()
    failed = cache() / f"{name}.failed"
    if name and failed.exists():
        raise RuntimeError(_failure(failed.read_text().partition("\n")[0], failed))
    return None


def _name(name, library):
    return f"{name}-{hashlib.sha256(pathlib.Path(library).read_bytes()).hexdigest()[:16]}.so"


def _failure(why, failed):
    return f"the fused kernels could not be built: {why}; delete {failed}, which holds all of the output, to try again"


def _build(name, toolkit, codes):
    from torch.utils import cpp_extension

    for scratch in cache().glob("build-*"):  # of a build that was killed: none takes a day
        if time.time() - scratch.stat().st_mtime > 24 * 3600:
            shutil.rmtree(scratch, ignore_errors=True)
    print("compiling the fused kernels, once on this machine ...", file=sys.stderr)
    cuda, failed = toolkit is not None, cache() / f"{name}.failed"
    with tempfile.TemporaryDirectory(dir=cache(), prefix="build-", ignore_cleanup_errors=True) as scratch:
        try:
            with _surroundings(toolkit, pathlib.Path(scratch)):
                compile_flags, link_flags = _openmp(pathlib.Path(scratch))
                built = cpp_extension.load(
                    name="pdarts_kernels",
                    sources=[str(SOURCES / name) for name in _SOURCES + _CUDA_SOURCES * cuda],
                    extra_cflags=[*_FLAGS, *compile_flags, f"-DPDARTS_VERSION={version()}", *["-DPDARTS_CUDA"] * cuda],
                    extra_cuda_cflags=["-O3", *(f"-gencode=arch={c.replace('sm', 'compute')},code={c}" for c in codes)],
                    extra_ldflags=["-shared", f"-L{scratch}", *link_flags],
                    build_directory=scratch,
                    with_cuda=cuda,
                    # Else torch would load the library too, from here, and nothing unloads it if the rest fails.
                    is_python_module=False,
                    is_standalone=True,
                )
        except Exception as error:  # of any kind: no ninja, a compiler fails, ...
            raise RuntimeError(_explained(str(error), failed)) from error
        library = cache() / _name(name, built)
        os.replace(built, library)
    return library


def _openmp(folder):
    """Flags for the compiler and the linker. Clang's library for threads may be missing; a Mac's torch brings it."""
    if "clang" not in _asked(_compiler(), "--version"):
        return ["-fopenmp"], []
    of_torch, source = pathlib.Path(torch.__file__).parent, folder / "openmp.cpp"
    flags = ["-Xpreprocessor", "-fopenmp", f"-I{of_torch / 'include'}"], [f"-L{of_torch / 'lib'}", "-lomp"]
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    _asked(_compiler(), source, *flags[0], *flags[1], "-o", folder / "openmp")
    if (folder / "openmp").exists():
        return flags
    print("one thread for the fused kernels: the compiler finds no libomp", file=sys.stderr)
    return [], []


@contextlib.contextmanager
def _surroundings(toolkit, scratch):
    """What torch and the linker read during a build, put back afterwards."""
    from torch.utils import cpp_extension

    runtime = list(toolkit.glob("lib*/libcudart.so*")) if toolkit else []
    if runtime and not any(path.suffix == ".so" for path in runtime):  # pip's: the linker looks for the short name
        os.symlink(runtime[0], scratch / "libcudart.so")

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


def main():
    """Builds ahead of time, such as where there is a compiler but no GPU, for machines where it is the other way."""
    parser = argparse.ArgumentParser(description="Build the fused kernels and print where the library is.")
    which = "also for GPUs of these compute capabilities, such as 8.0 9.0"
    parser.add_argument("--cuda", nargs="+", type=float, metavar="CAPABILITY", help=which)
    args = parser.parse_args()
    try:
        if args.cuda:
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(map(str, sorted(args.cuda))) + "+PTX"
        print(_library(cuda_toolkit() if args.cuda else None))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
