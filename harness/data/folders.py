"""Folders of images, one folder per class as for torchvision's ImageFolder, and a cache of the resized images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
import warnings
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from harness.files import locked, reason, shown, some, write_whole
from pdarts import InputError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".pgm", ".pbm")
# Whatever a file is called; others can do more than hold pixels, as EPS can.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
ANNOTATIONS = "val_annotations.txt"  # beside the images of Tiny-ImageNet's val: name, class, ...
MAX_PIXELS = 10**8
CACHE = ".pdarts-cache"


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a folder: (path relative to it, class index), class by class and in order of their paths."""

    folder: str
    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    note: str = ""  # about files that are not in it
    largest: int = 0  # of all values in images of 16 bits, by which these are scaled; 0: there are none, or not known

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


def split_folders(folder) -> dict[str, str]:
    """Return the names of the folders of "train", "val" and "test" in a folder, as far as there are any."""
    found = {}
    for name in sorted(os.listdir(folder)):
        for split, names in SPLITS.items():
            if name.lower() in names and os.path.isdir(os.path.join(folder, name)):
                if split in found:
                    raise InputError(f"{folder} has a folder {found[split]} and a folder {name}; expected one of them")
                found[split] = name
    return found


def loose_classes(folder) -> list[str]:
    """Return the folders in a folder that hold images themselves, as classes without train and val do."""
    below = [entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(e.name for e in below if any(name.lower().endswith(ENDINGS) for name in os.listdir(e.path)))


def entries(root: str, path: str, outside: list[str] | None, others: list[str]):
    """Yield (path relative to root, whether it is a folder) of the folders and images in a folder, in order.
    Links that lead out of `root`, a real path, go to `outside` instead, unless it is None, and files that are no images
    to `others`."""
    with os.scandir(os.path.join(root, path)) as scanned:
        found = sorted((entry for entry in scanned if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        name, is_folder = f"{path}/{entry.name}", entry.is_dir()
        if is_folder or entry.name.lower().endswith(ENDINGS):
            if outside is not None and entry.is_symlink() and not inside(root, entry.path):
                outside.append(name)
            else:
                yield name, is_folder
        else:
            others.append(name)


def images_below(root: str, folder: str, outside: list[str] | None, others: list[str]) -> list[str]:
    """Return the images in a folder and in the folders in it, sorted. A folder with several links is read once."""
    images, folders, seen = [], [folder], set()
    while folders:
        path = folders.pop()
        real = os.path.realpath(os.path.join(root, path))
        if real not in seen:  # else a link to a folder above it would have no end
            seen.add(real)
            within = list(entries(root, path, outside, others))
            images += [name for name, is_folder in within if not is_folder]
            folders += [name for name, is_folder in reversed(within) if is_folder]
    return sorted(images)


def scan(folder, links=False) -> Listing:
    """List the images of FOLDER/train/CLASS and FOLDER/val/CLASS, or FOLDER/test/CLASS if there is no val.

    Other names of these folders, and Tiny-ImageNet's val, are known. links: whether to follow those out of FOLDER."""
    folder = os.fspath(folder)
    root, outside, others, found = os.path.realpath(folder), None if links else [], [], {}
    try:
        names = split_folders(folder)
        if "train" not in names or len(names) < 2:
            lacks = ["train"] * ("train" not in names) + ["val or test"] * (not names.keys() & {"val", "test"})
            raise InputError(
                f"no folder {' and no '.join(lacks)} in {folder}; expected train/CLASS/*.jpg and val/CLASS/*.jpg there")
        splits = names["train"], names.get("val") or names["test"]
        for split in splits:
            if links or inside(root, os.path.join(root, split)):
                within = list(entries(root, split, outside, others))
                others += [name for name, is_folder in within if not is_folder]  # images without a class
                below = [name for name, is_folder in within if is_folder]
                found[split] = {name[len(split) + 1 :]: images_below(root, name, outside, others) for name in below}
            else:
                outside.append(split)
        annotations = os.path.join(root, splits[1], ANNOTATIONS)
        if not outside and os.path.isfile(annotations):
            others.remove(f"{splits[1]}/{ANNOTATIONS}")
            found[splits[1]] = annotated(annotations, found[splits[1]])
    except OSError as error:
        raise InputError(f"cannot read {folder} ({reason(error)}); expected a folder that can be read") from None
    if outside:
        raise InputError(
            f"{len(outside)} of the files and folders in {folder} are links that lead out of it: {some(outside)}; "
            "expected all images in it, or --follow-links")
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
    note = [f"{len(others)} other files in it not read: {some(others)}"] if others else []
    note += [f"tested on {splits[1]}, not on {names['test']}"] if len(names) == 3 else []
    return Listing(folder, list(known), *parts, ", ".join(note))


def annotated(file: str, found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the images of each class, where the lines of a file name them: image, class, ..."""
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        classes = dict(words[:2] for words in (line.split() for line in lines) if len(words) > 1)
    images = [path for paths in found.values() for path in paths]
    lacking = [path for path in images if os.path.basename(path) not in classes]
    if lacking:
        raise InputError(f"{file} lacks {len(lacking)} of {len(images)} images: {some(lacking)}; expected all of them")
    by_class = {name: [] for name in sorted(set(classes.values()))}
    for path in images:
        by_class[classes[os.path.basename(path)]].append(path)
    return by_class


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
    An image of 16 bits is int32 [1,H,W] or, in colour, [3,H,W], for `colour`. ValueError with the reason for a
    file that cannot be read, InputError if nothing is installed that reads any."""
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
                if image.mode.startswith("I"):  # 16 bits of grey, or 32, of which Pillow makes white
                    pixels = np.asarray(image).astype(np.int32)
                    if pixels.min() < 0:
                        raise ValueError(f"a pixel of {pixels.min()}; expected 0 or more")
                    return torch.from_numpy(pixels)[None]
                if image.mode == "F":
                    raise ValueError("pixels that are no whole numbers")
                about = image.tile[0][3] if image.tile and image.format in ("PNG", "TIFF") else ""
                layout = about if isinstance(about, str) else about[0]
                if image.format == "TIFF" and 16 in image.tag_v2.get(258, ()) and layout in image.getbands():
                    raise ValueError("16 bits in planes; expected pixel after pixel")
                pixels = np.array(image.convert("RGB"))
                if swap := swapped(layout):  # Pillow has kept the upper 8 bits
                    with Image.open(path, formats=FORMATS) as lower:  # and now, with the bytes swapped, the lower ones
                        for i, tile in enumerate(lower.tile):  # of an older Pillow a tuple without names
                            new = *tile[:3], swap if isinstance(tile[3], str) else (swap, *tile[3][1:])
                            lower.tile[i] = type(tile)(*new) if hasattr(tile, "_fields") else new
                        rest = np.array(lower.convert("RGB"))
                    pixels = 256 * pixels.astype(np.int32) + (rest[..., 1:2] if layout == "LA;16B" else rest)
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(reason(error)) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def swapped(layout: str) -> str:
    """Return the layout of pixels of 16 bits in colour with the bytes swapped, or "" for other pixels."""
    if layout == "LA;16B":
        return "RGBA"  # upper and lower bytes, as if they were colours
    kind, _, order = layout.partition(";16")
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    return f"{kind};16{'B' if little else 'L'}" if order and kind in ("RGB", "RGBA", "RGBX") else ""


def colour(pixels: torch.Tensor, largest: int) -> torch.Tensor:
    """Return what `decode` returns as uint8 [3,H,W]; largest: the value in images of 16 bits that becomes 255."""
    if pixels.dtype == torch.uint8:
        return pixels
    largest = max(largest, 1)
    return ((pixels.long() * 255 + largest // 2) // largest).clamp(max=255).to(torch.uint8).expand(3, -1, -1)


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

    An item is a pair. First the damage of the image, "" if there is none, or an error that has nothing to do with the
    image; then the largest value of an image of 16 bits, or 0. largest: see `colour`."""

    def __init__(self, listing: Listing, size: int, target: pathlib.Path, largest: int = 0):
        self.paths = [path for path, _ in listing.train + listing.test]
        self.folder, self.size, self.target, self.largest = listing.folder, size, target, largest

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i) -> tuple[str | Exception, int]:
        # Errors are returned: raised in a worker, they would become a text of many lines.
        try:
            pixels = decode(os.path.join(self.folder, self.paths[i]))
            if self.size:
                row = resize_and_crop(colour(pixels, self.largest), self.size).numpy()
                with open(self.target, "r+b") as file:
                    file.seek(i * row.nbytes)
                    file.write(row)
            return "", 0 if pixels.dtype == torch.uint8 else int(pixels.max())
        except (InputError, OSError) as error:
            return error, 0
        except ValueError as error:
            return shown(str(error)) or "damaged", 0

    def run(self, workers: int, progress, which=None) -> tuple[dict[str, str], dict[int, int]]:
        """Make all items, or `which`; return path and reason of each damaged image, and the second part of items."""
        which = range(len(self)) if which is None else which
        damaged, largest, done, told = {}, {}, 0, 0.0
        # A generator of its own, or else filling the cache would change the random numbers of the run.
        generator = torch.Generator()
        for items in DataLoader(Subset(self, which), 16, num_workers=workers, collate_fn=list, generator=generator):
            for result, value in items:
                if isinstance(result, Exception):
                    raise result
                if result:
                    damaged[self.paths[which[done]]] = result
                if value:
                    largest[which[done]] = value
                done += 1
            if progress and (done == len(which) or time.monotonic() - told > 0.1):
                told = time.monotonic()
                progress(done, len(which))
        return damaged, largest


def pixel_digest(path: pathlib.Path) -> str:
    result = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            result.update(block)
    return result.hexdigest()


def recall(record: pathlib.Path, listing: Listing, size: int) -> tuple[dict[str, str], int] | None:
    """Return what `build` returned, or None if its files are not whole."""
    try:
        content, pixels = json.loads(record.read_bytes()), record.with_suffix(".u8")
        damaged = {str(path): str(why) for path, why in content["damaged"].items()}
        rows = listing.images - len(damaged)
        whole = listing.without(damaged).images == rows
        if size:
            whole = whole and content["shape"] == [rows, 3, size, size]
            whole = whole and pixels.stat().st_size == rows * 3 * size**2 and content["digest"] == pixel_digest(pixels)
        whole = whole and type(content["largest"]) is int
        return (damaged, content["largest"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def build(record: pathlib.Path, listing, size, workers, skip_damaged, progress) -> tuple[dict[str, str], int]:
    """Decode all images and return the damaged ones, and the largest value in those of 16 bits.

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
        damaged, of_16_bits = images.run(workers, progress)
        largest = max(of_16_bits.values(), default=0)
        if size and damaged and not skip_damaged:
            return damaged, largest
        if size and largest:  # which is known now
            Decoded(listing, size, target, largest).run(workers, progress, list(of_16_bits))
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
    write_whole(record, json.dumps(content | {"damaged": damaged, "largest": largest}).encode())
    return damaged, largest


def sound(listing, size, workers, skip_damaged, cache, progress) -> tuple[Listing, dict[str, str], pathlib.Path]:
    """Return the listing without damaged images, the damaged ones, and the file of the pixels if there is a size."""
    cache = pathlib.Path(cache or os.path.join(listing.folder, CACHE))
    record = cache / f"{f'{size}px' if size else 'checked'}-{digest(listing, size, times=True)}.json"
    try:
        known = recall(record, listing, size)
        if known is None:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / ".lock"):
                known = recall(record, listing, size)  # another process may have been faster
                if known is None:
                    known = build(record, listing, size, workers, skip_damaged, progress)
        damaged, largest = known
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
    left = dataclasses.replace(listing.without(damaged), largest=largest)
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
    """Return x_train uint8 [N,3,size,size], y_train int64 [N], x_test, y_test, [(path, reason)] of damaged images, and
    the largest value in images of 16 bits.

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
    return x[: len(y_train)], y_train, x[len(y_train) :], y_test, list(damaged.items()), left.largest
