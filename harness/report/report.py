"""The report of a run: its charts, and one page that holds all of it, rewritten after every epoch."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence

import pdarts
from harness.devices import pick_device
from harness.progress import duration
from harness.report.cells import cell_svg, skips_of
from harness.report.charts import Stages, alphas_svg, curves_svg
from harness.settings import EVALUATE_PRESETS, FITS_IMAGES, SEARCH_PRESETS, options

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">{refresh}
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 Helvetica, Arial, sans-serif; margin: 2em auto; max-width: 1080px; padding: 0 1em }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.15em; margin-top: 2em }}
figure, .wide {{ margin: 1em 0; overflow-x: auto }} figcaption {{ color: #777 }}
svg {{ max-width: 100%; height: auto }} .cells svg {{ border-radius: 8px }}
table {{ border-collapse: collapse }} td, th {{ text-align: right; padding: 2px 12px; border-bottom: 1px solid #8885 }}
.settings td {{ text-align: left; overflow-wrap: anywhere }} .settings td:first-child {{ white-space: nowrap }}
@media (max-width: 700px) {{ .stages td, .stages th {{ font-size: 10px; padding: 2px 3px }} }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0 }}
pre {{ overflow-x: auto; padding: 0.8em; background: #8882; border-radius: 6px }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, finished: bool, parts: list[str]) -> str:
    refresh = "" if finished else '<meta http-equiv="refresh" content="60">'
    return PAGE.format(title=html.escape(title), refresh=refresh, body="\n".join(parts))


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def figure(svg: str, caption: str = "", kind: str = "") -> str:
    return f'<figure class="{kind}">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence], kind: str = "") -> str:
    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    lines = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table class="{kind}">{lines}</table></div>'


def command(*words) -> str:
    return f"<pre>python pdarts.py {html.escape(shlex.join(map(str, words)))}</pre>"


def cells_of(genotype, caption: str) -> str:
    drawings = (cell_svg(*genotype[:2], "normal cell"), cell_svg(*genotype[2:], "reduction cell"))
    return figure("\n".join(drawings), caption, "cells")


def share(value) -> str:
    return "" if value is None else f"{value:.1%}"


def data_options(preset: str, path: str | None, ways: dict) -> list[str]:
    """Return the options of the command line that load the images of a run."""
    words = ["--preset", preset, *(["--data", path] if path else [])]
    for name, value in ways.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return words


def preset_of(run) -> str:
    name = run.config.dataset
    return name if name in EVALUATE_PRESETS else "demo"


def data_of(run) -> list[str]:
    about = run.description
    path = "IMAGES" if from_python(run) else about["path"]
    return data_options(preset_of(run), path, about["options"])


def from_python(run) -> bool:
    """Return whether no command can load the images of a run."""
    return run.description["path"] is None and run.description["data"] != "shapes"


def following(run, *words) -> list[str]:
    """Return the heading, and the command that comes after a run or resumes it."""
    note = "IMAGES stands for a file (see --data) of the images, which the run has got from Python."
    return [heading("Next"), command(*words), *([paragraph(note)] if from_python(run) else [])]


def resuming(run, kind: str) -> list[str]:
    return following(run, kind, "--resume", run.folder.path, *(["--data", "IMAGES"] if from_python(run) else []))


def settings_of(description: dict) -> list[str]:
    about = {name: description[name] for name in ("data", "device", "processes", "threads", "kernels")}
    about |= description["versions"] | {"command": shlex.join(description["command"])}
    space = description.get("space", {})  # of a search
    return [
        heading("Settings"),
        table(("", ""), [*about.items(), *description["settings"].items(), *space.items()], "settings"),
    ]


def write_search(run, searching, genotype: pdarts.Genotype | None = None):
    """Write alphas.svg, curves.svg and report.html of a search; genotype: its cell, once it is finished."""
    if not run.folder.writes or not run.log:
        return
    config, log, data = run.config, run.log, run.description["data"]
    stages = Stages([config.epochs] * len(config.depths), config.alpha_start)
    candidates = [(stage.candidates_normal, stage.candidates_reduce) for stage in searching.stages]
    if searching.network is not None:
        candidates.append((searching.candidates_normal, searching.candidates_reduce))
    alphas, curves = alphas_svg(log, candidates, searching.space.edges, stages), curves_svg(log, stages, "skip_dropout")
    if genotype:
        parts = [cells_of(genotype, f"The cell: its normal cell has at most M = {config.max_skips} skip-connects.")]
    else:
        stage, epoch = log[-1]["stage"], log[-1]["epoch"] + 1
        parts = [paragraph(f"Stage {stage} of {len(config.depths)}: {epoch} of {config.epochs} epochs are done.")]
    parts += [
        heading("Stages"),
        stages_of(run, searching.stages, candidates),
        paragraph(
            "Accuracies are those of the last epoch, on the half of the images that the weights and that the alphas "
            "learn from; skip-connects are those of the normal cell before they are limited to M."
        ),
        heading("The probabilities of the candidates"),
        figure(alphas),
        heading("Losses, accuracies, rates"),
        figure(curves),
        heading("The cell of each stage"),
    ]
    for number, stage in enumerate(searching.stages, 1):
        parts.append(cells_of(stage.genotype(config.max_skips), f"stage {number}"))
    if genotype:
        fitting = options(config, SEARCH_PRESETS.get(config.dataset, SEARCH_PRESETS["demo"]), FITS_IMAGES)
        parts += following(run, "evaluate", run.folder.path / "genotype.json", *data_of(run), *fitting)
    else:
        parts += resuming(run, "search")
    parts += settings_of(run.description)
    run.folder.write("alphas.svg", alphas)
    run.folder.write("curves.svg", curves)
    run.folder.write("report.html", page(f"P-DARTS: a search on {data}", genotype is not None, parts))


def stages_of(run, stages, candidates) -> str:
    """Return a table with a row for each stage that has begun."""
    names = "stage", "cells", "candidates", "epochs", "time", "weights' half", "alphas' half", "test", "skip-connects"
    rows = []
    for number, (normal, _) in enumerate(candidates, 1):
        epochs = [record for record in run.log if record["stage"] == number]
        seconds = sum(record["seconds"] for record in run.times if record["stage"] == number)
        row = [number, run.config.depths[number - 1], len(normal[0]), len(epochs), duration(seconds)]
        last, skips = epochs[-1] if epochs else {}, ""
        row += [share(last.get(f"{of}_accuracy")) for of in ("train", "alpha", "test")]
        if number <= len(stages):
            skips = skips_of(stages[number - 1].genotype(None).normal)
        rows.append([*row, skips])
    return table(names, rows, "stages")


def write_evaluation(run, genotype: pdarts.Genotype):
    """Write curves.svg and report.html of an evaluation."""
    if not run.folder.writes:
        return
    config, last, data = run.config, run.log[-1], run.description["data"]
    curves = curves_svg(run.log, Stages([config.epochs]), "drop_path")
    done = last["epoch"] + 1
    seconds = duration(sum(record["seconds"] for record in run.times))
    finished = done == config.epochs
    parts = [
        paragraph(
            f"{done} of {config.epochs} epochs in {seconds}: training loss {last['train_loss']:.3f}, training accuracy "
            f"{last['train_accuracy']:.1%}, test error {1 - last['test_accuracy']:.2%}."
        ),
        figure(curves),
        heading("The cell"),
        cells_of(genotype, ""),
    ]
    if finished:
        words = ["evaluate", run.folder.path / "genotype.json", "--weights", run.folder.path / "weights.pt"]
        words += [*data_of(run), *options(config, EVALUATE_PRESETS[preset_of(run)])]
        words += ["--device", run.device] if run.device != pick_device("auto") else []
        parts += following(run, *words, *([] if run.fused else ["--kernels", "off"]))
    else:
        parts += resuming(run, "evaluate")
    parts += settings_of(run.description)
    run.folder.write("curves.svg", curves)
    run.folder.write("report.html", page(f"P-DARTS: an evaluation on {data}", finished, parts))
