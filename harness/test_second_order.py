"""Tests of the second-order architecture step against the derivative through a step of the weights."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from harness.conftest import ONE_STAGE, fast_search
from harness.second_order import SecondOrder
from pdarts import Architect, InputError, SearchNetwork, SearchSpace, require_gradients

TWO_NODES = SearchSpace(("none", "skip_connect", "sep_conv_3x3"), nodes=2)  # small, for fast tests


def small_network():
    """In double precision, with an optimizer whose momentum is filled, and batches for alphas and weights."""
    torch.manual_seed(0)
    candidates = (TWO_NODES.primitives,) * len(TWO_NODES.edges)
    network = SearchNetwork(2, 3, 3, candidates, candidates, space=TWO_NODES).double()
    batch, train = ([torch.randn(6, 3, 8, 8).double(), torch.arange(6) % 3] for _ in range(2))
    optimizer = torch.optim.SGD(network.weights(), 0.05, 0.9, weight_decay=3e-4)
    F.cross_entropy(network(train[0]), train[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return network, optimizer, batch, train


def test_second_order_gradient_is_the_derivative_through_one_step_of_the_weights():
    network, optimizer, batch, train = small_network()
    architect = SecondOrder(network, weight_optimizer=optimizer)
    assert architect.difference == 0.01  # as in DARTS; smaller here, so as not to cross the kinks of ReLU and max
    architect.difference = 1e-6
    start = [w.detach().clone() for w in network.weights()]
    gradients = architect.gradients(*batch, *train)[2]
    assert all(map(torch.equal, start, network.weights()))

    def unrolled_loss():
        require_gradients([*network.weights(), *network.alphas()])
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
            entry = int(rng.integers(len(TWO_NODES.edges))), int(rng.integers(3))
            sides = []
            for h in 1e-6, -1e-6:
                alpha.data[entry] += h
                sides.append(unrolled_loss())
                alpha.data[entry] -= h
            numerical = (sides[0] - sides[1]) / 2e-6
            assert gradient[entry].item() == pytest.approx(numerical, rel=1e-5, abs=1e-8)
        assert not torch.allclose(gradient, plain, rtol=0.05)  # first order would not pass


def test_second_order_sees_the_same_dropout_on_both_sides_of_the_difference():
    network, optimizer, batch, train = small_network()
    architect = SecondOrder(network, weight_optimizer=optimizer)
    architect.difference = 1e-6  # other dropout on either side would be amplified a million times
    network.set_skip_dropout(0.5)
    torch.manual_seed(0)
    gradients = architect.gradients(*batch, *train)[2]
    assert all(0 < gradient.abs().max() < 10 for gradient in gradients)


def test_a_step_leaves_weights_and_their_optimizer_as_they_were_even_if_it_fails():
    network, optimizer, batch, train = small_network()
    architect = SecondOrder(network, weight_optimizer=optimizer)
    weights, alphas = ([p.detach().clone() for p in group] for group in (network.weights(), network.alphas()))
    momentum = [optimizer.state[w]["momentum_buffer"].clone() for w in network.weights()]
    loss, logits = architect.update(*batch, *train)
    assert logits.shape == (6, 3) and not loss.requires_grad
    assert not any(map(torch.equal, alphas, network.alphas()))
    with pytest.raises(IndexError):
        architect.update(batch[0], batch[1] + 99, *train)  # at the moved weights
    assert all(map(torch.equal, weights, network.weights()))
    assert all(torch.equal(m, optimizer.state[w]["momentum_buffer"]) for m, w in zip(momentum, network.weights()))


def test_it_needs_the_optimizer_of_the_weights():
    with pytest.raises(InputError, match="weight_optimizer is None; expected the SGD optimizer of the weights"):
        SecondOrder(small_network()[0])


def test_a_search_takes_the_order_that_its_settings_say(images, monkeypatch):
    orders = []

    def spied(kind, gradients):
        return lambda *arguments: orders.append(kind) or gradients(*arguments)

    for kind in Architect, SecondOrder:
        monkeypatch.setattr(kind, "gradients", spied(kind, kind.gradients))
    config = dataclasses.replace(ONE_STAGE, epochs=1, alpha_start=0, batch_size=8)
    first, second = (fast_search(dataclasses.replace(config, unrolled=u), images) for u in (False, True))
    assert orders == [Architect, SecondOrder]
    assert not torch.equal(first.stages[0].alphas_normal, second.stages[0].alphas_normal)
