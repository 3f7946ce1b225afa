"""Files that are written whole or not at all, and what a message says of damaged ones."""

from __future__ import annotations

import contextlib
import os
import pathlib
import reprlib
import zipfile

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None


def short(value) -> str:
    """What a message shows of any value, however long or deeply nested."""
    return f"{reprlib.repr(value):.80}"


def reason(error: Exception) -> str:
    """What a message says of an error that a damaged file led to."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


def check_zip(path, sums=False):
    """ValueError for a zip that unpacks to far more than it is, as no images or weights do; `sums`: or is damaged."""
    with zipfile.ZipFile(path) as archive:
        size, unpacked = os.path.getsize(path), sum(part.file_size for part in archive.infolist())
        if unpacked > 10**7 + 100 * size:
            raise ValueError(f"{size} bytes that unpack to {unpacked}")
        if sums and (damaged := archive.testzip()):
            raise ValueError(f"{damaged} is damaged")


def write_whole(path: pathlib.Path, content: bytes):
    """The file appears, or takes the place of an older one, with all of its content or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = True):
    """Holds the lock of a file against other processes; True, or False where another holds it and `wait` is False."""
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
