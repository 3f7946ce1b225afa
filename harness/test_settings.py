"""Tests of the settings: the presets are the paper's, and what is out of bounds gets a message."""

import dataclasses
import math

import pytest

import pdarts
from harness.settings import EVALUATE_PRESETS, SEARCH_PRESETS, EvaluateSettings, SearchSettings
from pdarts import InputError


def test_the_presets_of_cifar_are_the_papers():
    run = dict(images=0, size=32, fraction=1.0, deterministic=False)
    search = dataclasses.asdict(pdarts.SearchConfig()) | run | dict(unrolled=False)
    evaluation = dataclasses.asdict(pdarts.EvaluateConfig()) | run
    assert dataclasses.asdict(SEARCH_PRESETS["cifar10"]) == search | dict(dataset="cifar10")
    dropout = dict(skip_dropout=(0.1, 0.2, 0.3), dataset="cifar100")
    assert dataclasses.asdict(SEARCH_PRESETS["cifar100"]) == search | dropout
    for name in "cifar10", "cifar100":
        assert dataclasses.asdict(EVALUATE_PRESETS[name]) == evaluation | dict(dataset=name, augment="cifar")
    mobile = dict(
        dataset="imagenet", augment="imagenet", size=224, depth=14, channels=48, stem="imagenet", epochs=250,
        batch_size=1024, lr=0.5, schedule="linear", warmup=5, weight_decay=3e-5, label_smoothing=0.1, drop_path=0.0,
        cutout=0, crop_padding=0,
    )  # fmt: skip
    assert dataclasses.asdict(EVALUATE_PRESETS["imagenet"]) == evaluation | mobile


def test_the_defaults_are_those_of_the_method():
    for settings, config in (SearchSettings(), pdarts.CIFAR10), (EvaluateSettings(), pdarts.EvaluateConfig()):
        assert dataclasses.asdict(config).items() <= dataclasses.asdict(settings).items()
        assert isinstance(settings, type(config))


def test_every_setting_says_what_it_is():
    for kind in SearchSettings, EvaluateSettings:
        assert all(field.metadata["help"] for field in dataclasses.fields(kind))


BAD = [
    (dict(images=-1), "images is -1; expected a whole number from 0"),
    (dict(size=7), "size is 7; expected a whole number from 8 to 1024"),
    (dict(fraction=math.nan), "fraction is nan; expected a number from 1e-09 to 1"),
    (dict(dataset=None), "dataset is None; expected a string"),
    (dict(deterministic=1), "deterministic is 1; expected True or False"),
    (dict(lr=-0.1), "lr is -0.1; expected a number from 0"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=str)
@pytest.mark.parametrize("kind", [SearchSettings, EvaluateSettings])
def test_a_setting_of_a_run_out_of_bounds_gets_a_message(kind, changes, message):
    with pytest.raises(InputError, match=f"^{message}"):
        kind(**changes)
