"""The folder of a run and its checkpoints, from which it resumes as if it had never been stopped."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import re
import socket
import warnings
import weakref
import zipfile

import torch

from harness.distributed import broadcast, processes
from harness.files import check_zip, is_temporary, lock, reason, some, write_whole
from harness.report.cells import draw
from pdarts import Genotype, InputError

LOCK = ".lock"
_held = weakref.WeakSet()  # the open lock files of this process


def _close_in_child():
    for file in list(_held):  # a process that loads images would hold the lock after the death of its run
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class Folder:
    """The folder that a run writes to; without a path nothing is written. Of several processes rank 0 writes.

    resume: the run in the folder, or a checkpoint of it, that resumes; otherwise the folder must be new or empty.
    """

    def __init__(self, path: str | os.PathLike | None, resume=None):
        self.path, self.resume = None if path is None else pathlib.Path(path), resume
        self.writes = path is not None and processes()[0] == 0
        if resume and not (self.path / "config.json").is_file():
            raise InputError(f"{self.path} holds no run; expected the folder of one, or --out for a new one")
        if self.path and not resume and self.path.exists() and (not self.path.is_dir() or self._files()):
            raise InputError(f"{self.path} already holds something; expected a new or empty folder")

    def _files(self):
        """Return the files of the folder without those of a run that was killed before it began."""
        return [path for path in self.path.iterdir() if path.name != LOCK and not is_temporary(path)]

    def write(self, name: str, content):
        """Write bytes, text, or anything else as JSON (`save` is for state dictionaries)."""
        if not self.writes:
            return
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content, indent=1) + "\n"
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content.encode() if isinstance(content, str) else content)

    def save(self, name: str, state, before: str | None = None):
        """Write a state by torch.save; the file that has the name now becomes the file `before`."""
        if self.writes:
            if before and (self.path / name).exists():
                self.write(before, (self.path / name).read_bytes())
            buffer = io.BytesIO()  # torch.save itself hides why a disk cannot be written
            torch.save(state, buffer)
            self.write(name, buffer.getvalue())

    def draw(self, genotype: Genotype, under: str = ""):
        for kind, svg in draw(genotype).items():
            self.write(f"{under}{kind}.svg", svg)


def folder_of(out, resume) -> pathlib.Path | None:
    """Return the folder that `out` or `resume` means, or None; `resume` may also be a checkpoint in the folder."""
    if out is not None and resume is not None:
        raise InputError(f"out is {str(out)!r} and resume is {str(resume)!r}; expected one of them")
    if resume is None:
        return out if out is None else pathlib.Path(out)
    path = pathlib.Path(resume)
    return path.parent if path.is_file() else path


@contextlib.contextmanager
def claimed(out, resume=None, numbered=False):
    """Yield the Folder of a run, which no other run can use until the block ends; an empty one is removed then.

    out, resume: see `folder_of`; a Folder, which the caller has claimed, is yielded as it is. numbered: `out` is a name
    that nobody chose, to which -2, -3, ... is added if it exists. Rank 0 claims the folder for all processes.
    """
    if isinstance(out, Folder):
        yield out
        return
    path, error = folder_of(out, resume), None
    with contextlib.ExitStack() as stack:
        if path is not None and processes()[0] == 0:
            try:
                path = stack.enter_context(_held_folder(path, resume, numbered))
            except (InputError, OSError) as refused:
                error = refused
        path, error = broadcast((path, error))
        if error:
            raise error
        yield Folder(path, resume)


@contextlib.contextmanager
def _held_folder(path: pathlib.Path, resume, numbered: bool):
    """Make and lock a folder and yield its path."""
    if not numbered and not (path / LOCK).exists():
        Folder(path, resume)  # is refused before anything is written
    made = []
    try:
        try:
            path, file = _locked_folder(path, numbered, made)
        except OSError as error:
            raise InputError(
                f"cannot write to {path} ({error.strerror}); expected a folder that can be written"
            ) from None
        with file:
            try:
                Folder(path, resume)
                for left in filter(is_temporary, path.rglob(".*")):  # by runs that were killed: no other writes here
                    left.unlink(missing_ok=True)
                yield path
            finally:
                (path / LOCK).unlink(missing_ok=True)
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _locked_folder(path: pathlib.Path, numbered: bool, made: list[pathlib.Path]):
    """Make a folder, add to `made` what is new, and return its path and its lock file, open and locked."""
    first, number, attempts = path, 1, 0
    while True:
        try:
            _make(path, made, numbered)
            file = open(path / LOCK, "a+", encoding="utf-8")
        except FileExistsError:
            if not numbered:
                raise
            number += 1
            path = first.with_name(f"{first.name}-{number}")
            continue
        except FileNotFoundError:  # another run has just removed its empty folder
            attempts += 1
            if attempts == 100:
                raise
            continue
        locked = lock(file, wait=False)
        if locked is False:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise InputError(f"{path} is in use by {holder}; expected a folder that no other run uses")
        if os.path.exists(path / LOCK) and os.path.samestat(os.fstat(file.fileno()), os.stat(path / LOCK)):
            break
        file.close()  # the run that held it has removed it
    if locked is None:
        why = "cannot be locked here: nothing keeps another run out of it"
        warnings.warn(f"{path} {why}", RuntimeWarning, stacklevel=2)
    _held.add(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return path, file


def _make(path: pathlib.Path, made: list[pathlib.Path], new: bool):
    """Make a folder and those above it; FileExistsError if it must be new and is not."""
    if not path.parent.is_dir():
        _make(path.parent, made, new=False)
    try:
        path.mkdir()
        made.append(path)
    except FileExistsError:
        if new or not path.is_dir():
            raise


class Checkpoints:
    """The last two checkpoints of a run in its folder. Of several processes rank 0 reads and writes.

    identity: everything that decides the result; a checkpoint with another identity is refused.
    """

    FORMAT = 3
    LAST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"

    def __init__(self, folder: Folder, identity: dict):
        self.folder, self.identity = folder, identity

    def save(self, state: dict):
        self.folder.save(self.LAST, {"format": self.FORMAT, "identity": self.identity, **state}, self.BEFORE)

    def load(self, resume) -> dict | None:
        """Return the last state in the folder `resume`, or that of the checkpoint `resume`; None if there is none."""
        path = pathlib.Path(resume)
        path = path if path.is_file() else path / self.LAST
        rank, number = processes()
        state = broadcast(self._read(path) if rank == 0 and path.exists() else None)
        if state is None:
            return None
        if state["step"] and len(state["meters"]) != number:
            raise InputError(
                f"{path} was written by {len(state['meters'])} processes in the middle of an epoch, here are {number}; "
                "expected as many"
            )
        if rank == 0 and path.name != self.LAST:  # else the next `save` would keep a damaged one
            self.folder.write(self.LAST, path.read_bytes())
        return state

    def _read(self, path: pathlib.Path) -> dict:
        try:
            check_zip(path, sums=True)
            state = torch.load(path, map_location="cpu", weights_only=True)
            version, identity = state["format"], state["identity"]
            if version == self.FORMAT:
                _check_state(state, identity["kind"] == "search")
        except Exception as error:  # whatever a damaged file leads to
            before = path.with_name(self.BEFORE)
            offer = f"; the one before it is whole: --resume {before}" if before.exists() and before != path else ""
            raise InputError(f"cannot read {path} ({reason(error)}); expected an undamaged checkpoint{offer}") from None
        if version != self.FORMAT:
            raise InputError(f"{path} has format {version}; expected {self.FORMAT}: another version wrote it")
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise InputError(
                    f"{path} is of another run: {name} is {identity.get(name)!r} there and {value!r} here; expected "
                    "the same settings and data"
                )
        return state


STATE = {"training": dict, "step": int, "meters": list, "log": list, "times": list}


def _check_state(state: dict, of_search: bool):
    """Raise ValueError if a state lacks a part, or holds a number that is not finite."""
    for name, kind in (STATE | {"test_accuracies": list} if of_search else STATE).items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"it holds no {name}")
    if type(state["training"].get("epoch")) is not int:
        raise ValueError("it holds no training.epoch")

    def check(value, where):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{where} is not finite")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} is {value}")
        if isinstance(value, (dict, list, tuple)):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                check(part, f"{where}.{key}")

    for name in STATE:
        check(state[name], name)


# Names that DataParallel, torch.compile, FSDP, AveragedModel and other projects' wrappers put into the keys of a
# state_dict, and the counters that AveragedModel and thop add to it.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model", "net", "network"}
COUNTERS = {"n_averaged", "total_ops", "total_params"}


def weights_in(content, keys: set[str]) -> dict:
    """Return the state_dict that a loaded file is or holds, with the keys of the network."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    found = {}
    for name, state in {None: content, **content}.items():
        if isinstance(state, dict):
            parts = [str(key).split(".") for key in state]
            renamed = [".".join(part for part in key if part not in WRAPPERS) for key in parts]
            weights = {new: value for new, key, value in zip(renamed, parts, state.values()) if key[-1] not in COUNTERS}
            if weights.keys() & keys:
                if len(weights) < sum(key[-1] not in COUNTERS for key in parts):
                    raise ValueError("keys that differ only in their prefixes")
                found[name] = weights
    if not found:
        raise ValueError(f"its keys are {some(list(map(str, content)))}, none of them the network's")
    if len(found) > 1:
        raise ValueError(f"it holds several: {', '.join(map(str, found))}")
    return next(iter(found.values()))


def load_weights(network, path, device):
    """Load a state_dict, with or without the auxiliary head; an InputError says what does not fit.

    It may have been saved by a wrapped network, and lie beside other things in a checkpoint, as the official one does.
    """
    try:
        if zipfile.is_zipfile(path):  # torch's format since 1.6
            check_zip(path, sums=True)  # torch does not compare them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd files, which are used or refused
            content = torch.load(path, map_location=device, weights_only=True)
        state = weights_in(content, set(network.state_dict()))
        if not any(key.startswith("auxiliary_head.") for key in state):
            network.auxiliary_head = None
        without_head = network.auxiliary_head is None
        state = {key: value for key, value in state.items() if not (without_head and key.startswith("auxiliary_head."))}
        wrong = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.is_complex()]
        if wrong:
            raise ValueError(f"{wrong[0]} is complex")
        network.load_state_dict(state)
    except Exception as error:  # whatever a damaged file leads to
        why = reason(error)
        if other := re.search(r"GLOBAL ([\w.]+)", str(error)):  # torch's own message is long, and no line
            why = f"it holds {other[1]}, where only tensors, numbers and texts are read"
        raise InputError(f"cannot use the weights {path} ({why}); expected a state_dict of this network") from None
