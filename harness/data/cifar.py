"""CIFAR-10 and CIFAR-100 as they are published: both file formats, and the download."""

from __future__ import annotations

import hashlib
import http.client
import io
import pathlib
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
from typing import NamedTuple

import numpy as np

from harness.files import reason
from pdarts import InputError


class CifarFormat(NamedTuple):
    """The address and the files of a CIFAR data set."""

    url: str
    md5: str
    binary: str  # folder of the binary version
    python: str  # folder of the python version
    train: tuple[str, ...]  # files, without the binary version's ending
    test: tuple[str, ...]
    label_bytes: int  # before each image of the binary version; the last of them is the class
    label_key: bytes  # of the python version
    classes: int
    names: tuple[str, ...]  # of the classes
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def version_in(self, folder: pathlib.Path) -> str | None:
        """Return the name of the folder of a version in `folder`, the binary one if there are both."""
        return next((name for name in (self.binary, self.python) if (folder / name).is_dir()), None)


CIFAR = {
    "cifar10": CifarFormat(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        binary="cifar-10-batches-bin",
        python="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        label_bytes=1,
        label_key=b"labels",
        classes=10,
        names=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
        mean=(0.49139968, 0.48215827, 0.44653124),
        std=(0.24703233, 0.24348505, 0.26158768),
    ),
    "cifar100": CifarFormat(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        binary="cifar-100-binary",
        python="cifar-100-python",
        train=("train",),
        test=("test",),
        label_bytes=2,  # coarse, fine
        label_key=b"fine_labels",
        classes=100,
        names=tuple(
            "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
            "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
            "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
            "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid "
            "otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray "
            "road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
            "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle "
            "wardrobe whale willow_tree wolf woman worm".split()
        ),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
}


class PickledArray:
    """A stand-in for numpy.ndarray while unpickling, which takes the state and runs nothing."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran_order, self.data = state

    def read(self) -> np.ndarray:
        if self.dtype.name != "u1" or self.fortran_order or not isinstance(self.data, bytes):
            raise ValueError("an array that is not uint8 in C order")
        return np.frombuffer(self.data, np.uint8).reshape(self.shape)


class PickledDtype:
    """A stand-in for numpy.dtype."""

    def __init__(self, name, *_):
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state):
        pass


# Python's own unpickler: the one in C allocates whatever sizes a damaged file claims.
class CifarUnpickler(pickle._Unpickler):
    """An unpickler that knows stand-ins for an array in a CIFAR file and refuses every other name."""

    ALLOWED = {"_reconstruct": lambda *_: PickledArray(), "ndarray": PickledArray, "dtype": PickledDtype}

    def refuse(self):
        raise ValueError("a part that no such file has")

    # The hash of a small tuple of tuples of tuples ... can take for ever: only text may be a key.

    def check_keys(self, keys):
        if not all(isinstance(key, (bytes, str)) for key in keys):
            raise ValueError("a key that is not text")

    def load_setitem(self):
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        self.check_keys(self.stack[::2])
        super().load_setitems()

    dispatch = pickle._Unpickler.dispatch | {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
    dispatch |= dict.fromkeys(pickle.BYTEARRAY8 + pickle.DICT + pickle.FROZENSET + pickle.ADDITEMS, refuse)

    def find_class(self, module, name):
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in self.ALLOWED:
            raise ValueError(f"it holds {module}.{name}")
        return self.ALLOWED[name]


def read_file(path: pathlib.Path, form: CifarFormat, binary: bool):
    """Return the images of a file, uint8 [N,3,32,32], and their labels [N]."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; expected the files {', '.join(form.train + form.test)}") from None
    if binary:
        row = form.label_bytes + 3072
        if not content or len(content) % row:
            raise InputError(f"{path} has {len(content)} bytes; expected a multiple of {row}, one row per image")
        rows = np.frombuffer(content, np.uint8).reshape(-1, row)
        x, y = rows[:, form.label_bytes :], rows[:, form.label_bytes - 1]
    else:
        try:
            entries = CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
            x, labels = entries[b"data"].read(), entries[form.label_key]
            if not isinstance(labels, list) or any(type(label) is not int for label in labels):
                raise ValueError("labels that are not whole numbers")
            y = np.array(labels, np.int64)
            if x.shape != (len(y), 3072) or not len(y):
                raise ValueError(f"data {list(x.shape)} for {len(y)} labels")
        except Exception as error:  # whatever a damaged or hostile pickle leads to
            raise InputError(
                f"{path} is not a CIFAR pickle ({reason(error)}); expected uint8 data [N,3072] and "
                f"{form.label_key.decode()}") from None
    if y.min() < 0 or y.max() >= form.classes:
        raise InputError(f"{path} holds labels from {y.min()} to {y.max()}; expected 0 to {form.classes - 1}")
    return x.reshape(-1, 3, 32, 32), y


def read_cifar(name: str, folder: pathlib.Path) -> list[np.ndarray]:
    """Return x_train, y_train, x_test, y_test of "cifar10" or "cifar100" in `folder`, in the binary or python version:
    images [N,32,32,3] uint8 and labels [N]."""
    form = CIFAR[name]
    version = form.version_in(folder)
    if version is None:
        raise InputError(
            f"no {name} in {folder}; expected a folder {form.binary} or {form.python} there (--download fetches it)")
    binary, arrays = version == form.binary, []
    for files in form.train, form.test:
        parts = [read_file(folder / version / (f"{file}.bin" if binary else file), form, binary) for file in files]
        x, y = map(np.concatenate, zip(*parts))
        arrays += [x.transpose(0, 2, 3, 1), y]
    return arrays


def download_cifar(name: str, folder: pathlib.Path, form: CifarFormat | None = None):
    """Fetch the binary version into `folder`, unless it is there. Either all of it arrives there or nothing."""
    form = form or CIFAR[name]
    if (folder / form.binary).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        archive, unpacked = pathlib.Path(temporary, "archive"), pathlib.Path(temporary, form.binary)
        try:
            with urllib.request.urlopen(form.url, timeout=60) as response, open(archive, "wb") as file:
                shutil.copyfileobj(response, file)
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"cannot fetch {form.url}: {error}; the archive can be unpacked into {folder} by hand") from None
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        if md5 != form.md5:
            raise InputError(f"{form.url} has MD5 {md5}; expected {form.md5}")
        unpacked.mkdir()
        try:
            with tarfile.open(archive) as tar:
                # Only the files asked for, read by name and written by us: no links, no paths that lead elsewhere.
                for file in form.train + form.test:
                    member = tar.getmember(f"{form.binary}/{file}.bin")
                    if not member.isreg() or member.issparse():
                        raise ValueError(f"{member.name} is not a file")
                    with tar.extractfile(member) as source, open(unpacked / f"{file}.bin", "wb") as target:
                        shutil.copyfileobj(source, target)
        except Exception as error:  # whatever a damaged archive leads to
            raise InputError(f"cannot unpack {form.url} ({reason(error)}); expected the published archive") from None
        try:
            unpacked.rename(folder / form.binary)
        except OSError:
            if not (folder / form.binary).exists():  # else another process was faster
                raise
