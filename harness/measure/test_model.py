"""Tests of the model of a step on a GPU."""

import argparse

import pytest

from harness.measure import model, traffic
from harness.measure.traffic import Launch, Part


def test_a_launch_takes_what_its_bytes_or_its_instructions_take_whichever_is_more():
    part = Part(n=96, channels=16, height=32, width=32, out=16, kernel=3, stride=1)
    by_bytes, by_instructions, seconds = model.seconds(Launch("convolution", 4e9, (part,)))
    assert by_bytes == pytest.approx(4e9 / model.BANDWIDTH) and by_bytes > by_instructions
    assert seconds == by_bytes + model.LAUNCH
    by_bytes, by_instructions, seconds = model.seconds(Launch("convolution", 0.0, (part,) * 64))
    assert by_bytes == 0 and seconds == by_instructions + model.LAUNCH
    base, taps = model.PATHS["convolution"][16, 1]
    blocks = 64 * 96 * 32 * 32 / 4 / model.THREADS  # four rows for each thread
    rounds = -(-blocks // model.PROCESSORS)
    of_block = model.THREADS * 16 * (base + taps[3])
    assert by_instructions == pytest.approx(rounds * of_block / model.ISSUE / model.CLOCK)


@pytest.mark.parametrize("kernel", ["convolution", "between", "pointwise", "input", "weight"])
@pytest.mark.parametrize("channels, size", [(16, 32), (32, 16), (64, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_more_images_take_longer_in_every_kernel(kernel, channels, size, stride):
    def seconds(n):
        part = Part(n, channels, size // stride, size // stride, channels, 5, stride)
        return model.seconds(Launch(kernel, 0.0, (part,) * 20))[1]

    assert seconds(960) > 5 * seconds(96) > 0


def test_the_convolutions_of_a_step_have_the_images_of_the_batch(few_cells, capsys):
    args = argparse.Namespace(batch=50, channels=8, stages=(1,), search=1)
    parts = [
        part for _, counted in traffic.counted_rows(args, ("cells",)) for each in counted.each for part in each.parts
    ]
    assert len(parts) > 100 and {part.n for part in parts} == {50}


def test_a_search_has_15_epochs_with_steps_of_the_alphas_in_each_stage():
    steps = {(stage, which): seconds for stage in (1, 2, 3) for which, seconds in (("weights", 1.0), ("alphas", 0.0))}
    assert model.search_minutes(steps) == pytest.approx(3 * 25 * 261 / 60)
    steps = {key: 1.0 - seconds for key, seconds in steps.items()}
    assert model.search_minutes(steps) == pytest.approx(3 * 15 * 261 / 60)
