"""Files that are written whole or not at all, locks, and texts about damaged files."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import reprlib
import secrets
import sys
import zipfile

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None


def short(value) -> str:
    """Return a short text of any value for a message, however long or deeply nested the value is."""
    return f"{reprlib.repr(value):.80}"


def reason(error: Exception) -> str:
    """Return a short text of an error that a damaged file led to."""
    text = " ".join(re.sub("\x1b\\[[0-9;]*m", "", str(error)).split())  # without colours
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


def shown(text: str) -> str:
    """Return a name as messages and lists show it: in one line, even if the name has several."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def some(names: list[str]) -> str:
    """Return the first three names."""
    return ", ".join(f"{shown(name):.80}" for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else "")


def free_memory() -> int:
    """Return the bytes of main memory that are free, or all bytes where only their number is known."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return min(free, free_in_groups(pathlib.Path("/proc/self/cgroup").read_text()))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize


def free_in_groups(groups: str, root="/sys/fs/cgroup") -> int:
    """Return the bytes that the limit of a container or of a job leaves; groups: the content of /proc/self/cgroup."""
    free = sys.maxsize
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        version_1 = "memory" in controllers.split(",")
        names = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
        for folder in f"{root}{'/memory' * version_1}{path}", f"{root}{'/memory' * version_1}":  # of it, of a container
            with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or no limit: "max"
                limit, used = (int(pathlib.Path(folder, f"memory.{name}").read_text()) for name in names)
                parts = dict(part.split() for part in pathlib.Path(folder, "memory.stat").read_text().splitlines())
                cached = int(parts["inactive_file"]) + int(parts["active_file"])  # which makes room when asked to
                free = min(free, max(limit - used + cached, 0))
    return free


def check_zip(path, sums=False):
    """Raise ValueError for a zip that unpacks to more than there is memory, or, with `sums`, is damaged."""
    with zipfile.ZipFile(path) as archive:
        unpacked, free = sum(part.file_size for part in archive.infolist()), free_memory()
        if unpacked > 0.7 * free:  # reading takes 1.3 times as much
            raise ValueError(f"it unpacks to {unpacked} bytes, and {free} are free in memory")
        if sums and (damaged := archive.testzip()):
            raise ValueError(f"{damaged} is damaged")


def write_whole(path: pathlib.Path, content: bytes, check=None):
    """Write a file with all of its content or not at all; it takes the place of an older one.

    check: a function of the temporary file, which raises an error if the file must not get its name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # of this process alone
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(temporary)
        os.replace(temporary, path)
    except OSError as error:  # a full disk's names no file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: pathlib.Path) -> bool:
    """Return whether `write_whole` was killed before it could rename this file."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name) is not None


def lock(file, wait: bool) -> bool | None:
    """Lock an open file until it is closed: True; False if another process holds it; None where nothing can be locked,
    as on Windows and on some network file systems."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None
    return True


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = True):
    """Hold the lock of a file; yield True, or False if another process holds it and `wait` is False."""
    with open(path, "ab") as file:
        yield lock(file, wait) is not False
