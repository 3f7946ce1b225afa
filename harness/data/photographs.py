"""Training on the original files of a folder, as on ImageNet: random resized crop, flip and colour jitter of each.

Crops are cut while the files are read, in worker processes; colours change on the device, a batch at a time. Everything
random of an image follows from its seed, see harness.data.loaders.Batches.
"""

from __future__ import annotations

import dataclasses
import math
import os

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import pdarts
from harness.data import folders
from harness.data.loaders import Batches, leave_signals_to_the_run
from pdarts import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for all folders, as for official checkpoints
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.4, 0.2  # official


@dataclasses.dataclass
class Photographs:
    """A data set of the files of a listing, in the place of `Images`. size: (3,S,S), as the network sees them."""

    listing: folders.Listing
    side: int
    workers: int = 0
    damaged: int = 0  # files that were left out
    note: str = ""  # about the data, for the user
    options: dict = dataclasses.field(default_factory=dict)  # of the command line, which loaded them
    device: torch.device = torch.device("cpu")

    @property
    def name(self) -> str:
        return str(self.listing.folder)

    path = name

    @property
    def size(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    mean, std = MEAN, STD

    @property
    def num_classes(self) -> int:
        return len(self.listing.classes)

    @property
    def classes(self) -> list[str]:
        return self.listing.classes

    @property
    def largest(self) -> int:
        return self.listing.largest

    def __len__(self):
        return len(self.listing.train)

    def fingerprint(self) -> str:
        return folders.fingerprint(self.listing)

    def first(self, images: int) -> Photographs:
        """Keep the first training images only, `images` at most; 0: all of them."""
        train = self.listing.train[: images or None]
        return dataclasses.replace(self, listing=dataclasses.replace(self.listing, train=train))

    def to(self, device) -> Photographs:
        return dataclasses.replace(self, device=torch.device(device))

    def search_data(self, config):
        raise InputError("a search takes images of one size; expected --augment cifar")

    def evaluate_data(self, config: pdarts.EvaluateConfig) -> pdarts.Data:
        crops = Crops(self.listing, self.side, config.flip)
        loader = Batches(crops, config.batch_size, self.workers, finish=jittered).to(self.device)
        return pdarts.Data(loader, self.num_classes)

    def test(self, limit: int | None = None, part: tuple[int, int] = (0, 1), batch: int = 256):
        """Yield batches of the first `limit` test images, resized and cropped to the middle, as Images.test does."""
        rank, number = part
        images = self.listing.test[:limit][rank::number]
        loader = DataLoader(
            Middles(self.listing, images, self.side),
            batch,
            num_workers=self.workers,
            worker_init_fn=leave_signals_to_the_run,
            generator=torch.Generator().manual_seed(0),
        )
        for pixels, labels in loader:
            yield normalised(pixels.to(self.device).float() / 255), labels.to(self.device)


def read(listing, path):
    try:
        return folders.colour(folders.decode(os.path.join(listing.folder, path)), listing.largest)
    except ValueError as error:  # it could be read when the run began
        raise InputError(f"cannot read {path} in {listing.folder} any more ({error}); expected an image") from None


@dataclasses.dataclass
class Crops:
    """A dataset of ((random crop, uint8 [3,side,side]; changes of its colours, float [8]), label)."""

    listing: folders.Listing
    side: int
    flip: bool

    def __len__(self):
        return len(self.listing.train)

    def __getitem__(self, i):
        path, label = self.listing.train[i]
        image = read(self.listing, path)
        top, left, height, width = random_crop(*image.shape[1:])
        image = resized(image[:, top : top + height, left : left + width], self.side, self.side)
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(2)
        reach = torch.tensor([BRIGHTNESS, CONTRAST, SATURATION, HUE])
        factors = (2 * torch.rand(4) - 1) * reach + torch.tensor([1.0, 1.0, 1.0, 0.0])
        return (image, torch.cat([factors, torch.randperm(4)])), label


@dataclasses.dataclass
class Middles:
    """A dataset of (the middle of a resized image, uint8 [3,side,side]; label). For 224, images get 256 (official)."""

    listing: folders.Listing
    images: list
    side: int

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        path, label = self.images[i]
        return middle(read(self.listing, path), self.side), label


def middle(image, side):
    """Return the middle of a resized image, uint8 [3,side,side]."""
    larger = round(side * 256 / 224)
    start = (larger - side) // 2
    return folders.resize_and_crop(image, larger)[:, start : start + side, start : start + side]


def random_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width): 8 to 100 % of an image, of a ratio of 3/4 to 4/3 (Szegedy et al., 2015)."""
    for _ in range(10):
        area = height * width * torch.empty(()).uniform_(0.08, 1).item()
        ratio = math.exp(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(torch.randint(n, ())) for n in (height - h + 1, width - w + 1))
            return top, left, h, w
    # The largest part in the middle that has such a ratio.
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized(image, height, width):
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


def normalised(images):
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


# --- Colours, of float images [N,3,H,W] from 0 to 1 -------------------------------------------------------------------


def jittered(batch, device):
    """Change brightness, contrast, saturation and hue of each image, in its own order, and normalise."""
    (images, colours), labels = batch
    images, factors = images.to(device, non_blocking=True).float() / 255, colours[:, :4].to(device, non_blocking=True)
    for turn in range(4):
        for change, function in enumerate((brighter, contrasting, saturated, turned)):
            which = (colours[:, 4 + turn] == change).nonzero()[:, 0]  # on the CPU: nothing waits for the device
            if len(which):
                which = which.to(device, non_blocking=True)
                images[which] = function(images[which], factors[which, change].view(-1, 1, 1, 1))
    return normalised(images), labels.to(device, non_blocking=True)


def mixed(images, others, factor):
    return (factor * images + (1 - factor) * others).clamp(0, 1)


def grey(images):
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def brighter(images, factor):
    return (factor * images).clamp(0, 1)


def contrasting(images, factor):
    return mixed(images, grey(images).mean((2, 3), keepdim=True), factor)


def saturated(images, factor):
    return mixed(images, grey(images), factor)


def turned(images, turn):
    """Turn the hue by a part of the circle of colours, -0.5 to 0.5."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = chroma.clamp_min(1e-12)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * turn[:, 0]  # of 6 around the circle

    def channel(start):
        k = (start + sixth) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)
