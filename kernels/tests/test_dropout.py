"""Dropout masks: the generator against its published vectors, the masks against their twin, and their statistics.

Every statistic is of fixed keys, so that a test fails always or never; its bound is five standard deviations.
"""

import itertools
import math

import pytest
import torch

import kernels
from kernels import Dropout, Sum

pytestmark = pytest.mark.usefixtures("fused")
RATES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)


def key_of(number, device="cpu"):
    return torch.tensor([number - 2**64 if number >= 2**63 else number], device=device)


def masks(key, rate, terms, size):
    return kernels.dropout_masks(key, torch.full((len(terms),), rate, device=key.device), terms, size)


def dropped(number, rate, terms, size):
    """-1 and 1, shifted and scaled to mean 0 and variance 1."""
    x = (masks(key_of(number), rate, terms, size) == 0).double()
    return (x - rate) / math.sqrt(rate * (1 - rate))


@pytest.mark.parametrize(
    "counter, key, words",
    [  # kat_vectors of Random123, the authors' own library
        ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_published_vectors(counter, key, words):
    assert tuple(map(int, kernels.philox_ref(map(torch.tensor, counter), key_of(key)))) == words


def test_masks_are_the_published_words_of_philox(device):
    rates = torch.arange(2**16, device=device) / 2**16
    kept = kernels.dropout_masks(key_of(0, device), rates, [0] * len(rates), (1, 1, 1, 8)) > 0
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # An element is dropped from the first rate on that is above its bits.
    assert (kept.sum(0).flatten() - 1).tolist() == [half for word in words for half in (word & 0xFFFF, word >> 16)]


@pytest.mark.parametrize("size", [(3, 20, 5, 7), (2, 16, 8, 8), (1, 1, 1, 1), (2, 3, 0, 4)])
@pytest.mark.parametrize("key", [0, 2**63 + 12345, 2**64 - 1])
def test_masks_equal_those_of_plain_torch(device, size, key):
    rates = torch.tensor([0.0, 0.3, 0.999, 1.0, 2e-6], device=device)
    arguments = key_of(key, device), rates, [0, 7, 2**31, 5, 6], size
    mine, right = kernels.dropout_masks(*arguments), kernels.dropout_masks_ref(*arguments)
    assert mine.dtype == torch.float32 and torch.equal(mine, right)
    assert torch.equal(mine[0], torch.ones_like(mine[0])) and not mine[3].any()  # rates 0 and 1


def test_masks_of_a_cell_are_those_of_dropout_masks(device):
    x = torch.ones(3, 5, 9, 11, dtype=torch.float64, device=device)
    key, rates = key_of(99, device), torch.tensor([0.5, 0.2], device=device)
    y = kernels.cell([x], [Sum([0, 0, 0])], [1], x.new_tensor([0.0, 1.0, 1.0]), dropout=Dropout(key, rates, [1, 2]))
    assert torch.equal(y, kernels.dropout_masks(key, rates, [1, 2], x.shape).double().sum(0))


def test_masks_depend_neither_on_threads_nor_on_the_images_beside():
    x = torch.randn(7, 16, 32, 32).requires_grad_()
    probabilities = torch.rand(2).requires_grad_()
    dropout = Dropout(key_of(1), torch.full((2,), 0.5), [0, 1])
    results, threads = [], torch.get_num_threads()
    for count, images in ((1, 7), (2, 7), (2, 3)):
        torch.set_num_threads(count)
        y = kernels.cell([x[:images]], [Sum([0, 0])], [1], probabilities, dropout=dropout)
        results.append([y[:3], *torch.autograd.grad(y[:3].sum(), [x, probabilities])])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_no_mask_is_saved_for_backward():
    x, saved = torch.randn(4, 16, 32, 32).requires_grad_(), []
    for dropout in (None, Dropout(key_of(1), torch.full((2,), 0.5), [0, 1])):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved[-1].append(t.nbytes) or t, lambda t: t):
            saved.append([])
            kernels.cell([x], [Sum([0, 0])], [1], torch.ones(2), dropout=dropout)
    assert sum(saved[1]) == sum(saved[0]) + 8 + 2 * 4  # key and rates


def test_a_key_is_a_new_one_at_each_draw_and_the_same_from_the_same_seed():
    torch.manual_seed(3)
    first = [int(kernels.dropout_key("cpu")) for _ in range(100)]
    torch.manual_seed(3)
    assert len(set(first)) == 100 and [int(kernels.dropout_key("cpu")) for _ in range(100)] == first


# --- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
def test_the_rate_the_mean_and_the_variance_are_those_of_inverted_dropout(rate):
    x = masks(key_of(11), rate, range(4), (16, 16, 32, 32)).double()
    n = x.numel()
    assert abs((x == 0).double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
    assert abs(x.mean() - 1) < 5 * math.sqrt(rate / (1 - rate) / n)
    assert len(x.unique()) == 2 and abs(x.max() - 1 / (1 - rate)) < 2**-16 / (1 - rate) ** 2
    assert abs(x.var() / (rate / (1 - rate)) - 1) < 5 * (1 / math.sqrt(rate * (1 - rate)) + 2) / math.sqrt(n)


@pytest.mark.parametrize("rate", (0.05, 0.4, 0.7))
def test_masks_of_terms_keys_images_channels_and_neighbours_are_not_correlated(rate):
    torch.manual_seed(0)
    keys = [int(kernels.dropout_key("cpu")) for _ in range(3)]  # of cells and steps that follow each other
    torch.manual_seed(1)
    keys.append(int(kernels.dropout_key("cpu")))  # of another rank
    size = (8, 16, 32, 32)
    all_of_them = [x for key in (*keys, keys[0] + 1, keys[0] ^ 2**62) for x in dropped(key, rate, range(3), size)]
    bound = 5 / math.sqrt(all_of_them[0].numel())
    for x, y in itertools.combinations(all_of_them, 2):
        assert abs((x * y).mean()) < bound
    for x in all_of_them:
        for axis, distance in itertools.product(range(4), range(1, 8)):
            length = x.shape[axis] - distance
            if length > 0:
                product = x.narrow(axis, 0, length) * x.narrow(axis, distance, length)
                assert abs(product.mean()) < 5 / math.sqrt(product.numel()), (axis, distance)
        flat = x.flatten(2)  # pixels, over the ends of rows, within and between the counters of 8
        for distance in (8, 9, 16, 33, 64):
            product = flat[:, :, distance:] * flat[:, :, :-distance]
            assert abs(product.mean()) < 5 / math.sqrt(product.numel()), distance


@pytest.mark.parametrize("rate", (0.1, 0.5))
def test_every_lane_of_the_vectors_drops_alike(rate):
    size, lanes = (64, 16, 8, 16), 16 * 8  # channels of a vector, pixels of a counter
    hits = (masks(key_of(5), rate, range(8), size) == 0).double().flatten(3).unflatten(3, (-1, 8))
    counts = hits.sum(dim=(0, 1, 3)).flatten()  # [channels * pixels]
    n = hits.numel() / lanes
    chi_square = ((counts - n * rate) ** 2 / (n * rate * (1 - rate))).sum()
    assert abs(chi_square - lanes) < 5 * math.sqrt(2 * lanes)


def test_bits_are_uniform_over_their_16_bits():
    """Chi-square over 64 equal parts: elements dropped at one rate and not at the one before."""
    rates = torch.arange(1, 65) / 64
    hits = kernels.dropout_masks(key_of(8), rates, [0] * 64, (4, 16, 32, 32)) == 0
    counts = hits.flatten(1).sum(1).diff(prepend=torch.zeros(1)).double()
    expected = hits[0].numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)


# --- Fused networks ---------------------------------------------------------------------------------------------------


def fused_cell(rate):
    pdarts = pytest.importorskip("pdarts")
    torch.manual_seed(0)
    candidates = (("max_pool_3x3", "skip_connect"),) * 5
    network = pdarts.SearchNetwork(4, 10, 3, candidates, candidates, space=pdarts.SearchSpace(nodes=2))
    network.set_skip_dropout(rate)
    return kernels.fuse(network)


def test_steps_draw_new_masks_and_a_seed_brings_them_back():
    network, x = fused_cell(0.5), torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    first, second = network(x), network(x)
    torch.manual_seed(1)
    assert not torch.equal(first, second) and torch.equal(network(x), first)


@pytest.mark.parametrize("rate, training", [(0.5, False), (0.0, True)])
def test_evaluation_and_rate_0_draw_nothing(rate, training):
    network, x = fused_cell(rate).train(training), torch.randn(4, 3, 8, 8)
    before = torch.get_rng_state()
    y = network(x)
    assert torch.equal(torch.get_rng_state(), before)
    network.set_skip_dropout(0.0)
    assert torch.equal(network(x), y)


def parts_of(cell):
    """The parts of a fused cell, as they run."""
    plan = cell._kernels_state.plans[0]
    return [plan.runs[part] for part in plan.parts], plan


def test_each_module_keeps_its_own_rate():
    network = fused_cell(0.3)
    network.cells[0].edges[1].ops[1].rate.fill_(0.25)
    network.train()(torch.randn(2, 3, 8, 8))
    (run,), plan = parts_of(network.cells[0])
    rates = {place: float(plan.attributes[rate]) for place, rate in run.part.dropout}
    assert sorted(rates.values()) == pytest.approx([0.25] + [0.3] * (len(rates) - 1))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    pdarts = pytest.importorskip("pdarts")
    genotype = pdarts.Genotype([("sep_conv_3x3", 0), ("skip_connect", 1)], [2], [("max_pool_3x3", 0)] * 2, [2])
    torch.manual_seed(0)
    network = kernels.fuse(pdarts.Network(genotype, 2, 3, 3).double())
    network.set_drop_path(0.3)
    cell, x = network.cells[0], torch.randn(2, 6, 8, 8, dtype=torch.float64)
    weights = []
    for training in (False, True):
        cell.train(training)(x, x)
        (run,), plan = parts_of(cell)
        env = {node: plan.attributes[node] for node in plan.attributes}
        weights.append(run.probabilities(env, x.repeat(2000, 1, 1, 1)))
    assert torch.equal(weights[0], torch.ones(2, dtype=torch.float64))
    dropped_images, identity = weights[1]
    assert torch.equal(identity, torch.ones_like(identity))  # identities are never dropped
    assert set((dropped_images == 0).tolist()) == {True, False} and len(dropped_images.unique()) == 2
    assert abs(dropped_images.mean() - 1) < 5 * math.sqrt(0.3 / 0.7 / 4000)
