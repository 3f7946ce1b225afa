"""Tests of training on the files of a folder: crops, colours, the mobile setting's run through the command line."""

import colorsys
import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import signal

import numpy as np
import pytest
import torch

import pdarts
from harness import cli
from harness.conftest import CELL, FAST_SEARCH, assert_same_run
from harness.data import folders, photographs
from harness.data.images import load
from harness.data.photographs import BRIGHTNESS, CONTRAST, HUE, SATURATION, Crops, Photographs, jittered, random_crop
from harness.settings import EVALUATE_PRESETS, SearchSettings
from pdarts import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """36 training images of 3 classes and 12 to test, of various sizes; their files hold their pixels."""

    def decoded(path):
        data = np.fromfile(path, np.uint8)
        if len(data) < 3:
            raise ValueError("not an image")
        return torch.from_numpy(data[2:].reshape(data[0], data[1], 3)).permute(2, 0, 1)

    monkeypatch.setattr(folders, "decode", decoded)
    rng = np.random.default_rng(0)
    for split, number in ("train", 12), ("val", 4):
        for (i, name), k in itertools.product(enumerate("abc"), range(number)):
            path = tmp_path / f"data/{split}/{name}/{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(20, 60, 2, np.uint8)
            pixels = rng.integers(0, 200, (height, width, 3), np.uint8) // 2 + 40 * i
            path.write_bytes(bytes([height, width]) + pixels.astype(np.uint8).tobytes())
    (tmp_path / "cell.json").write_text(json.dumps(CELL._asdict()))
    return tmp_path / "data"


MOBILE = "--preset imagenet --size 40 --epochs 3 --depth 3 --channels 8 --batch-size 9 --lr 0.05 --kernels off".split()


def test_the_mobile_setting_trains_on_files_and_goes_on_bit_for_bit(folder, tmp_path, capsys, monkeypatch):
    start = ["evaluate", str(tmp_path / "cell.json"), "--data", str(folder), *MOBILE]
    assert cli.command([*start, "--workers", "0", "--out", str(tmp_path / "whole")]) == 0
    text = capsys.readouterr().out
    assert f"training on 36 images of {folder}, 3 cells" in text and "top-5" not in text  # of 3 classes
    train, steps = pdarts.Evaluation.train, []

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == 6:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pdarts.Evaluation, "train", interrupted)
        assert cli.command([*start, "--workers", "1", "--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert f"--workers 1 --resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert cli.command(["evaluate", "--resume", str(tmp_path / "run"), "--workers", "2"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in log] == pytest.approx([0.01, 0.02, 0.015])  # 1/5, 2/5, 3/5 of 1, 1, 1/2
    assert [r["test_accuracy_top5"] for r in log] == [1.0] * 3
    weights = ["--weights", str(tmp_path / "run/weights.pt")]
    assert cli.command([*start, *weights]) == 0
    error = f"test error:    {1 - log[-1]['test_accuracy']:.2%}\n"
    assert capsys.readouterr().out.endswith(error)
    assert "stem0.0.weight" in torch.load(tmp_path / "run/weights.pt", weights_only=True)


def test_top_5_is_said_where_there_are_more_than_10_classes(folder, capsys):
    for name in "defghijkl":
        os.symlink(folder / "train/a", folder / f"train/{name}")
    start = ["evaluate", str(folder / "../cell.json"), "--data", str(folder), *MOBILE, "--workers", "0"]
    assert cli.command([*start, "--epochs", "1", "--out", str(folder / "../run")]) == 0
    assert "% (top-1), " in capsys.readouterr().out


def test_a_search_takes_the_files_resized_and_mapped_in_random_order(folder, tmp_path, capsys):
    settings = SearchSettings(dataset="shapes", size=16, fraction=0.5)
    images = load(settings, str(folder), workers=0)
    assert (len(images), images.size, images.num_classes, len(images.x_test)) == (18, (3, 16, 16), 3, 12)
    assert images.y_train.bincount().tolist() == [6, 6, 6] and images.y_train.tolist() != sorted(images.y_train)
    maps = pathlib.Path("/proc/self/maps")
    assert not maps.exists() or str(folder / ".pdarts-cache") in maps.read_text()
    small = [*FAST_SEARCH, *"--channels 8 --epochs 1 --alpha-start 0 --batch-size 4 --images 0".split()]
    folder_and_settings = ["--data", str(folder), "--size", "16", "--stem", "imagenet", "--workers", "0"]
    small += ["--kernels", "off", "--out", str(tmp_path / "run")]
    assert cli.command(["search", *folder_and_settings, *small]) == 0
    text, fitting = capsys.readouterr().out, "--stem imagenet --size 16"
    assert f"searching on 36 images of {folder}" in text and text.endswith(f"--data {folder} {fitting}\n")
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["path"] == str(folder) and saved["settings"]["stem"] == "imagenet"


def test_images_that_stay_in_a_file_yield_the_same_batches(folder, monkeypatch):
    images = load(SearchSettings(size=16), str(folder), workers=0)
    config = dataclasses.replace(SearchSettings(), batch_size=6)
    mapped = dataclasses.replace(images, device=torch.device("cpu"))
    a, b = (list(i.search_data(config).val.epoch(3)) for i in (mapped, images.to("cpu")))
    assert all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other))


@pytest.mark.parametrize("arguments, message", [
    (["search", "--workers", "-1"], "workers is -1; expected 0 to 1000"),
    (["search", "--fraction", "0"], "fraction is 0.0; expected a number from 1e-09 to 1"),
    (["search", "--size", "4"], "size is 4; expected a whole number from 8 to 1024"),
    (["evaluate", "PDARTS", "--augment", "mixup"], "invalid choice: 'mixup'"),
    (["evaluate", "PDARTS", "--preset", "imagenet", "--size", "32"],
     "images of 32 x 32 leave the auxiliary head 1 x 1; expected 33 or more (for folders: --size), or --no-auxiliary"),
])  # fmt: skip
def test_wrong_options_for_folders_get_one_line(folder, capsys, arguments, message):
    assert cli.command([*arguments, "--data", str(folder), "--kernels", "off"]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1


def test_a_damaged_file_ends_the_run_before_training_unless_skipped(folder, tmp_path, capsys):
    (folder / "train/b/5.jpg").write_text("x")
    start = ["evaluate", "PDARTS", "--data", str(folder), *MOBILE, "--workers", "0", "--out", str(tmp_path / "run")]
    assert cli.command(start) == 2
    stderr = capsys.readouterr().err
    assert "1 of 48 images cannot be read, the first: train/b/5.jpg" in stderr and "--skip-damaged" in stderr
    assert not (tmp_path / "run").exists()
    assert cli.command([*start, "--skip-damaged", "--epochs", "1"]) == 0
    assert f"training on 35 images of {folder}, without 1 damaged file, 3 cells" in capsys.readouterr().out
    assert load(SearchSettings(), str(folder), skip_damaged=True).damaged == 1


def test_a_file_that_is_damaged_meanwhile_ends_the_run_with_its_name(folder):
    data = load(EVALUATE_PRESETS["imagenet"], str(folder))
    assert isinstance(data, Photographs)
    (folder / "train/b/5.jpg").write_text("x")
    with pytest.raises(InputError, match="cannot read train/b/5.jpg in .* any more .not an image.; expected an image"):
        crops = Crops(data.listing, 16, True)
        [crops[i] for i in range(len(crops))]
    with pytest.raises(InputError, match="a search takes images of one size; expected --augment cifar"):
        data.search_data(None)


# --- crops and colours ------------------------------------------------------------------------------------------------


def test_random_crops_have_the_area_and_the_ratio_that_they_may_have():
    torch.manual_seed(0)
    areas, ratios = [], []
    for _ in range(2000):
        top, left, height, width = random_crop(300, 400)
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        areas.append(height * width / (300 * 400))
        ratios.append(width / height)
    assert 0.079 < min(areas) < 0.1 and 0.9 < max(areas) <= 1 and 0.35 < np.mean(areas) < 0.55
    assert 0.73 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.36 and abs(np.mean(np.log(ratios))) < 0.05
    assert random_crop(10, 1000) == (0, 493, 10, 13) and random_crop(1000, 10) == (493, 0, 13, 10)  # no part will do


def test_test_images_are_cut_out_of_the_middle(folder):
    listing = folders.scan(folder)
    images = Photographs(listing, 224)
    (pixels, labels), = list(images.test(3))
    assert pixels.shape == (3, 3, 224, 224) and labels.tolist() == [0, 0, 0] and pixels.dtype == torch.float32
    whole = folders.resize_and_crop(folders.decode(folder / listing.test[0][0]), 256)[:, 16:240, 16:240].float() / 255
    right = torch.stack([(c - m) / s for c, m, s in zip(whole, photographs.MEAN, photographs.STD)])
    torch.testing.assert_close(pixels[0], right)
    parts = [torch.cat([y for _, y in images.test(None, (rank, 2))]) for rank in (0, 1)]
    assert [len(part) for part in parts] == [6, 6] and torch.cat(parts).bincount().tolist() == [4, 4, 4]


def by_hand(pixel_rows, change, factor):
    """One change of the colours of an image, a list of (r, g, b) from 0 to 1."""
    clamp = lambda v: min(1.0, max(0.0, v))  # noqa: E731
    greys = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in pixel_rows]
    mean = sum(greys) / len(greys)
    result = []
    for rgb, grey in zip(pixel_rows, greys):
        if change == 3:
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            result.append(colorsys.hsv_to_rgb((h + factor) % 1, s, v))
        else:
            other = (0.0, mean, grey)[change]
            result.append(tuple(clamp(factor * c + (1 - factor) * other) for c in rgb))
    return result


def test_colours_change_in_the_order_and_by_the_factors_of_each_image():
    rng = random.Random(0)
    pixels = torch.randint(256, (24, 3, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reach = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    assert reach == (0.4, 0.4, 0.4, 0.2)
    factors = torch.tensor([[rng.uniform(-r, r) + (k < 3) for k, r in enumerate(reach)] for _ in range(24)])
    orders = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float32)
    labels = torch.arange(24)
    x, y = jittered([[pixels, torch.cat([factors, orders], 1)], labels], torch.device("cpu"))
    assert torch.equal(y, labels)
    for n in range(24):
        rows = [tuple(c / 255 for c in rgb) for rgb in pixels[n].flatten(1).T.tolist()]
        for change in orders[n].int().tolist():
            rows = by_hand(rows, change, factors[n, change].item())
        right = (torch.tensor(rows).T.reshape(3, 2, 3) - torch.tensor(photographs.MEAN).view(3, 1, 1))
        torch.testing.assert_close(x[n], right / torch.tensor(photographs.STD).view(3, 1, 1), rtol=1e-4, atol=1e-4)


def test_what_is_random_of_a_crop_is_flips_colours_and_their_order(folder):
    crops = Crops(folders.scan(folder), 16, True)
    torch.manual_seed(0)
    drawn = torch.stack([crops[0][0][1] for _ in range(400)])
    for k, reach in enumerate((0.4, 0.4, 0.4, 0.2)):
        low, high = drawn[:, k].min(), drawn[:, k].max()
        assert low == pytest.approx((k < 3) - reach, abs=0.05) and high == pytest.approx((k < 3) + reach, abs=0.05)
    assert len(set(map(tuple, drawn[:, 4:].tolist()))) == math.factorial(4)
    flipped = []
    for seed in range(20):
        torch.manual_seed(seed)
        plain = Crops(crops.listing, 16, False)[0][0][0]
        torch.manual_seed(seed)
        either = crops[0][0][0]
        assert plain.dtype == torch.uint8 and plain.shape == (3, 16, 16)
        flipped.append(torch.equal(either, plain.flip(2)))
        assert flipped[-1] or torch.equal(either, plain)
    assert 4 < sum(flipped) < 16
