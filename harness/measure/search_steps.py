"""The steps of a search: ours, with the kernels or in plain torch, and those of the official code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import sys
from unittest import mock

import torch
import torch.nn.functional as F

import kernels
import pdarts
from harness.data.images import load, shapes
from harness.devices import pick_kernels
from harness.graphs import CapturedStep
from harness.measure.timing import ROOT
from harness.settings import SearchSettings
from pdarts import InputError

# The initial rates of the three stages: those of CIFAR-10, but in stage 1 that of CIFAR-100 instead of 0.0, so that
# every stage shows the cost of the dropout.
SKIP_DROPOUT = (0.1, 0.4, 0.7)
NO_DROPOUT = (0.0, 0.0, 0.0)


def batches(count, batch, device, folder=None):
    """Return `count` batches of (images, labels), of CIFAR-10 in `folder` or generated."""
    n = count * batch
    data = load(SearchSettings(), folder) if folder else shapes(max(n, 100), 1)
    if len(data.x_train) < n:
        raise InputError(f"{data.name} has {len(data.x_train)} images; expected {n} or more for {count} batches")
    x, y = data.x_train[:n].to(device), data.y_train[:n].to(device)
    images = pdarts.Loader(x, y, pdarts.CIFAR10, data.mean, data.std).normalise(x)
    return list(zip(images.split(batch), y.split(batch)))


@functools.cache
def candidates(stage, number=1):
    """Return the candidates of all edges, of normal and of reduction cells, in a stage (from 1).

    Stage 1 has all of them, the others those that the official code keeps in search `number` (from 1) of
    testdata/derive.json; they differ from edge to edge.
    """
    searches = json.loads((ROOT / "testdata" / "derive.json").read_text())
    if not 1 <= number <= len(searches):
        raise InputError(f"search is {number}; expected 1 to {len(searches)}, those of testdata/derive.json")
    if stage == 1:
        return ((pdarts.PRIMITIVES,) * len(pdarts.SPACE.edges),) * 2
    kept = searches[number - 1]["kept"][stage - 2]
    return tuple(tuple(tuple(pdarts.PRIMITIVES[int(k)] for k in edge) for edge in cell.split()) for cell in kept)


class OurStep:
    """A stage (from 1) as a search trains it, at the initial rate of its skip dropout: `run` makes a step of the
    weights, of the alphas, or of both. number: of the search that the candidates are from."""

    def __init__(self, stage, config, images, labels, fused=True, graph=False, number=1):
        device, self.images, self.labels = images.device, images, labels
        if fused:
            pick_kernels("on", device)

        def prepare(network):
            network = network.to(images.dtype)
            return kernels.fuse(network) if fused else network

        def wrap(step):
            if not graph:
                return step
            self.graphs.append(CapturedStep(step, device))
            return self.graphs[-1]

        self.graphs = []
        self.search = pdarts.Search(config, pdarts.Data(None, 10, val=()), device, prepare=prepare, wrap_step=wrap)
        kept = candidates(stage, number)
        alphas = [torch.zeros(len(cell), len(cell[0])) for cell in kept]
        # The stage before has as many candidates as this one keeps: it keeps all of them.
        self.search.stages = [pdarts.Stage(*kept, *alphas)] * (stage - 1)
        self.search.begin_stage()
        self.network, self.weights = self.search.network, self.search.weights
        self.network.set_skip_dropout(config.skip_dropout[stage - 1])
        self.architecture_step = wrap(self.search.architect.update)

    def run(self, which):
        """Make a step; return its loss, and more."""
        batch = self.images, self.labels
        if which == "alphas":
            return self.architecture_step(*batch)
        return self.search.run_step(*batch, *batch) if which == "both" else self.search.run_step(*batch)

    def forward(self):
        pdarts.require_gradients(self.weights, not_of=self.network.alphas())
        return pdarts.loss_and_logits(self.network, self.images, self.labels, self.search.config.dtype)

    def check(self):
        if any(graph.refused for graph in self.graphs):
            raise InputError("the step could not be captured as a CUDA graph; expected one (the warning says why not)")


class OfficialStep:
    """The same of the official code in float32, every backward pass of which computes all gradients."""

    def __init__(self, folder, stage, config, images, labels, number=1):
        official = official_module(folder, "model_search")
        torch.manual_seed(0)
        self.images, self.labels, self.clip = images, labels, config.clip
        normal, reduce = (
            [[name in names for name in pdarts.PRIMITIVES] for names in cell] for cell in candidates(stage, number)
        )
        # The official network moves its alphas to the GPU, whether there is one or not.
        on_cpu = mock.patch.object(torch.Tensor, "cuda", lambda t: t)
        with on_cpu if images.device.type == "cpu" else contextlib.nullcontext():
            self.network = official.Network(
                config.channels,
                10,
                config.depths[stage - 1],
                F.cross_entropy,
                switches_normal=normal,
                switches_reduce=reduce,
                p=config.skip_dropout[stage - 1],
            ).to(images.device)
        of_alphas = self.network.arch_parameters()
        of_weights = [p for p in self.network.parameters() if all(p is not a for a in of_alphas)]
        sgd = torch.optim.SGD(of_weights, config.lr, config.momentum, weight_decay=config.weight_decay)
        adam = torch.optim.Adam(
            of_alphas, config.alpha_lr, betas=(0.5, 0.999), weight_decay=config.alpha_weight_decay
        )
        self.steps = {"weights": (of_weights, sgd), "alphas": (of_alphas, adam)}

    def forward(self):
        return F.cross_entropy(self.network(self.images), self.labels)

    def run(self, which):
        for name in ("alphas", "weights") if which == "both" else (which,):
            parameters, optimizer = self.steps[name]
            optimizer.zero_grad()
            self.forward().backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()

    def check(self):
        pass


def official_module(folder, name):
    """Import a module of the official code."""
    if not (pathlib.Path(folder) / f"{name}.py").is_file():
        raise InputError(f"no {name}.py in {folder}; expected a checkout of github.com/chenxin061/pdarts")
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        unused = "torchvision", "torchvision.transforms", "torchvision.datasets"  # but imported
        sys.modules.update({missing: mock.MagicMock() for missing in unused})
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        return importlib.import_module(name)


def verify_step(stage, config, images, labels, number=1):
    """Return the relative distances of loss and gradients, fused from plain; InputError if they are too large.

    There is no dropout, since each side draws masks of its own.
    """
    config = dataclasses.replace(config, skip_dropout=NO_DROPOUT)
    results, allow_tf32 = [], torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # both round, but not alike
    for fused in (False, True):
        side = OurStep(stage, config, images, labels, fused, number=number)
        parameters = [*side.weights, *side.network.alphas()]
        pdarts.require_gradients(parameters)
        loss, _ = pdarts.loss_and_logits(side.network, images, labels, config.dtype)
        gradients = torch.autograd.grad(loss, parameters)
        results.append([loss.detach(), torch.cat([g.flatten() for g in gradients])])
    torch.backends.cudnn.allow_tf32 = allow_tf32
    distances = [float((mine - right).norm() / right.norm()) for right, mine in zip(*results)]
    allowed = (1e-4, 1e-2) if config.dtype == "float32" else (2e-2, 0.5)
    if not all(d <= a for d, a in zip(distances, allowed)):
        raise InputError(
            f"stage {stage}: loss and gradients of the kernels have relative distances {distances} from plain torch; "
            f"expected at most {allowed}"
        )
    return distances


def search_sides(stage, config, device, official=None, number=1):
    """Return {name: function of images and labels that builds it}, ours first."""
    ours = functools.partial(OurStep, stage, config, number=number)
    sides = {"ours": ours}
    if device.type == "cuda":
        sides["graph"] = functools.partial(ours, graph=True)
    sides["plain"] = functools.partial(ours, fused=False)
    if official:
        sides["official"] = functools.partial(OfficialStep, official, stage, config, number=number)
    return sides
