"""The commands and options of bench.py and of `python -m harness.measure`."""

from __future__ import annotations

import argparse
import inspect
import json
import pathlib
import shlex

import torch

from harness.devices import pick_device
from harness.measure.timing import header
from pdarts import InputError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose --help keeps the lines of the description."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def at_least(least: int):
    """Return the type of an option: a whole number, `least` or more."""

    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, {least} or more")
        return int(text)

    return number


def positive(text):
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected more than 0")
    return number


def dropout_rate(text):
    rate = float(text)
    if not 0 <= rate < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a rate from 0 to less than 1")
    return rate


class Rates(argparse.Action):
    """One rate for all stages, or one for each."""

    def __call__(self, parser, namespace, values, option=None):
        if len(values) not in (1, 3):
            raise argparse.ArgumentError(self, f"{len(values)} rates; expected one rate or three")
        setattr(namespace, self.dest, tuple(3 * values if len(values) == 1 else values))


def network_size(text):
    """'36x20' -> (36, 20)"""
    channels, _, cells = text.partition("x")
    # With 3 cells the official auxiliary head would change, in place, the input of the classifier.
    if not (channels.isdecimal() and cells.isdecimal() and int(channels) >= 1 and int(cells) >= 4):
        raise argparse.ArgumentTypeError(f"{text!r}; expected CxCELLS, such as 36x20, with 4 cells or more")
    return int(channels), int(cells)


OPTIONS = {
    "device": {"default": "cuda" if torch.cuda.is_available() else "cpu", "help": "(default: %(default)s)"},
    "dtype": {"default": "float32", "choices": ("float32", "bfloat16"), "help": "(default: %(default)s)"},
    "json": {"metavar": "FILE", "help": "write the rows to this file too"},
    "seconds": {"type": positive, "default": 10, "metavar": "S", "help": "time for each row (default: %(default)s)"},
    "batch": {"type": at_least(2), "metavar": "N", "help": "images per step (default: 96, on the CPU fewer)"},
    "channels": {"type": at_least(1), "default": 16, "metavar": "C", "help": "of the first cell (default: 16)"},
    "networks": {"type": network_size, "nargs": "+", "default": ((16, 8), (36, 20)), "metavar": "CxCELLS",
                 "help": "C and cells of each network (default: 16x8 36x20)"},
    "stages": {"type": int, "nargs": "+", "default": (1, 2, 3), "choices": (1, 2, 3), "metavar": "N",
               "help": "(default: all)"},
    "search": {"type": at_least(1), "default": 1, "metavar": "N",
               "help": "search of testdata/derive.json that the candidates of stages 2 and 3 are of (default: 1)"},
    "skip-dropout": {"type": dropout_rate, "nargs": "+", "action": Rates, "metavar": "R",
                     "help": "initial rates, one for all stages or one for each; 0 switches the dropout off"},
    "rounds": {"type": at_least(2), "default": 3, "metavar": "N", "help": "measurements at least (default: 3)"},
    "official": {"metavar": "DIR", "help": "a checkout of github.com/chenxin061/pdarts, to measure too"},
    "channels-last": {"action": "store_true", "help": "the memory format of all tensors"},
    "no-compile": {"dest": "compile", "action": "store_false", "help": "leave torch.compile out"},
    "no-graphs": {"dest": "graphs", "action": "store_false", "help": "no CUDA graphs"},
    "steps": {"type": at_least(1), "default": 50, "metavar": "N", "help": "steps of the weights (default: 50)"},
    "data": {"metavar": "DIR", "help": "the folder of CIFAR-10 (default: generated images)"},
    "out": {"metavar": "DIR", "required": True, "help": "folder of the results; resumes from those that it holds"},
    "minutes": {"type": positive, "default": 30, "metavar": "M", "help": "time for all parts together (default: 30)"},
    "parts": {"type": int, "nargs": "+", "default": range(1, 11), "choices": range(1, 11), "metavar": "N",
              "help": "(default: all)"},
    "scale": {"default": "small", "choices": ("small", "paper"), "help": "sizes (default: small)"},
    "seeds": {"type": at_least(1), "default": 3, "metavar": "N", "help": "searches of each kind (default: 3)"},
}  # fmt: skip


def add_command(commands, run, *options, **defaults):
    """Add the command `run`, a function of the options, by its name; its docstring is the description."""
    text = inspect.cleandoc(run.__doc__)
    parser = commands.add_parser(run.__name__, help=text.partition("\n")[0], description=text)
    for name in options:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    parser.set_defaults(run=run, **defaults)
    return parser


def run_command(parser: Parser, arguments: list[str]):
    """Run the command of the arguments, write its rows to the file of --json, if there is one, and return them."""
    args = parser.parse_args(arguments)
    args.command = shlex.join([*parser.prog.split(), *arguments])
    try:
        rows = args.run(args)
    except InputError as error:
        parser.error(str(error))
    if getattr(args, "json", None):
        head = dict(zip(("device", "versions"), header(pick_device(args.device))))
        text = json.dumps({**head, "command": args.command, "rows": rows}, indent=1)
        pathlib.Path(args.json).write_text(text + "\n")
    return rows
