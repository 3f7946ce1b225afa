"""The classes of images, as the network of an evaluation sees them."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import pdarts
from harness.checkpoint import load_weights
from harness.data import folders
from harness.data.photographs import grey, middle
from harness.devices import pick_device
from harness.files import reason, shown
from harness.report.cells import read_genotype
from harness.settings import EvaluateSettings
from pdarts import InputError, Network


class Classifier:
    """The trained network in the folder of an evaluation, and what that kept of its data in config.json."""

    def __init__(self, folder, device: str = "auto"):
        folder, self.device = pathlib.Path(folder), pick_device(device)
        try:
            about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self.settings = EvaluateSettings(**about["settings"])
            self.classes, self.largest = about["classes"], about["largest"]
            (channels, *self.size), statistics = about["shape"], (about["mean"], about["std"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"cannot read the run {folder} ({reason(error)}); expected the folder of an evaluation, with "
                "config.json, genotype.json and weights.pt"
            ) from None
        if channels not in (1, 3) or None in statistics:
            raise InputError(
                f"{folder} was trained on {about['data']} of {channels} channels; expected images of 1 or 3 channels, "
                "with a known mean and deviation"
            )
        self.mean, self.std = (torch.tensor(numbers, device=self.device).view(-1, 1, 1) for numbers in statistics)
        genotype, s = read_genotype(str(folder / "genotype.json")), self.settings
        options = (s.auxiliary, s.stem, channels, s.stem_stride)
        self.network = Network(genotype, s.channels, len(self.classes), s.depth, *options).to(self.device).eval()
        load_weights(self.network, folder / "weights.pt", self.device)

    def image(self, path) -> torch.Tensor:
        """Return a file's image as the test of the run saw its own, uint8 [C,H,W]; ValueError if it cannot be read."""
        pixels = folders.colour(folders.decode(path), self.largest or 65535)
        if self.settings.augment == "imagenet":
            pixels = middle(pixels, self.size[0])
        elif self.size[0] == self.size[1]:
            pixels = folders.resize_and_crop(pixels, self.size[0])
        else:
            pixels = F.interpolate(pixels[None], self.size, mode="bilinear", antialias=True)[0]
        return pixels if len(self.mean) == 3 else grey(pixels[None].float())[0].round().to(torch.uint8)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        return (images.to(self.device).float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Return the probabilities [N,classes] of images, uint8 [N,C,H,W]."""
        x = self.normalise(images)
        labels = torch.zeros(len(x), dtype=torch.int64, device=self.device)
        _, logits = pdarts.loss_and_logits(self.network, x, labels, self.settings.dtype)
        return logits.float().softmax(1)


def images_in(paths) -> Iterator[str]:
    """Yield the files among the paths, and the images in and below the folders among them."""
    for path in paths:
        if os.path.isdir(path):
            found = folders.images_below(os.path.realpath(path), ".", None, [])
            if not found:
                raise InputError(f"no images in {path}; expected files {', '.join(folders.ENDINGS)}")
            yield from (os.path.join(path, name.removeprefix("./")) for name in found)
        else:
            yield os.fspath(path)


def predict(folder, paths, device: str = "auto") -> Iterator[str]:
    """Yield a line for each image: its five most likely classes and their probabilities.

    InputError is raised at the end if images cannot be read.
    """
    classifier, files, damaged = Classifier(folder, device), images_in(paths), []
    while batch := list(itertools.islice(files, 64)):
        images = {}
        for path in batch:
            try:
                images[path] = classifier.image(path)
            except InputError:
                raise
            except ValueError as error:
                damaged.append(f"{shown(path)} ({shown(str(error))})")
        if images:
            best = classifier.probabilities(torch.stack(list(images.values()))).topk(min(5, len(classifier.classes)))
            for path, *row in zip(images, best.values.tolist(), best.indices.tolist()):
                likely = (f"{shown(classifier.classes[i])} {probability:.2%}" for probability, i in zip(*row))
                yield f"{shown(path)}: {', '.join(likely)}"
    if damaged:
        raise InputError(f"{len(damaged)} of the images cannot be read, the first: {damaged[0]}; expected images")
