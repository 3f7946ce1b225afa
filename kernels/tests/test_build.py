"""Tests of building and loading. Compilers that fail, or only pretend, stand in for the real ones where that does."""

import contextlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils import cpp_extension

import kernels
from kernels import build
from kernels.tests.conftest import ENVIRONMENT, beside

FOLDER = pathlib.Path(kernels.__file__).parent
CXX = shutil.which(cpp_extension.get_cxx_compiler())
MAJOR = (torch.version.cuda or "13.0").split(".")[0]

# A machine with a CUDA device, as far as torch's answers go.
DEVICE = f"""if True:
    import os, sys, warnings, torch
    from torch.utils import cpp_extension
    torch.version.cuda = torch.version.cuda or "{MAJOR}.0"
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    import kernels, kernels.build
    """


def start(code, **environment):
    """What Python prints that runs `code` beside the folder of the kernels, in a process of its own."""
    environment = ENVIRONMENT | {"PDARTS_KERNELS": "auto"} | environment
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, cwd=FOLDER.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


KNOWN = "compute_75\ncompute_80\ncompute_86\ncompute_90\ncompute_100\ncompute_120"  # to the toolkits
WRITE = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done'  # what a compiler is told to


def toolkit(home, said, release=f"{MAJOR}.0", status=2):
    """A folder with a header and an nvcc, which notes its calls, says something and ends with `status`.

    Of the sources it only minds mixed.cu: which others it is called for depends on the machine.
    """
    version = f'[ "$*" = --version ] && echo "Cuda compilation tools, release {release}" && exit'
    version += f'\n[ "$*" = --list-gpu-arch ] && echo "{KNOWN}" && exit'
    others = f'case "$*" in *.cu*) case "$*" in *mixed.cu*) ;; *) {WRITE}; exit 0;; esac;; esac'
    script(home / "bin/nvcc", f'{version}\n{others}\necho "$*" >> {home}/calls\n{WRITE}\necho "{said}"; exit {status}')
    (home / "include").mkdir(exist_ok=True)
    (home / "include/cuda_runtime_api.h").touch()
    return home


def calls(home):
    return (home / "calls").read_text().splitlines() if (home / "calls").exists() else []


def pretending_compiler(folder):
    """A C++ compiler that only pretends where the code is for CUDA too."""
    return script(folder / "g++", f'case "$*" in *PDARTS_CUDA*|*mixed.cuda.o*) {WRITE};; *) exec {CXX} "$@";; esac')


@pytest.fixture
def cxx(tmp_path):
    return pretending_compiler(tmp_path)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "pdarts_kernels"


@pytest.fixture
def device(monkeypatch, cxx, cache):
    """One CUDA device, as far as torch's answers go, an empty cache and a C++ compiler that pretends."""
    monkeypatch.setattr(torch.version, "cuda", f"{MAJOR}.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setenv("CXX", str(cxx))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache.parent))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("PYTORCH_NVCC", raising=False)
    return capabilities


# --- where the kernels do not serve -----------------------------------------------------------------------------------


@beside
def test_without_a_compiler_plain_torch_is_used_with_one_warning_or_an_error_is_raised(folder):
    code = """if True:
        import warnings, torch, kernels
        outputs, weights = [torch.rand(2, 3, 4, 4)], torch.rand(1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                assert torch.equal(kernels.mixed_sum(outputs, weights), kernels.mixed_sum_ref(outputs, weights))
        print([str(w.message) for w in seen])
        try:
            kernels.use("on")
        except RuntimeError as error:
            print(error)"""
    printed = start(code, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(folder))
    why = "there is no C++ compiler 'no-such-compiler'; expected one in PATH or named by CXX"
    assert printed.splitlines() == [f'["plain torch instead of the fused kernels: {why}"]', why]


@beside
def test_where_cuda_does_not_compile_the_cpu_is_served_with_one_warning(folder):
    for first in "cpu", "cuda":
        where_cuda_does_not_compile(folder / first, first)


def where_cuda_does_not_compile(folder, first):
    home = toolkit(folder / "toolkit", "mixed.cu(7): error: made to fail")
    cxx, cache = pretending_compiler(folder), folder / "cache" / "pdarts_kernels"
    cache.mkdir(parents=True)
    code = f"""
    import shutil
    shutil.copy(kernels.build._library(None), {str(cache)!r})  # or that for the CPU would have to be built first
    os.environ |= {{"CXX": {str(cxx)!r}, "TORCH_EXTENSIONS_DIR": {str(cache.parent)!r}}}
    cpp_extension.CUDA_HOME, outputs, weights = {str(home)!r}, [torch.rand(2, 3, 4, 4)], torch.rand(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        print(kernels.fused({first!r}), kernels.fused("cpu"), kernels.fused("cuda"))
        assert torch.allclose(kernels.mixed_sum(outputs, weights), kernels.mixed_sum_ref(outputs, weights))
    print(*[w.message for w in seen], sep="\\n")
    try:
        kernels.use("on")
        kernels.fused("cuda")
    except RuntimeError as error:
        print(error)"""
    printed = start(DEVICE + code, TORCH_CUDA_ARCH_LIST="")
    served, warning, error = printed.splitlines()
    (failed,) = cache.glob("*.failed")
    assert served == f"{first == 'cpu'} True False"
    assert error == (
        f"the fused kernels could not be built: mixed.cu(7): error: made to fail; delete {failed}, which holds all "
        "of the output, to try again"
    )
    assert warning == f"plain torch instead of the fused kernels on CUDA: {error}"
    assert len(calls(home)) == 1


def test_a_compiler_may_be_named_with_arguments(tmp_path, cache, monkeypatch):
    cxx = script(tmp_path / "g++", f'case "$*" in *-o*) {WRITE};; *) exec {CXX} "$@";; esac')
    monkeypatch.setenv("CXX", f"env {cxx}")  # as "ccache g++"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache.parent))
    assert build._library(None).read_text() == "built\n"
    assert os.environ["CXX"] == f"env {cxx}"


def test_the_environment_is_put_back_where_it_names_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    before = os.environ.copy()
    with build._surroundings(None, tmp_path):
        pass
    assert os.environ.copy() == before


def test_a_failure_is_kept_until_it_is_deleted_or_a_compiler_changes(device, tmp_path, cache):
    home = toolkit(tmp_path / "toolkit", "mixed.cu(7): error: made to fail")
    before = os.environ.copy(), cpp_extension.CUDA_HOME
    for made in 1, 1, 2, 3:
        if made == 2:
            toolkit(home, "nvcc fatal   : Unsupported gpu architecture", f"{MAJOR}.9")
        if made == 3:
            for failed in cache.glob("*.failed"):
                failed.unlink()
        with pytest.raises(RuntimeError, match="Unsupported gpu" if made > 1 else "made to fail") as error:
            build._library(home)
        assert str(max(cache.glob("*.failed"), key=os.path.getmtime)) in str(error.value)
        assert len(calls(home)) == made
        assert (os.environ, cpp_extension.CUDA_HOME) == before


@pytest.mark.parametrize(
    "said",
    [
        "/tmp/t.s: fatal error: error writing: No space left on device",
        "g++: fatal error: Killed signal terminated program cc1plus",
        "nvcc error   : cicc died due to signal 9 (Kill signal)",
        "fatal error: nv/target: No such file or directory",
        "something",
    ],
)
def test_a_failure_that_may_pass_is_not_kept(device, tmp_path, cache, said):
    home = toolkit(tmp_path / "toolkit", said)
    for made in 1, 2:
        with pytest.raises(RuntimeError) as error:
            build._library(home)
        assert str(error.value) == f"the fused kernels could not be built: {said}"
        assert len(calls(home)) == made
    assert {path.name for path in cache.iterdir()} == {"lock"}


def test_other_failures_of_torch_are_told_in_a_line_too(device, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "old")
    with pytest.raises(RuntimeError, match=r"^the fused kernels could not be built: Unknown CUDA arch \(old\)"):
        build._library(toolkit(tmp_path / "toolkit", ""))
    cache.parent.mkdir()
    cache.touch()
    with pytest.raises(RuntimeError, match="the fused kernels cannot be kept in .*; expected a folder"):
        build._library(None)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", ["", "bui", "built\nx"])
def test_a_damaged_library_is_built_again(device, tmp_path, damaged):
    home = toolkit(tmp_path / "toolkit", "", status=0)
    library = build._library(home)
    assert library == build._library(home) and len(calls(home)) == 1
    library.write_text(damaged)
    assert library == build._library(home) and len(calls(home)) == 2
    assert library.read_text() == "built\n"


def test_where_the_library_for_cuda_cannot_be_loaded_the_cpu_is_served(device, tmp_path, monkeypatch):
    loaded, load = [], torch.ops.load_library
    monkeypatch.setattr(build, "cuda_toolkit", lambda: tmp_path)
    monkeypatch.setattr(build, "_library", lambda toolkit: script(tmp_path / "no.so", "") if toolkit else "cpu")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: loaded.append(path) if path == "cpu" else load(path))
    why, failed = build.load_library()
    assert loaded == ["cpu"] and failed
    assert why.startswith(f"{tmp_path}/no.so cannot be loaded: ") and why.endswith("; delete it to build it again")


def test_folders_of_builds_are_removed_when_they_are_a_day_old(device, tmp_path, cache):
    """A build on another machine, whose locks do not reach this one, may be under way in a younger one."""
    for name, hours in ("build-old", 25), ("build-new", 23):
        (cache / name).mkdir(parents=True)
        (cache / name / "object.o").touch()
        os.utime(cache / name, (time.time() - 3600 * hours,) * 2)
    build._library(toolkit(tmp_path / "toolkit", "", status=0))
    assert {path.name for path in cache.glob("build-*")} == {"build-new"}


def test_one_process_builds_while_others_wait(device, tmp_path, cache):
    fcntl = pytest.importorskip("fcntl")
    home, found = toolkit(tmp_path / "toolkit", "", status=0), []
    cache.mkdir(parents=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        others = [threading.Thread(target=lambda: found.append(build._library(home))) for _ in range(2)]
        for other in others:
            other.start()
        time.sleep(0.3)
        assert not found and not calls(home)
    for other in others:
        other.join()
    assert len(calls(home)) == 1 and len(set(found)) == 1


def test_where_nothing_can_be_compiled_the_newest_library_that_runs_serves(device, tmp_path, cache, monkeypatch):
    device[:] = (8, 0), (9, 0)
    libraries = []
    for i, release in enumerate([f"{MAJOR}.1", f"{MAJOR}.0"]):
        libraries.append(build._library(toolkit(tmp_path / "toolkit", "", release, status=0)))
        os.utime(libraries[-1], (time.time() + i,) * 2)
    monkeypatch.setattr(build, "_TOOLKITS", ())
    monkeypatch.setattr(build, "_toolkits", lambda: [tmp_path / "none"])
    with pytest.raises(RuntimeError, match="there is no C.. compiler"):
        monkeypatch.setenv("CXX", "no-such-compiler")
        build._available(False)  # those are for CUDA
    for capabilities, runs in [
        ([(9, 0)], True),
        ([(8, 6), (9, 0), (12, 0)], True),  # the last from PTX
        ([(9, 0), (7, 5)], False),
    ]:
        device[:] = capabilities
        with contextlib.nullcontext() if runs else pytest.raises(build.NoCompiler, match="there is no CUDA toolkit"):
            assert build._available(True) == libraries[1]
    device[:] = [(9, 0)]
    libraries[1].write_text("damaged")
    assert build._available(True) == libraries[0] and not libraries[1].exists()
    monkeypatch.setattr(build, "_FLAGS", ["-O0"])
    with pytest.raises(build.NoCompiler):
        build._available(True)


def test_a_library_is_built_ahead_for_gpus_that_are_not_there(device, tmp_path, cache, monkeypatch, capsys):
    home, here = toolkit(tmp_path / "toolkit", "", status=0), device[:]
    device.clear()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    monkeypatch.setattr(sys, "argv", ["build", "--cuda", "10.0", "9.0", "8.0"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # put back after the test
    build.main()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    built = capsys.readouterr().out.strip()
    assert "-compute_100+sm_100+sm_80+sm_90-" in built
    device[:] = here
    assert str(build._library(home)) == built and len(calls(home)) == 1
    device[:] = [(12, 0)]
    assert str(build._library(home)) != built and len(calls(home)) == 2  # nvcc knows a better one than PTX
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match="this torch is built without CUDA"):
        build.main()


def test_a_processor_that_the_user_names_is_the_one_that_counts(monkeypatch):
    monkeypatch.setattr(build, "_FLAGS", ["-O3", build._NATIVE])
    assert build.processor() != platform.machine()
    monkeypatch.setattr(build, "_FLAGS", ["-O3", build._NATIVE, "-march=x86-64-v3"])
    assert build.processor() == platform.machine()


def test_the_name_holds_compilers_and_architectures(device, tmp_path, cxx, monkeypatch):
    home, seen, names = toolkit(tmp_path / "toolkit", ""), set(), []
    monkeypatch.setattr(build, "once", lambda cache, find, make: make())
    monkeypatch.setattr(build, "_build", lambda name, *_: names.append(name))

    def changed(home=home):
        before = len(seen)
        build._library(home)
        seen.add(names[-1])
        return len(seen) > before

    assert changed() and not changed() and changed(None) and not changed(None)
    toolkit(home, "", f"{MAJOR}.9")
    assert changed()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert changed()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    assert changed()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    device.append((8, 0))
    assert changed()
    monkeypatch.setenv("CC", "another-gcc")  # nvcc's
    assert changed()
    script(cxx, "echo another compiler")
    assert changed() and changed(None)


def test_without_fcntl_the_folder_is_imported(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("build_without_fcntl", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = iter([None, None, "found"])
    assert module.once(tmp_path, lambda: next(made), lambda: "made") == "made"
    assert module.once(tmp_path, lambda: next(made), lambda: "made") == "found"


@beside
def test_another_version_of_the_folder_is_refused_in_the_same_process(folder):
    for name in "same", "changed":
        shutil.copytree(FOLDER, folder / name, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    with open(folder / "changed/csrc/mixed.h", "a") as file:
        file.write("// another version\n")
    code = f"""if True:
        import runpy, sys, warnings, torch, kernels
        sys.path.append({str(folder)!r})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runpy.run_module("same.build", run_name="__main__", alter_sys=True)  # python -m same.build
        import same, changed
        outputs, weights = [torch.rand(2, 3, 4, 4)], torch.rand(1)
        kernels.use("on"), same.use("on")
        right = kernels.mixed_sum(outputs, weights)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for module in kernels, same, changed, changed:
                print(module.fused(), torch.allclose(module.mixed_sum(outputs, weights), right))
        print(*[w.message for w in seen], sep="\\n")
        try:
            changed.use("on")
        except RuntimeError as error:
            print(error)"""
    library, *used, warning, error = start(code).splitlines()
    assert library == str(build._available(False))
    assert used == ["True True", "True True", "False True", "False True"]
    assert warning == f"plain torch instead of the fused kernels: {error}"
    assert error == (
        "this process uses the kernels of another folder, whose sources differ from those in "
        f"{folder / 'changed'}; expected one version of the kernels per process"
    )


# --- CUDA -------------------------------------------------------------------------------------------------------------


def test_the_toolkit_is_found_where_nvcc_is_a_script_or_a_link(device, tmp_path, monkeypatch):
    wheel, usual, real = (toolkit(tmp_path / name, "") for name in ("nvidia/cu13", "usr/local/cuda-13.1", "real"))
    toolkit(tmp_path / "usr/local/cuda-9.2", "")
    follows = script(tmp_path / "follows/bin/nvcc", f'[ "$1" = --dryrun ] && echo "#$ TOP={real}/bin/.." >&2')
    links = tmp_path / "links/bin/nvcc"
    links.parent.mkdir(parents=True)
    links.symlink_to(real / "bin/nvcc")
    silent = script(tmp_path / "silent/bin/nvcc", "exit 1")

    def found(guess, path=None):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", guess and str(guess))
        monkeypatch.setenv("PATH", str(path or tmp_path))
        return build.cuda_toolkit()

    monkeypatch.setattr(build, "_TOOLKITS", (f"{tmp_path}/usr/local/cuda-*", f"{tmp_path}/nvidia/cu[0-9]*"))
    assert found(real) == real  # torch is right
    for nvcc in follows, links:
        assert found(nvcc.parents[1]) == found(None, nvcc.parent) == real
    assert found(silent.parents[1], silent.parent) == found(None) == usual
    monkeypatch.setattr(build, "_TOOLKITS", (f"{tmp_path}/opt/cuda", f"{tmp_path}/nvidia/cu[0-9]*"))
    assert found(silent.parents[1]) == wheel
    monkeypatch.setattr(build, "_TOOLKITS", (f"{tmp_path}/opt/cuda",))
    with pytest.raises(RuntimeError) as error:
        found(silent.parents[1])
    assert str(error.value) == (
        "there is no CUDA toolkit; expected nvcc in PATH or the toolkit's folder in CUDA_HOME; tried "
        f"{tmp_path}/silent (no include/cuda_runtime_api.h), {tmp_path}/opt/cuda (no bin/nvcc)"
    )


def test_a_toolkit_of_another_major_version_is_refused(device, tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit(tmp_path / "old", "", "11.8")))
    with pytest.raises(RuntimeError) as error:
        build.cuda_toolkit()
    assert str(error.value) == (
        f"nvcc in {tmp_path}/old is of CUDA 11.8, torch {torch.__version__} of CUDA {MAJOR}.0; expected the same major "
        "version; CUDA_HOME names another toolkit"
    )


@pytest.mark.parametrize(
    "devices, flags",
    [
        ([(12, 1), (9, 0), (8, 6), (9, 0)], "compute_120 sm_120 sm_86 sm_90"),  # the toolkits know nothing above 12.0
        ([(10, 3), (8, 9)], "compute_100 sm_100 sm_86"),
        ([(13, 0), (9, 0)], "compute_120 sm_90"),
    ],
)
def test_nvcc_compiles_the_best_that_it_knows_for_every_device(device, tmp_path, devices, flags):
    device[:] = devices
    home = toolkit(tmp_path / "toolkit", "", status=0)
    library = build._library(home)
    assert gencode(home) == [f"arch={flag.replace('sm', 'compute')},code={flag}" for flag in flags.split()]
    assert library == build._library(home) and len(calls(home)) == 1


def gencode(home):
    return sorted(word.removeprefix("-gencode=") for word in calls(home)[-1].split() if word.startswith("-gencode"))


def test_nvcc_compiles_for_the_devices_that_the_user_names(device, tmp_path, monkeypatch):
    home = toolkit(tmp_path / "toolkit", "", status=0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    library = build._library(home)
    assert gencode(home) == [f"arch=compute_80,code={code}" for code in ("compute_80", "sm_80")]
    assert library == build._library(home) and len(calls(home)) == 1


def test_the_library_for_cuda_is_built_and_loaded_where_torch_and_a_toolkit_serve_it():
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    try:
        build.cuda_toolkit()
    except RuntimeError as error:
        pytest.skip(str(error))
    code = """
    kernels.load("cuda")
    served = torch._C._dispatch_has_kernel_for_dispatch_key
    names = "mixed", "cell", "dropout_masks"
    print(*[served(f"pdarts::{name}", "CUDA") for name in names], "CUDA_HOME" in os.environ)
    outputs, weights = [torch.rand(2, 3, 4, 4)], torch.rand(1)
    assert torch.allclose(kernels.mixed_sum(outputs, weights), kernels.mixed_sum_ref(outputs, weights))"""
    code = "import os; os.environ.pop('CUDA_HOME', None), os.environ.pop('CUDA_PATH', None)\n" + DEVICE + code
    assert start(code) == "True True True False\n"
