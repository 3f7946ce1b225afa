"""Tests of pdarts.py: the paper's facts, the official code's decisions, and runs that resume as if never stopped."""

import base64
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path

import pdarts
from harness.report.cells import count
from pdarts import GENOTYPES, OPERATIONS, PRIMITIVES, Genotype, InputError, Loader, Network, derive, shrink

torch.set_num_threads(1)  # the feature maps are small
os.environ["OMP_NUM_THREADS"] = "1"  # for what the tests start

HERE = pathlib.Path(pdarts.__file__).parent
ALL = (PRIMITIVES,) * 14
FEW = (("none", "skip_connect", "sep_conv_3x3"),) * 14  # small sets of candidates for fast tests
TINY = pdarts.SearchConfig(
    depths=(3, 3, 3), channels=2, epochs=2, alpha_start=1, batch_size=4, skip_dropout=(0.1, 0.2, 0.3), crop_padding=1)
SMALL_SPACE = pdarts.SearchSpace(("none", "avg_pool_3x3", "skip_connect", "dil_conv_3x3"), nodes=1)
SMALL = dataclasses.replace(TINY, depths=(3, 3), keep=(4, 3), skip_dropout=(0.2, 0.3))  # a search of SMALL_SPACE
EVALUATION = pdarts.EvaluateConfig(
    depth=3, channels=2, epochs=3, batch_size=6, cutout=4, crop_padding=1, drop_path=0.6)
ONE_NODE = pdarts.parse_genotype("skip_connect 0, sep_conv_3x3 1", "max_pool_3x3 0, dil_conv_3x3 1")
TWO_NODES = Genotype([("skip_connect", 0), ("sep_conv_3x3", 1)] * 2, [2, 3],
                     [("max_pool_3x3", 0), ("dil_conv_3x3", 1)] * 2, [2, 3])


def arrays(n=16, size=(10, 12), channels=3):
    """Images and labels. The first half has classes 0 and 1, the second 2 and 3, so that labels tell the halves."""
    x = torch.randint(256, (n, channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % 2 + 2 * (torch.arange(n) >= n // 2)


def small_search(config=SMALL, data=None, space=SMALL_SPACE, **options):
    return pdarts.Search(config, data or pdarts.search_data(*arrays(), config), space=space, **options)


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a, b, where=""):
    """Equal, bit for bit."""
    (of_a, form_a), (of_b, form_b) = tree_flatten_with_path(a), tree_flatten_with_path(b)
    assert form_a == form_b, where
    for (path, x), (_, y) in zip(of_a, of_b):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, where + keystr(path)


class CustomLoader:
    """Batches of given images and labels, in order, in double precision; notes the (seed, start) of its epochs."""

    def __init__(self, x, y, batch, part=slice(None)):
        self.batches, self.part, self.epochs = list(zip(x.double().div(255).split(batch), y.split(batch))), part, []

    def __len__(self):
        return len(self.batches)

    def epoch(self, seed, start=0):
        self.epochs.append((seed, start))
        for x, y in self.batches[start:]:
            yield x[self.part], y[self.part]

# --- the file alone ---------------------------------------------------------------------------------------------------


ALONE = """if True:
    import pathlib, sys, torch, pdarts
    assert pathlib.Path(pdarts.__file__).parent == pathlib.Path.cwd()
    x, y = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 3
    state = torch.get_rng_state()
    config = pdarts.SearchConfig((3,), (8,), (0.1,), channels=2, epochs=1, alpha_start=0, batch_size=8)
    genotype = pdarts.run(pdarts.Search, config, pdarts.search_data(x, y, config)).genotype()
    config = pdarts.EvaluateConfig(depth=3, channels=2, epochs=1, batch_size=16)
    data = pdarts.Data(loader := pdarts.Loader(x, y, config), 3)
    network = pdarts.run(pdarts.Evaluation, genotype, config, data).network
    print(pdarts.correct_predictions(network, loader.epoch(0)))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's
    assert not {"harness", "kernels"} & set(sys.modules)"""


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A process that works while the other tests run."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(HERE / "pdarts.py", folder)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ALONE], cwd=folder, env=environment, **streams) as process:
        yield process

# --- the official code's decisions ------------------------------------------------------------------------------------


def golden_searches():
    """12 searches as the official functions decided them; an operation is written as its index in PRIMITIVES."""

    def cell(text):
        return [(PRIMITIVES[int(op)], int(source)) for op, source in text.split()]

    searches = json.loads((HERE / "testdata/derive.json").read_text())
    assert len(searches) == 12
    for search in searches:
        alphas = [[torch.from_numpy(np.frombuffer(base64.b64decode(a), "<f4").reshape(14, -1).copy()) for a in stage]
                  for stage in search["alphas"]]
        kept = [[tuple(tuple(PRIMITIVES[int(k)] for k in edge) for edge in cell.split()) for cell in stage]
                for stage in search["kept"]]
        yield alphas, kept, {m: cell(text) for m, text in search["normal"].items()}, cell(search["reduce"])


def test_stages_keep_the_candidates_that_the_official_code_keeps():
    for alphas, kept, _, _ in golden_searches():
        candidates = [ALL, ALL]
        for of_stage, right, keep in zip(alphas[:2], kept, (5, 3), strict=True):
            candidates = [shrink(c, a, keep) for c, a in zip(candidates, of_stage, strict=True)]
            assert candidates == right


def test_derived_cells_are_those_of_the_official_code_for_every_limit_of_skips():
    for alphas, kept, normal, reduce in golden_searches():
        assert set(normal) == {"unrestricted", *map(str, range(9))}
        for limit, expected in normal.items():
            genotype = derive(*kept[1], *alphas[2], None if limit == "unrestricted" else int(limit))
            assert genotype == Genotype(expected, [2, 3, 4, 5], reduce, [2, 3, 4, 5])


@pytest.mark.parametrize("stem, channels, depth, classes, bare, with_head", [
    ("cifar", 36, 20, 10, 3433798, 3910224), ("cifar", 16, 8, 10, 292026, 727492),
    ("imagenet", 48, 14, 1000, 4944352, 6206664), ("cifar", 36, 20, 100, 3485728, None)])
def test_networks_of_the_pdarts_cell_have_the_official_numbers_of_parameters(
        stem, channels, depth, classes, bare, with_head):
    with torch.device("meta"):  # nothing is computed
        network = Network(GENOTYPES["PDARTS"], channels, classes, depth, auxiliary=with_head is not None, stem=stem)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    assert sum(n for name, n in sizes.items() if not name.startswith("auxiliary_head.")) == bare
    assert sum(sizes.values()) == (with_head or bare)


@pytest.mark.parametrize("depth, keep, weights", [(5, 8, 1275834), (11, 5, 2585146), (17, 3, 2791930)])
def test_search_networks_have_the_official_numbers_of_parameters(depth, keep, weights):
    candidates = (PRIMITIVES[-keep:],) * 14
    with torch.device("meta"):  # nothing is computed
        network = pdarts.SearchNetwork(16, 10, depth, candidates, candidates)
    assert sum(p.numel() for p in network.weights()) == weights
    assert sum(p.numel() for p in network.parameters()) == weights + 2 * 14 * keep


def test_count_gives_the_published_cost_of_the_pdarts_cell_and_takes_any_image():
    network = Network(GENOTYPES["PDARTS"], 36, 10, 20, auxiliary=True)
    parameters, multiply_adds = count(network)
    assert parameters == 3433798 and multiply_adds == pytest.approx(532e6, rel=0.001)
    assert network.training  # as it was
    network = Network(TWO_NODES, 4, 10, 3, in_channels=1)
    (_, wide), (_, small) = (count(network, size, in_channels=1) for size in ((16, 32), 16))
    linear = 10 * network.classifier.in_features  # does not grow with the image
    assert wide - linear == 2 * (small - linear)

# --- the search space -------------------------------------------------------------------------------------------------


def test_a_cell_has_14_edges_numbered_node_by_node():
    assert pdarts.SPACE.edges == tuple((node, source) for node in range(4) for source in range(node + 2))
    assert len(pdarts.SPACE.edges) == 14 and pdarts.cell_edges(2) == pdarts.SPACE.edges[:5]


PAPER_SEARCH = {
    "depths": (5, 11, 17), "keep": (8, 5, 3), "skip_dropout": (0.0, 0.4, 0.7), "max_skips": 2, "channels": 16,
    "stem": "cifar", "stem_stride": 1, "epochs": 25, "alpha_start": 10, "batch_size": 96, "lr": 0.025, "momentum": 0.9,
    "weight_decay": 3e-4, "alpha_lr": 6e-4, "alpha_weight_decay": 1e-3, "clip": 5.0, "crop_padding": 4, "flip": True,
    "dtype": "float32", "seed": 0}
PAPER_EVALUATION = {
    "depth": 20, "channels": 36, "stem": "cifar", "stem_stride": 1, "epochs": 600, "batch_size": 128, "lr": 0.025,
    "schedule": "cosine", "warmup": 0, "momentum": 0.9, "weight_decay": 3e-4, "clip": 5.0, "label_smoothing": 0.0,
    "auxiliary": True, "auxiliary_weight": 0.4, "drop_path": 0.3, "cutout": 16, "crop_padding": 4, "flip": True,
    "dtype": "float32", "seed": 0}


def test_the_paper_s_settings_are_the_defaults():
    assert dataclasses.asdict(pdarts.SearchConfig()) == dataclasses.asdict(pdarts.CIFAR10) == PAPER_SEARCH
    assert dataclasses.asdict(pdarts.CIFAR100) == PAPER_SEARCH | {"skip_dropout": (0.1, 0.2, 0.3)}
    assert dataclasses.asdict(pdarts.EvaluateConfig()) == PAPER_EVALUATION


def test_every_setting_of_the_method_says_where_it_comes_from():
    for config in pdarts.SearchConfig, pdarts.EvaluateConfig:
        for field in dataclasses.fields(config):
            named = any(source in field.metadata["help"] for source in ("paper", "official"))
            assert field.name in ("dtype", "seed") or named


BAD_SETTINGS = [
    ({"lr": math.nan}, "lr is nan; expected a number from 0 to 1e+30"),
    ({"lr": math.inf}, "lr is inf; expected a number from 0 to 1e+30"),
    ({"lr": -0.1}, "lr is -0.1; expected a number from 0"),
    ({"lr": "0.1"}, "lr is '0.1'; expected a number from 0"),
    ({"lr": None}, "lr is None; expected a number"),
    ({"clip": 0.0}, "clip is 0.0; expected a number from 1e-09"),
    ({"momentum": 1.5}, "momentum is 1.5; expected a number from 0 to 1"),
    ({"epochs": 0}, "epochs is 0; expected a whole number from 1 to 1000000"),
    ({"epochs": 2.0}, "epochs is 2.0; expected a whole number"),
    ({"epochs": True}, "epochs is True; expected a whole number"),
    ({"flip": 1}, "flip is 1; expected True or False"),
    ({"seed": 2**63}, "seed is 9223372036854775808; expected a whole number from 0 to 9223372036854775807"),
    ({"dtype": "float16"}, "dtype is 'float16'; expected float32 or bfloat16"),
    ({"dtype": ["float32"]}, "dtype is ['float32']; expected float32 or bfloat16"),
]
BAD_SEARCH_SETTINGS = [
    ({"depths": (5, 2, 17)}, "depths is 2; expected a whole number from 3 to 1000"),
    ({"depths": 5}, "depths is 5; expected one value for each stage"),
    ({"depths": (5, "11", 17)}, "depths is '11'; expected a whole number"),
    ({"depths": (5, 11)}, "depths (5, 11), keep (8, 5, 3) and skip_dropout (0.0, 0.4, 0.7) differ in their numbers of "
     "stages; expected one value for each stage"),
    ({"depths": (), "keep": (), "skip_dropout": ()}, "depths (), keep () and skip_dropout () differ in their numbers"),
    ({"keep": (8, 3, 5)}, "keep is (8, 3, 5); expected no stage to keep more candidates than the one before it"),
    ({"skip_dropout": (0.0, 0.4, 1.0)}, "skip_dropout is 1.0; expected a number from 0 to 0.99"),
    ({"skip_dropout": (0.0, 0.4, math.nan)}, "skip_dropout is nan; expected a number"),
    ({"epochs": 2, "alpha_start": 2}, "alpha_start is 2 of 2 epochs; expected less, or alphas never learn"),
]


def test_numbers_of_numpy_and_torch_become_python_s():
    given = {"lr": np.float64(0.5), "channels": np.int64(8), "flip": np.bool_(False), "clip": torch.tensor(2.0)}
    config = pdarts.SearchConfig(**given, depths=np.array([3, 4, 5]), keep=[8, np.int32(5), 3])
    assert config == pdarts.SearchConfig(lr=0.5, channels=8, flip=False, clip=2.0, depths=(3, 4, 5), keep=(8, 5, 3))
    assert json.loads(json.dumps(dataclasses.asdict(config)))["keep"] == [8, 5, 3]


@pytest.mark.parametrize("config, changes, message", [
    *((pdarts.SearchConfig, *bad) for bad in BAD_SETTINGS + BAD_SEARCH_SETTINGS),
    *((pdarts.EvaluateConfig, *bad) for bad in BAD_SETTINGS)], ids=str)
def test_a_setting_out_of_bounds_is_refused_by_its_name_its_value_and_its_range(config, changes, message):
    with pytest.raises(InputError) as refused:
        config(**changes)
    assert str(refused.value).startswith(message)


def test_whole_numbers_are_taken_for_rates():
    assert pdarts.SearchConfig(lr=1, momentum=0).lr == 1 and pdarts.EvaluateConfig(drop_path=0).drop_path == 0


@pytest.mark.parametrize("depth, reductions", [(3, [1, 2]), (5, [1, 3]), (11, [3, 7]), (17, [5, 11]), (20, [6, 13])])
def test_reduction_cells_stand_at_one_and_two_thirds(depth, reductions):
    candidates = (SMALL_SPACE.primitives,) * len(SMALL_SPACE.edges)
    network = pdarts.SearchNetwork(2, 10, depth, candidates, candidates, space=SMALL_SPACE)
    assert [i for i, cell in enumerate(network.cells) if cell.reduction] == reductions
    assert network.classifier.in_features == SMALL_SPACE.nodes * 2 * 4  # channels doubled twice


def test_alphas_start_small_and_are_shared_by_the_cells_of_a_kind():
    network = pdarts.SearchNetwork(2, 10, 3, ALL, ALL)
    assert network.alphas_normal.shape == network.alphas_reduce.shape == (14, 8)
    assert 0 < network.alphas_normal.abs().max() < 0.01


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_rounds_sizes_up(name):
    for stride, (height, width) in itertools.product((1, 2), ((8, 8), (7, 9), (1, 2))):
        y = OPERATIONS[name].build(4, stride, True)(torch.randn(2, 4, height, width))
        assert y.shape == (2, 4, -(-height // stride), -(-width // stride))


def test_factorized_reduction_covers_every_pixel_once():
    op = pdarts.FactorizedReduce(2, 2, affine=False)
    op.bn = nn.Identity()
    for conv in op.conv_1, op.conv_2:
        nn.init.ones_(conv.weight)
    for size in 4, 5:
        x = torch.rand(1, 2, size, size)
        first, second = op(x)[0]
        assert torch.allclose(first, x[0, :, ::2, ::2].sum(0))
        odd = x[0, :, 1::2, 1::2].sum(0)
        assert torch.allclose(second[: len(odd), : len(odd)], odd)
        assert second.sum().item() == pytest.approx(odd.sum().item())  # nothing but zeros in the added row and column


def test_average_pool_does_not_count_padding():
    assert torch.equal(OPERATIONS["avg_pool_3x3"].build(1, 1, True)(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_op_is_the_softmax_weighted_sum_of_its_candidates(stride):
    torch.manual_seed(0)
    mixed, x = pdarts.MixedOp(PRIMITIVES, 4, stride).double(), torch.randn(3, 4, 7, 7).double()
    probabilities = torch.rand(8).double()
    expected = sum(p * op(x) for p, op in zip(probabilities[1:], mixed.ops, strict=True))  # `none` adds nothing
    assert torch.allclose(mixed(x, probabilities), expected, rtol=1e-12)
    assert torch.equal(pdarts.MixedOp(("none",), 4, stride)(x, probabilities[:1]), torch.zeros_like(expected))


class CellTracer(torch.fx.Tracer):
    """Goes into cells and edges; what lies on the edges stays whole."""

    def is_leaf_module(self, module, name):
        return not isinstance(module, (pdarts.SearchCell, pdarts.MixedOp, pdarts.Cell))


def test_cells_can_be_traced():
    x, probabilities, space = torch.randn(2, 4, 8, 8), torch.rand(5, 8), pdarts.SearchSpace(nodes=2)
    search_cell = pdarts.SearchCell(ALL[:5], 4, 4, 4, reduction=True, reduction_before=False, space=space)
    cell = pdarts.Cell(TWO_NODES.normal, [2, 3], 4, 4, 4, reduction=False, reduction_before=False)
    for module, inputs in (search_cell, (x, x, probabilities)), (cell, (x, x)):
        for traced in torch.fx.GraphModule(module, CellTracer().trace(module)), torch.fx.symbolic_trace(module.eval()):
            assert torch.equal(traced.eval()(*inputs), module.eval()(*inputs))


@pytest.mark.parametrize("other", [(2, 3, 8, 8), pytest.param((3, 3, 13, 13), marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["search", "evaluation"])
def test_a_network_compiles_to_one_graph_in_training_for_all_rates_batches_and_sizes(kind, other):
    if kind == "search":
        space = pdarts.SearchSpace(("none", "skip_connect"), nodes=1)
        network = pdarts.SearchNetwork(2, 4, 3, (space.primitives,) * 2, (space.primitives,) * 2, space=space)
        set_rate = network.set_skip_dropout
    else:
        network = Network(ONE_NODE, 2, 4, 3)
        set_rate = network.set_drop_path
    graphs, outputs = [], []
    dynamic = None if other == (2, 3, 8, 8) else True
    compiled = torch.compile(
        network, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for rate, size in (0.0, (2, 3, 8, 8)), (0.9, (2, 3, 8, 8)), (0.9, other):
        set_rate(rate)
        outputs.append(torch.utils._pytree.tree_leaves(compiled(torch.ones(size)))[0])
    assert len(graphs) == 1 and not torch.equal(*outputs[:2]) and outputs[2].shape == (other[0], 4)


def test_cells_use_the_probabilities_of_their_kind():
    torch.manual_seed(0)
    network, outputs = pdarts.SearchNetwork(2, 10, 3, FEW, FEW).eval(), []
    for cell in network.cells[:2]:  # the first is a normal cell, the others are reduction cells
        cell.register_forward_hook(lambda *args: outputs.append(args[-1]))
    for change in torch.zeros(14, 3), torch.randn(14, 3):
        network.alphas_reduce.data += change
        network(torch.ones(2, 3, 8, 8))
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[1], outputs[3])


def test_norms_are_affine_and_pools_are_bare_in_evaluation_only():
    network = pdarts.SearchNetwork(2, 10, 3, ALL, ALL)
    norms = [m for m in network.cells.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.affine for norm in norms) and network.stem[1].affine
    for pool in network.cells[0].edges[0].ops[:2]:
        assert isinstance(pool.op[0], (nn.MaxPool2d, nn.AvgPool2d)) and isinstance(pool.op[1], nn.BatchNorm2d)
    evaluation = Network(GENOTYPES["PDARTS"], 4, 10, 3)
    assert all(m.affine for m in evaluation.modules() if isinstance(m, nn.BatchNorm2d))
    assert isinstance(evaluation.cells[1]._ops[0], nn.AvgPool2d)


def test_skip_dropout_acts_on_stride_one_skips_only_and_can_be_set():
    network = pdarts.SearchNetwork(2, 10, 3, FEW, FEW)
    network.set_skip_dropout(0.25)
    for cell in network.cells:
        for edge, (_, source) in zip(cell.edges, pdarts.SPACE.edges):
            rates = [op.rate.item() for op in edge.ops if isinstance(op, pdarts.SkipDropout)]
            assert rates == ([] if cell.reduction and source < 2 else [0.25])
    rates = [m.rate for m in network.modules() if isinstance(m, pdarts.SkipDropout)]
    network.set_skip_dropout(0.5)  # in place
    assert {rate.item() for rate in rates} == {0.5}


def test_skip_dropout_is_per_element_and_in_training_only():
    torch.manual_seed(0)
    mixed, ones = pdarts.MixedOp(("skip_connect",), 2, 1), torch.ones(4, 2, 8, 8)
    mixed.ops[0].rate.fill_(0.5)
    y = mixed(ones, torch.ones(1))
    assert set(y.unique().tolist()) == {0.0, 2.0} and 0.4 < (y == 0).float().mean() < 0.6
    assert torch.equal(mixed.eval()(ones, torch.ones(1)), ones)


@pytest.mark.parametrize("size, stride", [((8, 8), 1), ((9, 13), 1), ((32, 31), 2)])
def test_search_network_takes_any_size_number_of_channels_and_stride_of_the_stem(size, stride):
    candidates, sizes = (SMALL_SPACE.primitives,) * 2, []
    network = pdarts.SearchNetwork(
        2, 7, 3, candidates, candidates, in_channels=2, space=SMALL_SPACE, stem_stride=stride)
    network.cells[0].register_forward_hook(lambda *args: sizes.append(args[-1].shape[2:]))
    assert network(torch.randn(3, 2, *size)).shape == (3, 7)
    assert sizes == [tuple(math.ceil(n / stride) for n in size)]


def conv_1x1(channels, stride, affine):
    return nn.Sequential(nn.Conv2d(channels, channels, 1, stride), nn.BatchNorm2d(channels, affine=affine))


def test_another_search_space_works_beside_the_default_in_one_process(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "conv_1x1", pdarts.Primitive(conv_1x1))
    own = pdarts.SearchSpace(("skip_connect", "conv_1x1", "none"), nodes=3)
    config = dataclasses.replace(TINY, depths=(3,), keep=(3,), skip_dropout=(0.1,), epochs=1, alpha_start=0)
    searches = [(own, config), (pdarts.SPACE, dataclasses.replace(config, keep=(8,)))]
    data = pdarts.search_data(*arrays(8), config)
    running, other = (small_search(config, data, space) for space, config in searches)
    assert len(list(zip(running, other))) == (1 + 1) + 1  # by turns
    stage = running.stages[0]
    assert stage.candidates_normal == (own.primitives,) * 9 and stage.alphas_normal.shape == (9, 3)
    genotype = stage.genotype()
    assert len(genotype.normal) == len(genotype.reduce) == 6 and genotype.normal_concat == [2, 3, 4]
    assert {name for name, _ in genotype.normal + genotype.reduce} <= {"skip_connect", "conv_1x1"}
    assert other.stages[0].candidates_normal == ALL
    assert pdarts.SearchSpace().primitives == PRIMITIVES


def test_an_operation_is_added_by_one_entry_in_the_registry(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "conv_1x1", pdarts.Primitive(conv_1x1))
    own, images = pdarts.SearchSpace(("none", "conv_1x1"), nodes=1), torch.randn(2, 3, 8, 8)
    names, alphas = (own.primitives,) * 2, torch.zeros(2, 2)
    assert pdarts.SearchNetwork(2, 3, 3, names, names, space=own)(images).shape == (2, 3)
    assert Network(derive(names, names, alphas, alphas), 2, 3, 3).eval()(images).shape == (2, 3)

# --- schedule ---------------------------------------------------------------------------------------------------------


def test_skip_dropout_rate_in_every_epoch_of_a_stage():
    for initial in 0.1, 0.4, 0.7:
        rates = [pdarts.skip_dropout_rate(initial, epoch) for epoch in range(25)]
        assert rates[:10] == pytest.approx([initial * (24 - e) / 25 for e in range(10)])
        assert rates[10] == initial and rates[10:] == pytest.approx([initial * math.exp(-0.2 * e) for e in range(15)])


def test_learning_rate_falls_as_a_cosine_from_the_first_epoch():
    rates = [pdarts.cosine(0.025, epoch, 25) for epoch in range(25)]
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * epoch / 25)) / 2 for epoch in range(25)])


def test_learning_rate_falls_evenly_and_its_last_step_in_fifths():
    rates = [pdarts.linear(0.5, epoch, 250) for epoch in range(250)]
    assert rates[:245] == pytest.approx([0.5 * (245 - epoch) / 245 for epoch in range(245)])
    assert rates[245:] == pytest.approx([0.5 * share / (5 * 245) for share in (5, 4, 3, 2, 1)])
    for epochs in range(1, 8):  # fewer than the official code can take
        short = [pdarts.linear(1.0, epoch, epochs) for epoch in range(epochs)]
        assert short[0] == 1 and short == sorted(short, reverse=True) and short[-1] > 0

# --- from stage to stage, derivation and refinement -------------------------------------------------------------------


ZEROS = torch.zeros(14, 8)
FOR_NONE = torch.eye(8)[:1].repeat(14, 1)


def test_shrink_drops_the_first_of_equal_candidates_and_keeps_the_order():
    assert shrink(ALL, ZEROS, 5) == (PRIMITIVES[3:],) * 14
    assert shrink(ALL, FOR_NONE, 3) == (("none", "dil_conv_3x3", "dil_conv_5x5"),) * 14


def test_derive_never_chooses_none_and_keeps_the_later_of_equal_edges():
    expected = [("dil_conv_5x5", source) for source in (0, 1, 1, 2, 2, 3, 3, 4)]
    assert derive(ALL, ALL, FOR_NONE, FOR_NONE) == (expected, [2, 3, 4, 5]) * 2


def test_refinement_lets_another_edge_come_in():
    # Node 1 (edges 2, 3, 4): skips on all, strong on 2 and 3; without its skip, edge 2 is weaker than edge 4's skip.
    candidates = (("skip_connect", "sep_conv_3x3", "dil_conv_3x3"),) * 14
    alphas = torch.zeros(14, 3)
    alphas[:, 1] = 9.0
    alphas[[2, 3, 4], 1] = -9.0
    alphas[[2, 3, 4], 0] = torch.tensor([2.0, 3.0, 1.0])
    assert derive(candidates, candidates, alphas, alphas, 2).normal[2:4] == [("skip_connect", 0), ("skip_connect", 1)]
    assert derive(candidates, candidates, alphas, alphas, 1).normal[2:4] == [("skip_connect", 1), ("dil_conv_3x3", 2)]


def test_refinement_finds_candidates_whose_probability_rounds_to_zero():
    candidates = (("none", "avg_pool_3x3", "skip_connect"),) * 14
    cell = derive(candidates, candidates, torch.tensor([[200.0, 0.0, 0.0]] * 14), torch.zeros(14, 3), max_skips=0)
    assert {name for name, _ in cell.normal} == {"avg_pool_3x3"}


def test_refinement_continues_where_the_weakest_skip_is_all_that_its_edge_has():
    candidates = (("none", "skip_connect"), ("skip_connect", "sep_conv_3x3"))
    alphas = torch.tensor([[0.7, 0.3], [0.6, 0.4]]).log()
    assert derive(candidates, candidates, alphas, alphas, 1).normal == [("skip_connect", 0), ("sep_conv_3x3", 1)]


SKIPS = (("none", "skip_connect"),) * 14
IMAGES, LABELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("call, message", [
    (lambda: shrink(ALL, ZEROS, 9), "keep is 9; expected 1 to 8"),
    (lambda: shrink(ALL, torch.zeros(14, 5), 3), r"alphas have shape \[14, 5\]; expected \[14, 8\]"),
    (lambda: shrink(ALL[:3], torch.zeros(3, 8), 3), "lengths .8, 8, 8.; expected equal ones, 2, 5, 9, ... of them"),
    (lambda: shrink((*ALL[:13], ("none",)), ZEROS, 3), "8, 1.; expected equal ones, 2, 5, 9, ... of them"),
    (lambda: shrink(((),) * 14, torch.zeros(14, 0), 1), "0.; expected equal ones"),
    (lambda: shrink(ALL, ZEROS * math.nan, 3), "alphas hold numbers that are not finite; expected finite ones"),
    (lambda: derive((("none",),) * 14, ALL, torch.zeros(14, 1), ZEROS), "edge 0 has no candidate but none"),
    (lambda: derive(SKIPS, SKIPS, ZEROS[:, :2], ZEROS[:, :2], 0), "no candidate but skip_connect; .* max_skips=0"),
    (lambda: pdarts.SearchNetwork(2, 10, 3, (("skip_connect", "none"),) * 14, ALL), "one or more of .* this order"),
    (lambda: pdarts.SearchNetwork(2, 10, 3, ALL, (("sep_conv_9x9",),) * 14), "candidates .'sep_conv_9x9',.; expected"),
    (lambda: pdarts.Search(SMALL, None), "keep starts with 4; expected 8, all primitives"),
        (lambda: pdarts.Search(pdarts.SearchConfig(keep=(8, 5, 2)), None), "ends with 2; expected at least 3"),
    (lambda: pdarts.Search(pdarts.SearchConfig(), pdarts.Data([], 4)), "data.val is None; expected"),
    (lambda: pdarts.SearchSpace(("none", "conv_9x9")), "unknown primitives .*conv_9x9"),
    (lambda: pdarts.SearchSpace(("none", "skip_connect", "none")), "'none'.; expected one or more, each once"),
    (lambda: pdarts.SearchSpace(()), "primitives ..; expected one or more"),
    (lambda: pdarts.SearchSpace(nodes=0), "cells of 0 nodes; expected 1 or more"),
    (lambda: pdarts.SearchNetwork(2, 10, 3, ALL, ALL, space=pdarts.SearchSpace(nodes=3)), "equal ones, 9 of them"),
    (lambda: Network("PDARTS", 4, 10, 3), "genotype is a str; expected a Genotype"),
    (lambda: Network(GENOTYPES["PDARTS"], 4, 10, 2), "depth is 2; expected at least 3 cells"),
    (lambda: Network(GENOTYPES["PDARTS"], 4, 10, 3, stem="mnist"), "stem is 'mnist' of 4 channels; expected"),
    (lambda: pdarts.SearchNetwork(1, 10, 3, FEW, FEW, stem="imagenet"), "'imagenet' of 1 channels; .* of 2 or more"),
    (lambda: Network(TWO_NODES._replace(normal=[("conv_1x1", 0)] * 2), 4, 10, 3), "pair 0 .* .'conv_1x1', 0.; exp"),
    (lambda: Network(TWO_NODES._replace(reduce=[("none", 2)] * 2), 4, 10, 3), "'none', 2.; .* input from 0 to 1"),
    (lambda: Network(TWO_NODES._replace(normal=[(["none"], 0)] * 2), 4, 10, 3), "pair 0 .* ..'none'., 0.; expected"),
    (lambda: Network(TWO_NODES._replace(normal=[("none", "0")] * 2), 4, 10, 3), "'none', '0'.; .* input from 0 to 1"),
    (lambda: Network(TWO_NODES._replace(normal=TWO_NODES.normal[:3]), 4, 10, 3), "a cell has 3 pairs; expected two"),
    (lambda: Network(TWO_NODES._replace(reduce=[]), 4, 10, 3), "a cell has 0 pairs; expected two for each node"),
    *((lambda concat=concat: Network(TWO_NODES._replace(reduce_concat=concat), 4, 10, 3),
       r"the concat of a cell is .*; expected states from 2 to 3") for concat in ([2, 9], [-1], [0, 2], [], "23", 4)),
    (lambda: Network(TWO_NODES._replace(normal=None), 4, 10, 3), "a cell has the pairs None; expected two for each"),
    (lambda: Network(TWO_NODES._replace(normal=[1, 1]), 4, 10, 3), "pair 0 of a cell is 1; expected one of"),
    *((lambda name=name, size=size: Network(TWO_NODES, **(dict(channels=4, num_classes=10, depth=3) | {name: size})),
       f"^{name} is {size!r}; expected a whole number from 1")
      for name, size in (("channels", 0), ("channels", "4"), ("num_classes", 0), ("num_classes", 2.5),
                         ("stem_stride", 0), ("in_channels", None))),
    (lambda: pdarts.SearchNetwork(2, -1, 3, FEW, FEW), "num_classes is -1; expected a whole number from 1"),
    (lambda: Network(TWO_NODES, 4, 10, 3.5), "depth is 3.5; expected at least 3 cells"),
    (lambda: pdarts.SearchSpace(nodes=2.5), "cells of 2.5 nodes; expected 1 or more"),
    (lambda: Loader(IMAGES.float(), LABELS, TINY), r"x is torch.float32 \[4, 3, 8, 8\] .* expected .*uint8 .N,C,H,W."),
    (lambda: Loader(IMAGES.numpy(), LABELS, TINY), "x is a ndarray and y a Tensor; expected tensors, uint8 .N,C,H,W."),
    (lambda: Loader(IMAGES, LABELS - 1, TINY), "y holds -1; expected class indices from 0"),
    (lambda: Loader(IMAGES, LABELS, TINY, [0.5], [0.5]), r"mean is .0.5. and std .0.5.; expected 3 numbers"),
    (lambda: Loader(IMAGES, LABELS, TINY, [0.5] * 3), "and std None; expected 3 numbers"),
    (lambda: Loader(IMAGES, LABELS, TINY, [0.5] * 3, [0.5, 0.5, 0]), "std .0.5, 0.5, 0.; .*, those of std above 0"),
    (lambda: Loader(IMAGES, LABELS, TINY, [0.5] * 3, [0.5, 0.5, math.nan]), "nan.; .*, those of std above 0"),
    *((lambda x=x, y=y: pdarts.search_data(x, y, TINY), message + ".*; expected tensors, uint8 .*, 4 images or more")
      for x, y, message in (
          (IMAGES.numpy(), LABELS.numpy(), "x is a ndarray and y a ndarray"),
          (IMAGES[:, 0], LABELS, r"x is torch.uint8 \[4, 8, 8\]"),
          (IMAGES, LABELS.int(), "y torch.int32"),
          (IMAGES, LABELS[:, None], r"y torch.int64 \[4, 1\]"),
          (IMAGES[:3], LABELS[:3], r"x is torch.uint8 \[3, 3, 8, 8\]"))),
    (lambda: pdarts.search_data(IMAGES, LABELS + 2, TINY, num_classes=2), "y holds 2 of 2 classes; expected class"),
    (lambda: Loader(IMAGES, LABELS[:3], TINY), r"y torch.int64 \[3\]; expected"),
    (lambda: Loader(IMAGES, LABELS.int(), TINY), r"y torch.int32 \[4\]; expected .* int64"),
    (lambda: Loader(IMAGES[:1], LABELS[:1], TINY), "2 images or more"),
])
def test_wrong_arguments_get_a_message_that_says_what_was_expected(call, message):
    with pytest.raises(InputError, match=message):
        call()

# --- the architect ----------------------------------------------------------------------------------------------------


def test_an_architecture_step_is_adam_s_on_the_alphas_and_computes_no_gradients_of_weights():
    torch.manual_seed(0)
    network, labels = pdarts.SearchNetwork(2, 3, 3, FEW, FEW).double(), torch.arange(6) % 3
    images, before = torch.randn(6, 3, 8, 8).double(), [w.detach().clone() for w in network.weights()]
    loss = F.cross_entropy(network(images), labels)
    expected = [alpha.detach().clone().requires_grad_() for alpha in network.alphas()]
    for alpha, gradient in zip(expected, torch.autograd.grad(loss, network.alphas())):
        alpha.grad = gradient
    norm = nn.utils.clip_grad_norm_(expected, 1e-3)
    torch.optim.Adam(expected, 6e-4, (0.5, 0.999), weight_decay=1e-3).step()
    asked = []
    network.register_forward_hook(lambda *_: asked.extend(w.requires_grad for w in network.weights()))
    mine, logits = pdarts.Architect(network, clip=1e-3).update(images, labels)
    assert norm > 1e-3 and logits.shape == (6, 3) and torch.allclose(mine, loss) and not mine.requires_grad
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(network.alphas(), expected))
    assert_same([w.detach() for w in network.weights()], before)
    assert asked and not any(asked) and all(w.grad is None for w in network.weights())

# --- the search -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_search():
    """A search of two nodes, its events, its alphas after each, and the labels that its architect was given:
    those of the alphas' batch and of the batch of the next step of the weights."""

    def noted(*args, **options):
        architect = pdarts.Architect(*args, **options)
        update = architect.update
        architect.update = lambda *batches: labels.append(batches[1::2]) or update(*batches)
        return architect

    events, alphas, labels = [], [], []
    search = small_search(TINY, space=pdarts.SearchSpace(nodes=2), architect=noted)
    for event in search:
        events.append(event)
        alphas.append(search.network and [alpha.detach().clone() for alpha in search.network.alphas()])
        if type(event) is pdarts.Epoch:
            rates = {m.rate.item() for m in search.network.modules() if isinstance(m, pdarts.SkipDropout)}
            assert len(rates) == 1 and rates.pop() == pytest.approx(event.rate)
            assert search.weight_optimizer.param_groups[0]["lr"].item() == pytest.approx(event.lr)
    return search, events, alphas, labels


def test_a_search_yields_its_steps_epochs_and_stages_with_their_rates(tiny_search):
    _, events, *_ = tiny_search
    expected = ["Step", "Step", "Epoch", "Step", "Step", "Epoch", "Stage"] * 3
    assert [type(event).__name__ for event in events] == expected
    for stage, epoch in itertools.product(range(3), range(2)):
        *steps, end = events[7 * stage + 3 * epoch :][:3]
        rate = pdarts.skip_dropout_rate(TINY.skip_dropout[stage], epoch, 2, 1)
        assert end == (stage, epoch, pdarts.cosine(TINY.lr, epoch, 2), rate)
        for step in steps:
            assert step.size == 4 and step.loss.isfinite() and 0 <= step.correct <= 4
            assert step.alpha_size == 4 * epoch and (step.alpha_loss is None) == (epoch == 0)
            assert epoch == 0 or step.alpha_loss.isfinite() and 0 <= step.alpha_correct <= 4


def test_alphas_learn_from_the_second_half_and_not_in_the_first_epochs(tiny_search):
    _, events, alphas, labels = tiny_search
    assert len(labels) == 3 * 2  # stages, steps of the epoch after the warm-up
    assert all((of_alphas >= 2).all() and (of_weights < 2).all() for of_alphas, of_weights in labels)
    for stage in range(3):
        *warm_up, first, second, last, _ = alphas[7 * stage : 7 * stage + 7]
        assert_same(warm_up, [warm_up[0]] * 3)
        assert not any(map(torch.equal, [*warm_up[0], *first], [*first, *second]))
        assert_same(second, last)
        assert_same(last, list(events[7 * stage + 6][2:]))  # those of the stage


def test_each_stage_keeps_candidates_of_the_stage_before(tiny_search):
    stages = tiny_search[0].stages
    assert stages[0].candidates_normal == stages[0].candidates_reduce == ALL[:5]
    for before, after, keep in zip(stages, stages[1:], (5, 3)):
        assert after.candidates_normal == shrink(before.candidates_normal, before.alphas_normal, keep)
        assert after.candidates_reduce == shrink(before.candidates_reduce, before.alphas_reduce, keep)
    assert stages[-1].genotype(1) == derive(*stages[-1], 1)


def test_equal_seeds_give_equal_bits_and_leave_the_caller_s_random_state():
    def found(**settings):
        config = dataclasses.replace(SMALL, **settings)
        found = pdarts.run(pdarts.Search, config, pdarts.search_data(*arrays(), config), space=SMALL_SPACE)
        return found.genotype(), found.stages

    first = found()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, (no_skips, other) = found(), found(seed=1, max_skips=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(first, second)
    assert not torch.equal(first[1][0].alphas_normal, other[0].alphas_normal)
    assert "skip_connect" not in {name for name, _ in no_skips.normal}


def resumes_after_every_event(make):
    """Return the events of what `make` makes; resumed with the state after any of them, it ends with the same bits."""
    whole, events, states = make(), [], []
    for event in whole:
        events.append(event)
        states.append(saved_and_loaded(pdarts.state_dict(whole)))
    for i, state in enumerate(states):
        torch.manual_seed(i)
        again = make()
        pdarts.load_state_dict(again, state)
        assert_same(list(again), events[i + 1 :], f"events after {i}, a {type(events[i]).__name__}")
        assert_same(pdarts.state_dict(again), pdarts.state_dict(whole), f"end after {i}")
    broken_off = make()
    assert_same(list(iter(lambda: next(iter(broken_off), None), None)), events)
    return events


def test_a_search_resumes_after_any_event_with_the_same_bits():
    def with_custom_loaders():  # of 3 batches and 2
        data = pdarts.Data(CustomLoader(x, y, 6), 4, val=CustomLoader(x[:6], y[:6], 3))
        return small_search(config, data, prepare=nn.Module.double)

    config, (x, y) = dataclasses.replace(SMALL, depths=(3,), keep=(4,), skip_dropout=(0.3,)), arrays()
    # stages, epochs, steps
    assert len(resumes_after_every_event(small_search)) == 2 * (2 * (2 + 1) + 1)
    assert len(resumes_after_every_event(with_custom_loaders)) == 2 * (3 + 1) + 1


def test_a_shorter_validation_split_is_begun_again_with_a_new_seed():
    x, y = arrays()
    train, val, batches = CustomLoader(x[:10], y[:10], 2), CustomLoader(x[10:14], torch.arange(4), 2), []
    list(small_search(data=pdarts.Data(train, 4, val=val), prepare=nn.Module.double,
                      wrap_step=lambda step: lambda *batch: batches.append(batch) or step(*batch)))
    assert [batch[3].tolist() for batch in batches if len(batch) == 4] == 2 * [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    assert len({seed for seed, _ in val.epochs}) == 6 and len({seed for seed, _ in train.epochs}) == 4
    whole = list(itertools.islice(pdarts.endless(val, 7, 0), 9))
    for start in range(6):
        val.epochs.clear()
        assert_same(list(itertools.islice(pdarts.endless(val, 7, start), 3)), whole[start : start + 3])
        assert val.epochs[0][1] == start % 2  # nothing is made to be skipped


def test_prepare_may_replace_a_layer_which_is_trained_then():
    def prepare(network):
        network.weights()
        network.classifier = nn.Sequential(network.classifier, nn.Linear(4, 4))
        prepared.append((network, network.classifier[1].weight.detach().clone()))
        return network

    prepared, search = [], small_search(prepare=prepare)
    used = [search.network for event in search if type(event) is pdarts.Epoch]
    assert used == [network for network, _ in prepared for _ in range(2)] and len(prepared) == 2
    assert not any(torch.equal(network.classifier[1].weight, before) for network, before in prepared)


def test_average_is_given_all_gradients_of_alphas_and_of_weights_which_are_clipped_then():
    calls = []

    def average(gradients):
        calls.append(gradients)
        return [1e6 * gradient for gradient in gradients]

    search = small_search(average=average)
    for event in search:
        if type(event) is pdarts.Step:
            stepped = [search.network.alphas()] * (event.alpha_size > 0) + [search.network.weights()]
            for gradients, parameters in zip(calls, stepped, strict=True):
                assert [g.shape for g in gradients] == [p.shape for p in parameters]
                assert all(torch.equal(g.sign(), p.grad.sign()) for g, p in zip(gradients, parameters))
                assert torch.cat([p.grad.flatten() for p in parameters]).norm() == pytest.approx(5.0, rel=1e-4)
            calls.clear()


def test_two_ranks_that_average_their_gradients_do_the_steps_of_one_process():
    config, (x, y) = dataclasses.replace(SMALL, skip_dropout=(0.0, 0.0)), arrays(size=(8, 8))
    met, of_rank = threading.Barrier(2, timeout=60), [None, None]

    def average(rank, gradients):
        of_rank[rank] = gradients
        met.wait()
        mean = [(first + second) / 2 for first, second in zip(*of_rank, strict=True)]
        met.wait()
        return mean

    def frozen(network):  # in evaluation mode: batch norm's statistics of the parts of a batch differ
        network.double().eval().train = lambda: network
        return network

    def begun(part, **options):
        data = pdarts.Data(CustomLoader(x[:8], y[:8], 4, part), 4, val=CustomLoader(x[8:], y[8:], 4, part))
        search = small_search(config, data, prepare=frozen, **options)
        search.begin_stage()  # here, one after the other: torch's random state is shared
        return search

    one = begun(slice(None))
    ranks = [begun(slice(rank, None, 2), rank=rank, average=functools.partial(average, rank)) for rank in (0, 1)]
    before, *others = (saved_and_loaded(search.network.state_dict()) for search in (one, *ranks))
    assert_same(others, [before] * 2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda search: list(itertools.islice(search, 6)), ranks))  # but the end of the stage
    list(itertools.islice(one, 6))
    right, first, second = (search.network.state_dict() for search in (one, *ranks))
    assert_same(first, second)
    assert all(torch.allclose(first[key], right[key], rtol=1e-9, atol=1e-12) for key in right)
    assert not any(torch.allclose(before[key], right[key], rtol=1e-3) for key in ("alphas_reduce", "stem.0.weight"))


def test_every_step_of_every_rank_drops_other_elements():
    def seen(step):
        return lambda *batch: seeds.append(torch.initial_seed()) or step(*batch)

    seeds = []
    for rank in 0, 1:
        list(small_search(rank=rank, wrap_step=seen))
    assert len(seeds) == len(set(seeds)) == 2 * 2 * 2 * 2  # ranks, stages, epochs, steps


FORMATS = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("of_p, of_gradient, of_momentum", itertools.product(FORMATS, repeat=3))
def test_a_step_takes_gradients_and_loaded_momenta_of_another_memory_format(of_p, of_gradient, of_momentum):
    start, gradient, momentum = torch.randn(3, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(start.to(memory_format=of_p, copy=True))
    optimizer = pdarts.sgd([p], EVALUATION)
    pdarts.load_optimizer(optimizer, {0: {"momentum_buffer": momentum.to(memory_format=of_momentum, copy=True)}})
    pdarts.apply_gradients(optimizer, [p], [gradient.to(memory_format=of_gradient)], 1e9)
    expected = torch.nn.Parameter(start.clone())
    plain = torch.optim.SGD([expected], EVALUATION.lr, EVALUATION.momentum, weight_decay=EVALUATION.weight_decay)
    plain.load_state_dict(plain.state_dict() | {"state": {0: {"momentum_buffer": momentum}}})
    expected.grad = gradient
    plain.step()
    torch.testing.assert_close(p, expected)


def test_loading_keeps_the_tensor_of_the_learning_rate_which_a_captured_step_reads():
    for training in small_search(), small_evaluation():
        next(iter(training))
        optimizer, state = training.weight_optimizer, saved_and_loaded(pdarts.state_dict(training))
        lr = optimizer.param_groups[0]["lr"]
        pdarts.load_optimizer(optimizer, state["weight_optimizer"])
        assert optimizer.param_groups[0]["lr"] is lr and lr.item() > 0


def test_bfloat16_changes_the_feature_maps_only():
    def watch(network):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.register_forward_hook(lambda *args: types.add(args[-1].dtype))
        return network

    for make, config in (small_search, SMALL), (small_evaluation, EVALUATION):
        types = set()
        run = make(dataclasses.replace(config, dtype="bfloat16"), prepare=watch)
        losses = [event.loss.dtype for event in itertools.islice(run, 4) if type(event) is pdarts.Step]
        assert types == {torch.bfloat16} and set(losses) == {torch.float32}
        assert {t.dtype for t in run.network.state_dict().values()} == {torch.float32, torch.int64}

# --- the evaluation network -------------------------------------------------------------------------------------------


def test_state_dict_has_the_official_keys_and_shapes():
    network = Network(GENOTYPES["PDARTS"], 36, 10, 20, auxiliary=True)
    imagenet = Network(GENOTYPES["PDARTS"], 8, 5, 3, stem="imagenet").state_dict()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    official = {
        "stem.0.weight": (108, 3, 3, 3), "stem.1.running_var": (108,), "classifier.weight": (10, 576),
        "cells.0.preprocess0.op.1.weight": (36, 108, 1, 1), "cells.7.preprocess0.conv_1.weight": (36, 144, 1, 1),
        "cells.0._ops.1.op.1.weight": (36, 1, 3, 3),  # dil_conv_3x3: depthwise
        "cells.0._ops.3.op.6.weight": (36, 36, 1, 1),  # sep_conv_3x3: second pointwise
        "cells.7.preprocess0.bn.bias": (72,), "auxiliary_head.features.2.weight": (128, 576, 1, 1),
        "auxiliary_head.features.5.weight": (768, 128, 2, 2), "auxiliary_head.features.6.running_mean": (768,),
        "auxiliary_head.classifier.weight": (10, 768)}
    assert official.items() <= shapes.items() and not any("drop_path" in key for key in shapes)
    assert {"stem0.0.weight", "stem0.4.bias", "stem1.1.weight", "stem1.2.weight"} <= set(imagenet)


def test_networks_return_auxiliary_logits_in_training_only_at_every_size():
    network, bare = (Network(TWO_NODES, 4, 6, 5, auxiliary=auxiliary, in_channels=1) for auxiliary in (True, False))
    for size in (8, 8), (9, 31), (15, 11), (33, 64):
        images = torch.randn(2, 1, *size)
        logits, auxiliary_logits = network.train()(images)
        assert logits.shape == auxiliary_logits.shape == (2, 6)
        assert network.eval()(images).shape == (2, 6)
        assert bare(images)[1] is None


@pytest.mark.parametrize("size, stride", [(8, 3), (7, 2)])
def test_auxiliary_pool_is_the_official_one_at_official_sizes(size, stride):
    x = torch.randn(2, 3, size, size)
    assert torch.equal(pdarts.PoolTo2x2()(x), nn.AvgPool2d(5, stride=stride, count_include_pad=False)(x))


def test_auxiliary_pool_compiles_to_one_graph_for_all_sizes():
    graphs, pool = [], pdarts.PoolTo2x2()
    compiled = torch.compile(
        pool, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for size in (2, 3, 8, 7), (4, 3, 13, 3):
        x = torch.randn(size, dtype=torch.float64)
        assert torch.allclose(compiled(x), pool(x), rtol=1e-12)
    assert len(graphs) == 1


def test_imagenet_stem_reduces_eightfold_and_the_other_by_its_stride():
    network, sizes = Network(GENOTYPES["PDARTS"], 8, 5, 3, auxiliary=True, stem="imagenet"), []
    network.cells[0].register_forward_hook(lambda _, inputs, output: sizes.extend([inputs[0].shape, output.shape]))
    assert network(torch.randn(2, 3, 64, 96))[1].shape == (2, 5)
    assert sizes == [(2, 8, 16, 24), (2, 32, 8, 12)]
    assert Network(TWO_NODES, 4, 5, 3, stem_stride=3).stem(torch.randn(2, 3, 9, 8)).shape == (2, 12, 3, 3)


def test_a_search_with_the_imagenet_stem_halves_input_0_of_the_first_cell():
    config = dataclasses.replace(SMALL, stem="imagenet")
    searching = pdarts.Search(config, pdarts.search_data(*arrays(), config), space=SMALL_SPACE)
    searching.begin_stage()
    network, sizes = searching.network, []
    network.cells[0].register_forward_hook(lambda _, inputs, output: sizes.extend(x.shape for x in inputs[:2]))
    network(torch.randn(2, 3, 32, 48))
    c = config.channels
    assert sizes == [(2, c, 8, 12), (2, c, 4, 6)]
    assert {name.split(".")[0] for name in network.state_dict()} >= {"stem0", "stem1"}
    assert isinstance(network.cells[0].preprocess0, pdarts.FactorizedReduce)


def test_drop_path_drops_whole_samples_rescales_and_spares_identities_and_evaluation():
    torch.manual_seed(0)
    drop_path, ones = pdarts.DropPath(), torch.ones(1000, 2, 3, 3)
    drop_path.rate.fill_(0.3)
    per_sample = drop_path(ones).flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert per_sample.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert per_sample[:, 0].count_nonzero() == pytest.approx(700, abs=50)
    assert torch.equal(drop_path.eval()(ones), ones)
    network = Network(TWO_NODES, 4, 3, 3)
    network.set_drop_path(0.9)
    for cell in network.cells:
        for op, of_op in zip(cell._ops, cell.drop_paths, strict=True):
            assert isinstance(of_op, nn.Identity) if isinstance(op, nn.Identity) else of_op.rate == torch.tensor(0.9)


def test_a_cell_drops_the_paths_of_its_operations_in_training():
    torch.manual_seed(0)
    skips, convolutions = ([(name, 0), (name, 1)] for name in ("skip_connect", "sep_conv_3x3"))
    for pairs, training, dropped in (skips, True, False), (convolutions, True, True), (convolutions, False, False):
        network, outputs = Network(Genotype(pairs, [2], skips, [2]), 4, 3, 3).train(training), []
        s0 = s1 = network.stem(torch.randn(8, 3, 8, 8))
        for rate in 0.0, 0.9:
            network.set_drop_path(rate)
            outputs.append(network.cells[0](s0, s1))
        assert torch.equal(*outputs) != dropped


# --- the evaluation ---------------------------------------------------------------------------------------------------


def small_evaluation(config=EVALUATION, genotype=TWO_NODES, **options):
    return pdarts.Evaluation(genotype, config, pdarts.Data(Loader(*arrays(14), config), 4), **options)


def test_an_evaluation_resumes_after_any_event_with_the_same_bits():
    events = resumes_after_every_event(lambda: small_evaluation(dataclasses.replace(EVALUATION, epochs=2)))
    assert [type(event).__name__ for event in events] == ["Step", "Step", "Step", "Epoch"] * 2  # 6, 6 and 2 images


def test_drop_path_rises_and_the_learning_rate_falls_from_epoch_to_epoch():
    evaluation = small_evaluation()
    for event in evaluation:
        if type(event) is pdarts.Step:
            lr, rate = 0.025 * (1 + math.cos(math.pi * evaluation.epoch / 3)) / 2, 0.6 * evaluation.epoch / 3
            rates = {m.rate.item() for m in evaluation.network.modules() if isinstance(m, pdarts.DropPath)}
            assert len(rates) == 1 and rates.pop() == pytest.approx(rate)
            assert evaluation.weight_optimizer.param_groups[0]["lr"].item() == pytest.approx(lr)
        else:
            assert event == (0, evaluation.epoch - 1, pytest.approx(lr), pytest.approx(rate))


def test_an_evaluation_averages_and_clips_and_takes_cells_that_leave_nodes_out():
    calls, prepared = [], []

    def average(gradients):
        calls.append(gradients)
        return [None if gradient is None else 1e6 * gradient for gradient in gradients]

    genotype = TWO_NODES._replace(normal_concat=[3], reduce_concat=[3])
    evaluation = small_evaluation(genotype=genotype, average=average, prepare=lambda n: prepared.append(n) or n)
    next(iter(evaluation))
    assert [evaluation.network] == prepared and len(calls) == 1
    given = {name for (name, _), g in zip(prepared[0].named_parameters(), calls[0], strict=True) if g is not None}
    assert "cells.0._ops.3.op.1.weight" in given and "cells.0._ops.1.op.1.weight" not in given
    norm = torch.cat([p.grad.flatten() for p in evaluation.weights if p.grad is not None]).norm()
    assert norm == pytest.approx(5.0, rel=1e-4)


def test_the_auxiliary_loss_counts_by_its_weight():
    images, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    loss, logits = pdarts.loss_and_logits(lambda x: (x, 2 * x), images, labels, auxiliary_weight=0.4)
    assert torch.equal(logits, images)
    assert torch.allclose(loss, F.cross_entropy(images, labels) + 0.4 * F.cross_entropy(2 * images, labels))


def test_labels_are_smoothed_in_both_heads_of_a_training_with_the_imagenet_recipe():
    images, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    loss, _ = pdarts.loss_and_logits(lambda x: (x, 2 * x), images, labels, auxiliary_weight=0.4, label_smoothing=0.1)
    targets = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    smooth = [-(targets * x.log_softmax(1)).sum(1).mean() for x in (images, 2 * images)]
    assert torch.allclose(loss, smooth[0] + 0.4 * smooth[1])
    losses, rates = {}, []
    for smoothing in 0.0, 0.1:
        config = dataclasses.replace(EVALUATION, label_smoothing=smoothing, schedule="linear", warmup=2, lr=0.5)
        evaluation = small_evaluation(config)
        losses[smoothing] = next(iter(evaluation)).loss
        rates = [event.lr for event in evaluation if type(event) is pdarts.Epoch]
    assert losses[0.0] != losses[0.1]
    # 3 epochs fall in shares of 1, 1 and a half; the first is half of the warm-up.
    assert rates == pytest.approx([0.25, 0.5, 0.25])


def test_correct_predictions_counts_the_classes_among_the_largest_logits():
    batches = [(torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4), torch.arange(4))]
    assert pdarts.correct_predictions(nn.Identity(), batches, top=(1, 2, 5)) == (1, 2, 4, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_correct_predictions_counts_in_evaluation_mode_in_the_given_type(dtype):
    network, seen = nn.Linear(3, 3), []
    network.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    network.register_forward_hook(lambda _, __, y: seen.append((network.training, y.dtype, y.requires_grad)))
    batches = [(torch.eye(3), torch.tensor([0, 1, 1])), (torch.eye(3)[:1], torch.tensor([0]))]
    assert pdarts.correct_predictions(network, batches, dtype) == (3, 4)
    assert seen == [(False, getattr(torch, dtype), False)] * 2 and network.training

# --- data -------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_and_leaves_out_a_last_batch_of_one():
    for n, batch_size, sizes in (25000, 96, [96] * 260 + [40]), (9, 4, [4, 4]), (10, 4, [4, 4, 2]):
        config = dataclasses.replace(EVALUATION, batch_size=batch_size, crop_padding=0)
        loader = Loader(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n), config, mean=[0.0], std=[1.0])
        labels = [y for _, y in loader.epoch(0)]
        assert [len(y) for y in labels] == sizes and len(loader) == len(sizes)
        labels = torch.cat(labels)
        assert len(labels.unique()) == sum(sizes) and not torch.equal(labels, labels.sort().values)


def test_a_seed_says_the_batches_of_an_epoch_and_a_start_skips_some():
    loader = Loader(*arrays(), EVALUATION)
    epoch, other = list(loader.epoch(7)), list(loader.epoch(8))
    for start in range(len(loader) + 1):
        torch.manual_seed(start)
        assert_same(list(loader.epoch(7, start)), epoch[start:])
    assert not torch.equal(epoch[0][1], other[0][1]) and not torch.equal(epoch[0][0], other[0][0])


def test_search_data_halves_the_images():
    x, y = arrays(n=9, channels=2)
    data = pdarts.search_data(x, y, TINY)
    assert torch.equal(data.train.x, x[:4]) and torch.equal(data.val.x, x[4:]) and torch.equal(data.val.y, y[4:])
    assert (data.num_classes, pdarts.search_data(x, y, TINY, 10).num_classes, data.in_channels) == (4, 10, 2)


def test_images_are_normalised_by_their_own_statistics_or_by_given_ones():
    x, y = arrays()
    std, mean = torch.std_mean(Loader(x, y, TINY).normalise(x), (0, 2, 3))
    assert torch.allclose(mean, torch.zeros(3), atol=1e-5) and torch.allclose(std, torch.ones(3))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    expected = (x.permute(0, 2, 3, 1) / 255 - mean) / std
    assert torch.allclose(Loader(x, y, TINY, mean, std).normalise(x), expected.permute(0, 3, 1, 2))


def test_augmentation_crops_flips_normalises_and_cuts_out_each_image():
    marked = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    marked[:, :, 10, 12] = 255  # one white pixel shows where the crop and the flip took it

    def augment(x, **settings):
        config = dataclasses.replace(EVALUATION, **{"crop_padding": 0, "flip": False, "cutout": 0} | settings)
        loader = Loader(*arrays(), config)
        return loader.augment(x, torch.Generator().manual_seed(0)), loader.normalise(x)

    x, normalised = augment(marked, crop_padding=4, flip=True)
    _, rows, cols = (x[:, 0] == normalised[0, 0, 10, 12]).nonzero().T
    assert len(rows) == 200 and x.is_contiguous()
    assert set((10 - rows).tolist()) == set(range(-4, 5))
    assert set(cols.tolist()) == set(range(8, 17)) | set(range(31 - 16, 31 - 7))
    assert torch.equal(*augment(marked))
    cut = augment(marked, cutout=16)[0] == 0
    assert (cut == cut[:, :1]).all()  # the same square in all channels
    heights, widths = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert heights.max() == widths.max() == 16 and heights.min() >= 8  # clipped at the borders
    assert torch.equal(cut[:, 0].sum((1, 2)), heights * widths)
    small = augment(marked[:, :, :8, :8], cutout=16)[0] == 0
    assert 0 < small[:, 0].sum((1, 2)).max() <= 16  # at most half the image's side

# --- alone ------------------------------------------------------------------------------------------------------------


def test_the_file_alone_in_a_folder_searches_and_evaluates_from_arrays(alone):
    output, errors = alone.communicate(timeout=100)
    assert alone.returncode == 0, errors
    assert re.fullmatch(r"\(\d+, 16\)\n", output)
