"""Damaged, hostile and random input for tests, which leads to the right result or to one line of an error.

A failure names its case, which its number alone decides. PDARTS_FUZZ=10 tries ten times as many."""

import contextlib
import math
import os
import pathlib
import random
import warnings

from pdarts import InputError

FUZZ = int(os.environ.get("PDARTS_FUZZ", "1"))


def cases(count):
    """Return numbers of cases, each with its own random numbers."""
    return ((number, random.Random(number)) for number in range(count * FUZZ))


@contextlib.contextmanager
def case(*what):
    try:
        yield
    except Exception as error:
        raise AssertionError(f"case {what}: {type(error).__name__}: {error}") from error


def accepted(reader, *arguments):
    """Return the result of `reader`, or None where it refuses with a message that the command line prints in a line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # more lines
        try:
            return reader(*arguments)
        except (InputError, OSError) as error:
            assert 10 < len(str(error)) < 1000


def damaged(content: bytes, rng) -> bytes:
    """Return `content` with some bytes changed, cut off, left out, repeated or put in."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(content) + 1)
        end = min(start + rng.choice((1, 2, 16, 4096)), len(content))
        part, noise = content[start:end], rng.randbytes(end - start)
        new = [noise, noise, bytes([b ^ 1 << rng.randrange(8) for b in part]), b"", part * 2, noise + part, b"\xff" * 8]
        content[start:end] = rng.choice(new)
        if rng.random() < 0.1:
            del content[start:]
    return bytes(content)


NUMBERS = (-1, 0, 1, 2, 5, 6, 99, 2**31, -(2**63), 10**30, 0.5, -0.0, 1e308, math.inf, math.nan, True)
STRANGE = (*NUMBERS, None, "", "none", "skip_connect", "x" * 500, "\ud800", "normal", [], {}, [[]], ["none", 0])


def changed(value, rng):
    """Return JSON with a random value in place of another, or with parts left out, repeated or swapped."""
    if not isinstance(value, (list, dict)) or not value or rng.random() < 0.1:
        return rng.choice(STRANGE)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        new = value | {key: changed(value[key], rng)}
        return {k: v for k, v in new.items() if k != key} if rng.random() < 0.1 else new
    i, j = rng.randrange(len(value)), rng.randrange(len(value))
    new = [value[:i] + value[i + 1 :], value + value, value[:i] + value[j:], [*value[:i], value[j], *value[i + 1 :]]]
    return rng.choice([[*value[:i], changed(value[i], rng), *value[i + 1 :]]] * 8 + new)


class Exploit:
    """An object that creates the file `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)
