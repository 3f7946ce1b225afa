"""Fused networks against plain ones. The networks are those of pdarts.py."""

import copy
import functools
import os
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from kernels.tests.helpers import ALL_CONTIGUOUS, SLOW, DepthwiseConvolutions

pdarts = pytest.importorskip("pdarts")
TWO_NODES, ONE_NODE = (pdarts.SearchSpace(nodes=nodes) for nodes in (2, 1))
ALL = pdarts.PRIMITIVES
FEW = ("none", "skip_connect", "sep_conv_3x3")
SOME = pdarts.SearchSpace(("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5"), nodes=2)
SOME_OF_ONE_NODE = pdarts.SearchSpace(SOME.primitives, nodes=1)


pytestmark = pytest.mark.usefixtures("fused")


def search_network(candidates=None, dtype=torch.float64, skip_dropout=0.0, space=TWO_NODES, channels=4):
    """By default of all candidates."""
    torch.manual_seed(0)
    candidates = candidates or (space.primitives,) * len(space.edges)
    network = pdarts.SearchNetwork(channels, 10, 3, candidates, candidates, space=space).to(dtype)
    network.set_skip_dropout(skip_dropout)
    return network


def small_network(*names):
    """Of these candidates, and of two edges: for how single modules are converted."""
    return search_network((names,) * len(ONE_NODE.edges), space=ONE_NODE)


def fused(network):
    return kernels.fuse(copy.deepcopy(network))


def computed(network, x):
    """Logits, gradients and running statistics of a training step, and logits in evaluation."""
    torch.manual_seed(1)
    logits = network.train()(x)
    logits = logits if isinstance(logits, tuple) else (logits,)
    loss = sum(F.cross_entropy(part, torch.arange(len(x), device=x.device)) for part in logits)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    with torch.no_grad():
        return [*(part.detach() for part in logits), *gradients, *network.buffers(), network.eval()(x)]


def draw_alike(network, converted):
    """Lets the skip dropout and drop-path of plain cells take the masks that their fused copies draw."""
    for cell, other in zip(network.cells, converted.cells):
        _draw_alike(cell, other)


def _draw_alike(cell, other):
    keys = []

    def places():
        """The place of the term of each dropout in the program, by the number of its module."""
        modules = [m for m in other.modules() if isinstance(m, (pdarts.SkipDropout, pdarts.DropPath))]
        drops = {}
        for plan in other._kernels_state.plans:
            for part in plan.parts:
                for place, rate in part.dropout + part.drop_path:
                    drops |= {i: place for i, m in enumerate(modules) if m.rate is plan.attributes[rate]}
        return drops

    def masked(number, op, x):
        if not op.training or op.rate == 0:
            return x
        size = x.shape if isinstance(op, pdarts.SkipDropout) else (len(x), 1, 1, 1)
        return x * kernels.dropout_masks_ref(keys[0], op.rate.float().view(1), [places()[number]], size)[0].to(x.dtype)

    def draw(cell, inputs):
        keys[:] = [kernels.dropout_key(inputs[0].device)] if cell.training and places() else []

    cell.register_forward_pre_hook(draw)
    modules = [m for m in cell.modules() if isinstance(m, (pdarts.SkipDropout, pdarts.DropPath))]
    for number, op in enumerate(modules):
        op.forward = functools.partial(masked, number, op)


def assert_same(network, other, x, rtol=1e-9):
    for mine, right in zip(computed(other, x), computed(network, x), strict=True):
        torch.testing.assert_close(mine.contiguous(), right.contiguous(), rtol=rtol, atol=1e-11)


def classes(network):
    return {type(module).__name__ for module in network.modules()}


def all_whole(converted):
    rows = kernels.report(converted)
    return len(rows) == len(converted.cells) and all(row.fused == "whole" for row in rows)


@pytest.mark.parametrize(
    "nodes, names, size", [pytest.param(4, FEW, (12, 12), marks=SLOW), (2, ALL, (9, 13))], ids=str
)
def test_a_fused_search_network_computes_what_the_plain_one_does(device, nodes, names, size):
    space = pdarts.SearchSpace(nodes=nodes)
    network = search_network((names,) * len(space.edges), skip_dropout=0.3, space=space).to(device)
    converted = fused(network)
    assert all_whole(converted)
    draw_alike(network, converted)
    assert_same(network, converted, torch.randn(6, 3, *size, dtype=torch.float64, device=device))


def test_a_fused_search_network_whose_steps_torch_computes_is_the_same(device, steps_by_torch):
    network = search_network(skip_dropout=0.3, space=SOME).to(device)
    converted = fused(network)
    draw_alike(network, converted)
    assert_same(network, converted, torch.randn(6, 3, 8, 7, dtype=torch.float64, device=device))


def test_a_fused_evaluation_network_computes_what_the_plain_one_does(device):
    torch.manual_seed(0)
    network = pdarts.Network(pdarts.GENOTYPES["PDARTS"], 4, 10, 3, auxiliary=True).double().to(device)
    network.set_drop_path(0.3)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):  # gamma and beta count
            nn.init.uniform_(norm.weight)
            nn.init.uniform_(norm.bias)
    converted = fused(network)
    assert all_whole(converted)
    draw_alike(network, converted)
    assert_same(network, converted, torch.randn(4, 3, 32, 32, dtype=torch.float64, device=device))


def test_fusion_keeps_the_state_dict_and_the_types_and_survives_a_copy():
    network = small_network(*FEW)
    converted = fused(network)
    assert list(converted.state_dict()) == list(network.state_dict())
    assert isinstance(converted.cells[0], pdarts.SearchCell)
    before, twice = converted.state_dict(), kernels.fuse(copy.deepcopy(converted))
    twice.load_state_dict(before)
    assert_same(network, twice, torch.randn(4, 3, 8, 8, dtype=torch.float64))


def test_a_fused_network_keeps_less_than_half_for_backward():
    network = search_network(dtype=torch.float32, space=SOME)
    x = torch.randn(8, 3, 32, 32)

    def kept(network):
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = network(x)  # alive, so that no memory is counted twice
        del result
        return sum(sizes.values())

    assert kept(fused(network)) < kept(network) / 2


def distances(network, x):
    """Of logits and of the gradient of a training step in float32 from those in float64: fused, and plain."""

    def step(network, x):
        loss, logits = pdarts.loss_and_logits(network, x, torch.arange(len(x)) % 10, auxiliary_weight=0.4)
        gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        return logits.detach(), torch.cat([g.flatten() for g in gradients if g is not None])

    right = step(copy.deepcopy(network).double(), x.double())
    return [[float((t - r).norm() / r.norm()) for t, r in zip(step(n, x), right)] for n in (fused(network), network)]


def test_a_fused_search_network_is_as_exact_in_float32_as_the_plain_one():
    mine, plain = distances(search_network(dtype=torch.float32, space=SOME_OF_ONE_NODE), torch.randn(8, 3, 16, 16))
    assert all(m <= 1.5 * p for m, p in zip(mine, plain)) and plain[0] < 1e-6


@pytest.mark.parametrize("name", ["PDARTS", *(pytest.param(name, marks=SLOW) for name in ("DARTS_V1", "NASNet"))])
def test_a_fused_evaluation_network_is_as_exact_in_float32_as_the_plain_one(name):
    cells = pytest.importorskip("harness.report.cells")  # of other papers
    torch.manual_seed(0)
    network = pdarts.Network(cells.PUBLISHED[name], 16, 10, 3, auxiliary=True)
    mine, plain = distances(network, torch.randn(8, 3, 8, 8))
    assert all(m <= 1.5 * p for m, p in zip(mine, plain)) and plain[0] < 1e-5


def test_gradients_in_bfloat16_are_those_of_plain_torch_and_the_same_bits_again(device):
    # torch's of dilated depthwise convolutions are wrong on the CPU in channels-last, at 16 channels and 32 x 32 too.
    torch.manual_seed(0)
    candidates = (("dil_conv_3x3", "dil_conv_5x5"),) * 2
    network = pdarts.SearchNetwork(16, 10, 3, candidates, candidates, space=ONE_NODE).to(device)
    converted, x = fused(network), torch.randn(4, 3, 32, 32, device=device)

    def gradients(network, dtype):
        loss, _ = pdarts.loss_and_logits(network, x, torch.arange(4, device=device), dtype)
        return torch.autograd.grad(loss, network.weights())

    right, plain = gradients(network, "float32"), gradients(network, "bfloat16")
    mine, again = (gradients(converted, "bfloat16") for _ in range(2))
    errors = [[float((a - b).norm() / b.norm()) for a, b in zip(side, right)] for side in (mine, plain)]
    assert max(errors[0]) < 1.5 * max(errors[1]) < 0.6
    assert all(map(torch.equal, mine, again))


def test_gradients_of_networks_in_bfloat16_are_those_of_plain_torch(device):
    torch.manual_seed(0)
    candidates = (("dil_conv_3x3", "dil_conv_5x5"),) * 2
    network = search_network(candidates, space=ONE_NODE, channels=16).to(device)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, device=device).bfloat16()

    def gradients(network):
        loss = F.cross_entropy(network(x.to(network.classifier.weight.dtype)).float(), torch.arange(4, device=device))
        return torch.autograd.grad(loss, list(network.parameters()))

    shorter = copy.deepcopy(network).bfloat16()
    right, plain = gradients(network), gradients(shorter)
    with DepthwiseConvolutions() as convolutions:
        mine = gradients(fused(shorter))
    errors = [[float((a - b).norm() / b.norm()) for a, b in zip(side, right)] for side in (mine, plain)]
    assert max(errors[0]) < 1.5 * max(errors[1]) < 0.6
    assert convolutions.seen == ALL_CONTIGUOUS or device == "cuda"


# --- What is left alone -----------------------------------------------------------------------------------------------


class Doubled(pdarts.MixedOp):
    def forward(self, x, probabilities):
        return 2 * super().forward(x, probabilities)


class Negative(pdarts.SearchCell):
    def forward(self, s0, s1, probabilities):
        return -super().forward(s0, s1, probabilities)


class Halved(pdarts.Operation):
    def forward(self, x):
        return self.op(x) / 2


@pytest.mark.parametrize("name, changed", [("MixedOp", Doubled), ("SearchCell", Negative), ("Operation", Halved)])
def test_classes_that_were_changed_compute_what_they_say(monkeypatch, name, changed):
    original = small_network(*FEW)
    monkeypatch.setattr(pdarts, name, changed)
    network = small_network(*FEW)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same(network, fused(network), x)
    assert not torch.allclose(network.train()(x), original.train()(x))


@pytest.mark.parametrize("change", [lambda network: network.set_skip_dropout(0.4), nn.Module.float])
def test_a_fused_network_notices_what_changes_between_two_calls(change):
    network = small_network("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3")
    converted, x = fused(network), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    draw_alike(network, converted)
    for one in (network, converted):
        one.train()(x)  # nothing but the change lies between two calls in training
        change(one)
    x = x.to(network.classifier.weight.dtype)
    results = []
    for one in (converted, network):
        torch.manual_seed(2)
        results.append([one(x).detach(), *one.buffers()])
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9 if x.dtype == torch.float64 else 1e-4, atol=1e-6)


def test_nodes_of_more_than_64_outputs_and_other_search_spaces_are_fused(monkeypatch):
    more = {f"{name} {i}": pdarts.OPERATIONS[name] for name in ("max_pool_3x3", "avg_pool_3x3") for i in range(8)}
    monkeypatch.setattr(pdarts, "OPERATIONS", pdarts.OPERATIONS | more)
    space = pdarts.SearchSpace((*pdarts.PRIMITIVES[1:], *more), nodes=2)  # the last node adds up 3 * 23 outputs
    candidates = (space.primitives,) * 5, (FEW[1:],) * 5
    network = pdarts.SearchNetwork(4, 10, 3, *candidates, space=space).double()
    converted = fused(network)
    assert all_whole(converted)
    assert_same(network, converted, torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(2 * int(os.environ.get("PDARTS_FUZZ", "1"))))
def test_random_networks_compute_what_plain_torch_does(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    names = [name for name in pdarts.OPERATIONS if name != "none"]
    size, channels = (rng.randint(4, 11), rng.randint(4, 11)), rng.choice([2, 4, 6])
    if rng.random() < 0.5:
        space = pdarts.SearchSpace(("none", *names), nodes=rng.randint(1, 2))
        count = rng.randint(1, 4)
        candidates = [
            [tuple(name for name in space.primitives if name in chosen) for chosen in
             (rng.sample(names, count) for _ in space.edges)] for _ in range(2)
        ]
        network = pdarts.SearchNetwork(channels, 5, rng.randint(3, 4), *candidates, space=space)
        network.set_skip_dropout(rng.choice([0.0, 0.3]))
    else:
        cells = [
            [(rng.choice(names), rng.randint(0, 1 + i // 2)) for i in range(2 * rng.randint(1, 3))] for _ in range(2)
        ]
        concats = [rng.sample(range(2, 2 + len(c) // 2), rng.randint(1, len(c) // 2)) for c in cells]
        genotype = pdarts.Genotype(cells[0], concats[0], cells[1], concats[1])
        network = pdarts.Network(genotype, channels, 5, rng.randint(3, 4), auxiliary=False)
        network.set_drop_path(rng.choice([0.0, 0.3]))
    network = network.double()
    converted, x = fused(network), torch.randn(rng.randint(2, 4), 3, *size, dtype=torch.float64)
    if all_whole(converted):
        draw_alike(network, converted)
    else:  # torch draws some masks
        for module in (*network.modules(), *converted.modules()):
            if hasattr(module, "rate"):
                module.rate.zero_()
    results = []
    for one in (converted, network):
        torch.manual_seed(1)
        logits = one.train()(x)
        logits = logits[0] if isinstance(logits, tuple) else logits
        gradients = torch.autograd.grad(logits.square().mean(), list(one.parameters()), allow_unused=True)
        results.append([logits.detach(), *gradients, *one.buffers(), one.eval()(x)])
    for mine, right in zip(*results, strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            mine, right = (t[0] if isinstance(t, tuple) else t for t in (mine, right))
            torch.testing.assert_close(mine.contiguous(), right.contiguous(), rtol=1e-8, atol=1e-10)


def test_where_the_kernels_do_not_serve_nothing_is_changed():
    kernels.use("off")
    network = small_network(*FEW)
    assert classes(fused(network)) == classes(network)


def test_an_evaluation_with_kernels_takes_the_steps_of_a_plain_one():
    x, y = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8), torch.arange(12) % 3
    config, losses = pdarts.EvaluateConfig(depth=3, channels=4, epochs=2, batch_size=4, drop_path=0.0), []

    class Loader(pdarts.Loader):
        def normalise(self, x):
            return super().normalise(x).double()

    for prepare in (lambda n: n.double(), lambda n: kernels.fuse(n.double())):
        data = pdarts.Data(Loader(x, y, config), 3)
        events = list(pdarts.Evaluation(pdarts.GENOTYPES["PDARTS"], config, data, prepare=prepare))
        losses.append(torch.stack([event.loss for event in events if isinstance(event, pdarts.Step)]))
    assert len(losses[0]) == 6  # with the auxiliary head
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sources", [(0, 0, 0, 2), (1, 1, 1, 2), (0, 1, 0, 1)])
def test_parameters_that_nothing_reads_have_no_gradients_as_in_plain_torch(sources):
    pairs = [("sep_conv_3x3", source) for source in sources]
    plain, unread = pdarts.Network(pdarts.Genotype(pairs, [3], pairs, [3]), 4, 10, 3), []
    for network in plain, fused(plain):
        logits, _ = network.train()(torch.randn(2, 3, 8, 8))
        named = dict(network.named_parameters())
        gradients = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
        unread.append([name for name, gradient in zip(named, gradients) if gradient is None])
    assert unread[0] == unread[1] != []


def test_a_search_takes_fusion_as_an_argument():
    x, y = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8), torch.arange(24) % 3
    short = {"depths": (3, 3), "keep": (4, 3), "skip_dropout": (0.0, 0.2), "epochs": 1, "alpha_start": 0}
    config = pdarts.SearchConfig(**short, channels=2, batch_size=6)
    space = pdarts.SearchSpace(SOME.primitives[:4], nodes=2)
    data, seen = pdarts.search_data(x, y, config), []

    def prepare(network):
        seen.append(kernels.fuse(network))
        return seen[-1]

    mine = pdarts.run(pdarts.Search, config, data, space=space, prepare=prepare).stages
    plain = pdarts.run(pdarts.Search, config, data, space=space).stages
    rows = [row for network in seen for row in kernels.report(network)]
    assert len(seen) == 2 and len(rows) == 6 and all(row.fused == "whole" for row in rows)
    torch.testing.assert_close(mine[0].alphas_normal, plain[0].alphas_normal, rtol=0.05, atol=1e-4)
