"""The settings of a run besides the method's hyper-parameters, and the presets."""

from __future__ import annotations

import dataclasses

import pdarts
from pdarts import setting


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data set that a run loads."""

    dataset: str = setting("cifar10", "shapes, cifar10, cifar100 or imagenet; own data: --data")
    images: int = setting(0, "training images used at most, 0 = all", bounds=(0, 10**12))
    size: int = setting(32, "side of the images of a folder: they are resized, once", bounds=(8, 1024))
    fraction: float = setting(1.0, "share of the training images of each class of a folder", bounds=(1e-9, 1))


DETERMINISTIC = "the same bits in every run on a GPU too, where this costs time"


@dataclasses.dataclass(frozen=True)
class SearchSettings(DataSettings, pdarts.SearchConfig):
    """A search as a run: the data set that it loads, and how it computes."""

    unrolled: bool = setting(False, "second-order architecture steps (DARTS, eq. 7) instead of first-order")
    deterministic: bool = setting(False, DETERMINISTIC)


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(DataSettings, pdarts.EvaluateConfig):
    """An evaluation as a run."""

    augment: str = setting(
        "cifar",
        "cifar: crop of the padded image, flip, cutout; imagenet: random resized crop of a file, flip, colour jitter",
        choices=("cifar", "imagenet"),
    )
    deterministic: bool = setting(False, DETERMINISTIC)


FITS_IMAGES = ("size", "flip", "crop_padding", "stem", "stem_stride")  # what an evaluation takes over from a search


def options(settings, preset, names=None) -> list[str]:
    """Return the options of the command line that make `settings` of a preset; names: only those of these settings."""
    words = []
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        if name == "dataset" or name in unread(settings) or value == getattr(preset, name):
            continue  # --preset and --data stand for the data set
        if names is None or name in names:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def unread(settings) -> dict[str, str]:
    """Return the settings that nothing reads beside the others, and the option that makes it so."""
    found = {}
    if settings.stem == "imagenet":
        found["stem_stride"] = "--stem imagenet"
    if getattr(settings, "augment", None) == "imagenet":
        found |= dict.fromkeys(("cutout", "crop_padding"), "--augment imagenet")
    if getattr(settings, "auxiliary", None) is False:
        found["auxiliary_weight"] = "--no-auxiliary"
    return found


SEARCH_PRESETS = {
    "demo": SearchSettings(
        dataset="shapes",
        images=768,
        depths=(3, 4, 5),
        skip_dropout=(0.0, 0.1, 0.2),
        channels=8,
        stem_stride=2,
        epochs=4,
        alpha_start=1,
        batch_size=32,
        lr=0.05,
        alpha_lr=6e-3,  # ten times the paper's, for so few steps
        crop_padding=0,
    ),
    "cifar10": SearchSettings(**dataclasses.asdict(pdarts.CIFAR10)),
    "cifar100": SearchSettings(**dataclasses.asdict(pdarts.CIFAR100), dataset="cifar100"),
}
EVALUATE_PRESETS = {
    "demo": EvaluateSettings(
        dataset="shapes", images=2000, depth=5, channels=8, epochs=6, batch_size=50, cutout=8, drop_path=0.1
    ),
    "cifar10": EvaluateSettings(),
    "cifar100": EvaluateSettings(dataset="cifar100"),
    "imagenet": EvaluateSettings(  # the mobile setting (paper, ImageNet)
        dataset="imagenet",
        size=224,
        augment="imagenet",
        depth=14,
        channels=48,
        stem="imagenet",
        epochs=250,
        batch_size=1024,
        lr=0.5,
        schedule="linear",
        warmup=5,
        weight_decay=3e-5,
        label_smoothing=0.1,
        drop_path=0.0,
        cutout=0,
        crop_padding=0,
    ),
}
