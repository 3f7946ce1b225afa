"""Tests of harness/predict.py: an image gets the class that the test of the run gave it."""

import dataclasses
import re
import sys

import numpy as np
import pytest
import torch

from harness import cli
from harness.conftest import CELL, ONE_STAGE, fast_search, random_images
from harness.data.images import load
from harness.data.loaders import Batches, Loaders
from harness.evaluate import evaluate
from harness.predict import Classifier, predict
from harness.settings import EvaluateSettings
from pdarts import InputError

SMALL = EvaluateSettings(dataset="shapes", depth=3, channels=4, epochs=1, batch_size=6, auxiliary=False)
PERCENT = r"\d+\.\d\d%"


def evaluated(folder, images, **settings):
    """Return the test error of an evaluation in the folder."""
    return evaluate(CELL, dataclasses.replace(SMALL, **settings), images, folder).test_error


def write_images(folder, classes, shape, bits=8, mode=None):
    """Write random images, dark or bright by their class, and return them."""
    Image, rng = pytest.importorskip("PIL.Image"), np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 2 ** (bits - 1), shape) + number * 2 ** (bits - 2)
            image = Image.fromarray(pixels.astype(np.uint8 if bits == 8 else np.uint16))
            (image.convert(mode) if mode else image).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("shape, bits, settings", [
    ((12, 15, 3), 8, {"size": 8}),
    ((12, 15), 12, {"size": 8}),
    ((20, 15, 3), 8, {"size": 14, "augment": "imagenet"}),
    ((20, 15), 12, {"size": 14, "augment": "imagenet", "dtype": "bfloat16"}),
], ids=str)  # fmt: skip
def test_images_of_a_folder_get_the_classes_of_the_test(tmp_path, shape, bits, settings):
    for split in "train", "val":
        write_images(tmp_path / "data" / split, ("cat", "dog"), shape, bits)
    images = load(dataclasses.replace(SMALL, **settings), str(tmp_path / "data"))
    error = evaluated(tmp_path / "run", images, **settings)
    lines = [line for name in ("cat", "dog") for line in predict(tmp_path / "run", [tmp_path / "data/val" / name])]
    classifier, tested, wrong = Classifier(tmp_path / "run", "cpu"), [*images.test()][0][0], 0
    for line, file in zip(lines, sorted((tmp_path / "data/val").rglob("*.png")), strict=True):
        found = re.fullmatch(rf"{re.escape(str(file))}: (cat|dog) ({PERCENT}), (cat|dog) ({PERCENT})", line)
        wrong += found[1] != file.parent.name
        seen = classifier.normalise(classifier.image(file))
        assert any(torch.allclose(seen, image, atol=1e-5) for image in tested)
        assert {found[1], found[3]} == {"cat", "dog"} and float(found[2][:-1]) >= float(found[4][:-1])
    assert wrong / len(lines) == pytest.approx(error)


@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 12, 3), (9, 12)])
def test_images_of_arrays_get_the_classes_of_the_test(tmp_path, shape):
    Image, images = pytest.importorskip("PIL.Image"), random_images(shape, classes=7, n=21)
    error = evaluated(tmp_path / "run", dataclasses.replace(images, classes=tuple("abcdefg")))
    for i, pixels in enumerate(images.x_test.permute(0, 2, 3, 1).squeeze(3).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    lines = list(predict(tmp_path / "run", sorted(tmp_path.glob("*.png"))))
    assert all(re.search(rf": ([a-g] {PERCENT}, ){{4}}[a-g] {PERCENT}$", line) for line in lines)  # 5 of 7
    wrong = sum(line.split()[1] != "abcdefg"[y] for line, y in zip(lines, images.y_test.tolist(), strict=True))
    assert wrong / len(lines) == pytest.approx(error)


def test_images_that_cannot_be_read_are_named_after_the_others(tmp_path, capsys):
    write_images(tmp_path / "images", ("x/y",), (9, 9, 3))
    evaluated(tmp_path / "run", random_images((8, 8, 3)))
    (tmp_path / "images/0.jpg").write_text("text")
    (tmp_path / "images/notes.txt").write_text("text")
    assert cli.command(["predict", str(tmp_path / "run"), str(tmp_path / "images"), "nowhere.png"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout.count("\n") == 6 and f"{tmp_path}/images/x/y/5.png: " in stdout
    first = "2 of the images cannot be read, the first: .*0.jpg .UnidentifiedImageError.*; expected images"
    assert re.fullmatch(f"pdarts.py: error: {first}\n", stderr)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in .*empty; expected files .jpg, "):
        list(predict(tmp_path / "run", [tmp_path / "empty"]))


def test_what_cannot_classify_images_is_refused(tmp_path, monkeypatch):
    fast_search(ONE_STAGE, random_images(), tmp_path / "search")
    evaluated(tmp_path / "channels", random_images((8, 8, 4)))
    data = [(torch.rand(3, 8, 8), i % 2) for i in range(8)]
    loaders = Loaders(Batches(data, 4), None, [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))], 2, (3, 8, 8))
    evaluated(tmp_path / "loaders", loaders)
    for name, message in (
        ("nowhere", "cannot read the run .*nowhere .FileNotFoundError.*; expected the folder of an evaluation"),
        ("search", "cannot read the run .*search .TypeError: .*; expected the folder of an evaluation"),
        ("channels", "channels was trained on own data of 4 channels; expected images of 1 or 3 channels"),
        ("loaders", "trained on custom loaders of 3 channels; expected .*, with a known mean and deviation"),
    ):
        with pytest.raises(InputError, match=message):
            list(predict(tmp_path / name, ["1.jpg"]))
    evaluated(tmp_path / "run", random_images((8, 8, 3)))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="reading images needs Pillow"):
        list(predict(tmp_path / "run", ["1.jpg"]))
    evaluated(tmp_path / "known", dataclasses.replace(loaders, mean=[0.5] * 3, std=[0.2] * 3))
    with pytest.raises(InputError, match="reading images needs Pillow"):  # and nothing else
        list(predict(tmp_path / "known", ["1.jpg"]))
