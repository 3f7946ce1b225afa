"""The steps of an evaluation of the P-DARTS cell: ours, with the kernels or in plain torch, and the official code's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from unittest import mock

import torch
import torch.nn.functional as F

import kernels
import pdarts
from harness.graphs import CapturedStep
from harness.measure.search_steps import official_module
from pdarts import InputError

DROP_PATH = 0.2


class OurEvaluation:
    """The network of the P-DARTS cell as an evaluation trains it."""

    def __init__(self, config, images, labels, fused=True, graph=False):
        device, self.images, self.labels = images.device, images, labels

        def prepare(network):
            network = network.to(images.dtype)
            return kernels.fuse(network) if fused else network

        wrap = functools.partial(CapturedStep, device=device) if graph else pdarts.identity
        genotype, data = pdarts.GENOTYPES["PDARTS"], pdarts.Data(None, 10)
        self.training = pdarts.Evaluation(genotype, config, data, device, prepare, wrap_step=wrap)
        self.network, self.weights = self.training.network, self.training.weights
        self.set_drop_path(DROP_PATH)

    def set_drop_path(self, rate):
        self.network.set_drop_path(rate)

    def forward(self):
        config = self.training.config
        return pdarts.loss_and_logits(self.network, self.images, self.labels, config.dtype, config.auxiliary_weight)

    def run(self, which):
        return self.training.run_step(self.images, self.labels)

    def check(self):
        if getattr(self.training.run_step, "refused", False):
            raise InputError("the step could not be captured as a CUDA graph; expected one (the warning says why not)")


class OfficialEvaluation:
    """The same of the official code, in float32."""

    def __init__(self, folder, config, images, labels, channels_last=False):
        official = official_module(folder, "model")
        self.config, self.images, self.labels = config, images, labels
        torch.manual_seed(0)
        genotype = pdarts.GENOTYPES["PDARTS"]
        network = official.NetworkCIFAR(config.channels, 10, config.depth, config.auxiliary, genotype)
        self.network = network.to(images.device, images.dtype)
        self.set_drop_path(DROP_PATH)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
            self.images = images.contiguous(memory_format=torch.channels_last)
        self.weights = list(self.network.parameters())
        self.optimizer = torch.optim.SGD(
            self.weights, config.lr, config.momentum, weight_decay=config.weight_decay
        )

    def set_drop_path(self, rate):
        self.network.drop_path_prob = rate

    def forward(self):
        on_cpu = mock.patch.object(torch.cuda, "FloatTensor", torch.FloatTensor)  # the type of drop-path's mask
        with on_cpu if self.images.device.type == "cpu" else contextlib.nullcontext():
            logits, auxiliary_logits = self.network(self.images)
        loss = F.cross_entropy(logits, self.labels)
        if auxiliary_logits is not None:
            loss = loss + self.config.auxiliary_weight * F.cross_entropy(auxiliary_logits, self.labels)
        return loss, logits

    def run(self, which):
        self.optimizer.zero_grad()
        self.forward()[0].backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        self.optimizer.step()

    def check(self):
        pass


def verify_evaluation(config, images, labels, folder=None):
    """Return {side: largest relative distance of loss, logits and gradients from ours in float64}.

    InputError if a distance is too large.
    """
    config = dataclasses.replace(config, dtype="float32")
    makers = {"ours": OurEvaluation, "plain": functools.partial(OurEvaluation, fused=False)}
    if folder:
        makers["official"] = functools.partial(OfficialEvaluation, folder)
    distances, right = {}, None
    for name, make in makers.items():
        side = make(config, images.double(), labels)
        if name == "ours":
            state = side.network.state_dict()
        side.network.load_state_dict(state)
        side.set_drop_path(0.0)
        loss, logits = side.forward()
        gradients = torch.autograd.grad(loss, list(side.network.parameters()))
        results = [loss.detach(), logits.detach(), torch.cat([g.flatten() for g in gradients])]
        right = right or results
        distances[name] = max(float((mine - r).norm() / r.norm()) for mine, r in zip(results, right))
    if not max(distances.values()) <= 1e-9:
        raise InputError(f"in float64 the distances from ours are {distances}; expected at most 1e-9")
    del distances["ours"]
    return distances


def evaluation_sides(config, device, official=None):
    """Return {name: function of images and labels that builds it}, ours first."""
    ours = functools.partial(OurEvaluation, config)
    sides = {"ours": ours}
    if device.type == "cuda":
        sides["graph"] = functools.partial(ours, graph=True)
    sides["plain"] = functools.partial(ours, fused=False)
    if official:
        sides["official"] = functools.partial(OfficialEvaluation, official, config)
        sides["official-cl"] = functools.partial(sides["official"], channels_last=True)
    return sides
