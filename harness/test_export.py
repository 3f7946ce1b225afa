"""Tests of harness/export.py: the network of a run as a file, checked before it gets its name."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch

from harness import cli, export
from harness.conftest import ROOT, random_images
from harness.data.images import Images
from harness.evaluate import evaluate
from harness.predict import Classifier, predict
from harness.settings import EvaluateSettings
from pdarts import Genotype, InputError

SMALL = EvaluateSettings(dataset="shapes", depth=3, channels=4, epochs=1, batch_size=6)
PAIRS = [("skip_connect", 0), ("max_pool_3x3", 1)]
CLASSES = tuple("abcde")


@pytest.fixture(scope="module")
def images() -> Images:
    return dataclasses.replace(random_images((17, 18, 3)), classes=CLASSES)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    evaluate(Genotype(PAIRS, [2], PAIRS, [2]), SMALL, images, folder)
    return folder


def logits_of(run, images):
    classifier = Classifier(run, "cpu")
    return classifier.network(classifier.normalise(images.x_test)).detach()


def test_a_program_of_torch_takes_pixels_of_any_number_of_images(run, images, tmp_path):
    text = export.export(run, tmp_path / "model.pt2", images)
    said = r"compared with torch on 16 test images: 16 predictions are the same, .* is (\S+) of logits up to \S+\nwri"
    assert float(re.match(said, text)[1]) < 1e-5 and [*tmp_path.iterdir()] == [tmp_path / "model.pt2"]
    about = dict.fromkeys(("classes", "mean", "input"), "")
    program = torch.export.load(tmp_path / "model.pt2", extra_files=about).module()
    assert json.loads(about["classes"]) == list(CLASSES) and about["input"] == "images, uint8 [N, 3, 17, 18]"
    assert torch.tensor(json.loads(about["mean"])).allclose(images.mean)
    for number in 1, 5, 16:
        assert torch.allclose(program(images.x_test[:number]), logits_of(run, images)[:number], atol=1e-5)


def test_safetensors_hold_the_weights_and_say_the_rest(run, images, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    export.export(run, tmp_path / "weights.safetensors", images)
    with safetensors.safe_open(tmp_path / "weights.safetensors", "pt") as file:
        weights = torch.load(run / "weights.pt", weights_only=True)
        assert set(file.keys()) == {key for key in weights if not key.startswith("auxiliary_head.")}
        assert all(torch.equal(file.get_tensor(key), weights[key]) for key in file.keys())
        about = {key: json.loads(value) for key, value in file.metadata().items() if key != "input"}
    assert (about["genotype"]["normal"], about["settings"]["channels"]) == ([[*pair] for pair in PAIRS], 4)


def test_onnxruntime_alone_names_the_class_that_predict_names(run, images, tmp_path, monkeypatch, capsys):
    image_class = pytest.importorskip("PIL.Image")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    export.export(run, tmp_path / "model.onnx", images)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/EXPORT.md").read_text(), re.DOTALL)
    for pixels in images.x_test[:4]:
        image_class.fromarray(pixels.permute(1, 2, 0).numpy()).save("image.png")
        exec(code, {})
        (line,) = predict(run, ["image.png"])
        assert line.startswith(f"image.png: {capsys.readouterr().out.strip()} ")


def test_a_file_whose_logits_differ_does_not_get_its_name(run, images, tmp_path, monkeypatch):
    wrong = (), lambda *_: b"a program", lambda path, network: lambda x: network(x) + 0.01
    monkeypatch.setitem(export.FORMS, ".pt2", wrong)
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(InputError, match="16 predictions are the same.* 1.0e-02 of logits.*; expected .*nothing is wr"):
        export.export(run, tmp_path / "model.pt2", images)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_what_cannot_be_exported_is_refused_in_a_line(run, images, tmp_path, monkeypatch, capsys):
    for name in "onnxruntime", "safetensors":
        monkeypatch.setitem(sys.modules, name, None)
    x, y = np.zeros((10, 9, 9, 3), np.uint8), np.arange(10) % 5
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["model.pth"], "cannot export to .*model.pth; expected a file that ends in .onnx, .pt2, .safetensors"),
        (["model.safetensors"], "exporting .safetensors needs safetensors; expected: pip install safetensors"),
        (["model.onnx"], "exporting .onnx needs .*onnxruntime; expected: pip install .*onnxruntime"),
        (["model.pt2"], "the run was trained on own data, which no file holds; expected data with test images"),
        (["model.pt2", "--data", "own.npz"], r"the images of own.npz are \[3, 9, 9\] of 5 classes; expected \[3, 17"),
    ):
        assert cli.command(["export", str(run), "--to", *arguments]) == 2
        assert re.match(f"pdarts.py: error: {message}", capsys.readouterr().err)
        assert not [*tmp_path.glob("model*")]
