"""What all tests of the harness share."""

import os
import resource
import signal
import sys

import pytest
import torch

from harness.fuzz import FUZZ

torch.set_num_threads(1)  # the feature maps are small
os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start, several at a time


@pytest.fixture
def limits():
    """Fails a test that hangs or takes a gigabyte."""

    def hangs(*_):
        pytest.fail("hangs")

    def peak():  # in KiB, on a Mac in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)

    before, handler = peak(), signal.signal(signal.SIGALRM, hangs)
    signal.alarm(120 * FUZZ)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert peak() - before < 2**20
