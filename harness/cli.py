"""The command line: search, evaluate, draw, predict, export, cell."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shlex
import sys
import time

import torch

from harness.checkpoint import Folder, claimed
from harness.data.images import Images, load
from harness.devices import keep_freed_memory
from harness.distributed import environment_number, process_group, processes
from harness.evaluate import evaluate
from harness.export import FORMS, export
from harness.files import short, write_whole
from harness.predict import predict
from harness.progress import duration, reading
from harness.report import forms
from harness.report.cells import MAX_NODES, PUBLISHED, cell_table, draw, read_genotype
from harness.report.report import data_options
from harness.run import Stopped
from harness.search import search
from harness.settings import EVALUATE_PRESETS, FITS_IMAGES, SEARCH_PRESETS, options, unread
from pdarts import OPERATIONS, SPACE, InputError, SearchSpace

HELP = {  # more than pdarts.py says of its settings
    "stem": "cifar: a 3x3 convolution; imagenet: three of stride 2 (paper)",
    "stem_stride": "stride of the cifar stem; 2 or more for large images (official: 1)",
    "cutout": "side of the square cut out, at most half the image's side (paper, evaluation)",
}
DATA_OPTIONS = ("skip_damaged", "follow_links", "cache")  # how a folder of images is loaded, besides the settings
GENOTYPE = (
    f"{', '.join(PUBLISHED)}, a genotype.json, or \"Genotype(normal=[...], ...)\", as a text or in a file, or a cell "
    "of NNI, nasbench301 or AutoDL"
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _add_options(parser, presets):
    """Add the options of a run, and one for every field of the presets' dataclass."""
    parser.add_argument("--preset", choices=presets, help="where the settings come from (default: demo)")
    parser.add_argument(
        "--data",
        type=_path,
        metavar="PATH",
        help="an .npz file, the folder that holds CIFAR's folder, or one with images in train/CLASS and val/CLASS",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch CIFAR into PATH (default: data) if it is not there"
    )
    parser.add_argument(
        "--out", type=_path, metavar="DIR", help="new folder for the results (default: runs/ and the time)"
    )
    parser.add_argument(
        "--resume", type=_path, metavar="DIR", help="the folder of a run that ended early, which resumes"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--kernels",
        metavar="MODE",
        help="the fused kernels: on, off, auto (if they can be built) or, on CUDA, those of some operations, such as "
        '"mixed cell" (default: PDARTS_KERNELS, else auto, and PDARTS_CUDA_OPERATIONS)',
    )
    parser.add_argument(
        "--graphs",
        choices=("auto", "off"),
        default="auto",
        help="auto: a GPU replays whole steps as CUDA graphs, but for --unrolled and several GPUs (default: auto)",
    )
    folder = parser.add_argument_group("folders of images")
    folder.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: the cores of each process)"
    )
    folder.add_argument("--skip-damaged", action="store_true", help="leave out the images that cannot be read")
    folder.add_argument(
        "--follow-links", action="store_true", help="take the images to which links out of PATH lead"
    )
    folder.add_argument("--cache", type=_path, metavar="DIR", help="for resized images (default: in PATH)")
    settings = parser.add_argument_group("settings", "the value in brackets is the demo's, then CIFAR-10's")
    for field in dataclasses.fields(presets["demo"]):
        if field.name == "dataset":
            continue  # the preset's, or that of --data
        demo, paper = (getattr(presets[name], field.name) for name in ("demo", "cifar10"))
        flag = f"--{field.name.replace('_', '-')}"
        about = HELP.get(field.name, field.metadata["help"])
        keywords = {
            "default": argparse.SUPPRESS,
            "help": f"{about} [{_text(demo)}; {_text(paper)}]".replace("%", "%%"),
        }
        if isinstance(demo, bool):
            settings.add_argument(flag, action=argparse.BooleanOptionalAction, **keywords)
        elif field.metadata["choices"]:
            settings.add_argument(flag, choices=field.metadata["choices"], **keywords)
        elif isinstance(demo, tuple):
            settings.add_argument(flag, type=type(paper[0]), nargs="+", metavar="X", **keywords)
        else:
            settings.add_argument(flag, type=type(demo), metavar="X", **keywords)


def _path(text):
    if not text:  # such as "$DIR" of a variable that is not set
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return text


def _text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _configure(args, presets, folder):
    """Return settings, images and a text about these; the run that is resumed decides where the options do not."""
    settings = presets[args.preset or "demo"]
    if folder.resume and not args.preset:
        file = folder.path / "config.json"
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved["settings"].items()}
            if others := sorted(values.keys() - {field.name for field in dataclasses.fields(settings)}):
                raise ValueError(f"another version wrote it: it sets {', '.join(others)}")
            settings, args.data = type(settings)(**values), args.data or saved["path"]
            kernels = {"fused": "on", "plain": "off"}[saved["kernels"]]
            args.kernels = args.kernels or os.environ.get("PDARTS_KERNELS") or kernels
            if "space" in saved:
                args.space = _space(**saved["space"])
            if not isinstance(args.data, str | None):
                raise ValueError(f"path is {short(args.data)}")
            for name, value in saved.get("options", {}).items():
                if name not in DATA_OPTIONS or not isinstance(value, str | bool):
                    raise ValueError(f"options has {short(name)}: {short(value)}")
                setattr(args, name, getattr(args, name) or value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"cannot read {file} ({error}); expected the settings of a {args.command}") from None
        args.preset = settings.dataset if settings.dataset in presets else None
    args.preset = args.preset or "demo"
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(settings) if hasattr(args, f.name)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = dataclasses.replace(settings, **given)
    for name in given.keys() & unread(settings).keys():
        raise InputError(f"--{name.replace('_', '-')} is not read with {unread(settings)[name]}; expected one of them")
    if args.workers is not None and not 0 <= args.workers <= 1000:
        raise InputError(f"workers is {args.workers}; expected 0 to 1000")
    cores = (os.cpu_count() or 1) // environment_number("LOCAL_WORLD_SIZE", 1, least=1)
    workers = args.workers if args.workers is not None else min(cores, 16) if cores > 1 else 0
    ways = {name: getattr(args, name) for name in DATA_OPTIONS} | {"progress": reading()}
    images = load(settings, args.data, args.download, workers, **ways)
    if isinstance(images, Images) and images.version is None:  # not of a folder
        for name in ("size", *DATA_OPTIONS, "workers"):
            value = getattr(args, name, None)
            if value is not None and value is not False:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} is only for a folder of images, not for {images.name}; expected no {flag}")
    chosen = {name: getattr(args, name) for name in DATA_OPTIONS if getattr(args, name)}
    chosen |= {"cache": os.path.abspath(args.cache)} if args.cache else {}
    images = dataclasses.replace(images, options=chosen)
    used, all_images = images.first(settings.images), len(images)
    some = f"{len(used)} of " if len(used) < all_images else ""
    without = f", without {images.damaged} damaged file{'s' * (images.damaged > 1)}" if images.damaged else ""
    return settings, used, f"{some}{all_images} images of {images.name}{without}{images.note and f' ({images.note})'}"


def _space(primitives=SPACE.primitives, nodes=SPACE.nodes) -> SearchSpace:
    if type(nodes) is not int or nodes > MAX_NODES:
        raise InputError(f"nodes is {short(nodes)}; expected at most {MAX_NODES}")
    if not all(isinstance(name, str) for name in primitives):
        raise InputError(f"primitives are {short(primitives)}; expected names of operations")
    return SearchSpace(tuple(primitives), nodes)


def _say(*text):
    """Print the text; of several processes only rank 0 does."""
    if processes()[0] == 0:
        print(*text, flush=True)


def _ways(args):
    names = "device", "kernels"
    return {"graphs": args.graphs == "auto", "show": True} | {name: getattr(args, name) for name in names}


def _search(args, folder):
    settings, images, which = _configure(args, SEARCH_PRESETS, folder)
    out = folder.path
    space = _space(args.primitives or args.space.primitives, args.space.nodes if args.nodes is None else args.nodes)
    started = time.monotonic()
    _say(
        f"preset {args.preset}: searching on {which}, {len(settings.depths)} stages of {_text(settings.depths)} cells "
        f"and {settings.epochs} epochs; results in {out}"
    )
    result = search(settings, images, folder, space=space, **_ways(args))
    _say(f"\nThe cell, after {duration(time.monotonic() - started)}:\n\n{cell_table(result.genotype)}")
    _say(f"\n{result.genotype}\n")
    _say(f"written: {out / 'genotype.json'}, report.html, normal.svg, reduce.svg, log.jsonl, stages/")
    following = ["python", sys.argv[0], "evaluate", str(out / "genotype.json")]
    following += data_options(args.preset, args.data, images.options)
    _say("next:   ", shlex.join(following + options(settings, SEARCH_PRESETS[args.preset], FITS_IMAGES)))


def _evaluate(args, folder):
    out = folder.path
    if args.genotype is None and not folder.resume:
        raise InputError("the following arguments are required: genotype (see pdarts.py evaluate --help)")
    genotype = read_genotype(args.genotype or str(out / "genotype.json"))
    if args.weights and not pathlib.Path(args.weights).is_file():
        raise InputError(f"no weights {args.weights}; expected a file that an evaluation wrote")
    settings, images, which = _configure(args, EVALUATE_PRESETS, folder)
    if not args.weights:
        _say(
            f"preset {args.preset}: training on {which}, {settings.depth} cells, {settings.channels} channels, "
            f"{settings.epochs} epochs; results in {out}"
        )
    _say(f"genotype:      {genotype}")
    result = evaluate(genotype, settings, images, folder, weights=args.weights, **_ways(args))
    _say(f"parameters:    {result.parameters / 1e6:.3f} M")
    _say(f"multiply-adds: {result.multiply_adds / 1e6:.1f} M, of convolutions and the classifier")
    top5 = f" (top-1), {result.test_error_top5:.2%} (top-5)" if images.num_classes > 10 else ""
    _say(f"test error:    {result.test_error:.2%}{top5}")
    if not args.weights:
        _say(f"written:       {out / 'weights.pt'}, report.html")


def _draw(args, _):
    genotype = read_genotype(args.genotype)
    stem = "cell" if "Genotype(" in args.genotype else pathlib.Path(args.genotype).stem
    prefix = args.output if args.output is not None else f"{stem}-"
    folder = pathlib.Path(f"{prefix}x").parent
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; expected one that exists")
    for kind, svg in draw(genotype).items():
        path = pathlib.Path(f"{prefix}{kind}.svg")
        write_whole(path, svg.encode())
        print(path)


def _cell(args, _):
    print(forms.write(read_genotype(args.genotype), getattr(args, "as")))


def _predict(args, _):
    for line in predict(args.folder, args.images, args.device):
        print(line, flush=True)


def _export(args, _):
    print(export(args.folder, args.to, args.data))


def _parser():
    parser = _Parser(prog="pdarts.py", description="Progressive Differentiable Architecture Search", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    command = commands.add_parser("search", help="search a cell", allow_abbrev=False)
    _add_options(command, SEARCH_PRESETS)
    space = command.add_argument_group("search space", "--keep starts with the number of primitives")
    names = f"candidates of an edge, some of {', '.join(OPERATIONS)} (default: the first {len(SPACE.primitives)})"
    space.add_argument("--primitives", nargs="+", metavar="NAME", help=names)
    space.add_argument("--nodes", type=int, metavar="N", help=f"nodes of a cell (default: {SPACE.nodes})")
    command.set_defaults(run=_search, space=SPACE)
    command = commands.add_parser("evaluate", help="train and test the network of a cell", allow_abbrev=False)
    command.add_argument("genotype", nargs="?", help=GENOTYPE)
    _add_options(command, EVALUATE_PRESETS)
    command.add_argument("--weights", type=_path, metavar="FILE", help="only test the network with these weights")
    command.set_defaults(run=_evaluate)
    command = commands.add_parser("draw", help="draw a cell as SVG", allow_abbrev=False)
    command.add_argument("genotype", help=GENOTYPE)
    command.add_argument(
        "-o", "--output", metavar="PREFIX", help="PREFIXnormal.svg and PREFIXreduce.svg (default: NAME-)"
    )
    command.set_defaults(run=_draw)
    command = commands.add_parser("cell", help="print a cell in the form of another project", allow_abbrev=False)
    command.add_argument("genotype", help=GENOTYPE)
    command.add_argument("--as", choices=forms.WRITTEN, default="python", help="(default: python)")
    command.set_defaults(run=_cell)
    command = commands.add_parser("predict", help="name the classes of images", allow_abbrev=False)
    command.add_argument("folder", type=_path, metavar="RUN", help="the folder of an evaluation")
    command.add_argument("images", type=_path, nargs="+", metavar="IMAGE", help="files, and folders of them")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    command.set_defaults(run=_predict)
    command = commands.add_parser("export", help="write the trained network for other programs", allow_abbrev=False)
    command.add_argument("folder", type=_path, metavar="RUN", help="the folder of an evaluation")
    command.add_argument(
        "--to", type=_path, required=True, metavar="FILE", help=f"a new file that ends in {', '.join(FORMS)}"
    )
    command.add_argument(
        "--data", type=_path, metavar="PATH", help="with the test images, which check it (default: the run's)"
    )
    command.set_defaults(run=_export)
    return parser


def _complain(text: str, resuming: str = ""):
    """Print a line on stderr in one piece: other processes print there too."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"pdarts.py: {' '.join(text.split())}{resuming}\n")
        sys.stderr.flush()


def _flush(stream):
    try:
        stream.flush()
    except OSError:  # Python would complain at its end again
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _folder(args):
    """Return a block with the folder of the run; processes that torchrun started again resume the run in it."""
    if getattr(args, "weights", None):
        if args.out or args.resume:
            raise InputError("--weights only tests; expected no --out or --resume beside it")
        return claimed(None)
    restarted = environment_number("TORCHELASTIC_RESTART_COUNT", 0) > 0
    if restarted and args.out and (pathlib.Path(args.out) / "config.json").is_file():
        args.out, args.resume = None, args.out
    default = pathlib.Path("runs", f"{args.command}-{time.strftime('%Y%m%d-%H%M%S')}")
    numbered = args.out is None and args.resume is None
    return claimed(default if numbered else args.out, args.resume, numbered)


def _how_to_resume(arguments, folder) -> str:
    """Return the command that resumes the run, if it has begun: the same with --resume in the place of --out."""
    if folder.path is None or not (folder.path / "config.json").is_file():
        return ""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--resume")
    _, others = parser.parse_known_args(arguments)
    _, number = processes()
    start = ["python"] if number == 1 else ["torchrun", f"--nproc-per-node={number}"]
    if number > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(number):
        start = []  # several machines: their torchrun as before
    return "; to resume: " + shlex.join([*start, sys.argv[0], *others, "--resume", str(folder.path)])


def command(arguments: list[str]) -> int:
    """Run a command and return the exit status."""
    folder = Folder(None)
    try:
        parser = _parser()
        args = parser.parse_args(arguments)
        if [] in vars(args).values():  # "--seed=--", which Python before 3.13 takes for no value
            parser.error("expected a value, got --")
        if args.command in ("draw", "cell", "predict", "export"):
            args.run(args, None)
        else:
            if getattr(args, "deterministic", False):  # before the first product of the process, see `deterministic`
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            with process_group(args.device) as args.device, _folder(args) as folder:
                args.run(args, folder)
    except InputError as error:
        _complain(f"error: {error}")
        return 2
    except OSError as error:
        printed = error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)
        where = "stdout cannot be written: " if printed else ""
        _complain(f"error: {where}{error}", _how_to_resume(arguments, folder))
        return 2
    except Warning as error:  # of Python that makes errors of them
        _complain(f"error: {error}; expected no -W error or PYTHONWARNINGS=error to go on")
        return 2
    except Stopped as stopped:
        if processes()[0] == 0:
            _complain(str(stopped), _how_to_resume(arguments, folder))
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "you tried to allocate" in reason:
            _complain(f"error: out of memory; {reason}")
            return 2
        if "DataLoader worker" in reason and re.search("No space left|shared memory|killed|exited", str(error)):
            last = str(error).strip().splitlines()[-1]
            _complain(
                f"error: a process that loads images ended ({last:.200}); expected --workers 0, or more shared memory, "
                "as of docker run --shm-size 8g",
                _how_to_resume([*arguments, "--workers", "0"], folder),
            )
            return 2
        if processes()[1] == 1:
            raise
        resuming = _how_to_resume(arguments, folder)
        _complain(f"error: process {processes()[0]} cannot continue ({reason})", resuming)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command of the process and return the exit status."""
    keep_freed_memory()
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:  # it is closed: files of the run would get its number
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be Unicode
    try:
        status = command(sys.argv[1:] if arguments is None else arguments)
    finally:
        _flush(sys.stdout)
        _flush(sys.stderr)
    if "LOCAL_RANK" in os.environ:  # torch's threads of a process group outlive it, and abort or block Python's own end
        os._exit(status)
    return status
