"""Tests of pdarts.py: the paper's facts, the official code's decisions, and every message that a user can meet."""

import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import pdarts
from pdarts import EDGES, GENOTYPES, PRIMITIVES, Architect, Genotype, InputError, Network, SearchNetwork, derive, shrink

torch.set_num_threads(1)  # the maps are small
os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start, several at a time

HERE = pathlib.Path(pdarts.__file__).parent
ALL = (PRIMITIVES,) * 14
FEW = (("none", "skip_connect", "sep_conv_3x3"),) * 14  # small candidate sets for fast tests
TINY = pdarts.SearchConfig(
    dataset="shapes",
    cells=(3, 3, 3),
    channels=2,
    epochs=2,
    warmup=1,
    batch=4,
    skip_dropout=(0.1, 0.2, 0.3),
    pictures=16,
)


@pytest.fixture(autouse=True)
def _same_mode_of_the_kernels():
    before = kernels._mode
    yield
    kernels._mode = before


def beside(test):
    """A test that waits for processes that it starts: it runs beside the others, from the beginning of the session."""

    def wait(started):
        started[test.__name__].result()

    wait.test, wait.__doc__ = test, test.__doc__
    return wait


@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory):
    tests = [item.function.test for item in request.session.items if hasattr(item.function, "test")]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield {test.__name__: pool.submit(test, tmp_path_factory.mktemp(test.__name__)) for test in tests}


@pytest.fixture(scope="module")
def pictures():
    return own_pictures((10, 12, 3), classes=5, n=40)


def own_pictures(shape, classes=3, n=12):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % classes
    return pdarts.Pictures.from_arrays(x, y, x, y)


# --- the official code's decisions ------------------------------------------------------------------------------------


def golden_searches():
    """12 searches as the official functions decided them; an operation is written as its index in PRIMITIVES."""

    def cell(text):
        return [(PRIMITIVES[int(op)], int(source)) for op, source in text.split()]

    for search in json.loads((HERE / "testdata/derive.json").read_text()):
        alphas = [
            [torch.from_numpy(np.frombuffer(base64.b64decode(a), "<f4").reshape(14, -1).copy()) for a in stage]
            for stage in search["alphas"]
        ]
        kept = [
            [tuple(tuple(PRIMITIVES[int(k)] for k in edge) for edge in cell.split()) for cell in stage]
            for stage in search["kept"]
        ]
        yield alphas, kept, {m: cell(text) for m, text in search["normal"].items()}, cell(search["reduce"])


def test_stages_keep_the_candidates_that_the_official_code_keeps():
    decisions = 0
    for alphas, kept, _, _ in golden_searches():
        candidates = [ALL, ALL]
        for stage, keep in enumerate((5, 3)):
            candidates = [shrink(c, a, keep) for c, a in zip(candidates, alphas[stage])]
            assert candidates == kept[stage]
            decisions += 1
    assert decisions == 24


def test_derived_cells_are_those_of_the_official_code_for_every_limit_of_skips():
    decisions = 0
    for alphas, kept, normal, reduce in golden_searches():
        for limit, expected in normal.items():
            genotype = derive(*kept[1], *alphas[2], None if limit == "unrestricted" else int(limit))
            assert genotype == Genotype(expected, [2, 3, 4, 5], reduce, [2, 3, 4, 5])
            decisions += 1
    assert decisions == 12 * 10


# name, stem, C, L, classes -> parameters without and with the auxiliary head
PARAMETERS = """
PDARTS cifar 36 20 10 3433798 3910224 | PDARTS cifar 16 8 10 292026 727492 | PDARTS imagenet 48 14 1000 4944352 6206664
DARTS_V1 cifar 36 20 10 3169414 3645840 | DARTS_V1 cifar 16 8 10 232890 668356
DARTS_V1 imagenet 48 14 1000 4510432 5772744
DARTS_V2 cifar 36 20 10 3349342 3825768 | DARTS_V2 cifar 16 8 10 246106 681572
DARTS_V2 imagenet 48 14 1000 4718752 5981064
NASNet cifar 36 20 10 3830950 4288944 | NASNet cifar 16 8 10 333946 761220 | NASNet imagenet 48 14 1000 5564320 6802056
AmoebaNet cifar 36 20 10 3145078 3603072 | AmoebaNet cifar 16 8 10 326330 753604
AmoebaNet imagenet 48 14 1000 4627360 5865096
PDARTS cifar 36 20 100 3485728 - | DARTS_V1 cifar 36 20 100 3221344 - | DARTS_V2 cifar 36 20 100 3401272 -
NASNet cifar 36 20 100 3895840 - | AmoebaNet cifar 36 20 100 3184048 -
"""


@pytest.mark.parametrize("row", [row.strip() for row in re.split(r"[|\n]", PARAMETERS) if row.strip()])
def test_networks_have_the_official_numbers_of_parameters(row):
    name, stem, channels, cells, classes, bare, with_head = row.split()
    with torch.device("meta"):
        head = with_head != "-"
        network = Network(GENOTYPES[name], int(channels), int(classes), int(cells), auxiliary=head, stem=stem)
    sizes = {key: p.numel() for key, p in network.named_parameters()}
    assert sum(n for key, n in sizes.items() if not key.startswith("auxiliary_head.")) == int(bare)
    assert not head or sum(sizes.values()) == int(with_head)


@pytest.mark.parametrize("cells, keep, weights", [(5, 8, 1275834), (11, 5, 2585146), (17, 3, 2791930)])
def test_search_networks_have_the_official_numbers_of_parameters(cells, keep, weights):
    candidates = (PRIMITIVES[-keep:],) * 14
    network = SearchNetwork(16, 10, cells, candidates, candidates)
    assert sum(p.numel() for p in network.weights()) == weights
    assert sum(p.numel() for p in network.parameters()) == weights + 2 * 14 * keep


def test_count_gives_the_published_cost_of_the_pdarts_cell():
    cost = pdarts.count(Network(GENOTYPES["PDARTS"], 36, 10, 20, auxiliary=True))
    assert cost.parameters == 3433798
    assert cost.multiply_adds == pytest.approx(532e6, rel=0.001)


# --- the search space -------------------------------------------------------------------------------------------------


def test_a_cell_has_14_edges_numbered_node_by_node():
    assert EDGES == tuple((node, source) for node in range(4) for source in range(node + 2))
    assert len(EDGES) == 14


def test_the_paper_s_stages_are_the_default():
    config = pdarts.SearchConfig()
    assert config.cells == (5, 11, 17) and config.candidates == (8, 5, 3)
    assert (config.epochs, config.warmup, config.batch, config.channels, config.max_skips) == (25, 10, 96, 16, 2)
    assert (config.lr, config.momentum, config.weight_decay, config.clip) == (0.025, 0.9, 3e-4, 5)
    assert (config.alpha_lr, config.alpha_weight_decay) == (6e-4, 1e-3)
    assert config.skip_dropout == (0.0, 0.4, 0.7)
    assert pdarts.SEARCH_PRESETS["cifar10"] == config
    assert pdarts.SEARCH_PRESETS["cifar100"].skip_dropout == (0.1, 0.2, 0.3)
    evaluation = pdarts.EVALUATE_PRESETS["cifar10"]
    assert (evaluation.cells, evaluation.channels, evaluation.epochs, evaluation.batch) == (20, 36, 600, 128)
    assert (evaluation.auxiliary_weight, evaluation.cutout, evaluation.drop_path) == (0.4, 16, 0.3)


@pytest.mark.parametrize("cells, reductions", [(3, [1, 2]), (5, [1, 3]), (11, [3, 7]), (17, [5, 11]), (20, [6, 13])])
def test_reduction_cells_stand_at_one_and_two_thirds(cells, reductions):
    with torch.device("meta"):
        network = SearchNetwork(2, 10, cells, FEW, FEW)
    assert [i for i, cell in enumerate(network.cells) if cell.reduction] == reductions
    assert network.classifier.in_features == 4 * 2 * 4  # 4 nodes, channels doubled twice


def test_weights_are_created_in_the_documented_order():
    torch.manual_seed(0)
    network = SearchNetwork(4, 10, 3, ALL, ALL)
    names = [name for name, _ in network.named_parameters() if not name.startswith("alphas")]
    order = ["stem", "preprocess0", "preprocess1", "edges.0.ops", "edges.13.ops", "cells.1.", "cells.2.", "classifier"]
    first = [next(i for i, name in enumerate(names) if key in name) for key in order]
    assert first == sorted(first)
    torch.manual_seed(0)  # the first random numbers are the stem's
    assert torch.equal(network.stem[0].weight, nn.Conv2d(3, 12, 3, bias=False).weight)


def test_alphas_start_small_and_are_shared_by_the_cells_of_a_kind():
    network = SearchNetwork(2, 10, 5, ALL, ALL)
    assert network.alphas_normal.shape == network.alphas_reduce.shape == (14, 8)
    assert 0 < network.alphas_normal.abs().max() < 0.01
    assert {name for name, _ in network.named_parameters() if "alpha" in name} == {"alphas_normal", "alphas_reduce"}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [name for name in pdarts.OPERATIONS])
def test_every_operation_rounds_sizes_up(name, stride):
    op = pdarts.OPERATIONS[name](4, stride, True)
    for height, width in (8, 8), (7, 9), (1, 2):
        assert op(torch.randn(2, 4, height, width)).shape == (2, 4, -(-height // stride), -(-width // stride))


def test_factorized_reduction_covers_every_pixel_once():
    op = pdarts.FactorizedReduce(2, 2, affine=False)
    for conv in op.conv_1, op.conv_2:
        nn.init.ones_(conv.weight)
    for size in 4, 5:
        x = torch.rand(1, 2, size, size)
        first, second = op.before_norm(x)[0]
        assert torch.allclose(first, x[0, :, ::2, ::2].sum(0))
        odd = x[0, :, 1::2, 1::2].sum(0)
        assert torch.allclose(second[: len(odd), : len(odd)], odd)
        assert second.sum().item() == pytest.approx(odd.sum().item())  # nothing but zeros in the added row and column


def test_average_pool_does_not_count_padding():
    assert torch.equal(pdarts.OPERATIONS["avg_pool_3x3"](1, 1, True)(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_mixed_op_is_the_softmax_weighted_sum_of_its_candidates():
    torch.manual_seed(0)
    for stride in 1, 2:
        mixed = pdarts.MixedOp(PRIMITIVES, 4, stride).double()
        x, weights = torch.randn(3, 4, 7, 7).double(), torch.rand(8).double()
        expected = sum(w * op(x) for w, op in zip(weights[1:], mixed.ops))  # `none`, the first, adds nothing
        assert torch.allclose(mixed(x, weights), expected, rtol=1e-12)
        assert len(mixed.ops) == 7


def test_an_edge_that_only_has_none_gives_zeros():
    mixed = pdarts.MixedOp(("none",), 4, 2)
    assert torch.equal(mixed(torch.randn(2, 4, 7, 7), torch.ones(1)), torch.zeros(2, 4, 4, 4))


def test_search_cells_have_no_affine_norms_and_norm_their_pools():
    network = SearchNetwork(2, 10, 3, ALL, ALL)
    norms = [m for m in network.cells.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.affine for norm in norms) and network.stem[1].affine
    pools = [
        op
        for op in network.cells[0].edges[0].ops
        if isinstance(getattr(op, "op", [None])[0], (nn.MaxPool2d, nn.AvgPool2d))
    ]
    assert len(pools) == 2 and all(isinstance(pool.norm, nn.BatchNorm2d) for pool in pools)
    evaluation = Network(GENOTYPES["DARTS_V1"], 4, 10, 3)
    assert all(m.affine for m in evaluation.modules() if isinstance(m, nn.BatchNorm2d))
    assert isinstance(evaluation.cells[1]._ops[0], nn.MaxPool2d)


def test_skip_dropout_acts_on_stride_one_skips_only_and_can_be_set():
    network = SearchNetwork(2, 10, 3, FEW, FEW, skip_dropout=0.25)
    for cell in network.cells:
        for edge, (_, source) in zip(cell.edges, EDGES):
            dropouts = [op.rate for op in edge.ops if isinstance(op, pdarts.SkipDropout)]
            assert dropouts == ([] if cell.reduction and source < 2 else [0.25])
    network.skip_dropout = 0.5
    assert network.skip_dropout == 0.5
    assert {m.rate for m in network.modules() if isinstance(m, pdarts.SkipDropout)} == {0.5}


def test_skip_dropout_is_per_element():
    dropout = pdarts.MixedOp(("skip_connect",), 2, 1)
    dropout.ops[0].set_rate(0.5)
    torch.manual_seed(0)
    y = dropout(torch.ones(4, 2, 8, 8), torch.ones(1))
    assert set(y.unique().tolist()) == {0.0, 2.0} and 0.4 < (y == 0).float().mean() < 0.6


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (32, 32)])
def test_search_network_takes_any_size_and_number_of_channels(size):
    network = SearchNetwork(2, 7, 3, ALL, ALL, in_channels=2)
    assert network(torch.randn(3, 2, *size)).shape == (3, 7)


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_skip_dropout_rate_in_every_epoch_of_a_stage():
    for initial in 0.1, 0.4, 0.7:
        rates = [pdarts.skip_dropout_rate(initial, epoch) for epoch in range(25)]
        assert rates[:10] == pytest.approx([initial * (24 - e) / 25 for e in range(10)])
        assert rates[10:] == pytest.approx([initial * math.exp(-0.2 * e) for e in range(15)])
        assert rates[10] == initial > rates[0]


def test_learning_rate_falls_as_a_cosine_from_the_first_epoch():
    rates = [pdarts.cosine(0.025, epoch, 25) for epoch in range(25)]
    assert (
        rates[0] == 0.025
        and rates[-1] == pytest.approx(0.025 * (1 + math.cos(math.pi * 24 / 25)) / 2)
        and rates[-1] > 0
    )
    assert rates == sorted(rates, reverse=True)


def test_a_search_has_261_steps_per_epoch_and_ends_with_a_batch_of_40():
    sizes = [len(b) for b in pdarts.batches(torch.arange(25000), 96, torch.Generator())]
    assert len(sizes) == 261 and sizes[-1] == 40


def test_batches_are_a_permutation_and_leave_out_a_last_batch_of_one():
    parts = pdarts.batches(torch.arange(10, 19), 4, torch.Generator().manual_seed(0))
    assert [len(p) for p in parts] == [4, 4] and len(torch.cat(parts).unique()) == 8
    assert sorted(torch.cat(pdarts.batches(torch.arange(10, 20), 4, torch.Generator())).tolist()) == list(range(10, 20))


@pytest.fixture(scope="module")
def tiny_run(pictures, tmp_path_factory):
    """A tiny search, and what its architect and its optimizers were given."""
    out, alpha_batches, norms = tmp_path_factory.mktemp("tiny") / "run", [], []
    step, clip = Architect.step, nn.utils.clip_grad_norm_

    def spied_step(self, images, labels, *train):
        alpha_batches.append((images, train[0]))
        return step(self, images, labels, *train)

    def spied_clip(parameters, max_norm):
        norms.append(max_norm)
        return clip(parameters, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architect, "step", spied_step)
        patch.setattr(nn.utils, "clip_grad_norm_", spied_clip)
        # Only the second half lacks red, so that every batch tells where it comes from.
        marked = dataclasses.replace(pictures, x_train=pictures.x_train[:16].clone().clamp(min=1))
        marked.x_train[8:, 0] = 0
        result = pdarts.search(dataclasses.replace(TINY, crop_padding=0), marked, out)
    return out, result, alpha_batches, norms


def test_alphas_are_trained_on_the_second_half_and_not_in_the_first_epochs(tiny_run, pictures):
    _, _, alpha_batches, norms = tiny_run
    assert len(alpha_batches) == 3 * 2  # 3 stages, 1 epoch of 2 after the warm-up, 2 steps each
    no_red = pictures.normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0, 0, 0, 0]
    assert all((images[:, 0] == no_red).all() for images, _ in alpha_batches)
    assert not any((train[:, 0] == no_red).any() for _, train in alpha_batches)
    assert len(norms) == 3 * (2 * 2 + 2) and set(norms) == {5.0}  # every step of weights and of alphas is clipped


def test_log_holds_every_epoch_with_its_rates_and_both_softmax_matrices(tiny_run):
    out, result, *_ = tiny_run
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["epoch"]) for r in log] == [(s, e) for s in (1, 2, 3) for e in (0, 1)]
    for r in log:
        assert r["lr"] == pytest.approx(pdarts.cosine(0.025, r["epoch"], 2))
        initial = TINY.skip_dropout[r["stage"] - 1]
        assert r["skip_dropout"] == pytest.approx(pdarts.skip_dropout_rate(initial, r["epoch"], 2, 1))
        assert math.isfinite(r["train_loss"]) and 0 <= r["train_accuracy"] <= 1
        assert (r["alpha_loss"] is None) == (r["epoch"] == 0)
        for kind in "normal", "reduce":
            matrix = np.array(r[f"softmax_alphas_{kind}"])
            assert matrix.shape == (14, (8, 5, 3)[r["stage"] - 1]) and np.allclose(matrix.sum(1), 1)
    assert log[-1]["softmax_alphas_normal"] == result.stages[2].alphas_normal.softmax(1).tolist()


def test_search_writes_the_cells_of_every_stage_and_every_limit(tiny_run):
    out, result, *_ = tiny_run
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    pictures_and_cell = ["genotype.json", "normal.svg", "reduce.svg"]
    expected = ["checkpoint-before.pt", "checkpoint.pt", "config.json", "log.jsonl", "times.jsonl", *pictures_and_cell]
    assert written == sorted(expected + [f"stages/{s}/{name}" for s in (1, 2, 3) for name in pictures_and_cell])
    content = json.loads((out / "genotype.json").read_text())
    assert pdarts.read_genotype(str(out / "genotype.json")) == result.genotype == result.stages[2].genotype(2)
    assert sorted(content["by_max_skips"]) == [str(m) for m in range(9)]
    for limit, cell in [*content["by_max_skips"].items(), (None, content["unrestricted"])]:
        expected = result.stages[2].genotype(None if limit is None else int(limit))
        assert pdarts.check_genotype(Genotype(**cell)) == expected
        skips = sum(name == "skip_connect" for name, _ in expected.normal)
        assert limit is None or skips <= int(limit)
    for number, stage in enumerate(result.stages, 1):
        assert pdarts.read_genotype(str(out / f"stages/{number}/genotype.json")) == stage.genotype(2)
        assert len(stage.normal[0]) == (8, 5, 3)[number - 1]
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["cells"] == [3, 3, 3] and settings["seed"] == 0


def test_each_stage_keeps_candidates_of_the_stage_before(tiny_run):
    stages = tiny_run[1].stages
    for before, after in itertools.pairwise(stages):
        assert after.normal == shrink(before.normal, before.alphas_normal, len(after.normal[0]))
        assert after.reduce == shrink(before.reduce, before.alphas_reduce, len(after.reduce[0]))


def test_equal_seeds_give_equal_cells_and_alphas_bit_for_bit(pictures):
    config = dataclasses.replace(TINY, cells=(3,), candidates=(8,), skip_dropout=(0.3,))
    torch.manual_seed(1)
    first = pdarts.search(config, pictures)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = pdarts.search(config, pictures)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is untouched
    other = pdarts.search(dataclasses.replace(config, seed=1), pictures)
    assert first.genotype == second.genotype
    assert torch.equal(first.stages[0].alphas_normal, second.stages[0].alphas_normal)
    assert torch.equal(first.stages[0].alphas_reduce, second.stages[0].alphas_reduce)
    assert not torch.equal(first.stages[0].alphas_normal, other.stages[0].alphas_normal)


# --- derivation and refinement ----------------------------------------------------------------------------------------


def test_shrink_drops_the_first_of_equal_candidates_and_keeps_the_order():
    alphas = torch.zeros(14, 8)
    assert shrink(ALL, alphas, 5)[0] == PRIMITIVES[3:]
    alphas[:, 0] = 1.0
    assert shrink(ALL, alphas, 3)[0] == ("none", "dil_conv_3x3", "dil_conv_5x5")


def test_derive_never_chooses_none_and_keeps_the_later_of_equal_edges():
    alphas = torch.zeros(14, 8)
    alphas[:, 0] = 5.0
    genotype = derive(ALL, ALL, alphas, alphas)
    assert genotype.normal == [("dil_conv_5x5", source) for source in (0, 1, 1, 2, 2, 3, 3, 4)]


def test_refinement_lets_another_edge_come_in():
    # Node 1 (edges 2, 3, 4): skips on all, strong on 2 and 3; without its skip, edge 2 is weaker than edge 4's skip.
    candidates = (("skip_connect", "sep_conv_3x3", "dil_conv_3x3"),) * 14
    alphas = torch.zeros(14, 3)
    alphas[:, 1] = 9.0
    alphas[[2, 3, 4], 1] = torch.tensor([-9.0, -9.0, -9.0])
    alphas[[2, 3, 4], 0] = torch.tensor([2.0, 3.0, 1.0])
    assert derive(candidates, candidates, alphas, alphas, 2).normal[2:4] == [("skip_connect", 0), ("skip_connect", 1)]
    assert derive(candidates, candidates, alphas, alphas, 1).normal[2:4] == [("skip_connect", 1), ("dil_conv_3x3", 2)]


def test_refinement_finds_candidates_whose_probability_rounds_to_zero():
    candidates = (("none", "avg_pool_3x3", "skip_connect"),) * 14
    cell = derive(candidates, candidates, torch.tensor([[200.0, 0.0, 0.0]] * 14), torch.zeros(14, 3), max_skips=0)
    assert {name for name, _ in cell.normal} == {"avg_pool_3x3"}


def test_refinement_says_when_an_edge_has_nothing_but_skips():
    candidates = (("none", "skip_connect"),) * 14
    with pytest.raises(InputError, match="no candidate but skip_connect"):
        derive(candidates, candidates, torch.zeros(14, 2), torch.zeros(14, 2), 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: shrink(ALL, torch.zeros(14, 8), 9), "keep is 9; expected 1 to 8"),
        (lambda: shrink(ALL, torch.zeros(14, 5), 3), r"alphas have shape \[14, 5\]; expected \[14, 8\]"),
        (lambda: shrink(ALL[:3], torch.zeros(3, 8), 3), "expected 14 equal ones"),
        (lambda: SearchNetwork(2, 10, 3, (("skip_connect", "none"),) * 14, ALL), "in this order"),
        (lambda: SearchNetwork(2, 10, 2, ALL, ALL), "cells is 2; expected at least 3"),
        (lambda: Network(GENOTYPES["PDARTS"], 4, 10, 2), "cells is 2; expected at least 3"),
        (lambda: Network(GENOTYPES["PDARTS"], 4, 10, 3, stem="mnist"), "expected 'cifar' or 'imagenet'"),
        (lambda: derive((("none",),) * 14, ALL, torch.zeros(14, 1), torch.zeros(14, 8)), "no candidate but none"),
        (lambda: Architect(SearchNetwork(2, 10, 3, FEW, FEW), unrolled=True), "expected the SGD optimizer"),
        (lambda: pdarts.SearchConfig(candidates=(8, 3, 5)), "no stage to keep more"),
        (lambda: pdarts.SearchConfig(candidates=(7, 5, 3)), "expected 8, all primitives"),
        (lambda: pdarts.SearchConfig(candidates=(8, 5, 2)), "at least 3 in the last stage"),
        (lambda: pdarts.SearchConfig(cells=(5, 11)), "one value per stage"),
        (lambda: pdarts.SearchConfig(lr=math.nan), "lr is nan"),
        (lambda: Network("PDARTS", 4, 10, 3), "genotype is a str; expected a Genotype"),
    ],
)
def test_wrong_arguments_get_a_message_that_says_what_was_expected(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- architect --------------------------------------------------------------------------------------------------------


def small_network():
    torch.manual_seed(0)
    network = SearchNetwork(2, 3, 3, FEW, FEW).double()
    batch = [torch.randn(6, 3, 8, 8).double(), torch.arange(6) % 3]
    return network, batch, [torch.randn(6, 3, 8, 8).double(), torch.arange(6) % 3]


def test_first_order_step_changes_alphas_only_and_computes_no_weight_gradients():
    network, batch, _ = small_network()
    before = [w.clone() for w in network.weights()]
    architect = Architect(network)
    alphas = [a.clone() for a in network.alphas()]
    loss, logits = architect.step(*batch)
    assert logits.shape == (6, 3) and loss == F.cross_entropy(logits, batch[1])
    assert all(torch.equal(a, b) for a, b in zip(before, network.weights()))
    assert all(w.grad is None for w in network.weights())
    assert not any(torch.equal(a, b) for a, b in zip(alphas, network.alphas()))
    group = architect.optimizer.param_groups[0]
    assert isinstance(architect.optimizer, torch.optim.Adam)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (6e-4, (0.5, 0.999), 1e-3)


def test_second_order_gradient_is_the_derivative_through_one_step_of_the_weights():
    network, batch, train = small_network()
    optimizer = torch.optim.SGD(network.weights(), 0.05, 0.9, weight_decay=3e-4)
    F.cross_entropy(network(train[0]), train[1]).backward()
    optimizer.step()  # fills the momentum
    optimizer.zero_grad()
    architect = Architect(network, unrolled=True, weight_optimizer=optimizer)
    assert architect.difference == 0.01  # as in DARTS; smaller here, so as not to cross the kinks of ReLU and max
    architect.difference = 1e-6
    network.skip_dropout = 0.0
    start = [w.detach().clone() for w in network.weights()]
    gradients = architect._second_order(*batch, *train)[2]
    assert all(torch.equal(a, b) for a, b in zip(start, network.weights()))

    def unrolled_loss():
        pdarts.require_gradients(network, weights=True, alphas=True)
        step = torch.autograd.grad(F.cross_entropy(network(train[0]), train[1]), network.weights())
        with torch.no_grad():
            for w, g in zip(network.weights(), step):
                w -= 0.05 * (g + 3e-4 * w + 0.9 * optimizer.state[w]["momentum_buffer"])
            loss = F.cross_entropy(network(batch[0]), batch[1]).item()
            for w, s in zip(network.weights(), start):
                w.copy_(s)
        return loss

    rng = np.random.default_rng(0)
    first_order = torch.autograd.grad(F.cross_entropy(network(batch[0]), batch[1]), network.alphas())
    for alpha, gradient, plain in zip(network.alphas(), gradients, first_order):
        for _ in range(4):
            entry = int(rng.integers(14)), int(rng.integers(3))
            sides = []
            for h in 1e-6, -1e-6:
                alpha.data[entry] += h
                sides.append(unrolled_loss())
                alpha.data[entry] -= h
            numerical = (sides[0] - sides[1]) / 2e-6
            assert gradient[entry].item() == pytest.approx(numerical, rel=1e-5, abs=1e-8)
        assert not torch.allclose(gradient, plain, rtol=0.05)  # first order would not pass


def test_second_order_sees_the_same_dropout_on_both_sides_of_the_difference():
    network, batch, train = small_network()
    optimizer = torch.optim.SGD(network.weights(), 0.05, 0.9)
    architect = Architect(network, unrolled=True, weight_optimizer=optimizer)
    architect.difference = 1e-6  # other dropout on either side would be amplified a million times
    network.skip_dropout = 0.5
    torch.manual_seed(0)
    gradients = architect._second_order(*batch, *train)[2]
    assert all(0 < gradient.abs().max() < 10 for gradient in gradients)


# --- evaluation network -----------------------------------------------------------------------------------------------


def test_state_dict_has_the_official_keys_and_shapes():
    shapes = {
        k: tuple(v.shape) for k, v in Network(GENOTYPES["PDARTS"], 36, 10, 20, auxiliary=True).state_dict().items()
    }
    assert shapes["stem.0.weight"] == (108, 3, 3, 3) and shapes["stem.1.running_var"] == (108,)
    assert shapes["cells.0.preprocess0.op.1.weight"] == (36, 108, 1, 1)
    assert shapes["cells.0._ops.1.op.1.weight"] == (36, 1, 3, 3)  # dil_conv_3x3: depthwise
    assert shapes["cells.0._ops.3.op.6.weight"] == (36, 36, 1, 1)  # sep_conv_3x3: second pointwise
    assert shapes["cells.7.preprocess0.conv_1.weight"] == (36, 144, 1, 1)
    assert shapes["cells.7.preprocess0.bn.bias"] == (72,)
    assert shapes["auxiliary_head.features.2.weight"] == (128, 576, 1, 1)
    assert shapes["auxiliary_head.features.5.weight"] == (768, 128, 2, 2)
    assert shapes["auxiliary_head.features.6.running_mean"] == (768,)
    assert shapes["auxiliary_head.classifier.weight"] == (10, 768) and shapes["classifier.weight"] == (10, 576)
    imagenet = Network(GENOTYPES["AmoebaNet"], 8, 5, 3, stem="imagenet").state_dict()
    assert {"stem0.0.weight", "stem0.4.bias", "stem1.1.weight", "stem1.2.weight", "cells.1._ops.8.2.weight"} <= set(
        imagenet
    )


@pytest.mark.parametrize("name", GENOTYPES)
def test_networks_return_auxiliary_logits_in_training_only(name):
    network = Network(GENOTYPES[name], 4, 10, 5, auxiliary=True)
    logits, auxiliary = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == auxiliary.shape == (2, 10)
    assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert Network(GENOTYPES[name], 4, 10, 5)(torch.randn(2, 3, 32, 32))[1] is None


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (15, 11), (33, 64)])
def test_auxiliary_head_works_at_every_size(size):
    network = Network(GENOTYPES["PDARTS"], 4, 6, 5, auxiliary=True, in_channels=1)
    assert network(torch.randn(2, 1, *size))[1].shape == (2, 6)


@pytest.mark.parametrize("size, stride", [(8, 3), (7, 2)])
def test_auxiliary_pool_is_the_official_one_at_official_sizes(size, stride):
    x = torch.randn(2, 3, size, size)
    assert torch.equal(pdarts.PoolTo2x2()(x), nn.AvgPool2d(5, stride=stride, count_include_pad=False)(x))


def test_imagenet_stem_reduces_eightfold():
    network = Network(GENOTYPES["PDARTS"], 8, 5, 3, auxiliary=True, stem="imagenet")
    sizes = []
    network.cells[0].register_forward_hook(lambda _, inputs, output: sizes.extend([inputs[0].shape, output.shape]))
    assert network(torch.randn(2, 3, 224, 224))[1].shape == (2, 5)
    assert sizes == [(2, 8, 56, 56), (2, 32, 28, 28)]


def test_drop_path_drops_whole_samples_rescales_and_spares_identities():
    torch.manual_seed(0)
    y = pdarts.drop_path(torch.ones(1000, 2, 3, 3), 0.3)
    per_sample = y.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert per_sample.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert per_sample[:, 0].count_nonzero() == pytest.approx(700, abs=50)
    cell = Genotype([("skip_connect", 0), ("skip_connect", 1)], [2], [("skip_connect", 0), ("skip_connect", 1)], [2])
    network = Network(cell, 4, 3, 3)
    network.drop_path = 0.9
    x = torch.randn(8, 3, 8, 8)
    states = network.stem(x), network.stem(x)
    kept = network.cells[0](*states, 0.9)
    assert torch.equal(kept, network.cells[0](*states, 0.0))


# --- data -------------------------------------------------------------------------------------------------------------


def write_cifar(folder, name, binary, rows=10):
    """A CIFAR data set with `rows` random pictures in each file, in the published layout."""
    form, rng, written = pdarts.CIFAR[name], np.random.default_rng(0), []
    target = folder / (form.binary if binary else form.python)
    target.mkdir(parents=True)
    for file in form.train + form.test:
        x, y = rng.integers(0, 256, (rows, 3072), np.uint8), rng.integers(0, form.classes, rows)
        written.append((x, y))
        if binary:
            coarse = [np.full((rows, 1), 99, np.uint8)] * (form.label_bytes - 1)
            (target / f"{file}.bin").write_bytes(np.concatenate([*coarse, y[:, None].astype(np.uint8), x], 1).tobytes())
        else:
            (target / file).write_bytes(python2_pickle({form.label_key: y.tolist()}, x))
    train = [np.concatenate([part[i] for part in written[:-1]]) for i in (0, 1)]
    return train, written[-1]


def python2_pickle(entries, x):
    """A pickle as Python 2 and numpy 1 wrote it: byte strings, numpy.core.multiarray."""
    state = struct.pack("<B", 40) + b"K\x01(" + b"".join(b"M" + struct.pack("<H", n) for n in x.shape) + b"t"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + state + dtype
    array += b"\x89T" + struct.pack("<i", x.nbytes) + x.tobytes() + b"tb"
    items = b"U\x04data" + array
    for key, value in entries.items():
        items += b"U" + bytes([len(key)]) + key + pickle.dumps(value, 2)[2:-1]
    return b"\x80\x02}(" + items + b"u."


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("binary", [True, False])
def test_cifar_is_read_in_both_versions(tmp_path, name, binary):
    (x_train, y_train), (x_test, y_test) = write_cifar(tmp_path, name, binary)
    read = pdarts.load(name, str(tmp_path))
    assert np.array_equal(read.x_train.flatten(1).numpy(), x_train) and np.array_equal(read.y_train.numpy(), y_train)
    assert np.array_equal(read.x_test.flatten(1).numpy(), x_test) and np.array_equal(read.y_test.numpy(), y_test)
    assert read.num_classes == pdarts.CIFAR[name].classes
    assert read.mean.tolist() == pytest.approx(pdarts.CIFAR[name].mean)
    assert pdarts.load("shapes", str(tmp_path)).name == name  # found by the folder's name


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize(
    "content",
    [
        lambda path: pickle.dumps({b"data": Exploit(path), b"labels": [0]}, 2),
        lambda path: b"cbuiltins\neval\n(S'1'\ntR.",
        lambda path: pickle.dumps({b"labels": [0]}, 2),
        lambda path: pickle.dumps([1, 2], 2),
        lambda path: python2_pickle({b"labels": [0, 1, 2]}, np.zeros((2, 3072), np.uint8)),
        lambda path: python2_pickle({b"labels": [0, 99]}, np.zeros((2, 3072), np.uint8)),
        lambda path: python2_pickle({b"labels": [0, 1]}, np.zeros((2, 3072), np.uint8))[:-900],
        lambda path: b"",
    ],
)
def test_a_pickle_that_holds_anything_else_is_refused_and_runs_nothing(tmp_path, content):
    write_cifar(tmp_path, "cifar10", binary=False)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(content(tmp_path / "exploited"))
    with pytest.raises(InputError, match="data_batch_3.*expected"):
        pdarts.load("cifar10", str(tmp_path))
    assert not (tmp_path / "exploited").exists()


def test_truncated_and_missing_binary_files_are_named(tmp_path):
    write_cifar(tmp_path, "cifar10", binary=True)
    file = tmp_path / "cifar-10-batches-bin/data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"data_batch_2.bin has 30729 bytes; expected a multiple of 3073"):
        pdarts.load("cifar10", str(tmp_path))
    file.unlink()
    with pytest.raises(InputError, match="cannot read .*data_batch_2.bin"):
        pdarts.load("cifar10", str(tmp_path))


def archive(folder, name="cifar10", links=False):
    """A downloadable archive of a small CIFAR and its form."""
    write_cifar(folder / "made", name, binary=True)
    form, path = pdarts.CIFAR[name], folder / "made.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / "made" / form.binary, form.binary)
        evil = tarfile.TarInfo("../evil")
        evil.size = 4
        tar.addfile(evil, io.BytesIO(b"evil"))
        if links:
            link = tarfile.TarInfo(f"{form.binary}/test_batch.bin")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return form._replace(url=path.as_uri(), md5=hashlib.md5(path.read_bytes()).hexdigest())


def test_download_checks_the_sum_unpacks_only_the_data_and_leaves_nothing_else(tmp_path):
    form, target = archive(tmp_path), tmp_path / "target"
    with pytest.raises(InputError, match="has MD5 .* expected 0000"):
        pdarts.download_cifar("cifar10", target, form._replace(md5="0000"))
    with pytest.raises(InputError, match="cannot fetch"):
        pdarts.download_cifar("cifar10", target, form._replace(url=(tmp_path / "missing").as_uri()))
    assert list(target.iterdir()) == []
    pdarts.download_cifar("cifar10", target, form)
    assert [p.name for p in target.iterdir()] == ["cifar-10-batches-bin"]
    assert len(list((target / "cifar-10-batches-bin").iterdir())) == 6 and not (tmp_path / "evil").exists()
    assert len(pdarts.load("cifar10", str(target)).x_train) == 50
    pdarts.download_cifar("cifar10", target, form._replace(url="https://never.invalid/"))  # there already


def test_download_refuses_links_in_the_archive(tmp_path):
    form = archive(tmp_path, links=True)
    with pytest.raises(InputError, match="test_batch.bin is not a file.*expected"):
        pdarts.download_cifar("cifar10", tmp_path / "target", form)
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (16, 8, 1), (10, 11, 4)])
def test_own_data_of_any_shape_is_read_searched_and_evaluated(tmp_path, shape):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, *shape), np.uint8), np.arange(12) % 5
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5].astype(np.uint8))
    own = pdarts.load("shapes", str(tmp_path / "own.npz"))
    channels = shape[2] if len(shape) == 3 else 1
    assert own.x_train.shape == (12, channels, *shape[:2]) and own.num_classes == 5
    levels = x.reshape(-1, channels) / 255
    assert own.mean.numpy() == pytest.approx(levels.mean(0)) and own.std.numpy() == pytest.approx(levels.std(0))
    config = dataclasses.replace(TINY, cells=(3,), candidates=(8,), skip_dropout=(0.1,), epochs=1, warmup=0, pictures=0)
    genotype = pdarts.search(config, own).genotype
    evaluation = pdarts.EvaluateConfig(cells=3, channels=2, epochs=1, batch=4)
    assert 0 <= pdarts.evaluate(genotype, evaluation, own).test_error <= 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_train": None}, "lacks x_train"),
        ({"x_train": np.zeros((12, 8, 8), np.float32)}, r"x_train is float32 \[12, 8, 8\]; expected uint8"),
        ({"x_train": np.zeros((12, 8), np.uint8)}, "expected uint8"),
        ({"x_train": np.zeros((12, 7, 8), np.uint8)}, "8 x 8 or larger"),
        ({"x_test": np.zeros((4, 9, 8), np.uint8)}, "expected the same"),
        ({"x_test": np.zeros((0, 8, 8), np.uint8), "y_test": np.zeros(0, int)}, "1 test picture or more"),
        ({"y_train": np.zeros(12)}, r"y_train is float64 \[12\]; expected integers"),
        ({"y_train": np.zeros(11, int)}, r"expected integers \[12\]"),
        ({"y_train": np.full(12, -1)}, "class indices from 0"),
        ({"y_train": np.zeros(12, int)}, "expected 2 or more classes"),
        ({"y_test": np.full(4, 7)}, "y_test to 7"),
        ({"y_train": np.full(12, 10**9)}, "expected 2 or more classes"),
        ({"y_train": np.array([None] * 12, object)}, "cannot read"),
    ],
)
def test_wrong_npz_files_get_a_message_that_names_the_array(tmp_path, change, message):
    arrays = {"x_train": np.zeros((12, 8, 8), np.uint8), "y_train": np.arange(12) % 3}
    arrays |= {"x_test": np.zeros((4, 8, 8), np.uint8), "y_test": np.arange(4) % 3} | change
    np.savez(tmp_path / "own.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(InputError, match=message):
        pdarts.load("shapes", str(tmp_path / "own.npz"))


def test_a_damaged_npz_is_refused(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, x_train=np.zeros((12, 8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read"):
        pdarts.load("shapes", str(path))


def test_augmentation_crops_flips_normalises_and_cuts_out_each_picture():
    pictures = own_pictures((32, 32, 3))
    n = 200
    marked = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    marked[:, :, 10, 12] = 255  # one white pixel shows where the crop and the flip took it
    white = pictures.normalise(marked)[0, 0, 10, 12]
    x = pictures.augment(marked, 4, True, 0, torch.Generator().manual_seed(0))
    _, rows, cols = (x[:, 0] == white).nonzero().T
    assert len(rows) == n
    assert set((10 - rows).tolist()) == set(range(-4, 5))
    assert set(cols.tolist()) == set(range(8, 17)) | set(range(31 - 16, 31 - 7))
    plain = pictures.augment(marked, 0, False, 0, torch.Generator())
    assert torch.equal(plain, pictures.normalise(marked))
    cut = pictures.augment(marked, 0, False, 16, torch.Generator().manual_seed(0)) == 0
    assert (cut == cut[:, :1]).all()  # the same square in all channels
    heights, widths = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert heights.max() == widths.max() == 16 and heights.min() >= 8  # clipped at the borders
    assert torch.equal(cut[:, 0].sum((1, 2)), heights * widths)
    small = pictures.augment(marked[:, :, :8, :8], 0, False, 16, torch.Generator()) == 0
    assert small[:, 0].sum((1, 2)).max() <= 16  # at most half the picture's side


def test_shapes_are_seeded_balanced_and_beyond_a_linear_classifier():
    data = pdarts.shapes(1500, 500)
    again = pdarts.shapes(1500, 500)
    assert torch.equal(data.x_train, again.x_train) and torch.equal(data.y_test, again.y_test)
    assert not torch.equal(data.x_test, pdarts.shapes(1500, 500, seed=1).x_test)
    assert data.x_train.shape == (1500, 3, 32, 32) and data.num_classes == 10
    assert torch.bincount(torch.cat([data.y_train, data.y_test])).tolist() == [200] * 10
    x, x_test = (data.normalise(p).flatten(1) for p in (data.x_train, data.x_test))
    accuracies, products, right = [], x @ x.T, F.one_hot(data.y_train, 10).float()
    for ridge in 1e2, 1e3, 1e4, 1e5:
        solution = x.T @ torch.linalg.solve(products + ridge * torch.eye(len(x)), right)
        accuracies.append(((x_test @ solution).argmax(1) == data.y_test).float().mean().item())
    assert 0.1 < max(accuracies) < 0.6


# --- pictures of cells ------------------------------------------------------------------------------------------------


def svg_geometry(svg):
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    boxes = []
    for group in root.iter(f"{space}g"):
        rect = group.find(f"{space}rect")
        x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        boxes.append((group.get("class"), group.find(f"{space}text").text, x, y, x + w, y + h))
    paths = [p.get("d") for p in root.iter(f"{space}path") if p.get("fill") == "none"]
    width, height = float(root.get("width")), float(root.get("height"))
    return boxes, paths, width, height


@pytest.mark.parametrize("kind", ["normal", "reduce"])
@pytest.mark.parametrize("name", [*GENOTYPES, "crowded"])
def test_pictures_show_every_edge_and_nothing_overlaps(name, kind):
    crowded = [("conv_7x1_1x7", 0), ("sep_conv_7x7", 0)] * 6
    genotype = GENOTYPES.get(name) or Genotype(crowded, [2, 3, 4, 5, 6, 7], crowded, [7])
    boxes, paths, width, height = svg_geometry(pdarts.draw(genotype)[kind])
    pairs, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
    labels = sorted(text for kind_, text, *_ in boxes if kind_ == "label")
    assert labels == sorted([*(op for op, _ in pairs), "concat"])
    states = [box for box in boxes if box[0] == "state"]
    assert [text for _, text, *_ in states] == ["c_{k-2}", "c_{k-1}", *map(str, range(len(pairs) // 2)), "c_{k}"]
    assert [box[2] for box in states] == sorted(box[2] for box in states)  # inputs left, output right
    assert len(paths) == len(pairs) + len(concat)
    for _, text, left, top, right, bottom in boxes:
        assert 0 <= left and right <= width and 0 <= top and bottom <= height
        assert len(text) * 8 <= right - left  # the text fits
    for a, b in itertools.combinations(boxes, 2):
        assert a[4] < b[2] or b[4] < a[2] or a[5] < b[3] or b[5] < a[3], f"{a} overlaps {b}"
    ends = []
    for path in paths:
        x0, y0, y, x1, y1 = bracket(path)
        ends.append((x0, x1, y))
        crossed = []
        for box in boxes:
            _, _, left, top, right, bottom = box
            for x, y_end in (x0, y0), (x1, y1):  # the vertical parts touch their states only
                assert not (left < x < right and max(min(y, y_end), top) < min(max(y, y_end), bottom) - 4.1)
            if top < y < bottom and max(min(x0, x1), left) < min(max(x0, x1), right):
                crossed.append(box)
        above = y < y0
        assert [box[0] for box in crossed] == ["label"] if above else all(box[1] == "concat" for box in crossed)
    brackets = [(min(a, b), max(a, b), y) for a, b, y in ends[: len(pairs)]]
    for a, b in itertools.combinations(brackets, 2):
        assert a[2] != b[2] or a[1] < b[0] or b[1] < a[0]
    uprights = [x for a, b, _ in brackets for x in (a, b)]
    assert len(set(uprights)) == 2 * len(pairs)


def bracket(path):
    """x0, y0, height of the bracket, x1, y1 of a drawn edge."""
    match = re.fullmatch(r"M(\S+) (\S+) V\S+ Q\S+ (\S+) \S+ \S+ H\S+ Q(\S+) \S+ \S+ \S+ V(\S+)", path)
    return [float(n) for n in match.groups()]


# --- the command line -------------------------------------------------------------------------------------------------


def run(*arguments, cwd=None):
    command = [sys.executable, str(HERE / "pdarts.py"), *map(str, arguments)]
    environment = os.environ | {"PDARTS_KERNELS": "off"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=170)


SMALL = "--cells 3 3 3 --channels 2 --epochs 1 --warmup 0 --batch 8 --pictures 16".split()
ONE_STAGE = "--cells 3 --candidates 8 --skip-dropout 0.1 --channels 2 --batch 8 --kernels off --data own.npz".split()


def write_own_pictures(folder, n=24):
    x, y = np.random.default_rng(0).integers(0, 255, (n, 8, 8), np.uint8), np.arange(n) % 3
    np.savez(folder / "own.npz", x_train=x, y_train=y, x_test=x[:12], y_test=y[:12])


@beside
def test_search_evaluate_draw_and_test_again_through_the_command_line(folder):
    """From pdarts.py copied alone into another folder, on CIFAR-10's layout."""
    write_cifar(folder / "pictures", "cifar10", binary=True)
    (folder / "pdarts.py").write_bytes((HERE / "pdarts.py").read_bytes())
    command = [sys.executable, "pdarts.py", "search", "--data", "pictures", "--out", "found", *SMALL]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=170)
    assert result.returncode == 0 and result.stderr == ""
    assert (
        "searching on 16 pictures of cifar10" in result.stdout
        and "stage 3/3" in result.stdout
        and "node 3" in result.stdout
    )
    following = re.search(r"next: +python pdarts.py (evaluate .*)", result.stdout)[1].split()
    assert following == ["evaluate", "found/genotype.json", "--preset", "demo", "--data", "pictures"]
    size = ["--cells", "3", "--channels", "2"]
    evaluated = run(*following, *size, "--epochs", 1, "--batch", 16, "--out", "evaluated", cwd=folder)
    assert evaluated.returncode == 0 and evaluated.stderr == ""
    error = re.search(r"test error: +(\S+%)", evaluated.stdout)[1]
    assert sorted(p.name for p in (folder / "evaluated").iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "genotype.json",
        "log.jsonl",
        "times.jsonl",
        "weights.pt",
    ]
    tested = run(*following, *size, "--weights", "evaluated/weights.pt", cwd=folder)
    assert tested.returncode == 0 and f"test error:    {error}" in tested.stdout
    drawn = run("draw", "found/genotype.json", "-o", "cell-", cwd=folder)
    assert drawn.stdout.split() == ["cell-normal.svg", "cell-reduce.svg"]
    assert (folder / "cell-normal.svg").read_text() == (folder / "found/normal.svg").read_text()


BAD = {
    "no command": ([], "required: command"),
    "unknown preset": (["search", "--preset", "mnist"], "invalid choice: 'mnist'"),
    "unknown option": (["search", "--learning-rate", 1], "unrecognized arguments"),
    "negative epochs": (["search", "--epochs", -1], "epochs is -1; expected at least 1"),
    "no epoch for alphas": (["search", "--epochs", 2, "--warmup", 2], "warmup is 2 of 2 epochs; expected fewer"),
    "infinite rate": (["search", "--lr", "inf"], "lr is inf; expected a finite number"),
    "huge seed": (["search", "--seed", 2**64], "seed is 18446744073709551616; expected at least 0 and at most"),
    "nothing to download": (
        ["search", "--download"],
        "nothing to download for shapes; expected --preset cifar10 or cifar100",
    ),
    "no device for work": (["search", "--device", "meta"], "device 'meta' cannot be used"),
    "no number": (["search", "--epochs", "many"], "invalid int value: 'many'"),
    "dropout of 1.5": (["search", "--skip-dropout", 0, 0.4, 1.5], "expected at least 0 and at most 0.99"),
    "too many candidates": (
        ["search", "--candidates", 8, 9, 3],
        "candidates is (8, 9, 3); expected at least 1 and at most 8",
    ),
    "too few cells": (["search", "--cells", 2, 3, 4], "cells is (2, 3, 4); expected at least 3"),
    "too few pictures": (["search", "--pictures", 3], "pictures is 3; expected at least 4, or 0 for all"),
    "no data": (["search", "--data", "missing"], "no file or folder missing"),
    "empty folder": (["search", "--data", "empty"], "no data in empty"),
    "no CIFAR": (["search", "--preset", "cifar10", "--data", "empty"], "no cifar10 in empty; expected a folder"),
    "unknown device": (["search", "--device", "abacus"], "device 'abacus' cannot be used"),
    "used folder": (["search", "--out", "used"], "used already holds something"),
    "file as folder": (["search", "--out", "used/file"], "used/file already holds something"),
    "unknown genotype": (["draw", "RDARTS"], "no genotype 'RDARTS'; expected a file or one of PDARTS"),
    "no JSON": (["draw", "used/file"], "not valid JSON"),
    "no genotype": (["draw", "list.json"], "is not a genotype; expected an object with normal"),
    "unknown operation": (["evaluate", "operation.json"], "normal[3] has unknown operation 'sep_conv_4x4'"),
    "future node": (["evaluate", "future.json"], "reduce[0] has input 2; node 0 can take 0 to 1"),
    "wrong concat": (["draw", "concat.json"], "normal_concat is [9]; expected states from 2 to 5"),
    "half a node": (["draw", "half.json"], "two for each node"),
    "no pair": (["draw", "pair.json"], "normal[0] is 'skip_connect'; expected an (operation, input) pair"),
    "no weights": (["evaluate", "PDARTS", "--weights", "missing"], "no weights missing"),
    "weights and out": (["evaluate", "PDARTS", "--weights", "used/file", "--out", "new"], "--weights only tests"),
    "wrong weights": (["evaluate", "PDARTS", "--weights", "used/file"], "cannot use the weights used/file"),
    "no folder": (["draw", "PDARTS", "-o", "missing/cell"], "no folder missing"),
    "variable not set": (["search", "--data", ""], "argument --data: expected a path, got nothing"),
    "number too large": (
        ["search", "--weight-decay", 1e39],
        "weight_decay is 1e+39; expected a finite number, at most",
    ),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "used").mkdir()
    (folder / "used/file").write_text("something")
    cell = json.loads(json.dumps(GENOTYPES["PDARTS"]._asdict()))

    def write(name, field, change):
        changed = json.loads(json.dumps(cell))
        changed[field] = change(changed[field])
        (folder / name).write_text(json.dumps(changed))

    (folder / "list.json").write_text("[]")
    write("operation.json", "normal", lambda pairs: [*pairs[:3], ["sep_conv_4x4", 0], *pairs[4:]])
    write("future.json", "reduce", lambda pairs: [["skip_connect", 2], *pairs[1:]])
    write("concat.json", "normal_concat", lambda _: [9])
    write("half.json", "normal", lambda pairs: pairs[:-1])
    write("pair.json", "normal", lambda pairs: ["skip_connect", *pairs[1:]])
    return folder


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_status_2_and_writes_nothing(bad_files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(pdarts, "shapes", lambda: own_pictures((8, 8, 3)))
    before = sorted(bad_files.rglob("*"))
    assert pdarts.main([str(a) for a in arguments]) == 2
    stdout, stderr = capsys.readouterr()
    assert message in stderr and stderr.startswith("pdarts.py: error: ") and stderr.count("\n") == 1
    assert sorted(bad_files.rglob("*")) == before


@beside
def test_bad_input_ends_the_process_with_status_2(_):
    result = run("draw", "RDARTS")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(pictures):
    config = dataclasses.replace(TINY, lr=1e30, clip=1e30)
    with pytest.raises(InputError, match=r"training loss became (nan|inf) in stage 1, epoch \d, step \d"):
        pdarts.search(config, pictures)
    evaluation = pdarts.EvaluateConfig(cells=3, channels=2, epochs=2, batch=8, lr=1e30, clip=1e30)
    with pytest.raises(InputError, match=r"training loss became (nan|inf) in epoch \d, step \d"):
        pdarts.evaluate(GENOTYPES["PDARTS"], evaluation, pictures)


def test_sorted_pictures_are_refused(pictures):
    order = pictures.y_train.sort().indices
    by_class = dataclasses.replace(pictures, x_train=pictures.x_train[order], y_train=torch.arange(40) // 20)
    with pytest.raises(InputError, match="share no class; expected them shuffled"):
        pdarts.search(dataclasses.replace(TINY, pictures=0), by_class)


def test_help_names_every_setting_with_its_source(capsys):
    with pytest.raises(SystemExit) as end:
        pdarts.main(["search", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(pdarts.SearchConfig):
        assert field.name == "dataset" or f"--{field.name.replace('_', '-')}" in text
    assert "(paper, search)" in " ".join(text.split())


def test_live_line_shows_the_time_left_for_the_stage_and_the_whole(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    progress = pdarts.Progress([100.0, 300.0], show=True)
    progress.start -= 50  # 50 seconds for the first 50 of 400 units
    meter = pdarts.Meter("loss", "here")
    meter.update(torch.tensor(1.5), torch.tensor(3), 4)
    progress.step(0, "stage 1/2", 50.0, meter, 12.3)
    shown = capsys.readouterr().out
    assert shown.startswith("\r") and not shown.endswith("\n")
    assert "loss 1.500  acc  75.0%  12 pictures/s  left: stage 50 s, all 5 min 50 s" in shown
    assert (pdarts._duration(59), pdarts._duration(3700)) == ("59 s", "1 h 01 min")


def test_the_module_declares_what_it_needs_in_its_header():
    head = (HERE / "pdarts.py").read_text().split("# ///")[1]
    assert 'requires-python = ">=3.10"' in head and 'dependencies = ["torch>=2.10", "numpy"]' in head


# --- runs that survive ------------------------------------------------------------------------------------------------

STOP = dataclasses.replace(TINY, cells=(3, 3), candidates=(8, 3), skip_dropout=(0.2, 0.3))


class Kill(BaseException):
    """Ends a run at an instant, as SIGKILL would."""


def run_until(instant, patch, search):
    """Runs `search`, killed at its `instant`-th rename of a file or, halfway, in the writing before it."""
    replace, renames = os.replace, itertools.count(1)

    def counted(*arguments):
        if next(renames) == instant:
            raise Kill
        replace(*arguments)

    with patch.context() as p:
        p.setattr(os, "replace", counted)
        try:
            search()
        except Kill:
            return False
    return True


def assert_same(a, b, where="checkpoint"):
    """Equal, bit for bit, but for times."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"times"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Both folders hold the same weights, alphas, optimizers, random states, logs and cells."""
    assert_same(*(torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b)))
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.suffix in (".json", ".jsonl", ".svg"))
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.suffix in (".json", ".jsonl", ".svg"))
    for file in files:
        assert file.name in ("config.json", "times.jsonl") or (a / file).read_bytes() == (b / file).read_bytes()


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    pdarts.search(STOP, pictures, folder)
    return folder


def test_a_search_killed_while_it_writes_goes_on_as_if_nothing_had_happened(unbroken, pictures, tmp_path):
    folder = tmp_path / "run"
    patch = pytest.MonkeyPatch()
    for instant in 1, 2, 3, 8, 6, 3:
        assert not run_until(instant, patch, lambda: pdarts.search(STOP, pictures, resume=folder))
        for name in ("checkpoint.pt", "checkpoint-before.pt"):
            if (folder / name).exists():
                torch.load(folder / name, weights_only=True)
    pdarts.search(STOP, pictures, resume=folder)
    assert_same_run(unbroken, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_that_is_asked_to_stop_finishes_its_step_and_saves(unbroken, pictures, tmp_path, number):
    steps, train_step = itertools.count(1), pdarts.train_step

    def interrupted(*arguments):
        train_step(*arguments)
        if next(steps) % 3 == 0:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdarts, "train_step", interrupted)
        for _ in range(2):
            with pytest.raises(pdarts.Stopped) as stopped:
                pdarts.search(STOP, pictures, resume=tmp_path / "run")
            assert stopped.value.signal_number == number
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    pdarts.search(STOP, pictures, resume=tmp_path / "run")
    assert_same_run(unbroken, tmp_path / "run")


def test_an_evaluation_runs_with_kernels_or_without(tmp_path, monkeypatch):
    write_own_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    size = ["--cells", "3", "--channels", "2", "--epochs", "1", "--batch", "4", "--device", "cpu"]
    for mode, used in ("on", "fused"), ("off", "plain"):
        command = ["evaluate", "PDARTS", "--data", "own.npz", *size, "--kernels", mode, "--out", mode]
        assert pdarts.main(command) == 0
        assert json.loads((tmp_path / mode / "config.json").read_text())["kernels"] == used


def test_an_evaluation_goes_on_where_it_stopped(pictures, tmp_path):
    config = pdarts.EvaluateConfig(cells=3, channels=2, epochs=3, batch=12, cutout=4)
    cell, steps, train_step = GENOTYPES["PDARTS"], itertools.count(1), pdarts.train_step
    pdarts.evaluate(cell, config, pictures, tmp_path / "whole")

    def interrupted(*arguments):
        train_step(*arguments)
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdarts, "train_step", interrupted)
        with pytest.raises(pdarts.Stopped):
            pdarts.evaluate(cell, config, pictures, tmp_path / "stopped")
    pdarts.evaluate(cell, config, pictures, resume=tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert_same(*(torch.load(tmp_path / f / "weights.pt", weights_only=True) for f in ("whole", "stopped")))


# More kills, which take longer: PDARTS_KILLS=20
@beside
def test_a_search_killed_at_random_instants_ends_with_the_same_bits(tmp_path):
    kills, rng = int(os.environ.get("PDARTS_KILLS", 1)), np.random.default_rng(0)
    # The more kills, the longer the search: one that is killed right away makes no progress.
    write_own_pictures(tmp_path, 16 * kills)
    arguments = ["search", *ONE_STAGE, "--warmup", 1, "--epochs", 1 + kills]
    started = time.monotonic()
    assert run(*arguments, "--out", "whole", cwd=tmp_path).returncode == 0
    duration, number = time.monotonic() - started, 0
    while number < kills:
        command = [sys.executable, str(HERE / "pdarts.py"), *map(str, arguments), "--resume", "killed"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
            try:
                text, _ = p.communicate(timeout=rng.uniform(0.3, 1) * min(duration, 10))
                assert p.returncode == 0, text
                shutil.rmtree(tmp_path / "killed")  # it has ended: again from the start
            except subprocess.TimeoutExpired:
                p.kill()
                number += 1
    result = run(*arguments, "--resume", "killed", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_the_command_line_says_how_to_go_on_and_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_own_pictures(tmp_path)
    arguments = ["search", *ONE_STAGE, "--epochs", "1", "--warmup", "0", "--out", "a run"]
    monkeypatch.setattr(pdarts.Run, "asked_to_stop", lambda self: signal.SIGTERM)
    assert pdarts.main(arguments) == 143
    error = capsys.readouterr().err
    assert error.startswith("pdarts.py: stopped by SIGTERM; to go on: python ") and error.count("\n") == 1
    command = shlex.split(error.split("to go on: ")[1])[2:]
    assert command == [*arguments[:-2], "--resume", "a run"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert pdarts.main(["search", "--resume", "a run"]) == 0  # settings and data are in the folder
    assert pdarts.read_genotype("a run/genotype.json")
    assert pdarts.main(["search", "--resume", "a run"]) == 0  # it has ended: the same again
    assert pdarts.main([*command, "--lr", "1"]) == 2
    assert "lr is 0.05 there and 1.0 here; expected the same settings and data" in capsys.readouterr().err


RESUME = {
    "other settings": (dict(seed=1), None, r"seed is 0 there and 1 here"),
    "damaged": (
        {},
        lambda c: c[: len(c) // 2],
        r"cannot read .*checkpoint.pt \(.*\); expected an undamaged checkpoint; ",
    ),
    "flipped": (
        {},
        lambda c: c[:2000] + bytes([c[2000] ^ 1]) + c[2001:],
        r"the one before it goes on: --resume .*before",
    ),
    "nothing": ({}, lambda c: b"", r"expected an undamaged checkpoint"),
    "no checkpoint": ({}, lambda c: saved({"weights": 1}), r"cannot read"),
    "later format": ({}, lambda c: saved(loaded(c) | {"format": 2}), r"has format 2; expected 1"),
    "code": ({}, lambda c: saved({"format": Exploit("ran")}), r"cannot read"),
}


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def loaded(content):
    return torch.load(io.BytesIO(content), weights_only=True)


@pytest.mark.parametrize("changes, damage, message", RESUME.values(), ids=RESUME)
def test_a_checkpoint_that_cannot_be_used_is_refused_and_kept(unbroken, pictures, tmp_path, changes, damage, message):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    checkpoint = folder / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()) if damage else checkpoint.read_bytes())
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=message):
        pdarts.search(dataclasses.replace(STOP, **changes), pictures, resume=folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    if damage:
        pdarts.search(STOP, pictures, resume=folder / "checkpoint-before.pt")
        assert_same_run(unbroken, folder)


def test_resume_takes_the_folder_of_a_run_and_no_other(unbroken, pictures, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds no run; expected the folder of one, or a new or empty folder"):
        pdarts.search(STOP, pictures, resume=tmp_path)
    with pytest.raises(InputError, match="expected one of them"):
        pdarts.search(STOP, pictures, tmp_path / "out", resume=unbroken)
    other = dataclasses.replace(pictures, x_test=pictures.x_test.flip(0))
    with pytest.raises(InputError, match="of another run: data is"):
        pdarts.search(STOP, other, resume=unbroken)
    with pytest.raises(InputError, match="of another run: kind is 'search' there and 'evaluate' here"):
        pdarts.evaluate(GENOTYPES["PDARTS"], pdarts.EvaluateConfig(batch=4), pictures, resume=unbroken)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(13, "Permission denied")])
def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(unbroken, tmp_path, monkeypatch, capsys, error):
    folder = shutil.copytree(unbroken, tmp_path / "run")
    before = (folder / "checkpoint.pt").read_bytes()

    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=error.strerror):
            pdarts.Folder(folder, resume=True).save("checkpoint.pt", {"epoch": 1}, "checkpoint-before.pt")
        assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob(".*"))
        patch.chdir(tmp_path)
        assert pdarts.main(["search", *SMALL, "--kernels", "off"]) == 2
    assert re.fullmatch(rf"pdarts.py: error: .*{error.strerror}.*\n", capsys.readouterr().err)


def test_config_json_holds_what_is_needed_to_run_again(unbroken):
    content = json.loads((unbroken / "config.json").read_text())
    assert content["settings"] == json.loads(json.dumps(dataclasses.asdict(STOP)))
    assert content["pdarts.py"] == hashlib.sha256((HERE / "pdarts.py").read_bytes()).hexdigest()
    assert {"command", "versions", "device", "kernels", "processes", "threads", "data"} <= content.keys()


# --- several processes ------------------------------------------------------------------------------------------------


def gradients(images, labels, dtype=torch.float64):
    """Of the weights and of the alphas, by a process for its part of the batch; statistics are frozen."""
    rank, count = pdarts.processes()
    torch.manual_seed(rank)  # all start from the first process's weights
    network = SearchNetwork(2, 3, 3, FEW, FEW).to(dtype).eval()
    pdarts.require_gradients(network, weights=True, alphas=False)
    trained = pdarts.parallel(network)
    loss, _ = pdarts.classify(trained, images[rank::count].to(dtype), labels[rank::count])
    loss.backward()
    pdarts.require_gradients(network, weights=False, alphas=True)
    loss, _ = pdarts.classify(network, images[rank::count].to(dtype), labels[rank::count])
    of_alphas = pdarts.mean_over_processes(torch.autograd.grad(loss, network.alphas()))
    return [*(p.grad for p in network.weights()), *of_alphas]


def _process(rank, count, folder, images, labels):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    pdarts.fused.use("off")
    torch.save(gradients(images, labels), f"{folder}/{rank}.pt")
    if count == 2:
        check_what_two_processes_agree_on(rank)
    torch.distributed.destroy_process_group()
    os._exit(0)  # as pdarts.py itself ends: torch's threads abort Python's own end at random


def check_what_two_processes_agree_on(rank):
    run = pdarts.Run("search", TINY, pdarts.shapes(16, 4), torch.device("cpu"))
    run.check_agreement([torch.ones(2)], "the same")
    with pytest.raises(RuntimeError, match="the processes hold different alphas"):
        run.check_agreement([torch.full((2,), 1 + 1e-6 * rank)], "the same")
    with pytest.raises(InputError, match="batch is 7, of 16 pictures, for 2 processes; expected 2 pictures or more"):
        pdarts.check_batch(7, 16)
    assert [len(b) for b in pdarts.batches(torch.arange(15), 4, torch.Generator())] == [4, 4, 4]


@beside
def test_two_processes_compute_the_gradients_of_one(tmp_path):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for count in 1, 2:
        (tmp_path / str(count)).mkdir()
        torch.multiprocessing.spawn(_process, (count, tmp_path / str(count), images, torch.arange(6) % 3), nprocs=count)
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1/0.pt", "2/0.pt", "2/1.pt"))
    for gradients_of_two in two:
        for mine, right in zip(gradients_of_two, one, strict=True):
            assert torch.allclose(mine, right, rtol=1e-9, atol=1e-12)


SAY_PYTHONS_OWN_END = """
import atexit, os
if "LOCAL_RANK" in os.environ:
    atexit.register(print, "Python's own end", flush=True)
"""


@beside
def test_two_processes_search_by_torchrun_and_end_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(HERE / "pdarts.py")]
    command += ["search", *ONE_STAGE, "--epochs", "1", "--warmup", "0", "--device", "cpu", "--out", "found"]
    write_own_pictures(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(SAY_PYTHONS_OWN_END)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stderr
    assert "Python's own end" not in result.stdout  # where torch's threads abort or block it, at random
    assert result.stdout.count("stage 1/1") == 1 and result.stdout.count("node 3 =") == 2  # one process speaks
    log = [json.loads(line) for line in (tmp_path / "found/log.jsonl").read_text().splitlines()]
    assert len(log) == 1 and json.loads((tmp_path / "found/config.json").read_text())["processes"] == 2


# --- speed and precision ----------------------------------------------------------------------------------------------


class Replayed(pdarts.CapturedStep):
    """Captured steps without a GPU: what is "captured" reads its buffers anew and leaves its results in one place."""

    WARM_UP, made = 1, []

    def __init__(self, step, generator):
        self.step, self.generator = step, generator
        self.calls, self.captured = collections.Counter(), {}
        self.made.append(self)

    @staticmethod
    def serves(device, config):
        return True

    def _plain(self, inputs):
        return self.step(*inputs)

    def _capture(self, buffers):
        results = [torch.zeros(()) for _ in range(2 * len(buffers))]

        def replay():
            for result, new in zip(results, self.step(*buffers)):
                result.copy_(new)

        return replay, buffers, results


def test_a_captured_step_sees_every_batch_and_rate(pictures):
    config = dataclasses.replace(TINY, batch=3, cells=(3,), candidates=(8,), skip_dropout=(0.3,), pictures=24)
    plain = pdarts.search(config, pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdarts, "CapturedStep", Replayed)
        replayed = pdarts.search(config, pictures)
    assert len(Replayed.made[0].captured) == 2  # with and without alphas
    assert torch.equal(plain.stages[0].alphas_normal, replayed.stages[0].alphas_normal)
    assert plain.stages[0].test_accuracy == replayed.stages[0].test_accuracy


@pytest.mark.parametrize("fused", ["on", "off"])
def test_bfloat16_changes_the_maps_only(pictures, fused):
    config = dataclasses.replace(TINY, dtype="bfloat16", cells=(3,), candidates=(8,), skip_dropout=(0.3,))
    kernels.use(fused)
    types = set()
    with pytest.MonkeyPatch.context() as patch:
        terms = pdarts.MixedOp.terms

        def spied(self, x, weights):
            outputs, *others = terms(self, x, weights)
            types.update([weights.dtype, *(y.dtype for y in outputs)])
            return outputs, *others

        patch.setattr(pdarts.MixedOp, "terms", spied)
        result = pdarts.search(config, pictures)
    assert types == {torch.bfloat16, torch.float32}
    assert result.stages[0].alphas_normal.dtype == torch.float32


def test_deterministic_runs_ask_torch_for_it_and_leave_its_mode(pictures):
    config = dataclasses.replace(TINY, deterministic=True, cells=(3,), candidates=(8,), skip_dropout=(0.3,))
    modes, train_step = [], pdarts.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pdarts,
            "train_step",
            lambda *a: (modes.append(torch.are_deterministic_algorithms_enabled()), train_step(*a)),
        )
        pdarts.search(config, pictures)
    assert set(modes) == {True} and not torch.are_deterministic_algorithms_enabled()


# ----------------------------------------------------------------------------------------------------------------------
# Fused kernels against their plain twins
# ----------------------------------------------------------------------------------------------------------------------


CUDA = torch.cuda.is_available()
FRESH = (torch.zeros, torch.ones)  # running means and variances


@pytest.fixture(params=["cpu", "cuda"] if CUDA else ["cpu"])
def device(request):
    """Of the tensors; the fused kernels are used."""
    kernels.use("on")
    kernels.fused(request.param)
    return request.param


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape, count",
    [
        ((2, 3, 5, 7), 3),
        ((3, 16, 8, 8), 8),
        ((4, 36, 9, 9), 40),
        ((40, 36, 8, 8), 2),
        ((60, 20, 1, 33), 2),
        ((2, 20, 1, 33), 1),
        ((3, 2, 150, 150), 2),
        ((2, 2100, 2, 3), 2),
        ((5, 70, 1, 1), 3),
    ],
)
@pytest.mark.parametrize("normalised", [None, True, False])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_fused_mixed_operation_equals_plain_torch(device, channels_last, shape, count, normalised, dtype, bound):
    """normalised: None for mixed_sum, else whether mixed_norm_sum is in training."""
    torch.manual_seed(0)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    outputs = [torch.randn(shape, dtype=torch.float64).to(device, dtype, memory_format=memory) for _ in range(count)]
    weights, gradient = torch.rand(count, dtype=torch.float64).to(device, dtype), torch.randn(shape).double().to(device)

    def run(function, dtype):
        xs = [x.to(dtype).requires_grad_() for x in [y.detach().clone() for y in outputs]]
        w = weights.detach().clone().to(dtype).requires_grad_()
        running = []
        if normalised is not None:  # the first candidate of three or more is an identity
            some = [count > 2 and k == 0 for k in range(count)]
            running = [[None if s else f(shape[1], dtype=dtype, device=device) for s in some] for f in FRESH]
        y = function(xs, w, *running, *[normalised] * (normalised is not None))
        assert y.is_contiguous(memory_format=memory)
        return [
            y,
            *torch.autograd.grad(y, [w, *xs], gradient.to(dtype)),
            *(r for rs in running for r in rs if r is not None),
        ]

    fused, plain = (
        (kernels.mixed_sum, kernels.mixed_sum_ref)
        if normalised is None
        else (kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref)
    )
    for i, (mine, right) in enumerate(zip(run(fused, dtype), run(plain, torch.float64), strict=True)):
        # A gradient of a weight is a sum in which much cancels.
        assert (mine.double() - right).norm() <= (bound if i == 0 else 5 * bound) * right.norm()


def test_second_derivative_of_the_fused_sum_is_refused(device):
    w, x = leaves(device, 1)
    (gradient,) = torch.autograd.grad(kernels.mixed_sum([x], w).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "outputs, weights, message",
    [
        ([], torch.rand(0), "outputs has 0 tensors; expected 1 to 64"),
        ([torch.rand(2, 3, 4)], torch.rand(1), "outputs.0. has shape .2, 3, 4.; expected .N,C,H,W."),
        ([torch.rand(1, 2, 3, 3)] * 2, torch.rand(3), "probabilities has shape .3.; expected .2."),
        ([torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 4)], torch.rand(2), "outputs.1. has shape"),
        ([torch.rand(1, 2, 3, 3)] * 65, torch.rand(65), "outputs has 65 tensors; expected 1 to 64"),
        ([torch.ones(1, 2, 3, 3, dtype=torch.int32)], torch.rand(1), "outputs.0. is Int; expected float32, float64"),
        ([torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3).double()], torch.rand(2), "outputs.1. is Double; expected"),
        ([torch.rand(1, 2, 3, 3)], torch.rand(1).double(), "probabilities is Double; expected float32 or Float"),
    ],
)
def test_fused_sum_names_what_does_not_fit(device, outputs, weights, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.mixed_sum([y.to(device) for y in outputs], weights.to(device))


def normed(weights, *outputs, function=kernels.mixed_norm_sum, none=1):
    """mixed_norm_sum in training, with fresh running statistics; the first `none` outputs are not normalised."""
    kind = {"dtype": torch.float64 if weights.dtype == torch.float64 else torch.float32, "device": weights.device}
    running = [[None] * none + [f(outputs[0].shape[1], **kind) for _ in outputs[none:]] for f in FRESH]
    return function(list(outputs), weights, *running, True)


def leaves(device, count, shape=(2, 3, 4, 5), dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [torch.rand(count, dtype=dtype), *(torch.randn(shape, dtype=dtype) for _ in range(count))]
    return [t.to(device).requires_grad_() for t in tensors]


FUSED = [lambda w, *xs: kernels.mixed_sum(list(xs), w), normed]


@pytest.mark.parametrize("function", FUSED, ids=["sum", "norm"])
def test_fused_gradients_are_numerical_derivatives(device, function):
    assert torch.autograd.gradcheck(function, leaves(device, 3, dtype=torch.float64))


@pytest.mark.parametrize("function", FUSED, ids=["sum", "norm"])
def test_fused_operation_compiles_without_graph_breaks(device, function):
    inputs = leaves(device, 3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mine, right = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, function))
    assert all(map(torch.equal, mine, right))


def test_fused_operators_pass_opcheck(device):
    ops, (weights, *outputs) = torch.ops.pdarts, leaves(device, 3)
    detached, statistics, batch = [x.detach() for x in outputs], torch.rand(3, 3, 3, device=device), [False, True, True]
    running = [[f(3, device=device), f(3, device=device)] for f in FRESH]
    for op, arguments in (
        (ops.mixed, (outputs, weights, None, [False] * 3, 0.0)),
        (ops.mixed, (outputs, weights, statistics, [False] * 3, 0.0)),
        (ops.mixed, (outputs, weights, None, batch, 1e-5)),
        (ops.update_running, (*running, statistics, batch, 10, 0.1)),
        (ops.mixed_backward, (detached[0], detached, weights.detach(), statistics, batch, [True] * 3, True)),
    ):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_fused_operation_gives_the_same_bits_with_any_number_of_threads(device):
    inputs, threads, results = leaves(device, 3, (32, 16, 32, 32)), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = normed(*inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_16_bit_result_is_the_rounded_float32_result(device, dtype):
    weights, *outputs = (t.detach() for t in leaves(device, 5, (3, 16, 8, 8)))
    outputs = [y.to(dtype) for y in outputs]
    exact = normed(weights, *(y.float() for y in outputs)).to(dtype)
    units = normed(weights, *outputs).view(torch.int16).int() - exact.view(torch.int16).int()
    assert units.abs().max() <= 1


def test_fused_operation_keeps_only_what_its_gradients_need(device):
    weights, *outputs = leaves(device, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.mixed_sum(outputs, weights.detach())
        assert [t.dim() for t in kept] == [1]  # the weights
        kept.clear()
        normed(weights, *outputs)
    assert sorted(t.dim() for t in kept) == [1, 3, 4, 4, 4]  # weights, statistics, outputs


def test_fused_norm_is_no_worse_than_torch_where_the_mean_is_large(device):
    weights, *outputs = (t.detach() for t in leaves(device, 3, (32, 16, 16, 16)))
    outputs = [y + 1000 for y in outputs]
    plain = kernels.mixed_norm_sum_ref
    right = normed(weights.double(), *(y.double() for y in outputs), function=plain, none=0)
    mine, torchs = (normed(weights, *outputs, function=f, none=0) for f in (kernels.mixed_norm_sum, plain))
    assert (mine - right).norm() <= (torchs - right).norm()


def test_fused_operation_takes_no_pictures_and_expanded_gradients(device):
    empty = leaves(device, 2, (0, 3, 4, 4))
    y = normed(*empty)
    assert y.shape == (0, 3, 4, 4) and not any(g.any() for g in torch.autograd.grad(y.sum(), empty))
    inputs = leaves(device, 2, dtype=torch.float64)
    mine = torch.autograd.grad(kernels.mixed_sum(inputs[1:], inputs[0]).sum(), inputs)
    right = torch.autograd.grad(kernels.mixed_sum_ref(inputs[1:], inputs[0]).sum(), inputs)
    assert all(map(torch.allclose, mine, right))


@pytest.mark.parametrize(
    "means, variances, message",
    [
        ([torch.zeros(2)], [torch.ones(2)], "running_means has 1 and running_vars 1 entries; expected 2"),
        ([torch.zeros(2), None], [torch.ones(2)] * 2, "None in different places"),
        ([torch.zeros(2)] * 2, [torch.ones(3)] * 2, "running_vars.0. is a Float .3.* expected a contiguous Float .2."),
        ([torch.zeros(2).double()] * 2, [torch.ones(2)] * 2, "running_means.0. is a Double"),
    ],
)
def test_fused_norm_names_what_does_not_fit(device, means, variances, message):
    means, variances = ([None if t is None else t.to(device) for t in ts] for ts in (means, variances))
    with pytest.raises(RuntimeError, match=message):
        kernels.mixed_norm_sum(
            [torch.rand(2, 2, 3, 3).to(device)] * 2, torch.rand(2).to(device), means, variances, True
        )


def test_fused_norm_refuses_a_single_value_per_channel(device):
    with pytest.raises(RuntimeError, match="expected more than one value per channel"):
        normed(*leaves(device, 2, (1, 3, 1, 1)))


@pytest.mark.parametrize("apart", [False, True])
def test_a_fused_search_network_computes_what_the_plain_one_does(device, apart, monkeypatch):
    """apart: with torch's own convolutions, which are computed again in the backward pass."""
    results = []
    if apart:
        monkeypatch.setattr(kernels, "_on_cpu", lambda x: False)
    for mode in ("on", "off"):
        kernels.use(mode)
        torch.manual_seed(0)
        network = SearchNetwork(4, 10, 3, ALL, ALL).to(device, torch.float64)
        logits = network(torch.randn(6, 3, 16, 16).double().to(device))
        loss = F.cross_entropy(logits, torch.arange(6, device=device))
        gradients = torch.autograd.grad(loss, network.alphas() + network.weights())
        results.append([loss, logits, *gradients, *network.buffers()])
        with torch.no_grad():
            results[-1].append(network.eval()(torch.ones(2, 3, 16, 16).double().to(device)))
    assert all(torch.allclose(mine, right, rtol=1e-9, atol=1e-12) for mine, right in zip(*results, strict=True))


def test_a_fused_search_network_is_as_exact_in_float32_as_the_plain_one():
    def logits(mode, dtype):
        kernels.use(mode)
        torch.manual_seed(0)
        network = SearchNetwork(4, 10, 5, ALL, ALL).to(dtype)
        return network(torch.randn(8, 3, 32, 32).to(dtype)).detach().double()

    right = logits("off", torch.float64)
    fused, plain = ((logits(mode, torch.float32) - right).norm() / right.norm() for mode in ("on", "off"))
    assert fused <= 2 * plain and plain < 1e-6


def test_fused_operation_takes_slices_and_outputs_in_different_memory_formats(device):
    weights, *outputs = (t.detach() for t in leaves(device, 4, (4, 6, 8, 8), torch.float64))
    strange = [outputs[0].to(memory_format=torch.channels_last), outputs[1][:, :, ::2].repeat_interleave(2, 2)]
    strange += [outputs[2].transpose(2, 3), outputs[3][:1].expand(4, -1, -1, -1)]
    for order in (strange, strange[::-1], [y[1:3, 1:, ::3, 1:] for y in strange]):
        inputs = [weights.clone().requires_grad_(), *(y.detach().requires_grad_() for y in order)]
        mine, right = (normed(*inputs, function=f) for f in (kernels.mixed_norm_sum, kernels.mixed_norm_sum_ref))
        gradient = torch.randn_like(right).transpose(2, 3).contiguous().transpose(2, 3)
        gradients = [torch.autograd.grad(y, inputs, gradient) for y in (mine, right)]
        assert torch.allclose(mine, right) and all(map(torch.allclose, *gradients))


def test_fused_operation_leaves_alone_what_needs_no_gradient(device):
    weights, *outputs = leaves(device, 4, dtype=torch.float64)
    every = torch.autograd.grad(normed(weights, *outputs).square().sum(), [weights, *outputs])
    for needed in ([1], [0], [2, 4], [0, 3]):
        inputs = [t.detach().requires_grad_(i in needed) for i, t in enumerate([weights, *outputs])]
        some = torch.autograd.grad(normed(*inputs).square().sum(), [inputs[i] for i in needed])
        assert all(torch.allclose(mine, every[i], rtol=1e-12) for mine, i in zip(some, needed, strict=True))


def test_fused_operation_under_autocast_takes_the_widest_type_of_its_outputs(device):
    weights, *outputs = (t.detach() for t in leaves(device, 3))
    short = [outputs[0].bfloat16(), outputs[1].bfloat16(), outputs[2]]
    with torch.autocast(device, torch.bfloat16):
        y = kernels.mixed_sum(short, weights)
        assert kernels.mixed_sum(short[:2], weights[:2]).dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert torch.allclose(y, kernels.mixed_sum_ref([x.float() for x in short], weights), atol=1e-6)


def bench_rows(monkeypatch, tmp_path, *arguments):
    import bench

    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments, "--json", str(tmp_path / "rows.json")])
    bench.main()
    return json.loads((tmp_path / "rows.json").read_text())["rows"]


TINY_STEP = ("--stages", "3", "--channels", "2", "--batch", "2", "--device", "cpu")


def test_bench_finds_the_losses_of_both_ways_equal(monkeypatch, tmp_path):
    rows = bench_rows(monkeypatch, tmp_path, "losses", "--steps", "2", *TINY_STEP)
    assert [r["of"] for r in rows] == ["weights", "alphas"] * 2
    assert all(r["distance"]["kernels, float64"] < 1e-9 for r in rows)
    assert all(r["distance"]["last bit"] < 1e-9 < r["distance"]["kernels, float32"] < 0.1 for r in rows)


def test_bench_measures_a_step(monkeypatch, tmp_path):
    rows = bench_rows(monkeypatch, tmp_path, "step", "--rounds", "2", "--seconds", "0.01", *TINY_STEP)
    assert [(r["step"], r["side"]) for r in rows] == list(itertools.product(("weights", "alphas"), ("ours", "plain")))
    assert all(r["seconds"] > 0 for r in rows) and rows[0]["kept_per_picture"] < 0.5 * rows[1]["kept_per_picture"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["losses", "--data", "nowhere"], "no cifar10 in nowhere"),
        (["step", "--rounds", "1"], "--rounds is 1; expected 2 or more"),
        (["losses", "--dtype", "bfloat16"], "losses in bfloat16; expected float32"),
        (["step", "--dtype", "float16"], "step in float16; expected float32 or bfloat16"),
    ],
)
def test_bench_names_what_is_wrong(monkeypatch, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench_rows(monkeypatch, tmp_path, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("channels, width", [(1, 5), (3, 16), (16, 16), (20, 3), (64, 8)])
@pytest.mark.parametrize(
    "size, stride, dilation", [(0, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 2), (5, 2, 1), (5, 1, 2), (7, 1, 1)]
)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("norm", [None, "training", "evaluation"])
def test_fused_separable_convolution_equals_plain_torch(
    channels, width, size, stride, dilation, dtype, bound, norm, monkeypatch
):
    """size 0: without the depthwise convolution; norm: how the input is normalised first."""
    torch.manual_seed(0)
    x, depthwise = (
        torch.randn(2, channels, 9, width).to(dtype),
        torch.randn(channels, 1, size or 1, size or 1).to(dtype),
    )
    inputs = [x, torch.randn(6, channels, 1, 1).to(dtype)] + [depthwise] * (size > 0)
    settings = [stride, dilation * (size // 2), dilation]

    def run(function, dtype):
        x, pointwise, *depthwise = leaves = [t.to(dtype).requires_grad_() for t in inputs]
        running = (
            [torch.linspace(-1, 1, channels).to(dtype), torch.linspace(0.5, 2, channels).to(dtype)] if norm else []
        )
        y = function(x, *depthwise or [None], pointwise, *settings, *running, training=norm == "training", momentum=0.3)
        gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
        return [y, *torch.autograd.grad(y, leaves, gradient), *running]

    kernels.use("auto")
    rights = run(kernels.separable_ref, torch.float64)
    for apart in False, True:  # as where torch's own convolutions serve
        if apart:
            monkeypatch.setattr(kernels, "_on_cpu", lambda x: False)
            bound *= 1 if dtype == torch.float64 else 10
        for mine, right in zip(run(kernels.separable, dtype), rights, strict=True):
            assert mine.shape == right.shape and (mine.double() - right).norm() <= 5 * bound * right.norm()


@pytest.mark.parametrize("apart", [False, True])
def test_fused_separable_convolution_keeps_its_input_and_weights_only(apart, monkeypatch):
    if apart:
        monkeypatch.setattr(kernels, "_on_cpu", lambda x: False)
    inputs, kept = separable_leaves(), {}
    running = torch.zeros(4).double(), torch.ones(4).double()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        kernels.separable(*inputs, 1, 1, 1, *running, training=True)
    assert all(kept.pop(t.data_ptr()) == t.numel() for t in inputs)
    assert sum(kept.values()) <= 3 * 4  # statistics


def test_recomputed_convolutions_compute_only_what_the_gradients_asked_for_need(monkeypatch):
    monkeypatch.setattr(kernels, "_on_cpu", lambda x: False)
    x, depthwise, pointwise = separable_leaves()
    y = kernels.separable(x, depthwise.detach(), pointwise.detach(), padding=1)
    monkeypatch.setattr(F, "conv2d", lambda *_, **__: pytest.fail("an alpha step computed for a weight's gradient"))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_separable_convolutions_under_autocast_compute_in_the_shorter_type():
    inputs = [t.detach().float().requires_grad_() for t in separable_leaves()]
    running = [torch.zeros(4), torch.ones(4)]
    results = []
    for function in kernels.separable, kernels.separable_ref:
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*inputs, 1, 1, 1, *(t.clone() for t in running), training=True)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    assert [t.dtype for t in results[0]] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, right in zip(*results, strict=True):
        assert (mine.float() - right.float()).norm() <= 2e-2 * right.float().norm()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_fused_convolution_and_pooling_name_what_they_do_not_take():
    x, depthwise, pointwise = (t.detach().float() for t in separable_leaves())
    separable, ops = kernels.separable, torch.ops.pdarts
    for settings in ({"stride": 2**32 + 1}, {"dilation": 257}, {"padding": -1}):
        with pytest.raises(RuntimeError, match="expected at least 1, 0, 1 and 1, and at most 256"):
            separable(x, depthwise, pointwise, **settings)
    with pytest.raises(RuntimeError, match="1 to 256"):
        kernels.pool(x, "max", 2**32)
    with pytest.raises(RuntimeError, match="one of running_mean and running_var is None; expected both or none"):
        separable(x, depthwise, pointwise, running_mean=torch.zeros(4))
    with pytest.raises(RuntimeError, match="grad has shape .1, 1, 1, 1.; expected .2, 4, 5, 6."):
        ops.pool_backward(torch.zeros(1, 1, 1, 1), None, None, [2, 4, 5, 6], 1)
    with pytest.raises(RuntimeError, match="grad has shape .1, 3, 1, 1.; expected .2, 3, 5, 6."):
        ops.separable_backward(x[:1, :3, :1, :1], x, depthwise, pointwise, None, False, 1, 1, 1, [True] * 3)
    with pytest.raises(RuntimeError, match="x and y are Float .2, 4, 5, 6. and Float .1, 4, 5, 6.; expected Float"):
        ops.pool_backward(x, x, x[:1], [2, 4, 5, 6], 1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        calls = (lambda: separable(dual, depthwise, pointwise)), (lambda: kernels.pool(dual, "avg"))
        for call in (*calls, lambda: kernels.mixed_sum([dual], torch.ones(1))):
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                call()


def separable_leaves(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((2, 4, 5, 6), (4, 1, 3, 3), (3, 4, 1, 1))
    return [torch.randn(s, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_() for s in shapes]


def test_fused_separable_convolution_passes_gradcheck_opcheck_and_compiles():
    x, depthwise, pointwise = inputs = separable_leaves()
    function = functools.partial(kernels.separable, stride=2, padding=2, dilation=2)
    running = torch.zeros(4).double(), torch.ones(4).double()
    assert torch.autograd.gradcheck(function, inputs)
    for training in True, False:  # momentum 0: every call finds the same running statistics
        normed = functools.partial(function, running_mean=running[0], running_var=running[1], momentum=0.0)
        assert torch.autograd.gradcheck(functools.partial(normed, training=training), inputs)
    ops, detached, statistics = torch.ops.pdarts, [t.detach() for t in inputs], torch.rand(3, 1, 4).double() + 0.5
    gradient = torch.randn(2, 3, 5, 6).double()
    for op, arguments in (
        (ops.separable, (*inputs, None, False, 0.0, 2, 2, 2)),
        (ops.separable, (*inputs, None, True, 1e-5, 2, 2, 2)),
        (ops.separable, (*inputs, statistics, False, 1e-5, 2, 2, 2)),
        (ops.separable, (x, None, pointwise, None, False, 0.0, 1, 0, 1)),
        (ops.separable_backward, (gradient, *detached, None, False, 1, 1, 1, [True, True, True])),
        (ops.separable_backward, (gradient, *detached, None, False, 1, 1, 1, [True, False, False])),
        (ops.separable_backward, (gradient, *detached, statistics, True, 1, 1, 1, [True, False, True])),
    ):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
    for f in function, functools.partial(normed, training=True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        mine, right = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, f))
        assert all(map(torch.equal, mine, right))
    (gradient,) = torch.autograd.grad(function(*inputs).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


def test_fused_separable_convolution_gives_the_same_bits_with_any_number_of_threads():
    inputs = [torch.randn(s) for s in ((16, 16, 32, 32), (16, 1, 5, 5), (16, 16, 1, 1))]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = kernels.separable(
                *leaves, padding=2, running_mean=torch.zeros(16), running_var=torch.ones(16), training=True
            )
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize(
    "x, depthwise, pointwise, message",
    [
        ((2, 4, 5), (4, 1, 3, 3), (3, 4, 1, 1), "x has shape .2, 4, 5.; expected .N,C,H,W."),
        ((2, 4, 5, 5), (3, 1, 3, 3), (3, 4, 1, 1), "depthwise is a Float .3, 1, 3, 3.; expected a Float .4,1,k,k."),
        (
            (2, 4, 5, 5),
            (4, 1, 3, 3),
            (3, 5, 1, 1),
            "pointwise is a Float .3, 5, 1, 1.; expected a Float .channels,4,1,1.",
        ),
        ((2, 4, 2, 5), (4, 1, 3, 3), (3, 4, 1, 1), "expected it not to be smaller than the kernel"),
    ],
)
def test_fused_separable_convolution_names_what_does_not_fit(x, depthwise, pointwise, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.separable(torch.rand(x), torch.rand(depthwise), torch.rand(pointwise))


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (3, 16, 8, 8), (1, 1, 1, 1), (2, 20, 1, 33), (2, 8, 2, 1), (0, 3, 4, 4)]
)
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_pool_equals_plain_torch(shape, kind, stride, dtype):
    torch.manual_seed(0)
    # Of equal elements the first has the gradient: few values make many of them.
    x = (torch.randint(-2, 3, shape) if kind == "max" else torch.randn(shape)).to(dtype).requires_grad_()
    mine, right = (f(x, kind, stride) for f in (kernels.pool, kernels.pool_ref))
    gradient = torch.randn(right.shape).to(dtype)
    assert torch.equal(mine, right) or kind == "avg"  # which adds up in another order
    torch.testing.assert_close(mine, right)
    gradients = [torch.autograd.grad(y, x, gradient)[0] for y in (mine, right)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_fused_pool_of_infinite_elements_and_of_what_is_not_a_number_is_that_of_plain_torch(kind):
    values = torch.tensor([0.0, 1.0, 2.0, math.inf, -math.inf, math.nan])
    x = values[torch.randint(6, (2, 16, 9, 9), generator=torch.Generator().manual_seed(0))]
    x[0] = -math.inf
    torch.testing.assert_close(kernels.pool(x, kind), kernels.pool_ref(x, kind), equal_nan=True)


def test_fused_pool_passes_gradcheck_opcheck_and_compiles():
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).requires_grad_()
    ops, size = torch.ops.pdarts, [2, 3, 5, 6]
    for kind in "max", "avg":
        function = functools.partial(kernels.pool, kind=kind, stride=2)
        assert torch.autograd.gradcheck(function, x)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(*(torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, function)))
        given = [x.detach(), kernels.pool(x, kind, 2).detach()] if kind == "max" else [None, None]
        for op, arguments in (
            (ops.pool, (x, kind == "max", 1)),
            (ops.pool_backward, (torch.randn(2, 3, 3, 3).double(), *given, size, 2)),
        ):
            assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            gradient.sum().backward()


def test_fused_pool_propagates_what_is_not_a_number_and_names_what_does_not_fit():
    x = torch.randn(1, 1, 4, 4)
    x[0, 0, 0, 0] = math.nan
    assert kernels.pool(x, "max").isnan().equal(kernels.pool_ref(x, "max").isnan())
    with pytest.raises(RuntimeError, match="x has shape .4, 4.; expected .N,C,H,W."):
        kernels.pool(x[0, 0], "max")
    with pytest.raises(RuntimeError, match="stride is 0; expected at least one pixel and 1 to 256"):
        kernels.pool(x, "max", 0)
    with pytest.raises(ValueError, match="the kind of pooling is 'min'; expected max or avg"):
        kernels.pool(x, "min")


@pytest.mark.skipif("PDARTS_LARGE" not in os.environ, reason="needs 20 GB: set PDARTS_LARGE=1")
def test_fused_operation_takes_more_elements_than_32_bits_count(device):
    shape = (2, 2, 1 << 15, (1 << 14) + 1)  # 2^31 + 2^17 elements
    x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    x[-1, -1, -1] = 1
    running = [[f(2, device=device)] for f in FRESH]
    weights = torch.full((1,), 2.0, device=device, requires_grad=True)
    y = kernels.mixed_sum([x], weights)
    assert y[-1, -1, -1].eq(2).all() and y.count_nonzero() == shape[-1]
    (gradient,) = torch.autograd.grad(y, weights, x)
    assert gradient.item() == shape[-1]
    del y
    y = kernels.mixed_norm_sum([x], weights.detach(), *running, True)
    assert y[-1, -1, -1].gt(100).all() and y[:, 0].eq(0).all()


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_fused_operation_in_a_cuda_graph_and_on_another_stream():
    kernels.use("auto")
    inputs = leaves("cuda", 3, (8, 16, 8, 8))

    def step():
        y = normed(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    right, stream, graph = step(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, right, there)) and all(map(torch.equal, right, captured))


@beside
def test_the_module_works_without_its_kernels(tmp_path):
    shutil.copy(HERE / "pdarts.py", tmp_path)
    write_own_pictures(tmp_path)
    command = [sys.executable, "pdarts.py", "search", *ONE_STAGE, "--epochs", "1", "--warmup", "0", "--kernels"]
    auto, on = (
        subprocess.run([*command, mode, "--out", mode], cwd=tmp_path, capture_output=True, text=True)
        for mode in ("auto", "on")
    )
    assert auto.returncode == 0, auto.stderr
    assert json.loads((tmp_path / "auto/config.json").read_text())["kernels"] == "plain"
    assert on.returncode == 2 and not (tmp_path / "on").exists()
    assert on.stderr.startswith("pdarts.py: error: kernels is 'on', but no folder kernels lies beside pdarts.py;")


# ----------------------------------------------------------------------------------------------------------------------
# Damaged, hostile and random input: the right result, or one line and status 2
# ----------------------------------------------------------------------------------------------------------------------

# A failure names the case, which only its number decides. PDARTS_FUZZ=10 tries ten times as many.
FUZZ = int(os.environ.get("PDARTS_FUZZ", "1"))


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


def cases(count):
    """Numbers of cases, each with its own random numbers."""
    return ((number, random.Random(number)) for number in range(count * FUZZ))


@contextlib.contextmanager
def case(*what):
    try:
        yield
    except Exception as error:
        raise AssertionError(f"case {what}: {type(error).__name__}: {error}") from error


def accepted(reader, *arguments):
    """What `reader` returns, or None where it refuses with a message, which main prints in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # more lines
        try:
            return reader(*arguments)
        except (InputError, OSError) as error:
            assert 10 < len(str(error)) < 1000


def damaged(content: bytes, rng) -> bytes:
    """`content` with some bytes changed, cut off, left out, repeated or put in."""
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
    """JSON with a random value somewhere in place of another, or with parts left out, repeated or swapped."""
    if not isinstance(value, (list, dict)) or not value or rng.random() < 0.1:
        return rng.choice(STRANGE)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        new = value | {key: changed(value[key], rng)}
        return {k: v for k, v in new.items() if k != key} if rng.random() < 0.1 else new
    i, j = rng.randrange(len(value)), rng.randrange(len(value))
    new = [value[:i] + value[i + 1 :], value + value, value[:i] + value[j:], [*value[:i], value[j], *value[i + 1 :]]]
    return rng.choice([[*value[:i], changed(value[i], rng), *value[i + 1 :]]] * 8 + new)


def hostile_json(text):
    for depth in (10, 400, *range(900, 1000, 7), 10**5):
        yield text.replace('"sep_conv_3x3"', "[" * depth + "]" * depth, 1)
        yield text.replace('"sep_conv_3x3"', '{"a":' * depth + "0" + "}" * depth, 1)
        yield "[" * depth
    for number in ("9" * 4000, "9" * 5000, "1e999", "-1e999", "NaN", "-Infinity", "1" + "0" * 30, "1.0", "-0", "01"):
        yield text.replace(", 0]", f", {number}]", 1)
        yield text.replace("[2, 3, 4, 5]", f"[2, {number}]", 1)
    pair, many = '["none", 0],', 10**4
    yield text.replace('"normal": [', '"normal": [' + pair * many, 1)
    yield text.replace("[2, 3, 4, 5]", f"[{'2, ' * many}2]", 1)
    yield text.replace('{"normal"', '{"normal": [], "normal"', 1)
    yield from ("", "null", "{}", "\ufeff" + text, text + text, "\x00")


def test_random_genotype_files_are_drawn_as_they_say_or_refused(tmp_path, limits):
    path, taken = tmp_path / "genotype.json", 0

    def check(content: bytes):
        nonlocal taken
        path.write_bytes(content)
        genotype = accepted(pdarts.read_genotype, str(path))
        if genotype is None:
            return
        fields = json.loads(content)
        for kind in "normal", "reduce":
            pairs, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
            assert [list(pair) for pair in pairs] == fields[kind] and concat == fields[f"{kind}_concat"]
            assert all(op in pdarts.OPERATIONS and 0 <= source < 2 + i // 2 for i, (op, source) in enumerate(pairs))
            assert len(pairs) % 2 == 0 and set(concat) <= set(range(2, 2 + len(pairs) // 2))
            assert {*map(type, concat), *(type(source) for _, source in pairs)} == {int}
        for svg in pdarts.draw(genotype).values():
            ElementTree.fromstring(svg)
        taken += 1

    texts = [json.dumps(genotype._asdict()) for genotype in GENOTYPES.values()]
    for number, text in enumerate(hostile_json(texts[0])):
        with case("hostile", number):
            check(text.encode())
    for number, rng in cases(800):
        text = rng.choice(texts)
        with case(number):
            if number % 2:
                check(damaged(text.encode(), rng))
            else:
                value = json.loads(text)
                for _ in range(rng.choice((1, 1, 3))):
                    value = changed(value, rng)
                check(json.dumps(value).encode())
    assert taken > 20


def own_arrays():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, 8, 9, 2), np.uint8), np.arange(12) % 3
    return {"x_train": x, "y_train": y, "x_test": x[:5], "y_test": y[:5]}


def npz(parts, compression=zipfile.ZIP_STORED) -> bytes:
    """An .npz of arrays, or of bytes in their place."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, part in parts.items():
            if not isinstance(part, bytes):
                array, part = part, io.BytesIO()
                np.save(part, array)
                part = part.getvalue()
            archive.writestr(f"{name}.npy", part)
    return file.getvalue()


def npy(descr, shape, data=b"", version=1) -> bytes:
    """An array file that claims what it likes; descr and shape are Python text."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + data


def hostile_arrays(path):
    """Array files that are not what they claim."""
    pickled, data = pickle.dumps(np.array([Exploit(path)] * 12, object)), bytes(12 * 8 * 9 * 2)
    yield from (pickled, b"", b"\x93NUMPY", npy("'|O'", "(12,)", pickled), npy("[('a', '|O')]", "(12,)", pickled))
    for shape in (
        "(10**12,)",
        f"({10**12}, 8, 8)",
        f"({2**62}, 2, 2)",
        f"({10**30},)",
        "(-12, 8, 9)",
        "(12, -8, -9, 2)",
    ):
        yield from (npy("'|u1'", shape, data), npy("'<i8'", shape, data), npy("'|V0'", shape), npy("'|S0'", shape))
    for descr in ("'|V2147483647'", "('|u1', (99999, 9999))", "'<U99999999'", "'<m8[s]'", "'<M8[s]'", "'<c8'", "'|b1'"):
        yield from (npy(descr, "(12,)", data), npy(descr, "()", data), npy(descr, "(12, 8, 9, 2)", data))
    for text in (
        "(" * 500,
        "-" * 9000 + "1",
        "[" * 90 + "]" * 90,
        "__import__('os')",
        "1" * 9000,
        "'\\d'",
        "12L",
        "0x",
    ):
        yield from (npy(text, "(12,)", data), npy("'|u1'", text, data), npy("'|u1'", f"({text},)", data, version=2))


SHAPES = (
    (12, 8, 9, 2),
    (4, 8, 8),
    (5, 9, 8, 1),
    (5, 8, 9, 2),
    (3, 8, 8),
    (1, 8, 8),
    (12, 8),
    (12,),
    (),
    (0, 8, 8),
    (9, 8, 8, 0),
)


def fits(x, y, x_test, y_test) -> bool:
    """Whether arrays are pictures and their classes."""
    for a, b in (x, y), (x_test, y_test):
        if a.dtype != np.uint8 or a.ndim not in (3, 4) or not a.size or min(a.shape[1:3]) < 8:
            return False
        if b.dtype.kind not in "iu" or b.shape != a.shape[:1] or b.min() < 0:
            return False
    same = (*x.shape[1:], 1)[:3] == (*x_test.shape[1:], 1)[:3]
    return bool(same and len(x) >= 4 and max(1, y_test.max()) <= y.max() < len(x))


def test_random_npz_files_give_the_pictures_in_them_or_are_refused(tmp_path, limits):
    path, arrays, taken = tmp_path / "own.npz", own_arrays(), 0

    def check(content: bytes, arrays=arrays, must=None):
        """`arrays`: what it holds; must: whether it has to be accepted, if that is known."""
        nonlocal taken
        path.write_bytes(content)
        read = accepted(pdarts.load, "shapes", str(path))
        assert must is None or must == (read is not None)
        assert list(tmp_path.iterdir()) == [path]  # no Exploit
        if read is not None:
            order, taken = np.random.default_rng(0).permutation(len(arrays["x_train"])), taken + 1
            for split, rows in ("train", order), ("test", slice(None)):
                x, y = arrays[f"x_{split}"][rows], arrays[f"y_{split}"][rows]
                x = x[..., None] if x.ndim == 3 else x
                assert np.array_equal(getattr(read, f"x_{split}").permute(0, 2, 3, 1).numpy(), x)
                assert np.array_equal(getattr(read, f"y_{split}").numpy(), y)

    for name in arrays:
        check(npz({key: array for key, array in arrays.items() if key != name}), must=False)
    for name in "x_train", "y_test":
        for number, content in enumerate(hostile_arrays(tmp_path / "exploited")):
            with case("hostile", name, number):
                check(npz(arrays | {name: content}), must=False)
    for bomb in npy("'|u1'", f"({2**18}, 8, 8, 2)", bytes(2**25)), bytes(2**25):
        check(npz(arrays | {"x_train": bomb}, zipfile.ZIP_DEFLATED), must=False)
    check(npy("'|u1'", f"({10**12},)"), must=False)

    files = [npz(arrays), npz(arrays, zipfile.ZIP_DEFLATED), npz(arrays | {"more": np.zeros(3)})]
    for number, rng in cases(400):
        with case(number):
            content = rng.choice(files)
            # Its table of contents lies at the end.
            cut = rng.choice((0, len(content) - 300))
            check(content[:cut] + damaged(content[cut:], rng))
    for number, rng in cases(400):
        parts = {}
        for split, shape in ("train", rng.choice(SHAPES)), ("test", rng.choice(SHAPES)):
            shape = SHAPES[number % 3] if rng.random() < 0.7 else shape
            x = np.full(shape, number % 128, rng.choice(["u1"] * 40 + ["i1", "f4", "?", ">u2"]))
            y = np.arange(len(x) if x.ndim and rng.random() < 0.9 else 7) % rng.choice((1, 2, 3, 3))
            y = y.astype(rng.choice(["i8", "u1", ">i4", "u8"] * 10 + ["f8", "?", "m8[s]", "S2", "c8"]))
            if len(y) and y.dtype.kind == "i" and rng.random() < 0.2:
                y[-1] = rng.choice((-1, 2**31 - 1, 7))
            parts |= {f"x_{split}": x, f"y_{split}": y}
        with case(number):
            check(npz(parts), parts, must=fits(*parts.values()))
    assert taken > 30


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_random_binary_cifar_files_give_the_pictures_in_them_or_are_refused(tmp_path, limits, name):
    write_cifar(tmp_path, name, binary=True, rows=4)
    form, taken = pdarts.CIFAR[name], 0
    files = {path: path.read_bytes() for path in sorted((tmp_path / form.binary).iterdir())}
    row = form.label_bytes + 3072
    for number, rng in cases(150):
        path = rng.choice(list(files))
        content = files[path][: row * rng.randrange(5)] if rng.random() < 0.3 else damaged(files[path], rng)
        path.write_bytes(content)
        with case(number):
            read = accepted(pdarts.load, name, str(tmp_path))
            rows = [np.frombuffer(p.read_bytes()[: len(p.read_bytes()) // row * row], np.uint8) for p in files]
            rows = [r.reshape(-1, row) for r in rows]
            labels = np.concatenate(rows)[:, form.label_bytes - 1]
            fits = content and len(content) % row == 0 and labels.max() < form.classes
            train = np.concatenate([r for p, r in zip(files, rows) if "test" not in p.name])
            assert (read is not None) == bool(fits and len(train) >= 4)
            if read is not None:
                taken += 1
                assert np.array_equal(read.x_train.flatten(1).numpy(), train[:, form.label_bytes :])
                assert np.array_equal(read.y_train.numpy(), train[:, form.label_bytes - 1])
        path.write_bytes(files[path])
    assert taken > 20


def hostile_pickles(path):
    """Pickles that call, or that take all time or memory, in place of a whole file or as its labels."""
    for code in range(256):
        yield b"\x80\x04(" + bytes([code]) + b"\xff\xff\xff\x7f\x00\x00\x00\x00" * 2 + b"\n" * 4 + b"t}."
    nested = b"\x80\x02)" + b"2\x86" * 60  # a tuple of twice a tuple of twice a tuple ...
    yield from (nested + end for end in (b".", b"}" + nested[2:] + b"K\x00s.", b"(" + nested[2:] + b"K\x00d."))
    yield from (b"(" + nested[2:] + end for end in (b"\x91.", b"\x8f(" + nested[2:] + b"\x90."))
    x = np.zeros((2, 3072), np.uint8)
    lists = functools.reduce(lambda inner, _: [inner, inner], range(30), [0, 0])
    for labels in (
        lists,
        [0.5, 1],
        ["0", "1"],
        [True, False],
        [0, 10**30],
        [0, None],
        (0, 1),
        {0: 1},
        [[0], [1]],
        "01",
    ):
        yield python2_pickle({b"labels": labels}, x)
    for call in (Exploit(path), [Exploit(path)], {Exploit(path): 0}):
        yield from (pickle.dumps({b"data": x.tobytes(), b"labels": call}, protocol) for protocol in range(6))
    for call in (b"cos\nsystem\n", b"cbuiltins\nexec\n", b"cnumpy\nload\n", b"cnumpy.core.multiarray\nexec\n"):
        yield call + b"(S'touch " + bytes(path) + b"'\ntR."
        yield b"(S'touch " + bytes(path) + b"'\n" + call.replace(b"c", b"i", 1) + b"."


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_random_cifar_pickles_give_the_pictures_in_them_or_are_refused(tmp_path, limits, name):
    write_cifar(tmp_path, name, binary=False, rows=4)
    form, taken, reader = pdarts.CIFAR[name], 0, pdarts._read_cifar_file
    path = tmp_path / form.python / form.test[0]
    whole = path.read_bytes()
    for number, content in enumerate(hostile_pickles(tmp_path / "exploited")):
        with case("hostile", number):
            path.write_bytes(content)
            assert accepted(reader, path, form, False) is None
    for number, rng in cases(300):
        # Most of a file is pixels, all that can be damaged lies around them.
        x = whole.index(b"T" + struct.pack("<i", 4 * 3072)) + 5
        parts = [whole[:x], whole[x : x + 4 * 3072], whole[x + 4 * 3072 :]]
        which = rng.choice((0, 0, 1, 2))
        parts[which] = damaged(parts[which], rng)
        path.write_bytes(b"".join(parts))
        with case(number):
            read = accepted(reader, path, form, False)
            if read is not None:
                taken += 1
                assert read[0].shape == (len(read[1]), 3, 32, 32) and set(read[1]) <= set(range(form.classes))
                assert read[0].tobytes() in path.read_bytes()
    assert taken > 10 and [p.name for p in tmp_path.iterdir()] == [form.python]


def test_random_weights_are_those_of_the_network_or_are_refused(tmp_path, limits):
    network = Network(Genotype([("none", 0)] * 2, [2], [("none", 1)] * 2, [2]), 1, 3, 3)
    right, path, taken = {key: value.clone() for key, value in network.state_dict().items()}, tmp_path / "weights", 0

    def saved(state, **options):
        file = io.BytesIO()
        torch.save(state, file, **options)
        return file.getvalue()

    def check(content, exact=True):
        nonlocal taken
        path.write_bytes(content)
        for value in network.state_dict().values():
            value.fill_(7)
        if accepted(lambda: pdarts.load_weights(network, path, torch.device("cpu")) or True):
            taken += 1
            assert not exact or all(map(torch.equal, network.state_dict().values(), right.values()))
        assert list(tmp_path.iterdir()) == [path]

    check(pickle.dumps(right))
    files = saved(right), saved(right, _use_new_zipfile_serialization=False)  # the second without sums
    for content in files:
        check(content)
    assert taken == 2
    for number, rng in cases(200):
        with case(number):
            content = files[number % 2]
            cut = rng.choice((0, len(content) * 9 // 10))
            check(content[:cut] + damaged(content[cut:], rng), exact=number % 2 == 0)
    strange = [
        Exploit(tmp_path / "exploited"),
        torch.zeros(()),
        torch.zeros(2, 0),
        torch.zeros(3).to_sparse(),
        *STRANGE,
    ]
    for number, rng in cases(100):
        key = rng.choice(list(right))
        like = rng.choice((right[key].double, right[key].to_sparse, right[key].cfloat, right[key][None].clone))
        state = right | {key: like() if number % 2 else rng.choice(strange)}
        if rng.random() < 0.2:
            state[rng.choice(STRANGE[:-4])] = state.pop(rng.choice(list(state)))
        with case(number, key):
            check(saved(state))


def test_random_checkpoints_and_settings_go_on_as_they_say_or_are_refused(tmp_path, monkeypatch, capsys, limits):
    data = own_pictures((8, 8), n=16)
    config = dataclasses.replace(TINY, cells=(3,), candidates=(8,), skip_dropout=(0.3,))
    monkeypatch.setattr(pdarts, "shapes", lambda: data)
    folder, taken, seen = tmp_path / "run", collections.Counter(), []
    pdarts.search(config, data, folder)
    checkpoint, settings = folder / "checkpoint.pt", folder / "config.json"
    content, right = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    run = pdarts.Run("search", config, data, torch.device("cpu"))
    for number, rng in cases(100):
        with case("checkpoint", number):
            checkpoint.write_bytes(damaged(content, rng))
            state = accepted(run._read, checkpoint)
            if state is not None:
                assert_same(state, right)
    saved = json.loads(settings.read_text())
    result = pdarts.SearchResult(GENOTYPES["PDARTS"], [])
    monkeypatch.setattr(pdarts, "search", lambda config, *_, **__: seen.append(config) or result)
    for number, rng in cases(100):
        with case("settings", number):
            settings.write_text(json.dumps(changed(saved, rng)))
            status = pdarts.main(["search", "--resume", str(folder)])
            stderr = capsys.readouterr().err
            taken[status] += 1
            assert status == 0 and not stderr or status == 2 and re.fullmatch("pdarts.py: error: .*\n", stderr)
    assert len(seen) == taken[0] > 5 and all(isinstance(config, pdarts.SearchConfig) for config in seen)


def test_random_archives_are_unpacked_whole_or_leave_nothing(tmp_path, limits):
    write_cifar(tmp_path / "made", "cifar10", binary=True, rows=1)
    form, target, path, taken = pdarts.CIFAR["cifar10"], tmp_path / "target", tmp_path / "archive", 0
    files = {f"{form.binary}/{p.name}": p.read_bytes() for p in (tmp_path / "made" / form.binary).iterdir()}
    path.touch()
    target.mkdir()
    before = set(tmp_path.rglob("*"))
    links = [*files, "evil", "..", "/etc/passwd", str(tmp_path), "test_batch.bin", "x" * 90]
    names = [*files, form.binary, "../evil", f"{form.binary}/../../evil", str(tmp_path / "evil"), "evil", "x" * 90]
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    for number, rng in cases(250):
        members = [(name, tarfile.REGTYPE, content) for name, content in files.items()]
        for _ in range(rng.randrange(4)):
            members.append((rng.choice(names), rng.choice([*kinds, tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE]), b""))
        if number % 2:
            rng.shuffle(members)
        with tarfile.open(path, rng.choice(("w", "w:gz")), format=rng.randrange(3)) as tar:
            for name, kind, content in members:
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, rng.choice(links), len(content)
                tar.addfile(member, io.BytesIO(content))
        last = {name: (kind, content) for name, kind, content in members}  # as tar does
        right = {name: last[name][1] for name in files if last[name][0] == tarfile.REGTYPE}
        whole = rng.random() < 0.6
        if not whole:
            path.write_bytes(damaged(path.read_bytes(), rng))
        this = form._replace(url=path.as_uri(), md5=hashlib.md5(path.read_bytes()).hexdigest())
        with case(number):
            accepted(pdarts.download_cifar, "cifar10", target, this)
            written = set(tmp_path.rglob("*")) - before
            if not whole and written:  # no more is known than that it is all there
                assert {p.name for p in written} == {form.binary, *(name.split("/")[1] for name in files)}
            elif whole:
                right = right if right.keys() == files.keys() else {}
                assert {p.relative_to(target).as_posix(): p.read_bytes() for p in written if p.is_file()} == right
            taken += bool(written)
            assert not any(p.is_symlink() for p in written)
        shutil.rmtree(target)
        target.mkdir()
    assert taken > 20


VALUES = """0 1 2 3 4 5 8 16 100 -1 -0 +3 007 1_0 1e3 0.5 1.5 1e-9 1e30 1e31 1e999 nan inf -inf NaN 0x10 1,2 ½ ٣
9223372036854775807 9223372036854775808 -9223372036854775809 true None auto cpu cpu:7 cuda:99 meta mkldnn xla demo
cifar10 PDARTS here here/file here/cell.json here/missing/x %s %(prog)s {} - -- --cells -9 @here/file \udcff \U0001f600
\u2028 $HOME * ~ .""".split()
VALUES += ["", " ", "a b", "two\nlines", "9" * 30, "9" * 5000, "x" * 5000]


def test_random_command_lines_mean_what_they_say_or_are_refused(tmp_path, monkeypatch, capsys, limits):
    here, calls, taken = tmp_path / "here", [], 0
    here.mkdir()
    (here / "file").write_text("something")
    (here / "cell.json").write_text(json.dumps(GENOTYPES["DARTS_V2"]._asdict()))
    monkeypatch.chdir(tmp_path)
    data = own_pictures((8, 8, 1))
    monkeypatch.setattr(pdarts, "shapes", lambda: data)

    def stub(result):
        def call(*arguments, **_):
            pdarts.pick_device(next(a for a in arguments[2:] if isinstance(a, str)))
            calls.extend(arguments)
            return result

        return call

    monkeypatch.setattr(pdarts, "search", stub(pdarts.SearchResult(GENOTYPES["PDARTS"], [])))
    monkeypatch.setattr(pdarts, "evaluate", stub(pdarts.EvaluateResult(None, pdarts.Count(1, 1), 0.5)))
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own
    before = set(tmp_path.rglob("*"))
    for number, rng in cases(700):
        kind = rng.choice((pdarts.SearchConfig, pdarts.EvaluateConfig))
        settings = {f.name: f for f in dataclasses.fields(kind) if f.name != "dataset"}
        genotype, given = rng.choice(["PDARTS", "here/cell.json", rng.choice(VALUES)]), {}
        arguments = ["search"] if kind is pdarts.SearchConfig else ["evaluate", genotype]
        if rng.random() < 0.1:
            arguments, settings = ["draw", genotype], {"output": None}
        elif rng.random() < 0.3:
            settings = dict.fromkeys(["preset", "data", "out", "device", "kernels", "weights", "download", "new\n"])
        for name in rng.sample(list(settings), k=min(rng.choice((1, 1, 2, 4)), len(settings))):
            values = rng.choices(VALUES, k=rng.choice((1, 1, 1, 1, 1, 0, 2, 3)))
            if rng.random() < 0.5:  # more likely ones
                values = rng.choice((["1"], ["2"], ["3"], ["0.5"], ["8", "3"], ["3", "4", "5"], ["cpu"], []))
            flag = f"--{name.replace('_', '-')}"
            arguments += [f"{flag}={values[0]}", *values[1:]] if values and rng.random() < 0.5 else [flag, *values]
            given[name] = values
        calls.clear()
        with case(number, [a[:40] for a in arguments]), warnings.catch_warnings():
            warnings.simplefilter("error")
            status = pdarts.main(arguments)
            stdout, stderr = capsys.readouterr()
            written = set(tmp_path.rglob("*")) - before
            if status:
                assert status == 2 and stderr.startswith("pdarts.py: error: ") and stderr.count("\n") == 1
                assert not calls and not written
            elif arguments[0] == "draw":
                assert len(written) == 2 and stdout.count("\n") == 2
            else:
                taken += 1
                assert stderr == "" and not written
                config = next(a for a in calls if isinstance(a, kind))
                for name, values in given.items():
                    if name in settings and settings[name] is not None and values:
                        value = getattr(config, name)
                        numbers = value if isinstance(value, tuple) else (value,)
                        assert numbers == tuple(type(n)(text) for n, text in zip(numbers, values, strict=True))
                        low, high = (settings[name].metadata[bound] for bound in ("low", "high"))
                        assert all((low is None or n >= low) and (high is None or n <= high) for n in numbers)
                        assert all(map(math.isfinite, numbers))
                    elif name in ("data", "out", "weights"):
                        assert values and values[0]
            for path in written:
                path.unlink()
    assert taken > 30


@pytest.mark.parametrize(
    "mode, message",
    [("auto", "out of memory; "), ("perhaps", "the kernels cannot be used: PDARTS_KERNELS is 'perhaps'")],
)
def test_too_little_memory_and_a_wrong_environment_get_one_line(tmp_path, monkeypatch, capsys, mode, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pdarts, "shapes", lambda: own_pictures((8, 8)))
    monkeypatch.setattr(pdarts, "count", lambda *_: torch.empty(10**15))
    monkeypatch.setattr(kernels, "_mode", mode)
    assert pdarts.main(["evaluate", "PDARTS", "--cells", "3", "--channels", "2"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"pdarts.py: error: {message}") and stderr.count("\n") == 1
