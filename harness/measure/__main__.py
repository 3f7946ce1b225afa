"""Measurements beside those of bench.py, of hours or of a GPU, and tests: `python -m harness.measure COMMAND`."""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch

from harness.devices import keep_freed_memory, pick_device
from harness.measure import elsewhere, gpu_report
from harness.measure import model as modelling
from harness.measure import traffic as counting
from harness.measure.claims import Claims
from harness.measure.options import Parser, add_command, run_command
from harness.measure.versions import VERSIONS, versions


def gpu(args):
    """All measurements of a GPU in half an hour, and checks of its results, as DIR/report.md and report.json.

    Each of the ten parts runs in a process of its own with a time limit, so that one that fails, hangs or crashes
    does not stop the others. `--parts 1 3` runs some only: the other parts that DIR holds stay in the report. Without
    a GPU the same command runs on the CPU, small, and names the parts that do not apply.
    """
    if not torch.cuda.is_available():  # else the processes of the parts use the GPU, and this one must not
        pick_device(args.device)
    args.batch = args.batch or (8 if args.device == "cpu" else 96)
    return gpu_report.report(args)


def traffic(args):
    """Launches and bytes of a step on CUDA, and the bytes that it saves for backward, counted on the CPU.

    The bytes at the rates of the memories of an H100 and an H200 are a floor of the time. See the head of
    harness/measure/traffic.py.
    """
    return counting.print_table(args)


def model(args):
    """The time of a step and of the paper's search on an H200, from launches, bytes and instructions: a model.

    Nothing is measured. See the head of harness/measure/model.py, and docs/PERFORMANCE.md.
    """
    return modelling.print_table(args)


def claims(args):
    """The paper's claims, measured: searches with and without their mechanisms, and the cells that these find.

    `--scale small` takes two CPU cores two hours, `--scale paper` has the paper's settings. A plan that is interrupted
    resumes by the same command, and several processes with the same command share its runs. See docs/CLAIMS.md.
    """
    try:
        return Claims(args.out, args.scale, args.seeds, args.data, args.device).run()
    except KeyboardInterrupt as stopped:
        print(f"claims: {str(stopped) or 'interrupted'}; the same command resumes", file=sys.stderr)
        return 130


def counters(args):
    """The multiply-adds of the P-DARTS network by nine tools, and what each of them counts for a layer.

    The tools are installed at pinned versions into DIR/environment, which a second call uses again. See
    docs/COUNTING.md.
    """
    from harness.measure.counters import COUNTERS

    elsewhere.measure(args, "counters", {"row": COUNTERS, "depthwise_row": ["FlopCounterMode"]})


def tools(args):
    """Networks in torch.compile, torch.export, ONNX and other tools, and how far their logits are from torch's.

    The tools are installed at pinned versions into DIR/environment, which a second call uses again; it takes 6 GB and
    the command an hour on two cores. `--run` names the folder of an evaluation, whose network is tried too. See
    docs/EXPORT.md.
    """
    from harness.measure.tools import TOOLS

    run = args.run_folder and str(pathlib.Path(args.run_folder).resolve())
    elsewhere.measure(args, "tools", {"rows": args.tools or TOOLS}, run)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m harness.measure", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    steps = "batch", "channels", "stages", "skip-dropout", "search", "networks"
    add_command(commands, gpu, "device", "out", "parts", "minutes", "seconds", "rounds", "official", *steps, seconds=2)
    commands.choices["gpu"].set_defaults(compile=True)
    add_command(commands, traffic, "json", "batch", "channels", "stages", "search", batch=96, device="cpu")
    model_parser = add_command(commands, model, "json", "batch", "channels", "stages", "search", batch=96, device="cpu")
    model_parser.add_argument("--sass", metavar="FILE", help="the SASS of the kernels, to count instructions in")
    claims_parser = add_command(commands, claims, "device", "out", "scale", "seeds")
    claims_parser.add_argument("--data", metavar="DIR", required=True, help="the folder of CIFAR-10")
    versions_parser = add_command(commands, versions, "out")
    versions_parser.add_argument("--torch", nargs="+", default=VERSIONS, metavar="VERSION",
                                 help=f"(default: {' '.join(VERSIONS)})")  # fmt: skip
    versions_parser.add_argument("--python", default=sys.executable, metavar="FILE", help="(default: this Python)")
    versions_parser.add_argument("--tests", nargs=argparse.REMAINDER, default=(), help="arguments of pytest, the last")
    for command in add_command(commands, counters, "out"), add_command(commands, tools, "out"):
        command.add_argument("--python", default=sys.executable, metavar="FILE", help="(default: this Python)")
    command.add_argument("--run", dest="run_folder", default="", metavar="RUN", help="folder of an evaluation")
    command.add_argument("--tools", nargs="+", metavar="NAME", help="rows of the table (default: all)")
    result = run_command(parser, arguments)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    keep_freed_memory()
    raise SystemExit(main(sys.argv[1:]))
