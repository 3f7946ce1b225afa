"""Operations are compared with their twins before they are used on a GPU, for which the CPU stands in."""

import json
import threading
import time

import pytest
import torch

import kernels
from kernels import build, ops, runtime, trust

PROCESS = """if True:
    import os, sys, time
    open(sys.argv[2] + ".starts", "a").write("x")
    {start}
    for operation in sys.argv[4:]:
        print(operation + ": case 3", flush=True)
        if operation == "pool":
            {pool}
    print("done")
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library whose operations are not trusted yet on the CPU; the processes that check them are stand-ins."""
    library = tmp_path / "cache" / f"{build.fits()}-cpu-0-0.so"
    library.parent.mkdir()
    monkeypatch.setattr(torch.ops, "loaded_libraries", {"libother.so", str(library)})
    monkeypatch.setattr(runtime, "CHECKED", ("cpu",))
    monkeypatch.setattr(runtime, "_mode", "auto")
    monkeypatch.setattr(runtime, "_served", {"cpu"})
    monkeypatch.setattr(runtime, "_distrusted", {})
    monkeypatch.setattr(trust, "PROCESS", PROCESS.format(start="pass", pool="pass"))
    return library


def starts(library):
    path = library.with_name(library.name + ".starts")
    return len(path.read_text()) if path.exists() else 0


def supported():
    runtime._distrusted.clear()  # as another process
    return {name for name in kernels.CUDA_OPERATIONS if kernels.supports(name, torch.zeros(1))}


def test_all_operations_are_used_after_one_check(library, recwarn):
    for _ in range(2):
        assert supported() == kernels.CUDA_OPERATIONS and kernels.fused()
    (verdict,) = library.parent.glob("*.json")
    assert verdict.name.startswith(library.stem) and json.loads(verdict.read_text())["failures"] == {}
    assert starts(library) == 1 and not recwarn


@pytest.mark.parametrize(
    "pool, why",
    [
        ("raise ArithmeticError('wrong')", "ArithmeticError: wrong"),
        ("raise RuntimeError('an illegal memory access\\nSearch for')", "RuntimeError: an illegal memory access; "),
        ("os.abort()", "SIGABRT"),
        ("time.sleep(60)", "no end within 1 seconds"),
        ("os._exit(3)", "status 3"),
    ],
)
def test_an_operation_that_fails_runs_plain_with_one_warning_and_the_others_are_used(library, monkeypatch, pool, why):
    monkeypatch.setattr(trust, "PROCESS", PROCESS.format(start="pass", pool=pool))
    monkeypatch.setattr(trust, "SECONDS", 1)
    for _ in range(2):  # the second time by the verdict
        with pytest.warns(RuntimeWarning, match="plain torch instead of pool: ") as seen:
            assert supported() == kernels.CUDA_OPERATIONS - {"pool"} and kernels.fused()
        (verdict,) = library.parent.glob("*.json")
        (message,) = (str(w.message) for w in seen)
        assert f"pool: case 3: {why}" in message and f"please report this with {verdict}; delete it" in message
    assert starts(library) == 2  # the second one for the operation after pool
    monkeypatch.setattr(runtime, "_mode", "on")
    with pytest.raises(RuntimeError, match="pool: case 3"):
        supported()
    before = kernels.use_on_cuda("mixed separable cell")  # as the user may say then
    assert kernels.fused()
    kernels.use_on_cuda(before)


@pytest.mark.parametrize(
    "start, why",
    [
        ("sys.exit('no torch')", "no torch"),
        ("os.kill(os.getpid(), 15)", "SIGTERM"),
        ("print('mixed: 1', flush=True); raise MemoryError('CUDA out of memory')", "MemoryError: CUDA out of memory"),
    ],
)
def test_what_cannot_be_checked_runs_plain_and_the_next_process_tries_again(library, monkeypatch, start, why):
    monkeypatch.setattr(trust, "PROCESS", PROCESS.format(start=start, pool="pass"))
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=f"no check is possible on the CPU: {why}; PDARTS_TRUST=1 skips"):
            assert not supported() and not kernels.fused()
    assert starts(library) == 2 and not list(library.parent.glob("*.json"))


def test_without_a_python_nothing_is_checked(library, monkeypatch):
    monkeypatch.setattr("sys.executable", "/no/python")
    with pytest.warns(RuntimeWarning, match="no check is possible on the CPU: Python does not start"):
        assert not supported()


@pytest.mark.parametrize("damaged", ["", "[]", '{"failures": ["cell"]}', '{"failures": {"cel": ""}}', "\udc80"])
def test_a_damaged_verdict_is_made_again(library, damaged):
    supported()
    (verdict,) = library.parent.glob("*.json")
    right = verdict.read_text()
    verdict.write_text(damaged, errors="surrogateescape")
    assert supported() == kernels.CUDA_OPERATIONS
    assert verdict.read_text() == right and starts(library) == 2


def test_where_no_verdict_can_be_kept_the_check_is_made_all_the_same(library, monkeypatch):
    monkeypatch.setattr(build, "once", lambda *_: open(library / "lock", "w"))
    assert supported() == kernels.CUDA_OPERATIONS and starts(library) == 1


def test_one_process_checks_while_others_wait(library, monkeypatch):
    monkeypatch.setattr(trust, "PROCESS", PROCESS.format(start="time.sleep(0.3)", pool="pass"))
    found = []
    others = [threading.Thread(target=lambda: found.append(trust.verdict(torch.device("cpu")))) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert found == [(frozenset(), "")] * 3 and starts(library) == 1


def test_within_a_capture_nothing_is_checked_and_all_is_plain(library, monkeypatch):
    monkeypatch.setattr(runtime, "CHECKED", ("cuda",))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert runtime.distrusted(torch.device("cuda", 0))[0] == kernels.CUDA_OPERATIONS
    assert not runtime._distrusted and starts(library) == 0


# --- the comparison ---------------------------------------------------------------------------------------------------


def test_right_operations_pass(fused, monkeypatch, capsys):
    monkeypatch.setattr(trust, "SIZES", trust.SIZES[:1])
    trust.check("cpu", sorted(kernels.CUDA_OPERATIONS))
    cases = capsys.readouterr().out.splitlines()
    assert cases.pop() == "done"
    for operation, types in ("mixed", 4), ("pool", 2), ("separable", 2), ("cell", 2):
        of = [case.split(", ") for case in cases if case.startswith(operation)]
        assert len(of) >= 12 and len({dtype for _, dtype, _ in of}) == types and len({layout for *_, layout in of}) == 3


def off_by_a_thousandth(y):
    return y * 1.001


def wrong_gradient(y):
    return y.detach() + 0.999 * (y - y.detach())


def one_wrong_element(y):
    return torch.cat([y.flatten()[:-1], y.flatten()[:1]]).view(y.shape)


@pytest.mark.parametrize("wrong", [off_by_a_thousandth, wrong_gradient, one_wrong_element])
@pytest.mark.parametrize("name", ["mixed_norm_sum", "separable", "pool", "cell"])
def test_wrong_operations_fail(fused, monkeypatch, name, wrong):
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *arguments: wrong(right(*arguments)))
    with pytest.raises(ArithmeticError, match="result [01] has a relative error of"):
        trust.check("cpu", [name.partition("_")[0]])


def test_running_statistics_that_do_not_move_fail(fused, monkeypatch):
    monkeypatch.setattr(ops, "_move_running", lambda *_: None)
    for operation in "mixed", "cell":
        with pytest.raises(ArithmeticError, match="result [12][0-9] has a relative error of"):
            trust.check("cpu", [operation])


@pytest.mark.slow
def test_the_processes_that_check_do_what_the_tests_above_say(fused, monkeypatch):
    start = time.perf_counter()
    library = next(path for path in torch.ops.loaded_libraries if build.fits() in path)
    assert trust._failures(torch.device("cpu"), library, "the CPU") == {}
    assert time.perf_counter() - start < 15
    broken = trust.PROCESS.replace("trust.check(", "import os; trust.ops.pool = lambda *_: os.abort(); trust.check(")
    monkeypatch.setattr(trust, "PROCESS", broken)
    failures = trust._failures(torch.device("cpu"), library, "the CPU")
    assert failures == {"pool": "pool: case 0, torch.float64, NCHW: SIGABRT"}
