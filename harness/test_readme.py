"""Tests of what the README shows from Python: every block runs as it stands, on few images and with small settings."""

import dataclasses
import re

import pytest
import torch
from torch.utils.data import TensorDataset

import pdarts
from harness.conftest import ONE_STAGE, ROOT
from harness.settings import SEARCH_PRESETS

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


class OnTheCPU(pdarts.Search):
    def __init__(self, *arguments, device=None, **options):
        super().__init__(*arguments, **options)


@pytest.fixture
def small(monkeypatch, tmp_path, few_weights, few_edges):
    """What the blocks take as given, and settings that end soon."""
    monkeypatch.chdir(tmp_path)
    one_stage = {f.name: getattr(ONE_STAGE, f.name) for f in dataclasses.fields(pdarts.SearchConfig)}
    monkeypatch.setattr(pdarts, "SearchConfig", lambda **_: pdarts.CIFAR10.__class__(**one_stage))
    for name in SEARCH_PRESETS:
        monkeypatch.setitem(SEARCH_PRESETS, name, ONE_STAGE)
    search_data = pdarts.search_data
    monkeypatch.setattr(pdarts, "search_data", lambda *a, device=None, **b: search_data(*a, **b))
    monkeypatch.setattr(pdarts, "Search", OnTheCPU)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(12) % 3
    floats = TensorDataset(images / 255, labels)
    arrays = {"x_train": images.permute(0, 2, 3, 1), "y_train": labels, "x_test": images.permute(0, 2, 3, 1)}
    return {"images": images, "labels": labels, "halves": (floats, floats), "test_set": floats,
            "y_test": labels} | arrays  # fmt: skip


def test_the_blocks_of_the_readme_run_as_they_stand(small, capsys):
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        assert block.count("\n") <= 15
    exec(BLOCKS[0], small)
    assert "Genotype(normal=" in capsys.readouterr().out
    exec(BLOCKS[1], small)
    assert re.search(r"\(\d+, \d+\)\n$", capsys.readouterr().out)
    exec(BLOCKS[2].replace("workers=4", "workers=1"), small)
    assert len(small["result"].test_accuracies) == 1
