"""Tests of searches and evaluations as runs: their files, and resuming, bit for bit, wherever they ended."""

import collections
import copy
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import kernels
import pdarts
from harness.checkpoint import LOCK
from harness.conftest import (
    CELL,
    ENVIRONMENT,
    FAST_SEARCH,
    FUSED,
    ONE_NODE,
    ONE_STAGE,
    POOLS,
    ROOT,
    SMALL_CELL,
    TINY,
    TWO_STAGES,
    assert_same_run,
    begin,
    beside,
    fast_search,
    python,
    random_images,
    write_images,
)
from harness.devices import pick_kernels
from harness.evaluate import evaluate, fold
from harness.files import is_temporary
from harness.report.cells import PUBLISHED, check_genotype, count, read_genotype
from harness.run import Stopped
from harness.search import search
from harness.settings import EvaluateSettings
from pdarts import Evaluation, Genotype, InputError, Search, SearchSpace, SkipDropout

TRAINING = EvaluateSettings(dataset="shapes", depth=3, channels=8, epochs=3, batch_size=6, cutout=4, auxiliary=False)


@pytest.fixture
def steps(monkeypatch):
    """A list of functions; the next step of a run calls and removes the first of them."""
    following = []

    def spied(method):
        def step(*arguments):
            results = method(*arguments)
            (following.pop(0) if following else lambda: None)()
            return results

        return step

    monkeypatch.setattr(Search, "alternate", spied(Search.alternate))
    monkeypatch.setattr(Evaluation, "train", spied(Evaluation.train))
    return following


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- what a run writes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "run"
    return folder, search(TINY, images, folder, space=POOLS)


def test_log_holds_every_epoch_with_its_rates_and_both_softmax_matrices(searched):
    folder, result = searched
    log, times = records(folder / "log.jsonl"), records(folder / "times.jsonl")
    assert [(r["stage"], r["epoch"]) for r in log] == [(s, e) for s in (1, 2, 3) for e in (0, 1)]
    assert [(r["stage"], r["epoch"]) for r in times] == [(r["stage"], r["epoch"]) for r in log]
    assert all(r["seconds"] > 0 for r in times)
    for r in log:
        assert r["lr"] == pytest.approx(pdarts.cosine(0.025, r["epoch"], 2))
        initial = TINY.skip_dropout[r["stage"] - 1]
        assert r["skip_dropout"] == pytest.approx(pdarts.skip_dropout_rate(initial, r["epoch"], 2, 1))
        assert math.isfinite(r["train_loss"]) and 0 <= r["train_accuracy"] <= 1
        assert (r["alpha_loss"] is None) == (r["alpha_accuracy"] is None) == (r["epoch"] == 0)
        assert (r["test_accuracy"] is None) == (r["epoch"] == 0)  # that of the stage's network, after its last epoch
        for kind in "normal", "reduce":
            matrix = np.array(r[f"softmax_alphas_{kind}"])
            assert matrix.shape == (5, TINY.keep[r["stage"] - 1]) and np.allclose(matrix.sum(1), 1)
    assert log[-1]["softmax_alphas_normal"] == result.stages[2].alphas_normal.softmax(1).tolist()
    assert [r["test_accuracy"] for r in log if r["epoch"] == 1] == result.test_accuracies


def test_a_search_writes_the_cells_of_every_stage_and_every_limit(searched):
    folder, result = searched
    written = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    cell = ["genotype.json", "normal.svg", "reduce.svg"]
    expected = ["checkpoint-before.pt", "checkpoint.pt", "config.json", "log.jsonl", "times.jsonl", *cell]
    expected += ["alphas.svg", "curves.svg", "report.html"]
    assert written == sorted(expected + [f"stages/{stage}/{name}" for stage in (1, 2, 3) for name in cell])
    content = json.loads((folder / "genotype.json").read_text())
    assert read_genotype(str(folder / "genotype.json")) == result.genotype == result.stages[2].genotype(2)
    assert content["max_skips"] == 2 and sorted(content["by_max_skips"]) == [str(m) for m in range(5)]
    for limit, of_limit in [*content["by_max_skips"].items(), (None, content["unrestricted"])]:
        expected = result.stages[2].genotype(None if limit is None else int(limit))
        assert check_genotype(Genotype(**of_limit)) == expected
        assert limit is None or sum(name == "skip_connect" for name, _ in expected.normal) <= int(limit)
    for number, stage in enumerate(result.stages, 1):
        assert read_genotype(str(folder / f"stages/{number}/genotype.json")) == stage.genotype(2)
        assert len(stage.candidates_normal[0]) == TINY.keep[number - 1]


def test_config_json_holds_what_is_needed_to_run_again(searched, images):
    content = json.loads((searched[0] / "config.json").read_text())
    assert content["settings"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert content["space"] == {"primitives": list(POOLS.primitives), "nodes": 2}
    assert content["pdarts.py"] == hashlib.sha256((ROOT / "pdarts.py").read_bytes()).hexdigest()
    assert content["kernels"] in ("fused", "plain")
    assert (content["processes"], content["threads"]) == (1, torch.get_num_threads())
    assert (content["data"], content["path"]) == (images.name, None)
    assert (content["classes"], content["shape"]) == (list("01234"), list(images.size))
    assert content["mean"] == images.mean.tolist() and content["std"] == images.std.tolist()
    assert content["device"] == "cpu" or content["device"].startswith("cuda")
    assert content["versions"].keys() == {"python", "torch", "numpy"} and content["command"] == sys.argv


@pytest.mark.parametrize("mode", ["on", "off"])
def test_an_evaluation_writes_its_log_and_weights_with_kernels_and_without(images, tmp_path, mode):
    result = evaluate(CELL, TRAINING, images, tmp_path / "run", kernels=mode)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        "checkpoint-before.pt checkpoint.pt config.json curves.svg genotype.json log.jsonl report.html times.jsonl "
        "weights.pt".split()
    )
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["kernels"] == {"on": "fused", "off": "plain"}[mode]
    assert config["genotype"] == json.loads((tmp_path / "run/genotype.json").read_text())
    log = records(tmp_path / "run/log.jsonl")
    assert [r["epoch"] for r in log] == [r["epoch"] for r in records(tmp_path / "run/times.jsonl")] == [0, 1, 2]
    assert [r["lr"] for r in log] == pytest.approx([pdarts.cosine(0.025, e, 3) for e in range(3)])
    assert [r["drop_path"] for r in log] == pytest.approx([0, 0.1, 0.2])
    assert all(math.isfinite(r["train_loss"]) and 0 <= r["train_accuracy"] <= 1 for r in log)
    assert result.test_error == 1 - log[-1]["test_accuracy"]
    assert (result.parameters, result.multiply_adds) == count(pdarts.Network(CELL, 8, 5, 3), (10, 12))
    weights = torch.load(tmp_path / "run/weights.pt", weights_only=True)
    assert weights.about == {name: config[name] for name in ("classes", "shape", "mean", "std")}
    result.network.load_state_dict(weights)
    other = {"on": "off", "off": "on"}[mode]
    tested = evaluate(CELL, TRAINING, images, weights=tmp_path / "run/weights.pt", kernels=other)
    assert tested.test_error == pytest.approx(result.test_error)
    for name, value in tested.network.state_dict().items():
        assert torch.equal(value, result.network.state_dict()[name])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_the_network_of_an_evaluation_is_plain_and_can_be_saved_and_traced(images, tmp_path):
    result = evaluate(SMALL_CELL, dataclasses.replace(TRAINING, epochs=1), images, kernels="on")
    assert {type(module).__module__.partition(".")[0] for module in result.network.modules()} <= {"pdarts", "torch"}
    assert count(result.network, (10, 12)) == (result.parameters, result.multiply_adds)
    fused = kernels.fuse(copy.deepcopy(result.network))
    assert count(fused, (10, 12)) == (result.parameters, result.multiply_adds)
    torch.save(result.network, tmp_path / "network.pt")
    x = torch.randn(2, 3, 10, 12)
    y = result.network(x)
    for other in torch.load(tmp_path / "network.pt", weights_only=False), torch.jit.trace(result.network, x):
        assert torch.equal(other(x), y)
    batches = images.test()
    correct, total = pdarts.correct_predictions(result.network, batches)
    assert result.test_error == 1 - correct / total


@pytest.mark.parametrize("name, stem", [("PDARTS", "cifar"), ("AmoebaNet", "imagenet")])
def test_norms_folded_into_convolutions_change_no_logits(name, stem):
    torch.manual_seed(0)
    network = pdarts.Network(PUBLISHED[name], 4, 10, 4, auxiliary=True, stem=stem).double().eval()
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
                values.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    right, folded = network(x), fold(network)
    assert torch.allclose(folded(x), right, rtol=1e-10, atol=0)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for cell in folded.cells for m in cell.modules())


def test_runs_show_a_line_for_every_epoch(images, capsys):
    fast_search(ONE_STAGE, images, show=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("stage 1/1  epoch  0/1  loss ") and "alphas" not in first and "test" not in first
    assert second.startswith("stage 1/1  epoch  1/1  loss ") and "  alphas: loss " in second and "  test acc " in second
    evaluate(CELL, dataclasses.replace(TRAINING, epochs=1), images, show=True)
    assert capsys.readouterr().out.startswith("epoch   0/0  loss ")


def test_a_search_takes_all_of_own_images_but_of_a_data_set_what_its_settings_say(
    steps, monkeypatch
):
    config, seen = dataclasses.replace(ONE_STAGE, epochs=1, alpha_start=0, images=16), []
    own = random_images(n=40)
    for given, number in (own, 5), (None, 2):  # half of 40 or of 16, by 4
        monkeypatch.setattr("harness.data.images.shapes", lambda: own)
        steps[:] = [lambda: seen.append(1)] * 99
        fast_search(config, given)
        assert len(seen) == number
        seen.clear()


def test_equal_seeds_give_equal_cells_and_alphas_bit_for_bit(images):
    torch.manual_seed(1)
    first = fast_search(ONE_STAGE, images)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = fast_search(ONE_STAGE, images)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is untouched
    other = fast_search(dataclasses.replace(ONE_STAGE, seed=1), images)
    assert first.genotype == second.genotype and first.test_accuracies == second.test_accuracies
    assert all(map(torch.equal, first.stages[0][2:], second.stages[0][2:]))
    assert not torch.equal(first.stages[0].alphas_normal, other.stages[0].alphas_normal)


# --- what a run refuses -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(images):
    with pytest.raises(InputError, match=r"training loss became (nan|inf) in stage 1, epoch \d, step \d"):
        search(dataclasses.replace(TINY, lr=1e30, clip=1e30), images, space=POOLS)
    with pytest.raises(InputError, match=r"training loss became (nan|inf) in epoch \d, step \d"):
        evaluate(CELL, dataclasses.replace(TRAINING, lr=1e30, clip=1e30), images)


def test_what_cannot_be_searched_is_refused_before_anything_is_written(images, tmp_path):
    order = images.y_train.sort().indices
    by_class = dataclasses.replace(images, x_train=images.x_train[order], y_train=images.y_train[order])
    for config, given, message in (
        (TINY, by_class, "in the first half of y_train and .* in the second; expected them shuffled, not sorted"),
        (dataclasses.replace(TINY, keep=(3, 3, 3)), images, "keep starts with 3; expected 4, all primitives"),
    ):
        with pytest.raises(InputError, match=message):
            search(config, given, tmp_path / "run", kernels="off", space=POOLS)
        assert not (tmp_path / "run").exists()


def test_resume_takes_the_folder_of_a_run_and_no_other(unbroken, images, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for folder in tmp_path, tmp_path / "mistyped":
        with pytest.raises(InputError, match="holds no run; expected the folder of one, or --out for a new one"):
            search(TWO_STAGES, images, resume=folder, space=ONE_NODE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="already holds something; expected a new or empty folder"):
        search(TWO_STAGES, images, unbroken, space=ONE_NODE)
    with pytest.raises(InputError, match="expected one of them"):
        search(TWO_STAGES, images, tmp_path / "out", resume=unbroken, space=ONE_NODE)
    with pytest.raises(InputError, match="of another run: data is"):
        others = dataclasses.replace(images, x_test=images.x_test.flip(0))
        search(TWO_STAGES, others, resume=unbroken, space=ONE_NODE)
    with pytest.raises(InputError, match="of another run: space is {.*'nodes': 1} there and {.*'nodes': 2} here"):
        search(TWO_STAGES, images, resume=unbroken, space=SearchSpace(nodes=2))
    with pytest.raises(InputError, match="of another run: kind is 'search' there and 'evaluate' here"):
        evaluate(CELL, TRAINING, images, resume=unbroken)


def test_two_runs_in_threads_of_one_process_are_refused(images, steps, tmp_path):
    refused = []

    def another():
        with pytest.raises(InputError, match="another run of this process is under way.*one run after the other") as e:
            fast_search(ONE_STAGE, images, tmp_path / "other")
        refused.append(e)

    def at_once():
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()

    steps[:] = [at_once]
    fast_search(ONE_STAGE, images)
    assert len(refused) == 1 and not list(tmp_path.iterdir())
    fast_search(ONE_STAGE, images)


def test_resuming_names_each_difference_and_config_json_keeps_it(images, steps, tmp_path, monkeypatch, capsys):
    steps[:] = [lambda: None] * 2 + [lambda: os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(Stopped):
        fast_search(ONE_STAGE, images, tmp_path, kernels="on")
    file = tmp_path / "config.json"
    before = json.loads(file.read_text())
    versions = before["versions"] | {"torch": "1.0"}
    file.write_text(json.dumps(before | {"threads": 7, "pdarts.py": "older", "versions": versions}))
    monkeypatch.setattr(sys, "argv", ["resuming"])
    fast_search(ONE_STAGE, images, resume=tmp_path, show=True, kernels="off")
    changes = {"torch": ["1.0", torch.__version__], "threads": [7, 1], "pdarts.py": ["older", before["pdarts.py"]]}
    changes["kernels"] = ["fused", "plain"]
    lines = capsys.readouterr().out.splitlines()
    for name, (old, new) in changes.items():
        assert f"changed since the run was left: {name}, from {old} to {new}" in lines
    after = json.loads(file.read_text())
    assert after.pop("resumed") == [{"epochs_done": 1, "step": 1, "changed": changes}]
    del before["kernels/csrc"]
    assert after == before | {"kernels": "plain"}
    for change in 0, 1:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"threads": 1 + change}))
        fast_search(ONE_STAGE, images, resume=tmp_path, show=True)
        assert ("changed since" in capsys.readouterr().out) == bool(change)
        assert len(json.loads(file.read_text())["resumed"]) == 1 + change


# --- runs that survive ------------------------------------------------------------------------------------------------


def test_a_search_killed_at_any_write_goes_on_as_if_nothing_had_happened(
    monkeypatch, tmp_path
):
    two_stages = {"depths": (3, 3), "keep": (3, 3), "skip_dropout": (0.2, 0.3)}
    config = dataclasses.replace(ONE_STAGE, **two_stages, epochs=1, alpha_start=0)
    few, whole, replace, copies = random_images((8, 8), 2, 8), tmp_path / "whole", os.replace, {}

    def copying(source, target):
        if whole in pathlib.Path(target).parents:  # not what a test beside this one writes
            copy = tmp_path / str(len(copies))
            shutil.copytree(whole, copy)  # as it lies there if the process is killed now
            copies[copy] = pathlib.Path(target).name
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", copying)
        fast_search(config, few, whole)
    written = {path.name for path in whole.rglob("*") if path.is_file()}
    assert written <= set(copies.values())
    shown = {"alphas.svg", "curves.svg", "report.html", "normal.svg", "reduce.svg"}  # nothing is read from these
    once = {name: copy for copy, name in copies.items() if name in shown}
    for folder, name in copies.items():
        if once.get(name, folder) != folder:
            continue
        hidden = [p for p in folder.rglob(".*") if p.name != LOCK]
        assert list(map(is_temporary, hidden)) == [True]  # written, but not yet renamed
        begun = (folder / "config.json").exists()
        fast_search(config, few, **({"resume": folder} if begun else {"out": folder}))
        assert_same_run(whole, folder)
        assert not list(folder.rglob(".*"))


# After how many of the 8 steps: also after the last one of an epoch and of the search.
@pytest.mark.parametrize(
    "number, kernels, instants", [(signal.SIGINT, "off", (0, 0, 1, 2, 0)), (signal.SIGTERM, "on", (3,))]
)
def test_a_search_that_is_asked_to_stop_finishes_its_step_and_saves(
    unbroken, images, steps, tmp_path, number, kernels, instants
):
    config, space = TWO_STAGES, ONE_NODE
    if kernels == "on":
        config, space = dataclasses.replace(TWO_STAGES, keep=(3, 3)), FUSED
        search(config, images, unbroken := tmp_path / "unbroken", space=space, kernels=kernels)
    handler, folder, stops = signal.getsignal(number), {"out": tmp_path / "run"}, 0
    for skipped in (*instants, 99):
        steps[:] = [lambda: None] * skipped + [lambda: os.kill(os.getpid(), number)]
        try:
            search(config, images, **folder, space=space, kernels=kernels)
        except Stopped as stopped:
            stops += 1
            assert (stopped.signal_number, stopped.saved) == (number, True)
            assert str(stopped) == f"stopped by {number.name}"
        assert signal.getsignal(number) == handler
        folder = {"resume": tmp_path / "run"}
    assert stops == len(instants)
    assert_same_run(unbroken, tmp_path / "run")


def test_a_run_without_a_folder_that_is_stopped_does_not_claim_to_be_saved(images, steps):
    steps[:] = [lambda: os.kill(os.getpid(), signal.SIGINT)]
    with pytest.raises(Stopped, match="stopped by SIGINT; nothing is saved, because it has no folder") as stopped:
        fast_search(ONE_STAGE, images)
    assert not stopped.value.saved


SECOND_SIGNAL = """
import hashlib
import pdarts
from harness.conftest import ONE_STAGE, fast_search, random_images

def hangs(*_):
    print("hangs", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # one long call, in which no handler of Python runs

pdarts.Search.alternate = hangs
fast_search(ONE_STAGE, random_images())
"""


@beside
def test_a_second_signal_ends_the_process_at_once_within_one_long_call(_):
    command, environment = [sys.executable, "-c", SECOND_SIGNAL], ENVIRONMENT | {"PDARTS_KERNELS": "off"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "hangs\n"
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == -signal.SIGINT
        finally:
            process.kill()


def test_a_signal_that_reaches_a_process_that_loads_images_too_counts_once(images, steps):
    def both():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGINT)

    steps[:] = [both]
    with pytest.raises(Stopped):
        fast_search(ONE_STAGE, images)
    assert signal.set_wakeup_fd(-1) == -1


def test_a_run_in_another_thread_gets_no_signals_and_works(images):
    results = []
    thread = threading.Thread(target=lambda: results.append(fast_search(ONE_STAGE, images)))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_an_evaluation_goes_on_wherever_it_stopped(images, steps, tmp_path):
    evaluate(SMALL_CELL, TRAINING, images, tmp_path / "whole", kernels="on")
    folder, stops = {"out": tmp_path / "stopped"}, 0
    for skipped in 1, 0, 1, 99:  # steps; an epoch has 3
        steps[:] = [lambda: None] * skipped + [lambda: os.kill(os.getpid(), signal.SIGTERM)]
        try:
            evaluate(SMALL_CELL, TRAINING, images, **folder, kernels="on")
        except Stopped:
            stops += 1
        folder = {"resume": tmp_path / "stopped"}
    assert stops == 3
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


# More kills, which take longer: PDARTS_KILLS=20
@beside
def test_a_search_killed_at_random_instants_ends_with_the_same_bits(tmp_path):
    kills, rng = int(os.environ.get("PDARTS_KILLS", 1)), np.random.default_rng(0)
    # The more kills, the longer the search: one that is killed right away makes no progress.
    write_images(tmp_path, 16 * kills)
    arguments = "--channels 8 --batch-size 8 --alpha-start 1 --kernels off --data own.npz"
    command = [ROOT / "pdarts.py", "search", *FAST_SEARCH, *arguments.split(), "--epochs", 1 + kills]
    started = time.monotonic()
    assert python(*command, "--out", "whole", cwd=tmp_path).returncode == 0
    duration, number = time.monotonic() - started, 0

    def begun():  # or to be begun
        folder = tmp_path / "killed"
        if folder.exists() and not (folder / "config.json").exists():
            shutil.rmtree(folder)
        return ["--resume" if folder.exists() else "--out", "killed"]

    while number < kills:
        process, started = begin(tmp_path, *command, *begun(), cwd=tmp_path), time.monotonic()
        process.join(rng.uniform(0.3, 1) * min(duration, 10))
        if process.exitcode is None:
            process.kill()
            process.join()
            number += 1
        else:
            assert process.exitcode == 0, (tmp_path / "stderr").read_text()
            shutil.rmtree(tmp_path / "killed")  # it has ended: again from the start
            duration = time.monotonic() - started  # less than that of the first, which had to import torch
    result = python(*command, *begun(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# --- how a run computes -----------------------------------------------------------------------------------------------


def test_bfloat16_changes_the_feature_maps_only(images, monkeypatch):
    config, types = dataclasses.replace(ONE_STAGE, dtype="bfloat16"), collections.defaultdict(set)

    def see(cell, arguments, output):
        types["maps"].update(x.dtype for x in (*arguments[:2], output))
        types["probabilities"].add(arguments[2].dtype)

    def begin(self):
        begin_stage(self)
        for cell in self.network.cells:
            cell.register_forward_hook(see)
        types["stored"].update(t.dtype for t in self.network.state_dict().values() if t.is_floating_point())

    begin_stage = Search.begin_stage
    monkeypatch.setattr(Search, "begin_stage", begin)
    result = search(config, images, kernels="on", space=FUSED)
    assert types == {"maps": {torch.bfloat16}, "probabilities": {torch.float32}, "stored": {torch.float32}}
    assert result.stages[0].alphas_normal.dtype == torch.float32


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_deterministic_runs_ask_torch_for_it_and_leave_its_mode(images, steps, before):
    def mode():
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    modes = []
    steps[:] = [lambda: modes.append(mode())] * 99
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        fast_search(dataclasses.replace(ONE_STAGE, deterministic=True), images)
        assert set(modes) == {(True, False)} and mode() == before
        modes.clear()
        fast_search(ONE_STAGE, images)
        assert set(modes) == {before} and mode() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_kernels_are_fused_into_the_networks_of_a_run(images, monkeypatch):
    seen, fuse = [], kernels.fuse
    monkeypatch.setattr(kernels, "fuse", lambda network: seen.append(network) or fuse(network))
    fast_search(ONE_STAGE, images, kernels="off")
    assert not seen
    fast_search(ONE_STAGE, images, kernels="on")
    evaluate(SMALL_CELL, dataclasses.replace(TRAINING, epochs=1), images, kernels="on")
    assert len(seen) == 2
    skips = [module for module in seen[0].modules() if isinstance(module, SkipDropout)]
    assert skips and all(float(skip.rate) > 0 for skip in skips)  # set in the fused network


def test_kernels_may_name_the_operations_that_are_fused_on_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "fused", lambda device: True)
    before, mode = kernels.use_on_cuda("mixed"), kernels.use("off")
    try:
        assert pick_kernels("cell pool", torch.device("cuda")) and kernels.use("off") == "on"
        assert kernels.use_on_cuda("mixed") == "cell pool"
        with pytest.raises(InputError, match="the kernels cannot be used: the operations on CUDA are .'mixt'.; expe"):
            pick_kernels("mixt", torch.device("cuda"))
        with pytest.raises(InputError, match="kernels is 'pool'; expected auto, on or off, or, on CUDA, operations"):
            pick_kernels("pool", torch.device("cpu"))
        assert (kernels.use("off"), kernels.use_on_cuda("mixed")) == ("off", "mixed")
        monkeypatch.setattr(kernels.runtime, "_cuda_operations", None)  # as in a new process
        monkeypatch.setenv("PDARTS_CUDA_OPERATIONS", "mixt")
        with pytest.raises(InputError, match="the kernels cannot be used: the operations on CUDA are .'mixt'.; expe"):
            pick_kernels("auto", torch.device("cpu"))
        monkeypatch.delenv("PDARTS_CUDA_OPERATIONS")
    finally:
        kernels.use(mode), kernels.use_on_cuda(before)
