"""Folders of images, one folder per class as for torchvision's ImageFolder, and a cache of the resized images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
import warnings
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from harness.files import locked, reason, shown, some, write_whole
from pdarts import InputError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # whatever a file is called; others can do more than hold pixels, as EPS can
MAX_PIXELS = 10**8
CACHE = ".pdarts-cache"


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a folder: (path relative to it, class index), class by class and in order of their paths."""

    folder: str
    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]

    def subset(self, fraction: float) -> Listing:
        """Return a part of each class's training images, one at least; a larger part holds a smaller one."""
        if not 0 < fraction <= 1:
            raise InputError(f"fraction is {fraction}; expected more than 0 and at most 1")
        groups = [[] for _ in self.classes]
        for image in self.train:
            groups[image[1]].append(image)
        train = []
        for name, group in zip(self.classes, groups):
            # The seed is the class's own: what other classes there are does not change the choice.
            order = np.random.default_rng(zlib.crc32(os.fsencode(name))).permutation(len(group))
            train += [group[i] for i in sorted(order[: max(1, round(fraction * len(group)))])] if group else []
        return dataclasses.replace(self, train=train)

    @property
    def images(self) -> int:
        return len(self.train) + len(self.test)

    def without(self, damaged) -> Listing:
        train, test = ([image for image in part if image[0] not in damaged] for part in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)


# --- what there is ----------------------------------------------------------------------------------------------------


def inside(root: str, path: str) -> bool:
    return os.path.realpath(path).startswith(os.path.join(root, ""))


def entries(root: str, path: str, outside: list[str]):
    """Yield (path relative to root, whether it is a folder) of the folders and images in a folder, in order.
    Links that lead out of `root`, a real path, go to `outside` instead."""
    with os.scandir(os.path.join(root, path)) as scanned:
        found = sorted((entry for entry in scanned if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        name, is_folder = f"{path}/{entry.name}", entry.is_dir()
        if is_folder or entry.name.lower().endswith(ENDINGS):
            if entry.is_symlink() and not inside(root, entry.path):
                outside.append(name)
            else:
                yield name, is_folder


def images_below(root: str, folder: str, outside: list[str]) -> list[str]:
    """Return the images in a folder and in the folders in it, sorted. A folder with several links is read once."""
    images, folders, seen = [], [folder], set()
    while folders:
        path = folders.pop()
        real = os.path.realpath(os.path.join(root, path))
        if real not in seen:  # else a link to a folder above it would have no end
            seen.add(real)
            within = list(entries(root, path, outside))
            images += [name for name, is_folder in within if not is_folder]
            folders += [name for name, is_folder in reversed(within) if is_folder]
    return sorted(images)


def scan(folder) -> Listing:
    """List the images of FOLDER/train/CLASS and FOLDER/val/CLASS, or FOLDER/test/CLASS if there is no val."""
    folder = os.fspath(folder)
    root, outside, found = os.path.realpath(folder), [], {}
    train, val, test = (os.path.isdir(os.path.join(root, name)) for name in ("train", "val", "test"))
    if not train or not (val or test):
        lacks = ["train"] * (not train) + ["val or test"] * (not (val or test))
        raise InputError(
            f"no folder {' and no '.join(lacks)} in {folder}; expected train/CLASS/*.jpg and val/CLASS/*.jpg there")
    splits = "train", "val" if val else "test"
    try:
        for split in splits:
            if inside(root, os.path.join(root, split)):
                below = [name for name, is_folder in entries(root, split, outside) if is_folder]
                found[split] = {name[len(split) + 1 :]: images_below(root, name, outside) for name in below}
            else:
                outside.append(split)
    except OSError as error:
        raise InputError(f"cannot read {folder} ({reason(error)}); expected a folder that can be read") from None
    if outside:
        raise InputError(
            f"{len(outside)} of the files and folders in {folder} are links that lead out of it: {some(outside)}; "
            "expected all images in it")
    (known, tested), (where, test) = found.values(), (os.path.join(folder, split) for split in splits)
    if len(known) < 2:
        raise InputError(f"{where} has {len(known)} folders; expected 2 or more, one per class")
    empty = [name for name in known if not known[name]]
    if empty:
        raise InputError(
            f"{len(empty)} of {len(known)} classes in {where} have no images: {some(empty)}; expected files "
            f"{', '.join(ENDINGS)}")
    unknown = [name for name in tested if name not in known]
    if unknown:
        raise InputError(f"{len(unknown)} classes in {test} are not in {where}: {some(unknown)}; expected them in both")
    if not any(tested.values()):
        raise InputError(f"{test} has no images in folders of classes; expected CLASS/*.jpg there")
    parts = [[(path, i) for i, name in enumerate(known) for path in part.get(name, ())] for part in (known, tested)]
    return Listing(folder, list(known), *parts)


def digest(listing: Listing, *more, times=False) -> str:
    """Return a digest of classes, names, labels and sizes of the files, of their `times`, if asked, and of `more`."""
    result = hashlib.blake2b(repr((more, listing.classes)).encode(), digest_size=16)
    for split, part in (b"train", listing.train), (b"test", listing.test):
        result.update(split)
        for path, label in part:
            try:
                stat = os.stat(os.path.join(listing.folder, path))
                about = f"{stat.st_size} {stat.st_mtime_ns}" if times else stat.st_size
            except OSError:
                about = None  # decode says what is wrong with it
            result.update(b"%b\0%b\0" % (os.fsencode(path), f"{label} {about}".encode()))
    return result.hexdigest()


def fingerprint(listing: Listing) -> str:
    """Return a text that is equal for equal names, labels and sizes of files, as in a copied folder."""
    return digest(listing)


# --- one image --------------------------------------------------------------------------------------------------------


def decode(path) -> torch.Tensor:
    """Return a file's image: uint8 [3,H,W], always in colour, not turned by EXIF, as with ImageFolder; not contiguous.
    ValueError with the reason for a file that cannot be read, InputError if nothing is installed that reads any."""
    try:
        from PIL import Image  # torchvision cannot be imported without it either
    except ImportError:
        raise InputError(
            "reading images needs Pillow or torchvision; expected one of them: pip install pillow") from None
    try:
        if not os.path.isfile(path):  # reading a pipe would wait for ever
            raise ValueError("not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about many pixels, odd EXIF data or transparency
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if not 0 < width * height <= MAX_PIXELS:
                    raise ValueError(f"{width} x {height} pixels; expected 1 to {MAX_PIXELS}")
                if image.mode.startswith("I"):  # 16 bits of grey, of which Pillow makes white
                    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
                pixels = np.array(image.convert("RGB"))
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(reason(error)) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize_and_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 [3,H,W] until the shorter side is `size`, and cut out the middle, uint8 [3,size,size]."""
    short, long = sorted(image.shape[1:])
    if long > 16 * short:  # resizing the whole of a line would take any amount of memory
        image = middle(image, 16 * short, 16 * short)
    height, width = image.shape[1:]
    new = [max(size, int(size * side / min(height, width))) for side in (height, width)]
    return middle(F.interpolate(image[None], new, mode="bilinear", antialias=True)[0], size, size).contiguous()


def middle(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cut out the middle of [3,H,W], height x width at most, where torchvision's CenterCrop has it."""
    top, left = (max(0, round((side - to) / 2)) for side, to in zip(image.shape[1:], (height, width)))
    return image[:, top : top + height, left : left + width]


# --- all of them ------------------------------------------------------------------------------------------------------


class Decoded(Dataset):
    """A dataset whose item i decodes image i and, if there is a size, writes it as row i of the file `target`.
    An item is the damage of the image, "" if there is none, or an error that has nothing to do with the image."""

    def __init__(self, listing: Listing, size: int, target: pathlib.Path):
        self.paths = [path for path, _ in listing.train + listing.test]
        self.folder, self.size, self.target = listing.folder, size, target

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i) -> str | Exception:
        # Errors are returned: raised in a worker, they would become a text of many lines.
        try:
            image = decode(os.path.join(self.folder, self.paths[i]))
            if self.size:
                row = resize_and_crop(image, self.size).numpy()
                with open(self.target, "r+b") as file:
                    file.seek(i * row.nbytes)
                    file.write(row)
            return ""
        except (InputError, OSError) as error:
            return error
        except ValueError as error:
            return shown(str(error)) or "damaged"

    def run(self, workers: int, progress) -> dict[str, str]:
        """Make all items; return path and reason of each damaged image."""
        damaged, done, told = {}, 0, 0.0
        # A generator of its own, or else filling the cache would change the random numbers of the run.
        for results in DataLoader(self, 16, num_workers=workers, collate_fn=list, generator=torch.Generator()):
            for result in results:
                if isinstance(result, Exception):
                    raise result
                if result:
                    damaged[self.paths[done]] = result
                done += 1
            if progress and (done == len(self) or time.monotonic() - told > 0.1):
                told = time.monotonic()
                progress(done, len(self))
        return damaged


def pixel_digest(path: pathlib.Path) -> str:
    result = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            result.update(block)
    return result.hexdigest()


def recall(record: pathlib.Path, listing: Listing, size: int) -> dict[str, str] | None:
    """Return the damaged images that `build` found, or None if its files are not whole."""
    try:
        content, pixels = json.loads(record.read_bytes()), record.with_suffix(".u8")
        damaged = {str(path): str(why) for path, why in content["damaged"].items()}
        rows = listing.images - len(damaged)
        whole = listing.without(damaged).images == rows
        if size:
            whole = whole and content["shape"] == [rows, 3, size, size]
            whole = whole and pixels.stat().st_size == rows * 3 * size**2 and content["digest"] == pixel_digest(pixels)
        return damaged if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def build(record: pathlib.Path, listing, size, workers, skip_damaged, progress) -> dict[str, str]:
    """Decode all images and return the damaged ones.

    Write the record and, if there is a size, the pixels beside it, unless there are damaged images that must not be
    skipped. The record comes last: without it, the pixels are not whole."""
    pixels, row = record.with_suffix(".u8"), 3 * size**2
    target = pixels.with_name(f".{pixels.name}.tmp")
    for left in (record, pixels, *record.parent.glob(".*.u8.tmp")):  # by builds that were killed: no other is under way
        left.unlink(missing_ok=True)
    need, free = listing.images * row, shutil.disk_usage(record.parent).free
    if free < need:
        raise InputError(f"{free} bytes are free in {record.parent}; expected {need}, or another folder: --cache DIR")
    content, images = {}, Decoded(listing, size, target)
    try:
        if size:
            target.touch()
            os.truncate(target, need)
        damaged = images.run(workers, progress)
        if size and damaged and not skip_damaged:
            return damaged
        if size:
            kept = [i for i, path in enumerate(images.paths) if path not in damaged]
            with open(target, "r+b") as file:
                for to, i in enumerate(kept):
                    if to < i:  # into the place of a damaged one
                        file.seek(i * row)
                        moved = file.read(row)
                        file.seek(to * row)
                        file.write(moved)
                file.truncate(len(kept) * row)
                os.fsync(file.fileno())
            content = {"shape": [len(kept), 3, size, size], "digest": pixel_digest(target)}
            os.replace(target, pixels)
    finally:
        target.unlink(missing_ok=True)
    write_whole(record, json.dumps(content | {"damaged": damaged}).encode())
    return damaged


def sound(listing, size, workers, skip_damaged, cache, progress) -> tuple[Listing, dict[str, str], pathlib.Path]:
    """Return the listing without damaged images, the damaged ones, and the file of the pixels if there is a size."""
    cache = pathlib.Path(cache or os.path.join(listing.folder, CACHE))
    record = cache / f"{f'{size}px' if size else 'checked'}-{digest(listing, size, times=True)}.json"
    try:
        damaged = recall(record, listing, size)
        if damaged is None:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / ".lock"):
                damaged = recall(record, listing, size)  # another process may have been faster
                if damaged is None:
                    damaged = build(record, listing, size, workers, skip_damaged, progress)
        note = cache / "damaged.txt"
        lines = "".join(f"{shown(path)}\t{why}\n" for path, why in damaged.items()).encode()
        if damaged and not (note.is_file() and note.read_bytes() == lines):
            with locked(cache / ".lock"):
                write_whole(note, lines)
    except OSError as error:
        need = f"{listing.images * 3 * size**2} bytes to" if size else "to"
        raise InputError(
            f"cannot write {need} {cache} ({reason(error)}); expected a folder that can be written, or another: "
            "--cache DIR") from None
    left = listing.without(damaged)
    if damaged and not skip_damaged:
        path, why = next(iter(damaged.items()))
        raise InputError(
            f"{len(damaged)} of {listing.images} images cannot be read, the first: {shown(path)} ({why}); all are "
            f"listed in {note}; expected --skip-damaged to go without them")
    lost = {label for _, label in listing.train} - {label for _, label in left.train}
    if lost or not left.test:
        what = f"training images of {some([listing.classes[i] for i in sorted(lost)])}" if lost else "test images"
        raise InputError(f"all {what} are damaged, as listed in {note}; expected one or more that can be read")
    return left, damaged, record.with_suffix(".u8")


def check(listing: Listing, workers=0, skip_damaged=False, cache=None, progress=None) -> Listing:
    """Return the listing without damaged images, decoding all in `workers` processes unless that was done before.

    InputError if an image is damaged, unless skip_damaged. cache: the folder of the outcome. progress(done, total) is
    called meanwhile."""
    return sound(listing, 0, workers, skip_damaged, cache, progress)[0]


def cached(listing: Listing, size: int, workers=0, skip_damaged=False, cache=None, progress=None):
    """Return x_train uint8 [N,3,size,size], y_train int64 [N], x_test, y_test, and [(path, reason)] of damaged images.

    The images are resized once, into a file that x_* map: they are read as needed and must not be written to. The
    other arguments are those of `check`."""
    if size < 1:
        raise InputError(f"size is {size}; expected 1 or more")
    left, damaged, pixels = sound(listing, size, workers, skip_damaged, cache, progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that must not be written to
        # Not torch.from_file: it asks for memory for the whole, in case of writing.
        x = torch.from_numpy(np.memmap(pixels, np.uint8, "r", shape=(left.images, 3, size, size)))
    y_train, y_test = (torch.tensor([label for _, label in part]) for part in (left.train, left.test))
    return x[: len(y_train)], y_train, x[len(y_train) :], y_test, list(damaged.items())
