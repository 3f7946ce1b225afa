"""Tests of the settings: the presets are the paper's, and what is out of bounds gets a message."""

import dataclasses
import math

import pytest

import pdarts
from harness.settings import EVALUATE_PRESETS, SEARCH_PRESETS, EvaluateSettings, SearchSettings
from pdarts import InputError

PAPER_SEARCH = dict(
    cells=(5, 11, 17), keep=(8, 5, 3), skip_dropout=(0.0, 0.4, 0.7), max_skips=2, channels=16, stem_stride=1, epochs=25,
    warmup=10, batch=96, lr=0.025, momentum=0.9, weight_decay=3e-4, alpha_lr=6e-4, alpha_weight_decay=1e-3, clip=5.0,
    crop_padding=4, flip=True, dtype="float32", seed=0, stem="cifar",
)  # fmt: skip
PAPER_EVALUATION = dict(
    cells=20, channels=36, stem="cifar", stem_stride=1, epochs=600, batch=128, lr=0.025, schedule="cosine", warmup=0,
    momentum=0.9, weight_decay=3e-4, clip=5.0, label_smoothing=0.0, auxiliary=True, auxiliary_weight=0.4,
    drop_path=0.3, cutout=16, crop_padding=4,
    flip=True, dtype="float32", seed=0,
)  # fmt: skip


def test_the_presets_of_cifar_are_the_papers():
    run = dict(images=0, size=32, fraction=1.0, deterministic=False)
    search = PAPER_SEARCH | run | dict(unrolled=False)
    assert dataclasses.asdict(SEARCH_PRESETS["cifar10"]) == search | dict(dataset="cifar10")
    dropout = dict(skip_dropout=(0.1, 0.2, 0.3), dataset="cifar100")
    assert dataclasses.asdict(SEARCH_PRESETS["cifar100"]) == search | dropout
    for name in "cifar10", "cifar100":
        others = run | dict(dataset=name, augment="cifar")
        assert dataclasses.asdict(EVALUATE_PRESETS[name]) == PAPER_EVALUATION | others
    mobile = dict(
        dataset="imagenet", augment="imagenet", size=224, cells=14, channels=48, stem="imagenet", epochs=250,
        batch=1024, lr=0.5, schedule="linear", warmup=5, weight_decay=3e-5, label_smoothing=0.1, drop_path=0.0,
        cutout=0, crop_padding=0,
    )  # fmt: skip
    assert dataclasses.asdict(EVALUATE_PRESETS["imagenet"]) == PAPER_EVALUATION | run | mobile


def test_the_defaults_are_those_of_the_method():
    for settings, config in (SearchSettings(), pdarts.CIFAR10), (EvaluateSettings(), pdarts.EvaluateConfig()):
        assert dataclasses.asdict(config).items() <= dataclasses.asdict(settings).items()
        assert isinstance(settings, type(config))


def test_every_setting_says_what_it_is_and_the_methods_where_it_comes_from():
    for kind in SearchSettings, EvaluateSettings:
        for field in dataclasses.fields(kind):
            assert field.metadata["help"]
            of_the_method = {f.name for f in dataclasses.fields(kind.__base__)} - {"dtype", "seed", "stem"}
            named = any(source in field.metadata["help"] for source in ("paper", "official"))
            assert field.name not in of_the_method or named


BAD = [
    (dict(lr=math.nan), "lr is nan; expected a finite number, at most 1e30"),
    (dict(lr=math.inf), "lr is inf; expected a finite number"),
    (dict(lr=1e31), "lr is 1e[+]31; expected a finite number, at most 1e30"),
    (dict(lr=-0.1), "lr is -0.1; expected at least 0"),
    (dict(lr="0.1"), "lr is '0.1'; expected float"),
    (dict(lr=None), "lr is None; expected float"),
    (dict(clip=0.0), "clip is 0.0; expected at least 1e-09"),
    (dict(momentum=1.5), "momentum is 1.5; expected at least 0 and at most 1"),
    (dict(epochs=0), "epochs is 0; expected at least 1 and at most 1000000"),
    (dict(epochs=2.0), "epochs is 2.0; expected int"),
    (dict(epochs=True), "epochs is True; expected int"),
    (dict(flip=1), "flip is 1; expected bool"),
    (dict(seed=-1), "seed is -1; expected at least 0"),
    (dict(seed=2**63), "seed is 9223372036854775808; expected at least 0 and at most 9223372036854775807"),
    (dict(images=-1), "images is -1; expected at least 0"),
    (dict(dtype="float16"), "dtype is 'float16'; expected float32 or bfloat16"),
    (dict(dataset=None), "dataset is None; expected str"),
]
BAD_SEARCH = [
    (dict(cells=(5, 2, 17)), "cells is 2; expected at least 3 and at most 1000"),
    (dict(cells=5), "cells is 5; expected"),
    (dict(cells=(5, "11", 17)), "cells is '11'; expected int"),
    (dict(cells=(5, 11)), r"cells \(5, 11\), keep \(8, 5, 3\) and skip_dropout .* differ in their numbers of stages"),
    (dict(cells=(), keep=(), skip_dropout=()), "expected one value per stage in each"),
    (dict(keep=(8, 9, 3)), r"keep is \(8, 9, 3\); expected no stage to keep more than the one before it has"),
    (dict(skip_dropout=(0.0, 0.4, 1.0)), "skip_dropout is 1.0; expected at least 0 and at most 0.99"),
    (dict(skip_dropout=(0.0, 0.4, math.nan)), "skip_dropout is nan; expected a finite number"),
    (dict(warmup=25), "warmup is 25 of 25 epochs; expected fewer, or alphas do not learn"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=str)
@pytest.mark.parametrize("kind", [SearchSettings, EvaluateSettings])
def test_what_is_out_of_bounds_gets_a_message(kind, changes, message):
    with pytest.raises(InputError, match=f"^{message}"):
        kind(**changes)


@pytest.mark.parametrize("changes, message", BAD_SEARCH, ids=str)
def test_what_no_search_can_take_gets_a_message(changes, message):
    with pytest.raises(InputError, match=message):
        SearchSettings(**changes)


def test_whole_numbers_are_taken_for_rates():
    assert SearchSettings(lr=1, momentum=0).lr == 1
    assert EvaluateSettings(drop_path=0).drop_path == 0
