"""Epochs of a search as a run makes them, and the time of the paper's search that follows from them."""

from __future__ import annotations

import dataclasses
import time

import torch

import pdarts
from harness.data.images import shapes
from harness.devices import ways_to_compute

IMAGES = 25000  # of each half of CIFAR's training images


def epoch_rows(config: pdarts.SearchConfig, device, half, fused, graphs) -> list[dict]:
    """Search on `half` generated images in each half; return a row for each stage, in seconds for 25,000 images.

    A stage has two epochs that train the weights only and two with alphas; the second of each counts, since the first
    warms up. The skip dropout has the rates of `config`.
    """
    config = dataclasses.replace(config, epochs=4, alpha_start=2)
    images = shapes(max(2 * half, 100), 1).to(device)
    x, y = images.x_train[: 2 * half], images.y_train[: 2 * half]
    data = pdarts.search_data(x, y, config, 10, images.mean, images.std)
    rows, start = [], time.perf_counter()
    for event in pdarts.Search(config, data, device, **ways_to_compute(device, fused, graphs)):
        if not isinstance(event, pdarts.Epoch):
            continue
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) * IMAGES / half
        start = time.perf_counter()
        if event.epoch == 1:
            stage = {"stage": event.stage + 1, "cells": config.depths[event.stage], "K": config.keep[event.stage]}
            rows.append(stage | {"epoch": seconds, "skip_dropout": event.rate})
        elif event.epoch == 3:
            rows[-1] |= {"epoch_with_alphas": seconds, "skip_dropout_with_alphas": event.rate}
    return rows


def projected_hours(rows, paper=pdarts.CIFAR10) -> float:
    """Return the hours of the paper's search: its epochs that train the weights only, and those with alphas."""
    alone, with_alphas = paper.alpha_start, paper.epochs - paper.alpha_start
    return sum(alone * row["epoch"] + with_alphas * row["epoch_with_alphas"] for row in rows) / 3600
