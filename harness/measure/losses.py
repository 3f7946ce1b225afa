"""The distances between losses of training with the kernels and without, and those that rounding alone makes."""

from __future__ import annotations

import torch

from harness.measure.search_steps import OurStep

SIDES = ("kernels, float64", "last bit", "plain, float32", "kernels, float32")


def loss_rows(stage, config, data, number=1):
    """Train on the batches of `data`, in turn weights and alphas; yield the relative distances from plain float64.

    All sides see the same images from the same start, "last bit" from weights of which the last bits were changed.
    config: without skip dropout, since the kernels and plain torch draw different masks.
    """

    def side(dtype, fused):
        images, labels = data[0]
        return OurStep(stage, config, images.to(dtype), labels, fused, number=number)

    right = side(torch.float64, False)
    sides = {
        "kernels, float64": side(torch.float64, True),
        "last bit": side(torch.float64, False),
        "plain, float32": side(torch.float32, False),
        "kernels, float32": side(torch.float32, True),
    }
    torch.manual_seed(0)
    with torch.no_grad():
        for w in sides["last bit"].weights:
            w.mul_(1 + 2e-16 * torch.randn_like(w))
    for i, (images, labels) in enumerate(data):
        which = "alphas" if i % 2 else "weights"
        for step in (right, *sides.values()):
            step.images, step.labels = images.to(step.images.dtype), labels
        loss = float(right.run(which)[0])
        distance = {name: abs(float(step.run(which)[0]) - loss) / abs(loss) for name, step in sides.items()}
        yield {"stage": stage, "step": i // 2 + 1, "of": which, "loss": loss, "distance": distance}
