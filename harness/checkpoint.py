"""The folder of a run and its checkpoints, from which it resumes as if it had never been stopped."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import warnings
import zipfile

import torch

from harness.distributed import broadcast, processes
from harness.files import check_zip, reason, some, write_whole
from harness.report.cells import draw
from pdarts import Genotype, InputError


class Folder:
    """The folder that a run writes to; the first `write` makes it. Without a path nothing is written.

    resume: the folder holds a run already; otherwise it must be new or empty.
    """

    def __init__(self, path: str | os.PathLike | None, resume=False):
        self.path = None if path is None else pathlib.Path(path)
        if resume and not (self.path / "config.json").is_file():
            raise InputError(f"{self.path} holds no run; expected the folder of one, or --out for a new one")
        if self.path and not resume and self.path.exists() and (not self.path.is_dir() or self._files()):
            raise InputError(f"{self.path} already holds something; expected a new or empty folder")

    def _files(self):
        return {path.name for path in self.path.iterdir()} - {".config.json.tmp"}  # a run was killed before it began

    def write(self, name: str, content):
        """Write bytes, text, or anything else as JSON (`save` is for state dictionaries)."""
        if self.path is None:
            return
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content, indent=1) + "\n"
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content.encode() if isinstance(content, str) else content)

    def save(self, name: str, state, before: str | None = None):
        """Write a state by torch.save; the file that has the name now becomes the file `before`."""
        if self.path is not None:
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
