"""An evaluation as a run: a cell's network trained from scratch and tested."""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

import pdarts
from harness.checkpoint import claimed, load_weights
from harness.data.images import DataSet
from harness.devices import ways_to_compute
from harness.distributed import average, processes, share_buffers
from harness.progress import Progress
from harness.report.cells import check_genotype, count
from harness.report.report import write_evaluation
from harness.run import Clock, Run
from harness.settings import EvaluateSettings
from pdarts import Genotype, InputError, Network, Step


class EvaluateResult(NamedTuple):
    network: Network
    parameters: int
    multiply_adds: int
    test_error: float
    test_error_top5: float = 0.0


TOP = (1, 5)


def evaluate(
    genotype: Genotype,
    config: EvaluateSettings,
    images: DataSet | None = None,
    out=None,
    device: str = "auto",
    weights=None,
    resume=None,
    show: bool = False,
    kernels: str | None = None,
    graphs: bool = True,
) -> EvaluateResult:
    """Train the network of a cell from scratch and test it; with `weights`, a file of its state_dict, only test it.

    The other arguments are those of `search`.
    """
    genotype = check_genotype(genotype)
    with claimed(out, resume) as folder:
        run = Run("evaluate", config, images, folder, device, kernels, genotype=genotype._asdict())
        return _evaluate(genotype, run, weights, graphs, show)


def _evaluate(genotype: Genotype, run: Run, weights, graphs: bool, show: bool) -> EvaluateResult:
    config = run.config
    channels, *size = run.images.size
    reduction = 4 * (8 if config.stem == "imagenet" else config.stem_stride)
    if config.auxiliary and min(size) <= reduction:
        raise InputError(
            f"images of {size[0]} x {size[1]} leave the auxiliary head 1 x 1; expected {reduction + 1} or more (for "
            "folders: --size), or --no-auxiliary"
        )
    with run.block():
        torch.manual_seed(0)
        options = (config.auxiliary, config.stem, channels, config.stem_stride)
        network = Network(genotype, config.channels, run.images.num_classes, config.depth, *options)
        cost = count(network, tuple(size), channels)
        if weights is not None:
            network = network.to(run.device).eval()
            load_weights(network, weights, run.device)
            # The kernels take the norms as they are.
            prepare = ways_to_compute(run.device, run.fused, False).get("prepare", fold)
            # In 16 bits a folded network rounds otherwise than the trained one.
            tested = network if prepare is fold and config.dtype != "float32" else prepare(copy.deepcopy(network))
        else:
            tested = _train(genotype, run, graphs, show)
            network = network.to(run.device)  # plain, whatever the trained one was converted to
            network.load_state_dict(tested.state_dict())
        errors = [1 - accuracy for accuracy in run.test_accuracies(tested, top=TOP)]
        return EvaluateResult(network.eval(), *cost, *errors)


def fold(network: Network) -> Network:
    """Fold the batch norms of a network into the convolutions before them, for evaluation mode."""
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            for (name, conv), (after, norm) in itertools.pairwise(list(module.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, name, fuse_conv_bn_eval(conv.eval(), norm.eval()))
                    setattr(module, after, nn.Identity())
        elif isinstance(module, pdarts.FactorizedReduce):
            convolutions, norm = (module.conv_1, module.conv_2), module.bn
            values = norm.running_mean, norm.running_var, norm.weight, norm.bias
            values = zip(*(v.split([len(conv.weight) for conv in convolutions]) for v in values))
            for conv, (mean, var, gamma, beta) in zip(convolutions, values):
                folded = fuse_conv_bn_weights(conv.weight, conv.bias, mean, var, norm.eps, gamma, beta)
                conv.weight, conv.bias = folded
            module.bn = nn.Identity()
    return network


def _train(genotype, run, graphs, show):
    config = run.config
    data = run.shared(run.images.evaluate_data(config))
    training = pdarts.Evaluation(
        genotype,
        config,
        data,
        run.device,
        average=average,
        rank=processes()[0],
        **ways_to_compute(run.device, run.fused, graphs),
    )
    state = run.begin(training)
    run.folder.write("genotype.json", genotype._asdict())
    steps = len(data.train)
    progress, meters = Progress([config.epochs * steps], show), None
    for line in run.changed():
        progress.line(line)
    progress.resume(training.epoch * steps + training.step)
    clock = Clock()
    for event in training:
        epoch = training.epoch if isinstance(event, Step) else event.epoch
        label = f"epoch {epoch:3d}/{config.epochs - 1}"
        if meters is None:  # an epoch begins or is resumed, maybe after its last step
            meters = run.meters({"training loss": f"epoch {epoch}"}, state)
            state = None
        if isinstance(event, Step):
            meters[0].update(event.loss, event.correct, event.size)
            seen = event.size * processes()[1]
            text = f"{label}  step {training.step}/{steps}"
            progress.step(0, text, 1, meters[0], clock.rate(seen))
            run.stop_if_asked(training, meters)
        else:
            loss, accuracy = meters[0].result()
            share_buffers(training.network)
            test_accuracy, top5 = run.test_accuracies(training.network, top=TOP)
            record = {"epoch": event.epoch, "train_loss": loss, "train_accuracy": accuracy}
            record |= {"test_accuracy": test_accuracy, "test_accuracy_top5": top5}
            run.log.append(record | {"lr": event.lr, "drop_path": event.rate})
            seconds = run.time(clock, epoch=event.epoch)
            weights = training.network.state_dict()  # still one after torch.load, with the attribute
            weights.about = {name: run.description[name] for name in ("classes", "shape", "mean", "std")}
            run.folder.save("weights.pt", weights)
            run.save(training)
            write_evaluation(run, genotype)
            text = f"{label}  loss {loss:.3f}  acc {accuracy:6.1%}"
            progress.line(f"{text}  test acc {test_accuracy:6.1%}  {seconds:.1f} s")
            meters, clock = None, Clock()
    write_evaluation(run, genotype)  # again, for a run that was killed after its last checkpoint
    return training.network
