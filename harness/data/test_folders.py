"""Tests of harness/data/folders.py. Most read images of a format of their own, since Pillow need not be installed."""

import io
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import struct
import sys
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.data import folders
from harness.data.folders import cached, check, decode, fingerprint, resize_and_crop, scan
from harness.files import locked
from harness.fuzz import accepted, case, cases, changed, damaged
from pdarts import InputError

ODD = "\udcff" if sys.platform == "linux" else "\x7f"  # in names of files: not UTF-8, if such can be written
ESCAPED = ascii(ODD)[1:-1]
FORK = multiprocessing.get_start_method() == "fork"  # workers then have what the tests put in the place of decode


def image(number, height=9, width=12) -> bytes:
    return bytes([height, width]) + random.Random(number).randbytes(3 * height * width)


def fake_decode(path):
    content = pathlib.Path(path).read_bytes()
    if len(content) < 2 or len(content) != 2 + 3 * content[0] * content[1]:
        raise ValueError(f"{len(content)} bytes")
    return torch.tensor(list(content[2:]), dtype=torch.uint8).view(3, content[0], content[1])


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Reads images of the tests' own format; a file that gets a byte per image that is decoded, in any process."""
    path = tmp_path / "log"
    path.touch()

    def decode(file):
        with open(path, "ab") as log:
            log.write(b".")
        return fake_decode(file)

    monkeypatch.setattr(folders, "decode", decode)
    return path


def decoded(log) -> int:
    """How many images have been since the last call."""
    count = log.stat().st_size
    log.write_bytes(b"")
    return count


def write(folder, *paths):
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(image(number, 9 + number % 3, 12 - number % 5))
    return folder


@pytest.fixture
def folder(tmp_path):
    """4 training images of each of 3 classes and 2 test images of two of them."""
    names = [f"train/{name}/{i}.jpg" for name in ("cat", "dog", "eel") for i in range(4)]
    return write(tmp_path / "data", *names, *(f"val/{name}/{i}.png" for name in ("cat", "eel") for i in range(2)))


# --- what there is ----------------------------------------------------------------------------------------------------


def test_images_are_found_in_order_of_classes_and_paths(tmp_path):
    for path in ("train/b/2.JPG", "train/b/10.jpeg", "train/a-b/1.png", "train/a/z/y/1.WebP", "train/a/b.bmp",
                 "train/a/x.jpg/1.jpg", "val/b/1.Jpeg", "val/a/1.jpg", "test/b/2.jpg",
                 "train/a/notes.txt", "train/a/.hidden.jpg", "train/.hidden/1.jpg", "train/a/.hidden/1.jpg",
                 "train/1.jpg", "val/1.jpg", "train/a/jpg", "1.jpg"):  # fmt: skip
        write(tmp_path, path)
    listing = scan(tmp_path)
    assert listing.folder == str(tmp_path) and listing.classes == ["a", "a-b", "b"]
    assert listing.train == [("train/a/b.bmp", 0), ("train/a/x.jpg/1.jpg", 0), ("train/a/z/y/1.WebP", 0),
                             ("train/a-b/1.png", 1), ("train/b/10.jpeg", 2), ("train/b/2.JPG", 2)]  # fmt: skip
    assert listing.test == [("val/a/1.jpg", 0), ("val/b/1.Jpeg", 2)]
    assert scan(str(tmp_path)) == listing and listing.images == 8
    (tmp_path / "val").rename(tmp_path / ".val")
    assert scan(tmp_path).test == [("test/b/2.jpg", 2)]


@pytest.mark.parametrize(
    "paths, message",
    [
        ([], "cannot read .*own .FileNotFoundError.*; expected a folder that can be read"),
        (["1.jpg"], "no folder train and no val or test in .*; expected train/CLASS/"),
        (["train/a/1.jpg", "Training/a/1.jpg"], "has a folder Training and a folder train; expected one of them"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/images/1.jpg", "val/images/2.jpg", "val/val_annotations.txt"],
         "val_annotations.txt lacks 2 of 2 images: val/images/1.jpg, val/images/2.jpg; expected all of them"),
        (["val/a/1.jpg"], "no folder train in "),
        (["train/a/1.jpg", "train/b/1.jpg"], "no folder val or test in "),
        (["train/a/1.jpg", "val/a/1.jpg"], "train has 1 folders; expected 2 or more"),
        (["train/a/1.jpg", "train/b/1.svg", "train/c/x/.1.jpg", "val/a/1.jpg"],
         "2 of 3 classes in .*train have no images: b, c; expected files .jpg, .jpeg, .png, .webp, .bmp, .tif"),
        (["train/a/1.jpg", *(f"train/{i}/no" for i in range(5)), "val/a/1.jpg"], "5 of 6 .*: 0, 1, 2 and 2 more;"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg", "val/d/no"],
         "2 classes in .*val are not in .*train: c, d; expected"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"], "val has no images in folders of classes; expected CLASS/"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.svg", "test/a/1.jpg"], "val has no images in folders of classes"),
        (["train/a/1.jpg", f"train/b\n{ODD}/no", "val/a/1.jpg"], rf"1 of 2 classes in .*: b\\n\{ESCAPED}; expected"),
    ],
)  # fmt: skip
def test_what_is_not_a_folder_of_images_is_named(tmp_path, paths, message):
    with pytest.raises(InputError, match=message) as error:
        scan(write(tmp_path / "own", *paths))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("train, test, tested", [
    ("Training", "Testing", "Testing"), ("train", "valid", "valid"), ("TRAIN", "Test", "Test"),
    ("train", "validation", "validation")])  # fmt: skip
def test_other_names_of_train_and_val_are_known(tmp_path, train, test, tested):
    write(tmp_path, f"{train}/a/1.jpg", f"{train}/b/1.jpg", f"{test}/b/1.jpg")
    assert scan(tmp_path).train == [(f"{train}/a/1.jpg", 0), (f"{train}/b/1.jpg", 1)]
    assert scan(tmp_path).test == [(f"{tested}/b/1.jpg", 1)] and scan(tmp_path).note == ""


def test_what_is_not_read_is_counted_and_named(tmp_path):
    write(tmp_path, *(f"train/{name}/1.{ending}" for name, ending in zip("abcdefg", folders.ENDINGS[-7:])))
    write(tmp_path, "train/a/IMG_0001", "train/b/notes.txt", "train/c/x/1.heic", "train/1.jpg", "train/a/.DS_Store",
          "valid/a/1.jpg", "test/a/1.jpg", "test/a/readme", "readme")  # fmt: skip
    listing = scan(tmp_path)
    assert len(listing.train) == 7 and listing.test == [("valid/a/1.jpg", 0)]
    assert listing.note == (
        "4 other files in it not read: train/1.jpg, train/a/IMG_0001, train/b/notes.txt and 1 more, tested on valid, "
        "not on test"
    )


def test_the_annotations_of_tiny_imagenet_are_read(tmp_path):
    write(tmp_path, "train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG", "test/images/test_0.JPEG",
          *(f"val/images/val_{i}.JPEG" for i in range(3)))  # fmt: skip
    lines = "".join(f"val_{i}.JPEG\tn0{2 - i % 2}\t0\t0\t9\t9\n" for i in range(3))
    (tmp_path / "val/val_annotations.txt").write_text(lines)
    listing = scan(tmp_path)
    assert listing.classes == ["n01", "n02"] and len(listing.train) == 2
    assert listing.test == [("val/images/val_1.JPEG", 0), ("val/images/val_0.JPEG", 1), ("val/images/val_2.JPEG", 1)]
    assert listing.note == "tested on val, not on test"


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="cannot read .*data .PermissionError: .*Permission denied.; expected"):
        scan(folder)


def test_links_within_the_folder_are_followed_and_end(tmp_path, folder):
    (folder / "train/cat/linked.jpg").symlink_to("../dog/0.jpg")
    (folder / "train/fox").symlink_to("dog")
    (folder / "train/dog/loop").symlink_to("../../train/dog")
    (folder / "train/eel/up").symlink_to(folder / "train")  # and so all images
    (folder / "train/eel/1.txt").symlink_to("/etc/passwd")  # not an image
    (folder / "train/eel/gone.jpg").symlink_to("nowhere.jpg")
    (folder / "readme").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    listing = scan(tmp_path / "link")
    paths = [path for path, _ in listing.train]
    assert ("train/cat/linked.jpg", 0) in listing.train and ("train/fox/3.jpg", 3) in listing.train
    assert sum("dog" in path for path in paths) == 4 + sum("up/dog" in path for path in paths) < 30
    assert ("train/eel/gone.jpg", 2) in listing.train
    with pytest.raises(ValueError):
        decode(folder / "train/eel/gone.jpg")


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path, folder):
    write(tmp_path, "elsewhere/1.jpg", "data2/1.jpg")
    links = {"train/cat/out.jpg": "elsewhere/1.jpg", "train/cat/in/out.jpg": "elsewhere/no.jpg", "val/cat/deep": "",
             "train/fox": "data2"}  # fmt: skip
    for number, (link, target) in enumerate(links.items(), 1):
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(tmp_path / target)
        with pytest.raises(InputError, match=f"^{number} of the files and folders in .* are links that lead out of "):
            scan(folder)
    with pytest.raises(InputError, match="train/fox, train/cat/out.jpg, train/cat/in/out.jpg and 1 more; expected all"):
        scan(folder)
    shutil.move(folder / "val", tmp_path / "val")
    (folder / "val").symlink_to(tmp_path / "val")  # and so no longer val/cat/deep
    with pytest.raises(InputError, match="4 of .*: train/fox, .*; expected all images in it, or --follow-links"):
        scan(folder)
    taken = scan(folder, links=True)
    assert {("train/fox/1.jpg", 3), ("train/cat/out.jpg", 0), ("train/cat/in/out.jpg", 0)} <= set(taken.train)
    assert taken.classes == ["cat", "dog", "eel", "fox"] and ("val/eel/0.png", 2) in taken.test


def test_a_part_of_each_class_is_chosen_alike_whatever_the_others_are(tmp_path):
    counts = {"a": 40, "b": 7, "c": 1}
    write(tmp_path, *(f"train/{name}/{i:02}.jpg" for name, n in counts.items() for i in range(n)), "val/a/1.jpg")
    listing = scan(tmp_path)
    assert listing.subset(1) == listing
    half, tenth = listing.subset(0.5), listing.subset(0.1)
    assert half == scan(tmp_path).subset(0.5)
    for part, expected in (half, [20, 4, 1]), (tenth, [4, 1, 1]), (listing.subset(1e-9), [1, 1, 1]):
        assert np.bincount([label for _, label in part.train]).tolist() == expected
        assert part.train == sorted(part.train) and part.test == listing.test and part.classes == listing.classes
    assert {*tenth.train} < {*half.train} < {*listing.train}
    assert half.train[:20] != listing.train[:20]
    write(tmp_path, "train/0/1.jpg", "train/b/07.jpg")
    more = scan(tmp_path).subset(0.5).train
    assert [path for path, label in more if label == 1] == [path for path, _ in half.train[:20]]
    for fraction in 0, -1, 1.1, float("nan"):
        with pytest.raises(InputError, match="fraction is .*; expected more than 0 and at most 1"):
            listing.subset(fraction)


def test_fingerprints_tell_names_labels_and_sizes_apart(tmp_path, folder):
    first = fingerprint(scan(folder))
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy/train/cat/0.jpg", (0, 0))
    assert fingerprint(scan(tmp_path / "copy")) == first
    seen = {first, fingerprint(scan(folder).subset(0.5))}
    for number, change in enumerate((
        lambda copy: (copy / "train/cat/0.jpg").rename(copy / "train/cat/9.jpg"),
        lambda copy: (copy / "train/cat").rename(copy / "train/bat") and (copy / "val/cat").rename(copy / "val/bat"),
        lambda copy: (copy / "train/cat/0.jpg").rename(copy / "train/dog/9.jpg"),
        lambda copy: (copy / "train/cat/0.jpg").write_bytes(image(0) + b"."),
        lambda copy: (copy / "val/cat/0.png").unlink(),
        lambda copy: write(copy, "train/ape/1.jpg"),
    )):  # fmt: skip
        shutil.copytree(folder, tmp_path / str(number))
        change(tmp_path / str(number))
        seen.add(fingerprint(scan(tmp_path / str(number))))
    assert len(seen) == 8
    listing = scan(folder)
    (folder / "train/cat/0.jpg").unlink()
    assert fingerprint(listing) != first  # and no error


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, size", [(9, 12, 9), (12, 9, 9), (40, 30, 8), (31, 50, 16), (5, 7, 32), (1, 1, 8)])
def test_the_middle_is_cut_out_of_the_resized_image(height, width, size):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), np.uint8))
    result = resize_and_crop(pixels, size)
    assert result.dtype == torch.uint8 and result.shape == (3, size, size) and result.is_contiguous()
    new = [size * side // min(height, width) for side in (height, width)]
    whole = torch.nn.functional.interpolate(pixels[None].float(), new, mode="bilinear", antialias=True)[0]
    top, left = (round((side - size) / 2) for side in new)
    part = whole[:, top : top + size, left : left + size]
    assert (result - part).abs().max() <= 1  # rounded
    assert torch.equal(resize_and_crop(pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1), size), result)
    assert (resize_and_crop(torch.full((3, height, width), 7, dtype=torch.uint8), size) == 7).all()


def test_lines_are_resized_in_little_memory(limits):
    line = torch.arange(60_000, dtype=torch.int32).sub(25_000).clamp(0, 255).to(torch.uint8).expand(3, 1, -1)
    result = resize_and_crop(line, 224)  # the whole would have 9 GB
    assert result.shape == (3, 224, 224) and (result == 255).all()
    assert torch.equal(resize_and_crop(line.transpose(1, 2), 224), result)


# --- the cache --------------------------------------------------------------------------------------------------------


def expected(listing, size, left_out=()):
    for part in listing.train, listing.test:
        kept = [(path, label) for path, label in part if path not in left_out]
        yield torch.stack([resize_and_crop(fake_decode(os.path.join(listing.folder, path)), size) for path, _ in kept])
        yield torch.tensor([label for _, label in kept])


def assert_images(result, listing, size, left_out=()):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tensor, wanted in zip(result, expected(listing, size, left_out)):
            assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.skipif(not FORK, reason="needs fork"))])
def test_images_are_resized_once_and_mapped(tmp_path, folder, log, workers, recwarn):
    listing, told = scan(folder), []
    random_state = torch.get_rng_state()
    result = cached(listing, 8, workers, progress=lambda *numbers: told.append(numbers))
    assert torch.equal(torch.get_rng_state(), random_state)  # as if the cache had been there
    assert result[0].shape == (12, 3, 8, 8) and result[2].shape == (4, 3, 8, 8) and result[4] == []
    assert_images(result, listing, 8)
    assert decoded(log) == 16 and told[-1] == (16, 16)
    assert_images(cached(scan(folder), 8), listing, 8)
    assert decoded(log) == 0
    kept = [path.suffix for path in (folder / ".pdarts-cache").iterdir()]
    assert sorted(kept) == ["", ".json", ".u8"] and scan(folder) == listing
    maps = pathlib.Path("/proc/self/maps")
    assert not maps.exists() or ".pdarts-cache" in maps.read_text()
    assert not [str(warning.message) for warning in recwarn if "writable" in str(warning.message)]
    assert_images(cached(listing, 8, cache=tmp_path / "other/deep"), listing, 8)
    assert decoded(log) == 16
    with pytest.raises(InputError, match="size is 0; expected 1 or more"):
        cached(listing, 0)


def test_changed_folders_and_other_sizes_have_caches_of_their_own(folder, log):
    listing = scan(folder)
    cached(listing, 8)
    cached(listing, 9)
    assert decoded(log) == 32
    half = listing.subset(0.5)
    assert_images(cached(half, 8), half, 8)
    assert decoded(log) == 10
    (folder / "train/cat/0.jpg").write_bytes(image(99))
    assert_images(cached(listing, 8), listing, 8)
    assert decoded(log) == 16
    os.utime(folder / "train/cat/0.jpg", (0, 0))
    cached(listing, 8)
    assert decoded(log) == 16
    cached(listing, 9)
    write(folder, "train/cat/4.jpg")
    assert_images(cached(scan(folder), 9), scan(folder), 9)
    assert len([*(folder / ".pdarts-cache").glob("*.u8")]) == 7  # the old ones stay


def build_in_process(folder, queue, begin):
    begin.wait()
    x, *_, bad = cached(scan(folder), 8)
    queue.put((int(x.sum()), bad))


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_of_two_processes_one_builds_and_the_other_waits(folder, log):
    context = multiprocessing.get_context("fork")
    queue, begin = context.Queue(), context.Event()
    (folder / ".pdarts-cache").mkdir()
    processes = [context.Process(target=build_in_process, args=(folder, queue, begin)) for _ in range(2)]
    for process in processes:
        process.start()
    with locked(folder / ".pdarts-cache/.lock"):  # after the processes have begun: they would hold it as well
        begin.set()
        assert not any(process.join(0.2) or process.exitcode is not None for process in processes)  # both wait
    results = [queue.get(timeout=60) for _ in processes]
    assert [process.join(60) or process.exitcode for process in processes] == [0, 0]
    assert results[0] == results[1] and decoded(log) == 16
    assert_images(cached(scan(folder), 8), scan(folder), 8)


def test_an_interrupted_build_leaves_nothing_that_is_taken_for_whole(folder, log, monkeypatch):
    cache, listing, count = folder / ".pdarts-cache", scan(folder), 0
    original = folders.decode

    def interrupted(path):
        nonlocal count
        count += 1
        if count > 7:
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(folders, "decode", interrupted)
    for call in lambda: cached(listing, 8), lambda: check(listing):
        count = 0
        with pytest.raises(KeyboardInterrupt):
            call()
        assert [path.name for path in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(folders, "decode", original)
    (cache / ".6px-of a killed one.u8.tmp").write_bytes(b"1")
    # Killed between the two files that a build leaves:
    whole = cached(listing, 8)[0].clone()
    record, decodes = next(cache.glob("*.json")), decoded(log)
    record.unlink()
    assert torch.equal(cached(listing, 8)[0], whole) and decoded(log) == 16 < decodes
    assert not [*cache.glob(".*.tmp")]


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_a_killed_build_is_begun_anew(folder, log, monkeypatch):
    original = folders.decode

    def killed(path):
        if path.endswith("eel/3.jpg"):
            os.kill(os.getpid(), 9)
        return original(path)

    monkeypatch.setattr(folders, "decode", killed)
    process = multiprocessing.get_context("fork").Process(target=cached, args=(scan(folder), 8))
    process.start()
    process.join(60)
    assert process.exitcode == -9 and [*(folder / ".pdarts-cache").glob(".*.u8.tmp")]
    monkeypatch.setattr(folders, "decode", original)
    assert_images(cached(scan(folder), 8), scan(folder), 8)
    assert not [*(folder / ".pdarts-cache").glob(".*.u8.tmp")]


def test_damage_to_the_cache_is_noticed(folder, log):
    listing = scan(folder)
    before = cached(listing, 8)  # stays as it is, whatever becomes of the file
    (pixels,), (record,) = ((folder / ".pdarts-cache").glob(f"*.{ending}") for ending in ("u8", "json"))
    content, about = pixels.read_bytes(), record.read_bytes()
    flipped = content[:1234] + bytes([content[1234] ^ 1]) + content[1235:]
    for path, wrong in (
        *((pixels, bad) for bad in (flipped, content[:-1], content + b"0", b"", bytes(len(content)), None)),
        *((record, bad) for bad in (None, b"", b"[]", b"{}", about[:-1], about.replace(b"16", b"15"), b"[" * 9999)),
        *((record, json.dumps(json.loads(about) | {"damaged": bad}).encode()) for bad in ({"x": "y"}, [1], None)),
    ):
        decoded(log)
        path.unlink()
        if wrong is not None:
            path.write_bytes(wrong)
        assert_images(cached(listing, 8), listing, 8)
        assert decoded(log) == 16 and (pixels.read_bytes(), record.read_bytes()) == (content, about)
    assert_images(before, listing, 8)
    for number, rng in cases(30):
        with case(number):
            record.write_bytes(json.dumps(changed(json.loads(about), rng)).encode())
            assert_images(cached(listing, 8), listing, 8)


def test_too_little_room_is_noticed_before_and_while_the_cache_is_written(folder, log, monkeypatch):
    listing, need = scan(folder), 16 * 3 * 64
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
        with pytest.raises(InputError, match=f"{need - 1} bytes are free in .*cache; expected {need}, .*--cache DIR"):
            cached(listing, 8)
        assert decoded(log) == 0
        check(listing)  # needs none
    (folder / "file").touch()
    with pytest.raises(InputError, match=f"cannot write {need} bytes to .*file/cache .NotADirectory.*--cache DIR"):
        cached(listing, 8, cache=folder / "file/cache")
    with pytest.raises(InputError, match="cannot write to .*file/cache .NotADirectory.*--cache DIR"):
        check(listing, cache=folder / "file/cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "resize_and_crop", full)
    for workers in (0, 2) if FORK else (0,):
        with pytest.raises(InputError, match=f"cannot write {need} .*No space left on device.; expected") as error:
            cached(listing, 8, workers)
        assert "\n" not in str(error.value)
    assert not [path for path in (folder / ".pdarts-cache").iterdir() if "8px" in path.name]


# --- damaged images ---------------------------------------------------------------------------------------------------


DAMAGED = [("train/cat/0.jpg", "0 bytes"), ("train/dog/2.jpg", "9 bytes"), ("val/cat/0.png", "1 bytes")]
MESSAGE = (r"^3 of 16 images cannot be read, the first: train/cat/0.jpg \(0 bytes\); all are listed in .*damaged.txt; "
           "expected --skip-damaged to go without them$")  # fmt: skip


@pytest.fixture
def partly(folder):
    for path, why in DAMAGED:
        (folder / path).write_bytes(bytes(int(why[0])))
    return folder


def damaged_txt(folder):
    return [tuple(line.split("\t")) for line in (folder / ".pdarts-cache/damaged.txt").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.skipif(not FORK, reason="needs fork"))])
def test_damaged_images_are_listed_or_skipped(partly, log, workers):
    listing = scan(partly)
    for _ in range(2):
        with pytest.raises(InputError, match=MESSAGE):
            cached(listing, 8, workers)
        assert damaged_txt(partly) == DAMAGED and decoded(log) == 16
        assert sorted(path.name for path in (partly / ".pdarts-cache").iterdir()) == [".lock", "damaged.txt"]
    for decodes in 16, 0:
        (partly / ".pdarts-cache/damaged.txt").unlink(missing_ok=True)
        result = cached(listing, 8, workers, skip_damaged=True)
        assert len(result[0]) == 10 and len(result[2]) == 3 and result[4] == DAMAGED == damaged_txt(partly)
        assert_images(result, listing, 8, dict(DAMAGED))
        assert decoded(log) == decodes
    with pytest.raises(InputError, match=MESSAGE):
        cached(listing, 8)  # not to be skipped now
    assert decoded(log) == 0


def test_damaged_originals_are_found_once(partly, log):
    listing = scan(partly)
    for decodes in 16, 0:
        with pytest.raises(InputError, match=MESSAGE):
            check(listing)
        assert decoded(log) == decodes and damaged_txt(partly) == DAMAGED
    left = check(listing, skip_damaged=True)
    assert left == listing.without(dict(DAMAGED)) and left.images == 13 and decoded(log) == 0
    for path, _ in DAMAGED:
        (partly / path).write_bytes(image(0))
    assert check(listing, workers=2 * FORK) == listing and decoded(log) == 16
    record = max((partly / ".pdarts-cache").glob("checked*.json"), key=os.path.getmtime)
    record.write_bytes(record.read_bytes()[:-1])
    assert check(listing) == listing and decoded(log) == 16


def test_a_class_needs_images_that_are_not_damaged(folder, log):
    for path in (folder / "train/cat").iterdir():
        path.write_bytes(b"")
    for skip in lambda: check(scan(folder), skip_damaged=True), lambda: cached(scan(folder), 8, skip_damaged=True):
        with pytest.raises(InputError, match="all training images of cat are damaged, as listed in .*damaged.txt; exp"):
            skip()
    shutil.rmtree(folder / "train/cat")
    shutil.rmtree(folder / "val/cat")
    write(folder, "train/cat/0.jpg")
    for path in (folder / "val/eel").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="all test images are damaged, as listed in"):
        cached(scan(folder), 8, skip_damaged=True)


def test_names_of_any_kind_are_told_in_a_line(folder, log):
    name = f"train/cat/a\nb\t{ODD}.jpg"
    (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match=rf"^1 of 17 .*, the first: train/cat/a\\nb\\t\{ESCAPED}.jpg \(0 bytes\);"):
        check(scan(folder))
    assert damaged_txt(folder) == [(rf"train/cat/a\nb\t{ESCAPED}.jpg", "0 bytes")]
    assert check(scan(folder), skip_damaged=True) == scan(folder).without([name])
    assert cached(scan(folder), 8, skip_damaged=True)[4] == [(name, "0 bytes")]


@pytest.mark.parametrize("workers", [0, 1])
def test_without_pillow_a_message_says_so(folder, monkeypatch, workers):
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = "^reading images needs Pillow or torchvision; expected one of them: pip install pillow$"
    for call in (lambda: decode(folder / "train/cat/0.jpg"), lambda: check(scan(folder), workers * FORK),
                 lambda: cached(scan(folder), 8, workers * FORK)):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()


# --- real images ------------------------------------------------------------------------------------------------------


def encoded(array, form, mode=None, **options) -> bytes:
    from PIL import Image

    file, picture = io.BytesIO(), Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(file, form, **options)
    return file.getvalue()


def tiff_16(array, order: str, planes=1) -> bytes:
    """A TIFF of 16 bits, [H,W,3], in two strips, which Pillow does not write; order: of the bytes, "<" or ">"."""
    (height, width, _), start = array.shape, 8 + 2 + 12 * 10 + 4
    halves, small = [array[: height // 2], array[height // 2 :]], struct.pack(f"{order}HHH", 16, 16, 16)
    strips = [half.astype(f"{order}u2").tobytes() for half in halves]
    first = start + len(small) + 16
    places = struct.pack(f"{order}IIII", first, first + len(strips[0]), *map(len, strips))
    entries = (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, start), (259, 3, 1, 1), (262, 3, 1, 2)
    entries += (273, 4, 2, start + 6), (277, 3, 1, 3), (278, 4, 1, height // 2), (279, 4, 2, start + 14)
    tags = b""
    for number, kind, count, value in (*entries, (284, 3, 1, planes)):
        single = kind == 3 and count == 1
        tags += struct.pack(f"{order}HHI", number, kind, count)
        tags += struct.pack(f"{order}HH" if single else f"{order}I", *((value, 0) if single else (value,)))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, 10)
    return head + tags + bytes(4) + small + places + b"".join(strips)


def png_16(array) -> bytes:
    """A PNG of 16 bits, [H,W,2] grey with alpha, [H,W,3] or with alpha [H,W,4], which Pillow does not write."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return png(width, height, 16, {2: 4, 3: 2, 4: 6}[channels], rows)


def png(width, height, depth=8, kind=2, data=b"") -> bytes:
    """A PNG that claims what it likes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.fixture
def smooth():
    """[40,30,3]"""
    y, x = np.mgrid[0:40, 0:30]
    return np.stack([6 * y, 8 * x, 3 * (x + y)], 2).astype(np.uint8)


def test_images_of_all_kinds_become_colour(tmp_path, smooth):
    pytest.importorskip("PIL")
    grey = smooth[..., 0]
    deep = (grey.astype(np.uint16) << 8) + 99
    alpha = np.dstack([smooth, 255 - grey])
    turned = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # a quarter
    for content, wanted, near in (
        (encoded(smooth, "JPEG", quality=95), smooth, 9),
        (encoded(smooth, "JPEG", "CMYK", quality=95), smooth, 9),
        (encoded(smooth, "JPEG", quality=95, exif=b"Exif\0\0" + turned), smooth, 9),
        (encoded(smooth, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"), smooth, 9),
        (encoded(grey, "JPEG", quality=95), grey, 9),
        (encoded(smooth, "WEBP", lossless=True), smooth, 0),
        (encoded(smooth, "BMP"), smooth, 0),
        (encoded(smooth, "PNG"), smooth, 0),
        (encoded(grey, "PNG"), grey, 0),
        (encoded(deep, "PNG"), deep / 257, 0.6),
        (png_16(smooth.astype(int) * 257), smooth, 0),
        (png_16(alpha.astype(int) * 257), smooth, 0),
        (png_16(np.dstack([grey, 255 - grey]).astype(int) * 257), grey, 0),
        (tiff_16(smooth.astype(int) * 257, "<"), smooth, 0),
        (tiff_16(smooth.astype(int) * 257, ">"), smooth, 0),
        (encoded(deep, "TIFF"), deep / 257, 0.6),
        (encoded(deep, "PPM"), deep / 257, 0.6),
        (encoded(smooth, "TIFF"), smooth, 0),
        (encoded(smooth, "PPM"), smooth, 0),
        (encoded(grey // 16 * 16, "GIF"), grey // 16 * 16, 0),
        (encoded(alpha, "PNG"), smooth, 0),
        (encoded(alpha, "WEBP", lossless=True, exact=True), smooth, 0),
        (encoded(grey, "PNG", "LA"), grey, 0),
        (encoded(grey // 16 * 16, "PNG", "P"), grey // 16 * 16, 0),
        (encoded(grey // 16 * 16, "PNG", "P", transparency=bytes(9)), grey // 16 * 16, 0),
        (encoded(grey // 200 * 255, "PNG", "1"), grey // 200 * 255, 0),
    ):
        path = tmp_path / "image.jpg"  # whatever it is
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = folders.colour(decode(path), 65535)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 40, 30)
        wanted = wanted if wanted.ndim == 3 else np.repeat(wanted[..., None], 3, 2)
        assert abs(pixels.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= near
        assert resize_and_crop(pixels, 8).shape == (3, 8, 8)


def test_damaged_files_are_refused_with_a_reason(tmp_path, smooth, limits):
    pytest.importorskip("PIL")
    jpeg = encoded(np.tile(smooth, (9, 9, 1)), "JPEG")
    bomb = png(2**16, 2**16 - 1, data=bytes(2**20))
    for content, message in (
        (b"", "UnidentifiedImageError: cannot identify"),
        (b"not an image\n" * 99, "UnidentifiedImageError: cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "UnidentifiedImageError"),  # a program
        *((jpeg[:end], "OSError: image file is truncated") for end in (len(jpeg) // 2, -100, -2, -1)),
        (jpeg[:30], "Error"),
        (encoded(smooth, "PNG")[:-40], "Error"),
        (encoded(smooth, "WEBP")[:-40], "Error"),
        (encoded(smooth, "BMP")[:-40], "Error"),
        (bomb, "DecompressionBombError"),
        (png(12_000, 10_000), "ValueError: 12000 x 10000 pixels; expected 1 to 100000000"),
        (png(10_000, 9_500), "OSError"),  # of which Pillow warns
        (png(0, 10), "Error"),
        (encoded(smooth[..., 0].astype(np.float32), "TIFF"), "ValueError: pixels that are no whole numbers"),
        (encoded(smooth[..., 0].astype(np.int32) - 9, "TIFF"), "ValueError: a pixel of -9; expected 0 or more"),
        (tiff_16(smooth.astype(int), "<", planes=2), "ValueError: 16 bits in planes; expected pixel after pixel"),
        (png(10, 0), "Error"),
        (png(10, 10), "OSError"),
    ):
        (tmp_path / "1.jpg").write_bytes(content)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message) as error:
            warnings.simplefilter("error")
            decode(tmp_path / "1.jpg")
        assert not isinstance(error.value, InputError) and len(str(error.value).splitlines()) == 1
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in "pipe.jpg", "", "nowhere.jpg":
        with pytest.raises(ValueError, match="not a file"):
            decode(tmp_path / path)


def test_random_damage_to_images_leads_to_an_image_or_a_reason(tmp_path, smooth, limits):
    pytest.importorskip("PIL")
    files = [encoded(smooth, form) for form in folders.FORMATS] + [encoded(smooth[..., 0], "PNG", "P")]
    files += [png_16(smooth.astype(int) * 16), tiff_16(smooth.astype(int) * 16, "<")]
    files.append(encoded(smooth[..., 0].astype(np.uint16) * 16, "TIFF"))
    files.append(encoded(smooth, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"))
    path, taken = tmp_path / "1.jpg", 0
    for number, rng in cases(150):
        with case(number):
            path.write_bytes(damaged(rng.choice(files), rng))
            try:
                pixels = accepted(decode, path)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
            else:
                taken += 1
                assert pixels.numel() <= 3 * 10**8 and pixels.min() >= 0
                assert (pixels.dtype, len(pixels)) in ((torch.uint8, 3), (torch.int32, 1), (torch.int32, 3))
    assert taken > 20


def test_a_folder_of_real_images_is_cached(tmp_path, smooth):
    pytest.importorskip("PIL")
    rng = random.Random(0)
    for split, n in ("train", 5), ("val", 2):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                content = encoded(np.roll(smooth, rng.randrange(30), 1), rng.choice(folders.FORMATS[:3]))
                (tmp_path / split / name / f"{i}.jpg").write_bytes(content)
    (tmp_path / "train/a/0.jpg").write_bytes(b"text")
    listing = scan(tmp_path)
    with pytest.raises(InputError, match=r"1 of 14 .*: train/a/0.jpg \(UnidentifiedImageError: .*damaged.txt"):
        cached(listing, 16, 2)
    x, y, x_test, y_test, bad, largest = cached(listing, 16, 2, skip_damaged=True)
    assert largest == 0
    assert (x.shape, x_test.shape, len(bad)) == ((9, 3, 16, 16), (4, 3, 16, 16), 1)
    assert y.tolist() == [0] * 4 + [1] * 5 and y_test.tolist() == [0, 0, 1, 1]
    left = check(listing, 2, skip_damaged=True)
    for row, (path, _) in zip(torch.cat([x, x_test]), left.train + left.test):
        assert torch.equal(row, resize_and_crop(decode(tmp_path / path), 16))


@pytest.mark.parametrize("largest", [200, 4095, 65535])
def test_images_of_16_bits_are_scaled_by_the_largest_value_in_the_data_set(tmp_path, largest):
    pytest.importorskip("PIL")
    ramp, grey = np.linspace(0, 1, 256).reshape(16, 16), np.arange(256, dtype=np.uint8).reshape(16, 16)
    for split, scale in ("train", largest), ("val", largest // 2):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "1.png").write_bytes(encoded((scale * ramp).round().astype(np.uint16), "PNG"))
    (tmp_path / "train/a/2.png").write_bytes(encoded(grey, "PNG"))
    in_colour = np.stack([largest * ramp, largest * (1 - ramp), 0 * ramp], 2).round().astype(int)
    (tmp_path / "train/b/2.png").write_bytes(png_16(in_colour))
    for workers in 0, 1:  # the second time from the cache
        x, _, x_test, _, _, found = cached(scan(tmp_path), 16, workers * FORK)
        assert found == largest == check(scan(tmp_path)).largest
        assert np.array_equal(x[1, 0].numpy(), grey)  # of 8 bits: as it is
        for image in x[0], x[2], 2 * x_test[0].int(), x[3, :1], 255 - x[3, 1:2].int():
            assert (image - torch.from_numpy(255 * ramp)).abs().max() <= max(1.1, 500 / largest)
