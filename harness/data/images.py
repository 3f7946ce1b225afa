"""Image data sets: arrays, .npz files, folders, generated shapes and CIFAR, and the batches of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import warnings

import numpy as np
import torch

import pdarts
from harness.data import folders
from harness.data.cifar import CIFAR, download_cifar, read_cifar
from harness.data.loaders import Loaders
from harness.data.photographs import Photographs
from harness.files import check_zip, reason, some
from pdarts import InputError


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set: x_* uint8 [N,C,H,W], y_* int64 [N] class indices; mean, std float32 [C] of x/255."""

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    mean: torch.Tensor
    std: torch.Tensor
    path: str | None = None  # where they come from
    device: torch.device | None = None  # of the batches, if the images themselves stay in a mapped file
    damaged: int = 0  # files that were left out
    version: str | None = None  # tells them from others, where they are too many to look at
    note: str = ""  # about the data, for the user
    classes: tuple[str, ...] = ()  # their names, if there are any
    largest: int = 0  # of all values in images of 16 bits, see harness.data.folders.colour
    options: dict = dataclasses.field(default_factory=dict)  # of the command line, which loaded them

    def __len__(self):
        return len(self.y_train)  # what trains

    @property
    def size(self) -> tuple[int, int, int]:  # (C,H,W)
        return tuple(self.x_train.shape[1:])

    @staticmethod
    def from_arrays(
        x_train, y_train, x_test, y_test, name="own data", num_classes=None, mean=None, std=None, in_place=False
    ) -> Images:
        """Check arrays or tensors, x [N,H,W] or [N,H,W,channels] uint8 and y [N] or [N,1] integers from 0.

        num_classes is one more than the largest label of y_train, mean and std are those of x_train, unless given.
        in_place: the arrays are not needed any more, and their memory may be used."""
        parts = {}
        for split, x, y in ("train", x_train, y_train), ("test", x_test, y_test):
            x, y = (np.asarray(v.cpu() if isinstance(v, torch.Tensor) else v) for v in (x, y))
            if x.dtype != np.uint8 or x.ndim not in (3, 4):
                raise InputError(
                    f"{name}: x_{split} is {x.dtype} {list(x.shape)}; expected uint8 [N,H,W] or [N,H,W,channels]" + (
                        ", from 0 to 255, as (255 * x).round().astype(np.uint8) of numbers from 0 to 1"
                        if x.dtype.kind == "f" else ""))
            x = x[..., None] if x.ndim == 3 else x
            if layout := other_layout(x.shape, y.size):
                raise InputError(
                    f"{name}: x_{split} has shape {list(x.shape)}, which looks like {layout[0]}; expected "
                    f"[N,H,W] or [N,H,W,channels], as {layout[1]} has it")
            if x.shape[0] < (4 if split == "train" else 1) or min(x.shape[1:3]) < 8 or x.shape[3] < 1:
                raise InputError(
                    f"{name}: x_{split} has shape {list(x.shape)}; expected 4 training images or more and 1 test image "
                    "or more, of 8 x 8 or larger")
            y = y.reshape(-1) if y.shape in ((len(x), 1), (1, len(x))) else y
            if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
                raise InputError(
                    f"{name}: y_{split} is {y.dtype} {list(y.shape)}; expected integers [{len(x)}], one per image (of "
                    "floats y.astype(int), of one-hot rows y.argmax(1), of names np.unique(y, return_inverse=True)[1])")
            if y.min() < 0:
                raise InputError(f"{name}: y_{split} holds {y.min()}; expected class indices from 0")
            parts[split] = x, y
        (x_train, y_train), (x_test, y_test) = parts["train"], parts["test"]
        if x_train.shape[1:] != x_test.shape[1:]:
            raise InputError(
                f"{name}: x_train holds images of {list(x_train.shape[1:])} and x_test of {list(x_test.shape[1:])}; "
                "expected the same")
        if num_classes is None:
            num_classes, found = int(y_train.max()) + 1, np.unique(y_train)
            if len(found) < num_classes:
                raise InputError(
                    f"{name}: y_train has {len(found)} classes, from {found[0]} to {found[-1]}; expected class indices "
                    "from 0, each with images, as np.unique(y, return_inverse=True)[1] numbers them")
        if max(y_train.max(), y_test.max()) >= num_classes or num_classes < 2:
            raise InputError(
                f"{name}: y_train goes up to {y_train.max()} and y_test to {y_test.max()}; expected 2 or more classes, "
                "counted from 0, none of them in y_test only")
        if mean is None or std is None:
            # From the histogram of each channel: exact and without a float copy of the images.
            levels = np.arange(256) / 255
            p = np.zeros((x_train.shape[3], 256))
            for part in in_parts(x_train):
                p += [np.bincount(part[..., c].ravel(), minlength=256) for c in range(len(p))]
            p = p / p.sum(axis=1, keepdims=True)
            mean = p @ levels
            std = np.maximum(np.sqrt(np.maximum(p @ levels**2 - mean**2, 0)), 1 / 255)
        tensors = []
        for x, y in parts.values():
            tensors.append(torch.from_numpy(channels_first(x, in_place)))
            tensors.append(torch.from_numpy(y.astype(np.int64)))
        mean, std = (torch.tensor(v, dtype=torch.float32) for v in (mean, std))
        return Images(name, *tensors, num_classes, mean, std)

    def to(self, device) -> Images:
        """Move the images to the device, or only their batches, if the images are mapped and many."""
        if self.device and self.x_train.nbytes + self.x_test.nbytes > 2**32:
            return dataclasses.replace(self, device=torch.device(device))
        moved = {f: t.to(device) for f, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return dataclasses.replace(self, **moved, device=None)

    def fingerprint(self) -> str:
        """Return a text that is equal for equal images and labels."""
        if self.version:
            return f"{self.version}, {len(self)} and {len(self.y_test)} images"
        digest = hashlib.blake2b(digest_size=16)
        for t in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(repr(t.shape).encode())
            digest.update(t.cpu().contiguous().numpy())
        return digest.hexdigest()

    def first(self, images: int) -> Images:
        """Keep the first training images only, `images` at most; 0: all of them."""
        if 0 < images < 4:
            raise InputError(f"images is {images}; expected at least 4, or 0 for all")
        n = images or len(self.x_train)
        return dataclasses.replace(self, x_train=self.x_train[:n], y_train=self.y_train[:n])

    def search_data(self, config: pdarts.SearchConfig) -> pdarts.Data:
        """Return loaders of the first half of the training images, for the weights, and of the second, for the alphas.
        InputError if the images come sorted by class, so that the halves are not alike."""
        about = (self.num_classes, self.mean, self.std, self.device)
        data = pdarts.search_data(self.x_train, self.y_train, config, *about)
        halves = torch.stack([torch.bincount(part.y, minlength=self.num_classes) for part in (data.train, data.val)])
        # In random order, the numbers of a class of n differ by sqrt(n), give or take; 6 times that does not happen.
        difference = (halves[0] - halves[1]).abs() / halves.sum(0).clamp(min=1).sqrt()
        one_after_the_other = (self.y_train.diff() != 0).sum() < len(self.y_train.unique())
        if one_after_the_other or difference.max() > 6 or not halves.prod(0).any():
            worst = int(difference.argmax())
            first, second = halves[:, worst].tolist()
            raise InputError(
                f"{self.name}: class {worst} has {first} images in the first half of y_train and {second} in the "
                "second; expected them shuffled, not sorted")
        return data

    def evaluate_data(self, config: pdarts.EvaluateConfig) -> pdarts.Data:
        """Return a loader of all training images."""
        loader = pdarts.Loader(self.x_train, self.y_train, config, self.mean, self.std, self.device)
        return pdarts.Data(loader, self.num_classes, self.x_train.shape[1])

    def test(self, limit: int | None = None, part: tuple[int, int] = (0, 1), batch: int = 256):
        """Yield batches of the first `limit` test images, normalised, float32 [N,C,H,W], and their labels, int64 [N].
        part: (rank, number) of several processes, each of which takes every number-th image."""
        rank, number = part
        loader = self.evaluate_data(pdarts.EvaluateConfig()).train
        x, y = self.x_test[:limit][rank::number], self.y_test[:limit][rank::number]
        for start in range(0, len(y), batch):
            images, labels = (part[start : start + batch].to(loader.device) for part in (x, y))
            yield loader.normalise(images), labels


def other_layout(shape, labels: int) -> tuple[str, str] | None:
    """Return what images [N,H,W,channels] of this shape more likely are, and how to convert them."""
    n, height, width, channels = shape
    if n != labels == channels:
        return "[H,W,channels,N]", "x.transpose(3, 0, 1, 2)"
    if height == width == channels > 4:
        return "volumes [N,D,H,W]", f"a slice x[:, {height // 2}]"
    small = height < 8 <= min(width, channels)
    if small or channels > 4 and (channels == width or channels > height != width):
        return "[N,channels,H,W]", "x.transpose(0, 2, 3, 1)"
    return None


def in_parts(x: np.ndarray) -> list[np.ndarray]:
    """Return views of some images each, of a megabyte or so."""
    return np.array_split(x, min(max(1, x.nbytes >> 20), len(x)))


def channels_first(x: np.ndarray, in_place: bool) -> np.ndarray:
    """Return [N,H,W,C] as [N,C,H,W], contiguous; in_place: in the memory of x."""
    n, h, w, c = x.shape
    if c == 1 or not in_place or not x.flags.c_contiguous:
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    for part in in_parts(x.reshape(n, h * w * c)):
        part[:] = part.reshape(-1, h * w, c).transpose(0, 2, 1).reshape(part.shape)
    return x.reshape(n, c, h, w)


def shuffle(x: np.ndarray, order: np.ndarray):
    """Bring the images of a contiguous array into this order, in its memory."""
    for columns in np.array_split(x.reshape(len(x), -1), 16, axis=1):
        columns[:] = columns[order]


SHAPES = tuple("disc ring square frame diamond diamond-frame cross saltire lying-bar standing-bar".split())


def shapes(train: int = 4000, test: int = 500, seed: int = 0) -> Images:
    """Generate images, 32 x 32 in colour, of 10 shapes of varied position, size, colour, rotation and background."""
    rng = np.random.default_rng(seed)
    n = train + test
    label = rng.permutation(np.arange(n) % 10)

    def column(low, high):
        return rng.uniform(low, high, (n, 1, 1))

    # Coordinates in which the shape is upright, centred and of radius 1.
    y, x = np.mgrid[0:32, 0:32]
    x, y, angle, radius = x - column(10.5, 20.5), y - column(10.5, 20.5), column(-0.3, 0.3), column(7, 11)
    u, v = (np.cos(angle) * x + np.sin(angle) * y) / radius, (np.cos(angle) * y - np.sin(angle) * x) / radius
    r, square, diamond = np.hypot(u, v), np.maximum(abs(u), abs(v)), abs(u) + abs(v)
    masks = (
        r < 0.9,  # disc
        (r < 1) & (r > 0.6),  # ring
        square < 0.8,
        (square < 0.9) & (square > 0.55),  # frame
        diamond < 1.1,
        (diamond < 1.2) & (diamond > 0.7),  # diamond frame
        (np.minimum(abs(u), abs(v)) < 0.2) & (square < 1),  # cross
        (abs(abs(u) - abs(v)) < 0.28) & (square < 0.9),  # saltire
        (abs(v) < 0.25) & (abs(u) < 1),  # lying bar
        (abs(u) < 0.25) & (abs(v) < 1),  # standing bar
    )
    mask = np.choose(label[:, None, None], masks)[..., None]
    # Bright shapes on a dark background, which is shaded from one side to the other, and noise over both.
    colour, background = rng.uniform(140, 255, (n, 1, 1, 3)), rng.uniform(0, 100, (n, 1, 1, 3))
    tilt = column(0, 2 * np.pi)
    shade = (x * np.cos(tilt) + y * np.sin(tilt)) * column(0, 2)
    noise = rng.normal(0, 1, (n, 32, 32, 3)) * column(5, 25)[..., None]
    image = (np.where(mask, colour, background + shade[..., None]) + noise).clip(0, 255).astype(np.uint8)
    images = Images.from_arrays(image[:train], label[:train], image[train:], label[train:], "shapes")
    return dataclasses.replace(images, classes=SHAPES)


KEYS = "x_train", "y_train", "x_test", "y_test"
OTHER_KEYS = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}

OTHERS = " (docs/DATA.md: how to convert SVHN's .mat and other files)"


def load_npz(path: pathlib.Path) -> Images:
    """Read x_train, y_train, x_test, y_test, as Images.from_arrays takes them, from a file; or MedMNIST's names.

    The training images are shuffled (by a fixed seed): a search halves them, and such files are often sorted. All this
    happens in the memory of the arrays."""
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old or odd array headers
            found = {key.lower(): key for key in archive}
            keys = [next((found[name] for name in (key, OTHER_KEYS[key]) if name in found), None) for key in KEYS]
            missing = [key for key, name in zip(KEYS, keys) if name is None]
            if missing:
                raise InputError(
                    f"{path} lacks {', '.join(missing)} and holds {some(list(archive)) or 'nothing'}; expected "
                    f"{', '.join(KEYS)}, or {', '.join(OTHER_KEYS.values())}")
            arrays = [archive[key] for key in keys]
            others = [key for key in archive if key not in keys]
    except InputError:
        raise
    except Exception as error:  # whatever a damaged zip or array header leads to
        raise InputError(
            f"cannot read {path} ({reason(error)}); expected an .npz with {', '.join(KEYS)}{OTHERS}"
        ) from None
    images = Images.from_arrays(*arrays, str(path), in_place=True)
    order = np.random.default_rng(0).permutation(len(images.x_train))
    shuffle(images.x_train.numpy(), order)
    note = f"{some(others)} in it not read" if others else ""
    return dataclasses.replace(images, y_train=images.y_train[torch.from_numpy(order)], note=note)


DataSet = Images | Photographs | Loaders


def load_folder(path: str, settings, workers: int, follow_links=False, **options) -> Images | Photographs:
    """Return the images of a folder: its files, if the settings augment these, else resized, in a mapped file.

    Their order is random (by a fixed seed): a search halves them, and --images takes the first ones."""
    listing, rng = folders.scan(path, follow_links).subset(settings.fraction), np.random.default_rng(0)
    train, test = ([part[i] for i in rng.permutation(len(part))] for part in (listing.train, listing.test))
    listing = dataclasses.replace(listing, train=train, test=test)

    def note(largest):
        scaled = f"images of 16 bits scaled by their largest value, {largest}" if largest else ""
        return ", ".join(filter(None, (listing.note, scaled)))

    if getattr(settings, "augment", "cifar") == "imagenet":
        sound = folders.check(listing, workers, **options)
        damaged = listing.images - sound.images
        return Photographs(sound, settings.size, workers, damaged=damaged, note=note(sound.largest))
    x_train, y_train, x_test, y_test, damaged, largest = folders.cached(listing, settings.size, workers, **options)
    version = f"{folders.fingerprint(listing)}, {settings.size} pixels, without {len(damaged)}"
    statistics = pdarts.statistics(x_train[:2000])
    images = Images(path, x_train, y_train, x_test, y_test, len(listing.classes), *statistics, path)
    return dataclasses.replace(
        images, device=torch.device("cpu"), version=version, damaged=len(damaged), note=note(largest),
        classes=tuple(listing.classes), largest=largest)


def load(settings, path: str | None = None, download: bool = False, workers: int = 0, **options) -> DataSet:
    """Return the images of `settings.dataset` and --data: generated shapes, CIFAR, an .npz file, a folder of images.

    Where a folder holds several of these, a preset of CIFAR or ImageNet decides. workers and options: see
    harness.data.folders.cached; follow_links: the links of harness.data.folders.scan.
    """
    folder, dataset = pathlib.Path(path or "data"), settings.dataset
    from_files = dataset == "imagenet" or getattr(settings, "augment", "cifar") == "imagenet"
    if dataset not in ("shapes", "imagenet", *CIFAR):
        raise InputError(f"dataset is {dataset!r}; expected shapes, imagenet, {' or '.join(CIFAR)}")
    if download and (dataset not in CIFAR or folder.is_file()):
        raise InputError(f"nothing to download for {path or dataset}; expected --preset {' or '.join(CIFAR)}")
    found = [name for name, form in CIFAR.items() if form.version_in(folder)] if path else []
    splits = list(folders.split_folders(folder).values()) if path and folder.is_dir() else []
    if dataset == "shapes" and not from_files and len(found) + bool(splits) > 1:
        raise InputError(
            f"{path} holds {' and '.join(found + splits)}; expected one data set, or --preset {' or '.join(CIFAR)}")
    if splits and (from_files or dataset not in CIFAR or not (download or dataset in found)):
        return load_folder(path, settings, workers, **options)
    if path and folder.is_dir() and not found and not download and (classes := folders.loose_classes(folder)):
        raise InputError(
            f"{path} holds images in folders ({some(classes)}), but no train and val; expected most images of each "
            f"class in {folder / 'train'}/CLASS, and the others in {folder / 'val'}/CLASS")
    if from_files:
        lacks = f"no train/CLASS and val/CLASS in {path}" if path else "no --data FOLDER"
        raise InputError(f"{lacks}; expected a folder with images in train/CLASS and val/CLASS")
    if settings.fraction != 1:
        raise InputError(f"fraction is {settings.fraction}; expected 1 but for a folder of images (or use --images)")
    if path and folder.is_file():
        return dataclasses.replace(load_npz(folder), path=path)
    if dataset == "shapes":
        if not path:
            return shapes()
        if not folder.is_dir():
            raise InputError(f"no file or folder {path}; expected an .npz file, or a folder with CIFAR or train/CLASS")
        if not found:
            names = ", ".join(name for form in CIFAR.values() for name in (form.binary, form.python))
            raise InputError(
                f"no data in {path}; expected images in train/CLASS and val/CLASS, or one of the folders {names}"
                f"{OTHERS}")
        dataset = found[0]
    if download:
        download_cifar(dataset, folder)
    form = CIFAR[dataset]
    images = Images.from_arrays(*read_cifar(dataset, folder), dataset, form.classes, form.mean, form.std)
    return dataclasses.replace(images, path=str(folder), classes=form.names)
