"""Tests of the Python in README.md and docs/DATA.md: every block runs as it stands, on few images."""

import dataclasses
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import kernels
import pdarts
from harness.conftest import ONE_STAGE, ROOT
from harness.data.images import load
from harness.settings import SEARCH_PRESETS

TEXT = "".join((ROOT / name).read_text() for name in ("README.md", "docs/DATA.md"))
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """What the blocks take as given, and settings that end soon."""
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(ONE_STAGE, keep=(8,))
    one_stage = {f.name: getattr(settings, f.name) for f in dataclasses.fields(pdarts.SearchConfig)}
    monkeypatch.setattr(pdarts, "SearchConfig", lambda **_: pdarts.CIFAR10.__class__(**one_stage))
    for name in SEARCH_PRESETS:
        monkeypatch.setitem(SEARCH_PRESETS, name, settings)

    class Search(pdarts.Search):  # on the CPU, of small cells
        def __init__(self, config, data, device=None, space=None, **options):
            super().__init__(config, data, "cpu", pdarts.SearchSpace(nodes=1), **options)

    search_data = pdarts.search_data
    monkeypatch.setattr(pdarts, "search_data", lambda *arguments, device=None: search_data(*arguments))
    monkeypatch.setattr(pdarts, "Search", Search)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(12) % 3
    floats = TensorDataset(images / 255, labels)
    arrays = {"x_train": images.permute(0, 2, 3, 1), "y_train": labels, "x_test": images.permute(0, 2, 3, 1)}
    arrays |= {"y_test": labels, "outputs": torch.randn(3, 2, 4, 8, 8), "probabilities": torch.rand(3)}
    norms = [kernels.Norm(torch.zeros(4), torch.ones(4)) for _ in range(3)]
    given = {"images": images, "labels": labels, "halves": (floats, floats), "test_set": floats, "norms": norms}
    return given | arrays


def test_the_blocks_of_the_readme_run_as_they_stand(small, capsys, few_weights, monkeypatch):
    assert len(BLOCKS) == 5
    kernels.use("on")
    exec(BLOCKS[0], small)
    assert small["y"].shape == (2, 4, 8, 8)
    exec(BLOCKS[1], small)
    assert "Genotype(normal=" in capsys.readouterr().out
    kernels.use("off")
    exec(BLOCKS[2], small)
    assert re.search(r"\(\d+, \d+\)\n$", capsys.readouterr().out)
    of_svhn = {"X": np.zeros((32, 32, 3, 20), np.uint8), "y": np.arange(20)[:, None] % 10 + 1}
    monkeypatch.setitem(sys.modules, "scipy", SimpleNamespace(io=SimpleNamespace(loadmat=lambda _: of_svhn)))
    monkeypatch.setitem(sys.modules, "scipy.io", sys.modules["scipy"].io)
    exec(BLOCKS[3], small)
    assert load(SEARCH_PRESETS["demo"], "svhn.npz").num_classes == 10
    exec(BLOCKS[4].replace("workers=4", "workers=1"), small)
    assert len(small["result"].test_accuracies) == 1
