"""Tests of the command line: the commands, what is refused in one line, and the command that resumes."""

import dataclasses
import html
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch

import harness.evaluate
import kernels
from harness import cli
from harness.conftest import CELL, FAST_SEARCH, ROOT, beside, python, random_images, write_images
from harness.data.test_cifar import write_cifar
from harness.devices import pick_device
from harness.evaluate import EvaluateResult
from harness.fuzz import case, cases, changed
from harness.report.cells import read_genotype
from harness.search import SearchResult
from harness.settings import EVALUATE_PRESETS, SEARCH_PRESETS, EvaluateSettings, SearchSettings, options, unread
from pdarts import GENOTYPES

SMALL = "--depths 3 3 3 --channels 8 --epochs 1 --alpha-start 0 --batch-size 8 --images 16".split()
ONE_STAGE = [*FAST_SEARCH, *"--channels 8 --batch-size 8 --kernels off --data own.npz".split()]
ONE_EPOCH = ["--epochs", "1", "--alpha-start", "0"]


# --- whole commands ---------------------------------------------------------------------------------------------------


@beside
def test_search_and_evaluate_from_the_repository(folder):
    """On CIFAR-10's layout."""
    write_cifar(folder / "images", "cifar10", binary=True)

    def run(*arguments):
        result = python("pdarts.py", *arguments)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        return result.stdout

    text = run("search", "--data", folder / "images", "--out", folder / "found", *SMALL)
    assert "preset demo: searching on 16 of 50 images of cifar10, 3 stages of 3 3 3 cells and 1 epochs" in text
    assert "stage 3/3" in text and "node 3" in text
    following = shlex.split(re.search(r"next: +python pdarts.py (.*)", text)[1])
    cell = f"{folder}/found/genotype.json"
    assert following == ["evaluate", cell, "--preset", "demo", "--data", f"{folder}/images"]
    printed = re.findall(r"^Genotype.*", text, re.MULTILINE)
    small = "--depth 3 --channels 8 --epochs 1 --batch-size 16".split()
    text = run(*following, *small, "--out", folder / "evaluated")
    printed += re.findall(r"^genotype: +(.*)", text, re.MULTILINE)
    assert [read_genotype(genotype) for genotype in printed] == [read_genotype(cell)] * 2
    assert "preset demo: training on 50 images of cifar10, 3 cells, 8 channels, 1 epochs" in text
    assert re.search(r"test error: +\d+\.\d\d%", text) and (folder / "evaluated/weights.pt").exists()
    refused = python("pdarts.py", "search", "--out", folder / "refused", PDARTS_KERNELS="perhaps")
    assert refused.returncode == 2 and not (folder / "refused").exists() and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("pdarts.py: error: the kernels cannot be used: PDARTS_KERNELS is 'perhaps'")


@beside
def test_without_kernels_plain_torch_serves_and_without_the_harness_a_message_names_it(folder):
    shutil.copy(ROOT / "pdarts.py", folder)
    alone = python("pdarts.py", "search", cwd=folder)
    assert alone.returncode == 1 and alone.stderr.count("\n") == 1
    assert alone.stderr.startswith("pdarts.py: error: the command line needs harness, which is missing; expected")
    shutil.copytree(ROOT / "harness", folder / "harness", ignore=shutil.ignore_patterns("test_*", "conftest.py"))
    write_images(folder)
    command = ["pdarts.py", "search", *ONE_STAGE, *ONE_EPOCH, "--kernels"]
    auto, on = (python(*command, mode, "--out", mode, cwd=folder, PDARTS_KERNELS="auto") for mode in ("auto", "on"))
    assert auto.returncode == 0 and auto.stderr == "", auto.stderr
    assert json.loads((folder / "auto/config.json").read_text())["kernels"] == "plain"
    assert on.returncode == 2 and not (folder / "on").exists()
    assert on.stderr.startswith("pdarts.py: error: kernels is 'on', but no folder kernels lies beside pdarts.py;")
    assert on.stderr.count("\n") == 1


def test_help_names_every_setting_with_its_source(capsys):
    for command, kind in ("search", SearchSettings), ("evaluate", EvaluateSettings):
        with pytest.raises(SystemExit) as end:
            cli.command([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0
        for field in dataclasses.fields(kind):
            assert field.name == "dataset" or f"--{field.name.replace('_', '-')}" in text
            assert field.name == "dataset" or cli.HELP.get(field.name, field.metadata["help"]) in text
        assert f"(paper, {command.replace('evaluate', 'evaluation')})" in text
    assert "[6; 600]" in text  # epochs of the demo and of CIFAR-10


# --- proposed commands ------------------------------------------------------------------------------------------------


def proposed(page):
    """The words of the command in a report."""
    (command,) = re.findall("<pre>python pdarts.py (.*)</pre>", (page / "report.html").read_text())
    return shlex.split(html.unescape(command))


def write_photographs(folder):
    """A folder of small images in two classes, one of which is damaged."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split, number in ("train", 6), ("val", 5):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (50, 60, 3), np.uint8) // (1 + (name == "b"))
                image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    (folder / "train/a/0.png").write_bytes(b"damaged")


FEW = "--depth 3 --channels 12 --epochs 1 --batch-size 4".split()
OF_A_FOLDER = "--data photographs --skip-damaged --cache kept --size 40 --no-auxiliary".split()
EVALUATIONS = {
    "demo": "--images 16 --no-flip --cutout 0 --lr 0.01 --seed 3 --momentum 0.5",
    "cifar10": "--data data --dtype bfloat16 --stem-stride 2 --no-auxiliary --label-smoothing 0.1",
    "cifar100": "--data data --stem imagenet --no-auxiliary --crop-padding 2 --images 20 --schedule linear",
    "imagenet": " ".join(["--preset imagenet --stem cifar --fraction 0.5 --workers 0", *OF_A_FOLDER]),
    "an own folder": " ".join(["--preset cifar10 --augment imagenet --workers 0", *OF_A_FOLDER]),
    "an own file": "--data own.npz --stem-stride 2 --no-auxiliary",
}


SLOW = {"demo": pytest.mark.slow, "an own folder": pytest.mark.slow}  # its images are read as those of imagenet


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in EVALUATIONS])
def test_the_test_command_of_a_report_gives_the_error_that_was_printed(here, monkeypatch, capsys, name):
    (here / "cell.json").write_text(json.dumps(CELL._asdict()))
    given = EVALUATIONS[name].split()
    if "photographs" in given:
        write_photographs(here / "photographs")
    if "data" in given:
        write_cifar(here / "data", name, binary=True)
    preset = ["--preset", name] if name in EVALUATE_PRESETS and "--preset" not in given else []
    assert cli.command(["evaluate", "cell.json", *preset, *FEW, *given, "--kernels", "off", "--out", "a run"]) == 0
    error = re.search(r"test error: .*\n", capsys.readouterr().out)[0]
    words = proposed(here / "a run")
    assert words[:4] == ["evaluate", "a run/genotype.json", "--weights", "a run/weights.pt"]
    assert {w for w in [*FEW, *given] if w.startswith("--")} - {"--workers"} <= set(words)
    kernels.use("auto")
    assert cli.command(words) == 0
    assert error in capsys.readouterr().out


def test_the_evaluation_that_a_search_proposes_takes_images_of_the_same_form(here, capsys):
    write_photographs(here / "photographs")
    form = "--size 40 --no-flip --crop-padding 2 --stem imagenet --skip-damaged".split()
    given = [*ONE_STAGE[:-2], *ONE_EPOCH, "--data", "photographs", *form, "--workers", "0", "--out", "run"]
    assert cli.command(["search", *given]) == 0
    following = shlex.split(re.search(r"next: +python \S+ (.*)", capsys.readouterr().out)[1])
    assert cli.command(["search", "--resume", "run", "--workers", "0"]) == 0  # without the damaged file again
    assert following[:4] == ["evaluate", "run/genotype.json", "--preset", "demo"]
    for words, data in (following, "photographs"), (proposed(here / "run"), str(here / "photographs")):
        assert sorted(words) == sorted([*following[:4], "--data", data, *form])
    assert cli.command([*following, *FEW, "--no-auxiliary", "--workers", "0", "--out", "evaluated"]) == 0
    assert "3 cells, 12 channels" in capsys.readouterr().out


def test_settings_that_differ_from_a_preset_are_options_that_make_them():
    for presets, kind in (SEARCH_PRESETS, "search"), (EVALUATE_PRESETS, "evaluate"):
        for settings in presets.values():
            for name, preset in presets.items():
                words = [kind, *["cell"] * (kind == "evaluate"), "--preset", name, *options(settings, preset)]
                given = vars(cli._parser().parse_args(words))
                for field in dataclasses.fields(settings):
                    if field.name == "dataset" or field.name in unread(settings):
                        continue
                    value = given.get(field.name, getattr(preset, field.name))
                    assert (tuple(value) if isinstance(value, list) else value) == getattr(settings, field.name)


# --- what is refused --------------------------------------------------------------------------------------------------


BAD = {
    "no command": ([], "required: command"),
    "unknown preset": (["search", "--preset", "mnist"], "invalid choice: 'mnist'"),
    "unknown option": (["search", "--learning-rate", 1], "unrecognized arguments"),
    "short option": (["search", "--epoch", 1], "unrecognized arguments: --epoch"),
    "no value": (["search", "--depths=--"], "expected a value, got --"),
    "negative epochs": (["search", "--epochs", -1], "epochs is -1; expected a whole number from 1"),
    "no epoch for alphas": (["search", "--epochs", 2, "--alpha-start", 2], "alpha_start is 2 of 2 epochs; expected"),
    "infinite rate": (["search", "--lr", "inf"], "lr is inf; expected a number from 0 to 1e+30"),
    "no rate": (["search", "--lr", "nan"], "lr is nan; expected a number from 0 to 1e+30"),
    "number too large": (["search", "--weight-decay", 1e39], "weight_decay is 1e+39; expected a number from 0"),
    "huge seed": (["search", "--seed", 2**64], "seed is 18446744073709551616; expected a whole number from 0 to"),
    "no number": (["search", "--epochs", "many"], "invalid int value: 'many'"),
    "dropout of 1.5": (["search", "--skip-dropout", 0, 0.4, 1.5], "skip_dropout is 1.5; expected a number from 0 to"),
    "more candidates": (["search", "--keep", 8, 9, 3], "keep is (8, 9, 3); expected no stage to keep more"),
    "too few candidates": (["search", "--keep", 8, 5, 2], "keep ends with 2; expected at least 3 in the last stage"),
    "not all candidates": (["search", "--keep", 7, 5, 3], "keep starts with 7; expected 8, all primitives"),
    "two stages": (["search", "--depths", 5, 11], "differ in their numbers of stages; expected one value for"),
    "no primitives": (["search", "--primitives"], "argument --primitives: expected at least one argument"),
    "unknown primitive": (["search", "--primitives", "none", "conv"], "unknown primitives ['conv']; expected some of"),
    "a primitive twice": (["search", "--primitives", "none", "none"], "expected one or more, each once"),
    "fewer primitives": (["search", "--primitives", "none", "skip_connect"], "keep starts with 8; expected 2, all"),
    "no nodes": (["search", "--nodes", 0], "the search space has cells of 0 nodes; expected 1 or more"),
    "too many nodes": (["search", "--nodes", 101], "nodes is 101; expected at most 100"),
    "too few cells": (["search", "--depths", 2, 3, 4], "depths is 2; expected a whole number from 3"),
    "too few images": (["search", "--images", 3], "images is 3; expected at least 4, or 0 for all"),
    "nothing to download": (["search", "--download"], "nothing to download for shapes; expected --preset cifar10 or"),
    "no data": (["search", "--data", "missing"], "no file or folder missing"),
    "empty folder": (["search", "--data", "empty"], "no data in empty"),
    "no CIFAR": (["search", "--preset", "cifar10", "--data", "empty"], "no cifar10 in empty; expected a folder"),
    "variable not set": (["search", "--data", ""], "argument --data: expected a path, got nothing"),
    "unknown device": (["search", "--device", "abacus"], "device 'abacus' cannot be used"),
    "no device for work": (["search", "--device", "meta"], "device 'meta' cannot be used"),
    "used folder": (["search", "--out", "used"], "used already holds something"),
    "file as folder": (["search", "--out", "used/file"], "used/file already holds something"),
    "mistyped run": (["search", "--resume", "ruin"], "ruin holds no run; expected the folder of one, or --out for a"),
    "no run": (["search", "--resume", "used"], "used holds no run"),
    "new and old": (["search", "--out", "new", "--resume", "used"], "out is 'new' and resume is 'used'; expected one"),
    "size": (["search", "--size", 40], "--size is only for a folder of images, not for own data; expected no --size"),
    "damaged": (["search", "--skip-damaged"], "--skip-damaged is only for a folder of images, not for own data; exp"),
    "cache": (["search", "--cache", "here"], "--cache is only for a folder of images, not for own data; expected no"),
    "workers": (["search", "--workers", 0], "--workers is only for a folder of images, not for own data; expected no"),
    "stride": (["search", "--stem", "imagenet", "--stem-stride", 2], "--stem-stride is not read with --stem imagenet;"),
    "crop": (["evaluate", "PDARTS", "--augment", "imagenet", "--cutout", 4], "--cutout is not read with --augment im"),
    "no head": (["evaluate", "PDARTS", "--no-auxiliary", "--auxiliary-weight", 1], "--auxiliary-weight is not read wi"),
    "unknown genotype": (["draw", "RDARTS"], "no genotype 'RDARTS'; expected a file, one of PDARTS"),
    "nothing to evaluate": (["evaluate"], "the following arguments are required: genotype"),
    "no JSON": (["draw", "used/file"], "used/file is not valid (JSONDecodeError: Expecting value"),
    "half a text": (["draw", "Genotype(normal=[('none', 0)"], "the genotype is not valid"),
    "a long name": (["evaluate", "x" * 5000], "; expected a file, one of PDARTS"),
    "no genotype": (["draw", "list.json"], "is not a genotype; expected an object with normal"),
    "unknown operation": (["evaluate", "operation.json"], "normal[3] has unknown operation 'sep_conv_4x4'"),
    "future node": (["evaluate", "future.json"], "reduce[0] has input 2; node 0 can take 0 to 1"),
    "wrong concat": (["draw", "concat.json"], "normal_concat is [9]; expected states from 2 to 5"),
    "half a node": (["draw", "half.json"], "two for each node"),
    "no pair": (["draw", "pair.json"], "normal[0] is 'skip_connect'; expected an (operation, input) pair"),
    "no weights": (["evaluate", "PDARTS", "--weights", "missing"], "no weights missing"),
    "weights and out": (["evaluate", "PDARTS", "--weights", "used/file", "--out", "new"], "--weights only tests"),
    "wrong weights": (["evaluate", "PDARTS", "--weights", "used/file"], "cannot use the weights used/file"),
    "no evaluation": (["predict", "missing", "1.jpg"], "cannot read the run missing (FileNotFoundError"),
    "no image": (["predict", "missing"], "the following arguments are required: IMAGE"),
    "no folder": (["draw", "PDARTS", "-o", "missing/cell"], "no folder missing"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "used").mkdir()
    (folder / "used/file").write_text("something")
    cell = json.loads(json.dumps(GENOTYPES["PDARTS"]._asdict()))

    def write(name, field, change):
        (folder / name).write_text(json.dumps(cell | {field: change(cell[field])}))

    (folder / "list.json").write_text("[]")
    write("operation.json", "normal", lambda pairs: [*pairs[:3], ["sep_conv_4x4", 0], *pairs[4:]])
    write("future.json", "reduce", lambda pairs: [["skip_connect", 2], *pairs[1:]])
    write("concat.json", "normal_concat", lambda _: [9])
    write("half.json", "normal", lambda pairs: pairs[:-1])
    write("pair.json", "normal", lambda pairs: ["skip_connect", *pairs[1:]])
    return folder


@pytest.fixture
def generated(monkeypatch):
    """Small images in the place of the generated shapes, and no waiting for kernels."""
    own = random_images((8, 8, 3), 3, 12)
    monkeypatch.setattr("harness.data.images.shapes", lambda: own)
    kernels.use("off")


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_status_2_and_writes_nothing(
    bad_files, generated, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(bad_files)
    before = sorted(bad_files.rglob("*"))
    assert cli.command([str(a) for a in arguments]) == 2
    _, stderr = capsys.readouterr()
    assert message in stderr and stderr.startswith("pdarts.py: error: ") and stderr.count("\n") == 1
    assert sorted(bad_files.rglob("*")) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(13, "Permission denied")])
def test_a_full_disk_ends_in_one_line_that_names_the_file_and_how_to_resume(
    tmp_path, generated, monkeypatch, capsys, error
):
    replace = os.replace

    def full(source, target):
        if target.name == "checkpoint.pt":
            raise error
        replace(source, target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    assert cli.command(["search", *FAST_SEARCH, *ONE_EPOCH, "--out", "run"]) == 2
    line = rf"pdarts.py: error: .*{error.strerror}: 'run/checkpoint.pt'; to resume: python .* --resume run\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_refused_before_data_are_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "load", None)
    (tmp_path / "file").touch()
    assert cli.command(["search", "--out", "file/run"]) == 2
    assert re.fullmatch(r"pdarts.py: error: cannot write to file/run \(.*\); expected a .*\n", capsys.readouterr().err)


def test_a_process_that_loads_images_and_dies_gets_one_line_and_how_to_resume(here, monkeypatch, capsys):
    why = "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)"
    of_torch = f"Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n\nRuntimeError: {why}\n"

    def dies(*_, **__):
        raise RuntimeError(of_torch)

    monkeypatch.setattr("pdarts.Search.alternate", dies)
    assert cli.command(["search", *ONE_STAGE, *ONE_EPOCH, "--out", "run"]) == 2
    line = f"pdarts.py: error: a process that loads images ended (RuntimeError: {why}); expected --workers 0, or more "
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1
    assert re.search("; to resume: python .* --workers 0 --resume run\n$", error)


def test_warnings_as_errors_get_one_line_and_leave_no_folder(here, monkeypatch, capsys):
    def warns(*_):
        warnings.warn("plain torch instead of the fused kernels: no compiler", RuntimeWarning, stacklevel=2)

    command = ["search", *ONE_STAGE, *ONE_EPOCH, "--out", "run"]
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr("harness.devices.fused.fused", warns)
        assert cli.command(command) == 2
        assert re.fullmatch("pdarts.py: error: plain torch .*: no compiler; expected .*\n", capsys.readouterr().err)
    assert not (here / "run").exists()


@beside
def test_a_closed_stdout_ends_in_one_line_or_changes_nothing(folder):
    write_images(folder)
    command = shlex.join([sys.executable, str(ROOT / "pdarts.py"), "search", *ONE_STAGE, *ONE_EPOCH, "--out"])
    full = "stdout cannot be written: [Errno 28] No space left on device"
    for way, status, said in (">&-", 0, ""), ("2>&1 >/dev/full", 2, f"pdarts.py: error: {full}\n"):
        run = subprocess.run(f"{command} {status} {way}", shell=True, cwd=folder, capture_output=True, text=True)
        assert (run.returncode, run.stdout, run.stderr) == (status, said, "")
    assert (folder / "0/genotype.json").is_file()


def test_a_line_of_an_error_is_written_in_one_piece(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=written.append, flush=lambda: None))
    assert cli.command(["search", "--epochs", "many"]) == 2
    assert len(written) == 1 and written[0].endswith("\n")


def test_too_little_memory_gets_one_line(tmp_path, generated, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness.evaluate, "count", lambda *_: torch.empty(10**15))
    assert cli.command(["evaluate", "PDARTS", "--depth", "3", "--channels", "8"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("pdarts.py: error: out of memory; ") and stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


VALUES = """0 1 2 3 4 5 8 16 100 -1 -0 +3 007 1_0 1e3 0.5 1.5 1e-9 1e30 1e31 1e999 nan inf -inf NaN 0x10 1,2 ½ ٣
9223372036854775807 9223372036854775808 -9223372036854775809 true None auto cpu cpu:7 cuda:99 meta mkldnn xla demo
cifar10 PDARTS here here/file here/cell.json here/missing/x %s %(prog)s {} - -- --depths -9 @here/file \udcff \U0001f600
\u2028 $HOME * ~ .""".split()
VALUES += ["", " ", "a b", "two\nlines", "9" * 30, "9" * 5000, "x" * 5000]


def test_random_command_lines_mean_what_they_say_or_are_refused(tmp_path, generated, monkeypatch, capsys, limits):
    here, calls, taken = tmp_path / "here", [], 0
    here.mkdir()
    (here / "file").write_text("something")
    (here / "cell.json").write_text(json.dumps(GENOTYPES["PDARTS"]._asdict()))
    monkeypatch.chdir(tmp_path)

    def stub(result):
        def call(*arguments, device, **_):
            pick_device(device)
            calls.extend(arguments)
            return result

        return call

    monkeypatch.setattr(cli, "search", stub(SearchResult(GENOTYPES["PDARTS"], [], [])))
    monkeypatch.setattr(cli, "evaluate", stub(EvaluateResult(None, 1, 1, 0.5)))
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")  # as in the process of a command
    before = set(tmp_path.rglob("*"))
    for number, rng in cases(400):
        kind = rng.choice((SearchSettings, EvaluateSettings))
        settings = {f.name: f for f in dataclasses.fields(kind) if f.name != "dataset"}
        genotype, given = rng.choice(["PDARTS", "here/cell.json", rng.choice(VALUES)]), {}
        arguments = ["search"] if kind is SearchSettings else ["evaluate", genotype]
        if rng.random() < 0.1:
            arguments, settings = ["draw", genotype], {"output": None}
        elif rng.random() < 0.3:
            settings = dict.fromkeys("preset data out device kernels weights download nodes new\n".split(" "))
        for name in rng.sample(list(settings), k=min(rng.choice((1, 1, 2, 4)), len(settings))):
            values = rng.choices(VALUES, k=rng.choice((1, 1, 1, 1, 1, 0, 2, 3)))
            if rng.random() < 0.5:  # more likely ones
                values = rng.choice((["1"], ["2"], ["3"], ["0.5"], ["8", "5", "3"], ["3", "4", "5"], ["cpu"], []))
            flag = f"--{name.replace('_', '-')}"
            arguments += [f"{flag}={values[0]}", *values[1:]] if values and rng.random() < 0.5 else [flag, *values]
            given[name] = values
        calls.clear()
        with case(number, [a[:40] for a in arguments]), warnings.catch_warnings():
            warnings.simplefilter("error")
            status = cli.command(arguments)
            stdout, stderr = capsys.readouterr()
            written = set(tmp_path.rglob("*")) - before
            if status:
                assert status == 2 and stderr.startswith("pdarts.py: error: ") and stderr.count("\n") == 1
                assert not calls and not written
            elif arguments[0] == "draw":
                assert len(written) == 2 and stdout.count("\n") == 2
            else:
                taken += 1
                assert stderr == "" and not written
                config = next(a for a in calls if isinstance(a, kind))
                for name, values in given.items():
                    if name in settings and settings[name] is not None and values:
                        value = getattr(config, name)
                        numbers = value if isinstance(value, tuple) else (value,)
                        assert numbers == tuple(type(n)(text) for n, text in zip(numbers, values, strict=True))
                        low, high = settings[name].metadata["bounds"]
                        assert all(low <= n <= high for n in numbers)
                        assert all(map(math.isfinite, numbers))
                    elif name in ("data", "out", "weights"):
                        assert values and values[0]
            for path in written:
                path.unlink()
    assert taken > 30


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with own images."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    return tmp_path


def stopped(monkeypatch, arguments):
    """The status of a command that is asked to stop in its first step."""
    with monkeypatch.context() as patch:
        patch.setattr("harness.run.largest", lambda _: signal.SIGTERM)
        return cli.command(arguments)


def test_the_command_line_says_how_to_go_on_and_does(here, monkeypatch, capsys):
    arguments = ["search", *ONE_STAGE, *ONE_EPOCH, "--out", "a run"]
    monkeypatch.setattr(sys, "argv", ["pdarts.py"])
    assert stopped(monkeypatch, arguments) == 143
    error = capsys.readouterr().err
    assert error.startswith("pdarts.py: stopped by SIGTERM; to resume: python pdarts.py ") and error.count("\n") == 1
    command = shlex.split(error.split("to resume: ")[1])[2:]
    assert command == [*arguments[:-2], "--resume", "a run"]
    kernels.use("auto")  # as in a new process
    assert cli.command(["search", "--resume", "a run"]) == 0  # settings, data, space and kernels are in the folder
    genotype = read_genotype("a run/genotype.json")
    assert len(genotype.normal) == 2 and {name for name, _ in genotype.normal} <= {"avg_pool_3x3", "skip_connect"}
    assert json.loads((here / "a run/config.json").read_text())["space"]["nodes"] == 1
    assert cli.command(["search", "--resume", "a run/checkpoint.pt"]) == 0  # it has ended: the same again
    assert read_genotype("a run/genotype.json") == genotype
    capsys.readouterr()
    assert cli.command(["draw", "a run/genotype.json", "-o", "cell-"]) == 0
    assert capsys.readouterr().out.split() == ["cell-normal.svg", "cell-reduce.svg"]
    assert (here / "cell-normal.svg").read_text() == (here / "a run/normal.svg").read_text()
    assert cli.command([*command, "--lr", "1"]) == 2
    assert "lr is 0.05 there and 1.0 here; expected the same settings and data" in capsys.readouterr().err


def test_an_evaluation_goes_on_with_the_cell_settings_and_data_in_its_folder(here, monkeypatch, capsys):
    size = "--depth 3 --channels 8 --epochs 2 --batch-size 8 --kernels off --data own.npz".split()
    (here / "cell.json").write_text(json.dumps(CELL._asdict()))
    assert stopped(monkeypatch, ["evaluate", "cell.json", *size, "--out", "run"]) == 143
    assert cli.command(["evaluate", "--resume", "run"]) == 0
    output = capsys.readouterr().out
    assert "training on 24 images of own.npz, 3 cells, 8 channels, 2 epochs; results in run" in output
    assert "written:       run/weights.pt" in output
    error = re.search(r"test error: +\S+%\n", output)[0]
    assert cli.command(["evaluate", "run/genotype.json", *size, "--weights", "run/weights.pt"]) == 0
    tested = capsys.readouterr().out
    assert error in tested and "written" not in tested


def test_a_run_is_resumed_from_any_folder(here, monkeypatch, capsys):
    assert stopped(monkeypatch, ["search", *ONE_STAGE, *ONE_EPOCH, "--out", "run"]) == 143
    (here / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert cli.command(["search", "--resume", "../run"]) == 0
    assert (here / "run/genotype.json").is_file()


def test_processes_that_torchrun_starts_again_go_on_with_the_run(here, monkeypatch, capsys):
    arguments = ["search", *ONE_STAGE, *ONE_EPOCH, "--out", "run"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert stopped(monkeypatch, arguments) == 143  # nothing had begun
    checkpoint = (here / "run/checkpoint.pt").read_bytes()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert cli.command(arguments) == 2
    assert "run already holds something" in capsys.readouterr().err
    assert (here / "run/checkpoint.pt").read_bytes() == checkpoint
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert cli.command(arguments) == 0
    assert (here / "run/checkpoint-before.pt").read_bytes() == checkpoint  # it went on
    (here / "used").mkdir()
    (here / "used/file").touch()
    assert cli.command([*arguments[:-1], "used"]) == 2


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(here, monkeypatch, capsys):
    monkeypatch.setattr(cli.time, "strftime", lambda _: "now")
    for name in "search-now", "search-now-2", "search-now-3":
        assert cli.command(["search", *ONE_STAGE, *ONE_EPOCH]) == 0
        assert f"results in runs/{name}\n" in capsys.readouterr().out
        assert (here / "runs" / name / "genotype.json").is_file()


def test_random_settings_of_a_run_go_on_as_they_say_or_are_refused(
    tmp_path, generated, monkeypatch, capsys, limits
):
    folder, seen, taken = tmp_path / "run", [], 0
    arguments = ["search", *FAST_SEARCH, *"--epochs 1 --alpha-start 0".split(), "--out", str(folder)]
    assert stopped(monkeypatch, arguments) == 143
    saved = json.loads((folder / "config.json").read_text())
    result = SearchResult(GENOTYPES["PDARTS"], [], [])
    monkeypatch.setattr(cli, "search", lambda config, *_, **__: seen.append(config) or result)
    capsys.readouterr()
    for number, rng in cases(100):
        with case(number):
            (folder / "config.json").write_text(json.dumps(changed(saved, rng)))
            status = cli.command(["search", "--resume", str(folder)])
            stderr = capsys.readouterr().err
            taken += status == 0
            assert status == 0 and not stderr or status == 2 and re.fullmatch("pdarts.py: error: .*\n", stderr)
    assert len(seen) == taken > 5 and all(isinstance(config, SearchSettings) for config in seen)
