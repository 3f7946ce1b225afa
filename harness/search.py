"""A search as a run.

    result = search(SEARCH_PRESETS["demo"], images, out="runs/mine", show=True)
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pdarts
from harness.checkpoint import claimed
from harness.data.images import DataSet
from harness.devices import ways_to_compute
from harness.distributed import average, check_agreement, processes, share_buffers
from harness.progress import Progress
from harness.report.report import write_search
from harness.run import Clock, Run
from harness.second_order import SecondOrder
from harness.settings import SearchSettings
from pdarts import SPACE, Architect, Epoch, Genotype, SearchSpace, Stage, Step


class SearchResult(NamedTuple):
    genotype: Genotype
    stages: list[Stage]
    test_accuracies: list[float]  # of each stage's network


def search(
    config: SearchSettings,
    images: DataSet | None = None,
    out=None,
    device: str = "auto",
    kernels: str | None = None,
    graphs: bool = True,
    resume=None,
    show: bool = False,
    space: SearchSpace = SPACE,
) -> SearchResult:
    """Search progressively: stage after stage a deeper network with fewer candidates, then the cell.

    images: Images or Loaders, by default the data set of `config.dataset` and `config.images`. out: a new or empty
    folder for the results, or None. kernels: "auto", "on" or "off", or None, see `pick_kernels`. graphs: capture steps
    on a GPU, see `CapturedStep`. resume: instead of `out`, the folder of a run that ended early. show: print progress.
    space: the candidates of an edge, as many as config.keep[0], and the nodes of a cell.
    SIGINT and SIGTERM raise `Stopped`, once the state is saved. Torch's random state stays as it was.
    """
    with claimed(out, resume) as folder:
        run = Run("search", config, images, folder, device, kernels, space=dataclasses.asdict(space))
        return _search(run, space, graphs, show)


def _search(run: Run, space: SearchSpace, graphs: bool, show: bool) -> SearchResult:
    config = run.config
    data = run.shared(run.images.search_data(config))
    steps = len(data.train)
    # The work of each stage: a step with alphas counts twice.
    work = [steps * c * k * (2 * config.epochs - config.alpha_start) for c, k in zip(config.depths, config.keep)]
    accuracies = []
    with run.block():
        searching = pdarts.Search(
            config,
            data,
            run.device,
            space,
            average=average,
            rank=processes()[0],
            architect=SecondOrder if config.unrolled else Architect,
            **ways_to_compute(run.device, run.fused, graphs and not config.unrolled),
        )
        state = run.begin(searching)
        progress, meters = Progress(work, show), None
        for line in run.changed():
            progress.line(line)
        if state:
            accuracies = state["test_accuracies"]
            epochs = searching.epoch + max(0, searching.epoch - config.alpha_start)
            stage = min(len(searching.stages), len(work) - 1)
            progress.resume(sum(work[:stage]) + steps * config.depths[stage] * config.keep[stage] * epochs)
        clock = Clock()
        for event in searching:
            if isinstance(event, Stage):
                under, genotype = f"stages/{len(searching.stages)}/", event.genotype(config.max_skips)
                run.folder.write(f"{under}genotype.json", genotype._asdict())
                run.folder.draw(genotype, under)
                continue
            stage, epoch = len(searching.stages), event.epoch if isinstance(event, Epoch) else searching.epoch
            label = f"stage {stage + 1}/{len(work)}  epoch {epoch:2d}/{config.epochs - 1}"
            if meters is None:  # an epoch begins or is resumed, maybe after its last step
                where = f"stage {stage + 1}, epoch {epoch}"
                meters = run.meters({"training loss": where, "alpha loss": where}, state)
                state = None
            if isinstance(event, Step):
                meters[0].update(event.loss, event.correct, event.size)
                if event.alpha_loss is not None:
                    meters[1].update(event.alpha_loss, event.alpha_correct, event.alpha_size)
                seen = event.size * processes()[1]
                amount = config.depths[stage] * config.keep[stage] * (1 if event.alpha_loss is None else 2)
                text = f"{label}  step {searching.step}/{steps}"
                progress.step(stage, text, amount, meters[0], clock.rate(seen))
                run.stop_if_asked(searching, meters, test_accuracies=accuracies)
            else:
                (loss, accuracy), (alpha_loss, alpha_accuracy) = (meter.result() for meter in meters)
                share_buffers(searching.network)
                last, test_accuracy = event.epoch == config.epochs - 1, None
                if last:  # only reported
                    (test_accuracy,) = run.test_accuracies(searching.network, 2 * steps * config.batch_size)
                    accuracies = [*accuracies, test_accuracy]
                alphas = [alpha.detach() for alpha in searching.network.alphas()]
                run.log.append(
                    {
                        "stage": event.stage + 1,
                        "epoch": event.epoch,
                        "train_loss": loss,
                        "train_accuracy": accuracy,
                        "alpha_loss": alpha_loss,
                        "alpha_accuracy": alpha_accuracy,
                        "test_accuracy": test_accuracy,
                        "lr": event.lr,
                        "skip_dropout": event.rate,
                        "softmax_alphas_normal": alphas[0].softmax(1).tolist(),
                        "softmax_alphas_reduce": alphas[1].softmax(1).tolist(),
                    }
                )
                seconds = run.time(clock, stage=event.stage + 1, epoch=event.epoch)
                check_agreement(alphas, searching.candidates_normal, searching.candidates_reduce)
                run.save(searching, test_accuracies=accuracies)
                write_search(run, searching)
                text = f"{label}  loss {loss:.3f}  acc {accuracy:6.1%}"
                if alpha_loss is not None:
                    text += f"  alphas: loss {alpha_loss:.3f}  acc {alpha_accuracy:6.1%}"
                text += f"  test acc {test_accuracy:6.1%}" if last and accuracies[-1] is not None else ""
                progress.line(f"{text}  {seconds:.1f} s")
                meters, clock = None, Clock()
    last, genotype = searching.stages[-1], searching.genotype()
    run.folder.draw(genotype)
    others = {
        "max_skips": config.max_skips,
        "unrestricted": last.genotype(None)._asdict(),
        "by_max_skips": {str(m): last.genotype(m)._asdict() for m in range(len(genotype.normal) + 1)},
    }
    run.folder.write("genotype.json", genotype._asdict() | others)
    write_search(run, searching, genotype)
    return SearchResult(genotype, searching.stages, accuracies)
