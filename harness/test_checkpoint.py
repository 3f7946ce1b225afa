"""Tests of checkpoints and weights: what is damaged, hostile or of another run is refused, and nothing gets lost."""

import argparse
import io
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import harness.files
from harness.checkpoint import Checkpoints, Folder, claimed, load_weights
from harness.conftest import ENVIRONMENT, ONE_NODE, ROOT, TWO_STAGES, assert_same, assert_same_run, beside
from harness.files import write_whole
from harness.fuzz import STRANGE, Exploit, accepted, case, cases, damaged
from harness.search import search
from pdarts import Genotype, InputError, Network


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def loaded(content):
    return torch.load(io.BytesIO(content), weights_only=True)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def changed_training(content, **changes):
    state = loaded(content)
    return state | {"training": state["training"] | changes}


DAMAGE = {
    "cut off": (lambda c: c[: len(c) // 2], r"cannot read .*checkpoint.pt \(.*\); expected an undamaged checkpoint; "),
    "flipped": (lambda c: c[:2000] + bytes([c[2000] ^ 1]) + c[2001:], "the one before it is whole: --resume .*before"),
    "nothing": (lambda c: b"", "expected an undamaged checkpoint"),
    "no checkpoint": (lambda c: saved({"weights": 1}), "cannot read"),
    "later format": (lambda c: saved(loaded(c) | {"format": 4}), "has format 4; expected 3: another version wrote it"),
    "no log": (lambda c: saved(without(loaded(c), "log")), "it holds no log.*; expected an undamaged checkpoint; "),
    "no training": (lambda c: saved(without(loaded(c), "training")), "it holds no training"),
    "no accuracies": (lambda c: saved(without(loaded(c), "test_accuracies")), "it holds no test_accuracies"),
    "part missing": (lambda c: saved(changed_training(c, stages=None)), "cannot resume .*; expected a checkpoint"),
    "not a number": (
        lambda c: saved(changed_training(c, more=math.nan)),
        r"cannot read .*\(ValueError: training.more is nan\); expected an undamaged checkpoint; the one before it",
    ),
    "no epoch": (lambda c: saved(changed_training(c, epoch="2")), "it holds no training.epoch"),
    "infinite": (lambda c: saved(changed_training(c, more=[torch.ones(2) / 0])), "training.more.0 is not finite"),
    "code": (lambda c: saved({"format": Exploit("ran")}), "cannot read"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_kept_and_the_one_before_it_goes_on(
    unbroken, images, tmp_path, damage, message
):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    checkpoint = folder / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=message):
        search(TWO_STAGES, images, resume=folder, space=ONE_NODE)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    if damage is DAMAGE["cut off"][0]:
        search(TWO_STAGES, images, resume=folder / "checkpoint-before.pt", space=ONE_NODE)
        assert_same_run(unbroken, folder)


def checkpoints(folder):
    """Those of the run in `folder`."""
    identity = torch.load(folder / "checkpoint.pt", weights_only=True)["identity"]
    return Checkpoints(Folder(folder, resume=True), identity)


@pytest.mark.parametrize("name, value", [("seed", 1), ("kind", "evaluate"), ("data", "others")])
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(unbroken, name, value):
    here = checkpoints(unbroken)
    there, here.identity = here.identity[name], here.identity | {name: value}
    message = f"is of another run: {name} is {there!r} there and {value!r} here; expected the same settings and data"
    with pytest.raises(InputError, match=message):
        here.load(unbroken)


def test_a_folder_without_a_checkpoint_begins_anew(unbroken, tmp_path):
    shutil.copy(unbroken / "config.json", tmp_path)
    assert Checkpoints(Folder(tmp_path, resume=True), {}).load(tmp_path) is None


def test_a_checkpoint_in_the_middle_of_an_epoch_needs_as_many_processes(unbroken, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    state = torch.load(folder / "checkpoint.pt", weights_only=True) | {"step": 1, "meters": [[], []]}
    (folder / "checkpoint.pt").write_bytes(saved(state))
    message = "was written by 2 processes in the middle of an epoch, here are 1; expected as many"
    with pytest.raises(InputError, match=message):
        checkpoints(folder).load(folder)


def test_random_checkpoints_are_what_was_saved_or_are_refused(unbroken, tmp_path, limits):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    here, checkpoint, taken = checkpoints(folder), folder / "checkpoint.pt", 0
    content, right = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    for number, rng in cases(60):
        with case(number):
            checkpoint.write_bytes(damaged(content, rng))
            state = accepted(here.load, checkpoint)
            if state is not None:
                assert_same(state, right)
                taken += 1
    assert taken < 30


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(13, "Permission denied")])
def test_a_full_disk_keeps_the_last_checkpoint(unbroken, tmp_path, monkeypatch, error):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    before = (folder / "checkpoint.pt").read_bytes()

    def full(*_):
        raise error

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=error.strerror):
        checkpoints(folder).save({"epoch": 1})
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob(".*"))


def test_a_folder_must_be_new_or_empty_or_left_before_the_run_began(tmp_path):
    killed = (".config.json.0123abcd.tmp", True), (".lock", True)
    for name, fits in ("", True), *killed, ("config.json", False), (".bashrc", False):
        folder = tmp_path / f"folder{name}"
        folder.mkdir()
        if name:
            (folder / name).touch()
        assert (accepted(Folder, folder) is not None) == fits
    assert accepted(Folder, tmp_path / "new") and accepted(Folder, None)
    assert not accepted(Folder, tmp_path / "folderconfig.json/config.json")


def test_a_folder_is_of_one_run_at_a_time_and_the_other_is_named(unbroken, tmp_path):
    run, new = shutil.copytree(unbroken, tmp_path / "run"), tmp_path / "a/new/one"
    files = set(tmp_path.rglob("*"))
    (run / ".log.jsonl.0123abcd.tmp").touch()  # of a run that was killed
    for path, resume in (new, None), (run, run), (run, run / "checkpoint-before.pt"):
        ways = (None, resume) if resume else (path, None)
        with claimed(*ways) as mine:
            assert mine.path == path
            used = f"{path} is in use by process {os.getpid()} on {socket.gethostname()}; expected a folder that no"
            for others in ways, (path, None):
                with pytest.raises(InputError, match=used), claimed(*others):
                    pass
            with claimed(mine) as same:  # the command line claims it, and the run takes it
                assert same is mine
        assert set(tmp_path.rglob("*")) - {run / ".log.jsonl.0123abcd.tmp"} == files
    assert set(tmp_path.rglob("*")) == files


def test_a_name_that_nobody_chose_gets_a_number_where_it_is_taken(tmp_path):
    path = tmp_path / "runs/search"
    with claimed(path, numbered=True) as first, claimed(path, numbered=True) as second:
        second.write("config.json", {})
        with claimed(path, numbered=True) as third:
            names = [folder.path.name for folder in (first, second, third)]
    assert names == ["search", "search-2", "search-3"] and [p.name for p in path.parent.iterdir()] == ["search-2"]


HOLDER = """
import os, signal, sys, time
from harness.checkpoint import claimed

with claimed("run"):
    child = os.fork()  # as a process that loads images
    if child:
        print(os.getpid(), child, flush=True)
    time.sleep(100)
"""


@beside
def test_a_folder_is_free_when_the_process_of_its_run_is_killed(tmp_path):
    command, environment = [sys.executable, "-c", HOLDER], ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        pid, child = map(int, process.stdout.readline().split())
        with pytest.raises(InputError, match=f"run is in use by process {pid} on "), claimed(tmp_path / "run"):
            pass
        os.kill(pid, signal.SIGKILL)
        process.wait()
        try:
            with claimed(tmp_path / "run"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_where_nothing_can_be_locked_a_run_says_so_and_works(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.files, "fcntl", None)
    message = "run cannot be locked here: nothing keeps another run out of it"
    with pytest.warns(RuntimeWarning, match=message), claimed(tmp_path / "run") as folder:
        folder.write("config.json", {})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, fsync = tmp_path / "file", os.fsync

    def interrupted(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        write_whole(path, b"another's")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    write_whole(path, b"mine")
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


# --- weights ----------------------------------------------------------------------------------------------------------


SMALL = Genotype([("none", 0)] * 2, [2], [("none", 1)] * 2, [2])


def test_weights_are_loaded_with_and_without_an_auxiliary_head(tmp_path):
    path = tmp_path / "weights.pt"
    for in_file in False, True:
        torch.manual_seed(0)
        weights = Network(SMALL, 1, 3, 3, auxiliary=in_file).state_dict()
        torch.save(weights, path)
        for in_network in False, True:
            network = Network(SMALL, 1, 3, 3, auxiliary=in_network)
            load_weights(network, path, torch.device("cpu"))
            assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
            assert (network.auxiliary_head is not None) == (in_file and in_network)


def prefixed(state, *prefixes):
    return {prefix + key: value for prefix in prefixes for key, value in state.items()}


WRAPPED = {
    "the official ImageNet script's": lambda state: {
        "epoch": 3, "state_dict": prefixed(state, "module."), "best_acc_top1": 71.2, "optimizer": {"state": {}}
    },
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "a part compiled": lambda state: {key.replace("cells.1.", "cells.1._orig_mod."): v for key, v in state.items()},
    "both": lambda state: prefixed(state, "module._orig_mod."),
    "repeated": lambda state: prefixed(state, "module.module._orig_mod."),
    "nested": lambda state: {"model": state},
    "nested and wrapped": lambda state: {"model_state_dict": prefixed(state, "_orig_mod.module."), "args": {"lr": 1}},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {}},
    "averaged": lambda state: prefixed(state, "module.") | {"n_averaged": torch.tensor(3)},
    "counted by thop": lambda state: state | prefixed({"total_ops": torch.zeros(1)}, "", "cells.0.", "cells.1._ops.0."),
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_of_a_wrapped_network_and_in_a_checkpoint_are_loaded(tmp_path, wrap):
    network, weights = Network(SMALL, 1, 3, 3, True), Network(SMALL, 1, 3, 3, True).state_dict()
    torch.save(wrap(weights), tmp_path / "weights.pt")
    load_weights(network, tmp_path / "weights.pt", torch.device("cpu"))
    assert_same(dict(network.state_dict()), dict(weights))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {"epoch": 1, "weights": {"x": torch.ones(1)}}, "its keys are epoch, weights, none of them the"),
        (lambda state: {"run": {"state_dict": state}}, "its keys are run, none of them the network's"),
        (lambda state: {"state_dict": state, "ema": state}, "it holds several: state_dict, ema"),
        (lambda state: prefixed(state, "", "module."), "keys that differ only in their prefixes"),
        (lambda state: state | {"best": np.float64(1)}, "it holds numpy.*scalar, where only tensors, numbers and text"),
        (lambda state: {"state_dict": state, "args": argparse.Namespace()}, "it holds argparse.Namespace, where only"),
        (lambda state: list(state.values()), "it holds a list"),
        (lambda state: state | {"stem.0.weight": state["stem.0.weight"].cfloat()}, "stem.0.weight is complex"),
        (lambda state: {"classifier.bias": state["classifier.bias"]}, "Missing key"),
        (lambda state: state | {"more": torch.ones(1)}, "Unexpected key"),
        (lambda state: state | {"classifier.bias": torch.ones(4)}, "size mismatch for classifier.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_reason(tmp_path, change, message):
    network = Network(SMALL, 1, 3, 3)
    torch.save(change(network.state_dict()), tmp_path / "weights.pt")
    message = f"cannot use the weights .*{message}.*; expected a state_dict of this network"
    with pytest.raises(InputError, match=message) as error:
        load_weights(network, tmp_path / "weights.pt", torch.device("cpu"))
    assert str(error.value).isprintable()


def test_random_weights_are_those_of_the_network_or_are_refused(tmp_path, limits):
    network = Network(SMALL, 1, 3, 3)
    right, path, taken = {key: value.clone() for key, value in network.state_dict().items()}, tmp_path / "weights", 0

    def check(content, exact=True):
        nonlocal taken
        path.write_bytes(content)
        for value in network.state_dict().values():
            value.fill_(7)
        if accepted(lambda: load_weights(network, path, torch.device("cpu")) or True):
            taken += 1
            assert not exact or all(map(torch.equal, network.state_dict().values(), right.values()))
        assert list(tmp_path.iterdir()) == [path]

    check(pickle.dumps(right))
    files = saved(right), saved(right, _use_new_zipfile_serialization=False)  # the second without sums
    for content in files:
        check(content)
    assert taken == 2
    for number, rng in cases(120):
        with case(number):
            content = files[number % 2]
            cut = rng.choice((0, len(content) * 9 // 10))
            check(content[:cut] + damaged(content[cut:], rng), exact=number % 2 == 0)
    strange = [
        Exploit(tmp_path / "exploited"),
        torch.zeros(()),
        torch.zeros(2, 0),
        torch.zeros(3).to_sparse(),
        *STRANGE,
    ]
    for number, rng in cases(60):
        key = rng.choice(list(right))
        like = rng.choice((right[key].double, right[key].to_sparse, right[key].cfloat, right[key][None].clone))
        state = right | {key: like() if number % 2 else rng.choice(strange)}
        if rng.random() < 0.2:
            state[rng.choice(STRANGE[:-4])] = state.pop(rng.choice(list(state)))
        with case(number, key):
            check(saved(state))
