"""Fusion of code as others write it: in any style it computes what plain torch does, and what cannot is left alone."""

import collections
import copy
import random
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from kernels.tests.test_changes import separable

pytestmark = pytest.mark.usefixtures("fused")


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x.mul(0.0) if self.stride == 1 else x[:, :, :: self.stride, :: self.stride].mul(0.0)


class NewZeros(nn.Module):
    def forward(self, x):
        n, c, h, w = x.size()
        device = torch.device("cuda") if x.is_cuda else torch.device("cpu")
        return torch.zeros(n, c, h, w, device=device, dtype=torch.float64)


class Halves(nn.Module):
    """A factorized reduction."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.first, self.second = (nn.Conv2d(4, 2, 1, stride=2, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.relu(x)
        return self.norm(torch.cat([self.first(x), self.second(x[:, :, 1:, 1:])], 1))


class Functional(nn.Module):
    def __init__(self, size=5):
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, size, padding=size // 2, groups=4, bias=False)
        self.pointwise = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.pointwise(self.depthwise(F.relu(x))))


class Mixed(nn.Module):
    def __init__(self, *ops):
        super().__init__()
        self.ops = nn.ModuleList(ops or [nn.Identity(), Zero(1), NewZeros(), separable(), Functional()])


class ByIndex(Mixed):
    def forward(self, x, weights):
        y = 0
        for i, op in enumerate(self.ops):
            y += op(x) * weights[i]
        return y


class Stacked(Mixed):
    def forward(self, x, weights):
        return torch.stack([weights[i] * op(x) for i, op in enumerate(self.ops)]).sum(dim=0)


class Sigmoids(Mixed):
    def forward(self, x, weights):
        return sum(torch.sigmoid(w) * op(x) for w, op in zip(weights, self.ops))


class Softmax(Mixed):
    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(torch.softmax(weights, dim=-1), self.ops))


class Fixed(Mixed):
    def forward(self, x, weights):
        a, b, c = self.ops[0], self.ops[3], self.ops[4]
        return (0.25 * a(x) + b(x)) + (c(x) * 0.5 + weights[0] * a(x))


class OneOnly(Mixed):
    def forward(self, x, weights):
        return self.ops[3](x) + self.ops[4](x) + weights[0]


class Reduced(Mixed):
    def __init__(self):
        pool = nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.BatchNorm2d(4))
        super().__init__(Zero(2), pool, Halves())

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.ops))


class Gated(Mixed):
    """The share of an edge and those of its operations."""

    def forward(self, x, weights):
        edge = sum(weights[1 + k] * op(x) for k, op in enumerate(self.ops[:4]))
        return weights[0] * edge + self.ops[4](x)


class Branching(Mixed):
    """It can be followed but for one of its modules."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = separable()

        def forward(self, x):
            return self.inner(x) if x.shape[0] > 1 else x

    def __init__(self):
        super().__init__(nn.Identity(), self.Odd(), separable())

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.ops))


@pytest.mark.parametrize("style", [ByIndex, Stacked, Sigmoids, Softmax, Fixed, Reduced, Gated, Branching, OneOnly])
def test_code_in_any_style_is_fused_and_computes_the_same(style):
    torch.manual_seed(0)
    plain = style().double()
    mine = kernels.fuse(copy.deepcopy(plain))
    (row, *inner) = kernels.report(mine)
    assert row.fused == ("in parts" if style in (Branching, OneOnly) else "whole")
    assert inner == [] or style is Branching
    inputs = [torch.randn(3, 4, 6, 8).double(), torch.rand(5).double()]
    for right, one in zip(*(computed_of(module, inputs) for module in (plain, mine)), strict=True):
        torch.testing.assert_close(one.contiguous(), right.contiguous(), rtol=1e-10, atol=1e-12)


def computed_of(module, inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = module(*leaves)
    gradients = torch.autograd.grad(y.square().mean(), [*leaves, *module.parameters()], allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None), *module.buffers(), module.eval()(*inputs).detach()]


class DropPath(Mixed):
    """Drop-path in place, in training only, as the evaluation networks of DARTS have it."""

    def forward(self, x, probability):
        y = self.ops[3](x)
        if self.training and probability > 0.0:
            y.div_(1 - probability)
            y.mul_(torch.ones(len(x), 1, 1, 1, dtype=x.dtype))
        return y + self.ops[4](x)


def test_what_can_be_followed_with_some_numbers_only_is_fused_with_them():
    torch.manual_seed(0)
    plain = DropPath().double()
    mine, x = kernels.fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 6).double()
    for probability in (0.0, 0.5, 0.0):
        results = [module(x, probability) for module in (mine, plain)]
        assert torch.allclose(*results, rtol=1e-10, atol=1e-12)
        results[0].sum().backward()
        assert bool(mine._kernels_state.plans[0].instructions) == (probability == 0)
    assert not isinstance(mine.ops[3].op, kernels.modules.Fused)  # whose results are changed in place


class Random(Mixed):
    def forward(self, x, weights):
        if torch.rand(()) < 0.5:
            return self.ops[3](x) + weights[0] * x
        return self.ops[4](x) + weights[1] * x


class Counting(Mixed):
    calls = 0

    def forward(self, x, weights):
        self.calls += 1
        return self.ops[3](x) * self.calls + weights[0] * x


class WithoutGradients(Mixed):
    def forward(self, x, weights):
        with torch.no_grad():
            y = self.ops[3](x)
        return y + self.ops[4](x) * weights[0]


class InPlace(Mixed):
    def forward(self, x, weights):
        y = self.ops[3](x)
        y.mul_(2)
        return y + self.ops[4](x) * weights[0]


class OfAList(Mixed):
    def forward(self, x, weights):
        states = [self.ops[3](x)]
        y = states[0]
        y += self.ops[4](x)
        return states[0] + weights[0] * x


class NumberOfATensor(Mixed):
    def __init__(self):
        super().__init__()
        self.gain = torch.ones(())

    def forward(self, x, weights):
        self.gain += 0.5
        return self.ops[3](x) * float(self.gain) + weights[0] * x


class WithHook(Mixed):
    def forward(self, x, weights):
        y = self.ops[3](x)
        y.register_hook(lambda gradient: 2 * gradient)
        return y + self.ops[4](x) * weights[0]


@pytest.mark.filterwarnings("ignore:nothing of the network is fused")
@pytest.mark.parametrize("kind", [WithHook, Random, Counting, WithoutGradients, InPlace, OfAList, NumberOfATensor])
def test_code_that_depends_on_what_is_not_traced_is_left_alone(kind):
    torch.manual_seed(0)
    plain = kind().double()
    inputs, mine = (torch.randn(2, 4, 6, 6).double(), torch.rand(2).double()), kernels.fuse(copy.deepcopy(plain))
    for seed in range(6):
        results = []
        for module in (plain, mine):
            torch.manual_seed(seed)
            y = module(*inputs)
            gradients = torch.autograd.grad(y.square().mean(), list(module.parameters()), allow_unused=True)
            results.append([y, *gradients])
        for right, one in zip(*results, strict=True):
            assert (right is None) == (one is None)
            assert one is None or torch.allclose(one, right, rtol=1e-9, atol=1e-12)


# --- Code that is easily taken for something else ---------------------------------------------------------------------


class Leaky(Mixed):
    """A module whose name is that of a function."""

    def __init__(self):
        super().__init__()
        self.relu, self.max = nn.LeakyReLU(0.1), nn.Identity()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x, weights):
        return self.norm(self.conv(self.relu(x))) + weights[0] * self.max(x)


class KeptDimension(Mixed):
    def forward(self, x, weights):
        return torch.stack([weights[i] * op(x) for i, op in enumerate(self.ops)]).sum(0, keepdim=True)


class AddedTwice(Mixed):
    def forward(self, x, weights):
        return torch.add(self.ops[3](x), torch.mul(self.ops[4](x), other=weights[0]), alpha=2)


class Complementary(Mixed):
    """Two terms share one mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rate", torch.tensor(0.5))

    def forward(self, x, weights):
        mask = ((torch.rand_like(x) >= self.rate) / (1 - self.rate)).to(x.dtype)
        return self.ops[3](x) + x * mask - x * mask


class Switched(Mixed):
    """Operations that numbers switch off: their norms move, and their gradients are zeros."""

    def forward(self, x, weights):
        y = weights[0] * x
        for switch, op in zip((1, 0), self.ops[3:]):
            y = y + switch * op(x)
        return y


class WeightOfItsOwn(Mixed):
    """The parameter that weighs zeros."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.ones(()))

    def forward(self, x, weights):
        return self.ops[3](x) + self.share * self.ops[1](x) + weights[0] * x


class ExactNumber(Mixed):
    def forward(self, x, weights):
        return 0.1 * self.ops[3](x) + weights[0] * (x / 3)


class InPlaceInABranch(Mixed):
    class Doubled(nn.Module):
        def forward(self, x):
            return x.mul_(2) if x.shape[0] > 1 else x

    def __init__(self):
        super().__init__(separable(), self.Doubled(), Functional())

    def forward(self, x, weights):
        y = self.ops[0](x) * weights[0]
        return self.ops[2](y) + y + self.ops[1](y)


class WritesElements(InPlaceInABranch):
    class Doubled(nn.Module):
        def forward(self, x):
            x[:, :1] = 0
            return x


class InPlaceFunction(InPlaceInABranch):
    class Doubled(nn.Module):
        def forward(self, x):
            F.relu_(x)
            return x


class Power(Mixed):
    def forward(self, x, weights):
        y = z = self.ops[3](x)
        y **= 2
        return z + self.ops[4](x)


class OutOf(Mixed):
    def forward(self, x, weights):
        y = self.ops[3](x)
        torch.add(y.detach(), 1, out=torch.empty_like(y))
        return y + self.ops[4](x)


class InPlaceAfter(Mixed):
    """An activation in place of what a fused part computes and saves."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x, weights):
        return self.act(sum(w * op(x) for w, op in zip(weights, self.ops))) + x


class InPlaceOfTheInput(Mixed):
    def forward(self, x, weights):
        y = x.clone()
        z = F.relu(sum([y]), inplace=True)
        return weights[0] * self.ops[3](z) + y


class Equal(Mixed):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(3))
        self.full = torch.ones(3)

    def forward(self, x, weights):
        return self.ops[3](x) + x * (weights[0] if torch.equal(self.mask, self.full) else weights[1])


class RequiresGrad(Mixed):
    def forward(self, x, weights):
        return self.ops[3](x) + x * weights[0 if self.ops[4].norm.weight.requires_grad else 1]


class Namespace(Mixed):
    def __init__(self):
        super().__init__()
        self.args, self.counts = types.SimpleNamespace(gain=1.0), collections.defaultdict(int, a=1)
        self.array, self.modules_of_others = np.ones(2), [nn.Sequential(nn.Identity())]

    def forward(self, x, weights):
        y = self.ops[3](x) * self.args.gain + x * self.counts["a"]
        return self.modules_of_others[0](y) + weights[0] * x * float(self.array[0])


class Generator(Mixed):
    def __init__(self):
        super().__init__()
        self.random = random.Random(0)

    def forward(self, x, weights):
        return self.ops[3](x) + weights[0 if self.random.random() < 0.5 else 1] * x


class IsTensor(Mixed):
    def forward(self, x, weights):
        x = x if isinstance(x, torch.Tensor) else x[0]
        return self.ops[3](x) + weights[0] * self.ops[4](x)


class Keeps(Mixed):
    def __init__(self):
        super().__init__()
        self.features = []

    def forward(self, x, weights):
        self.features.append(self.ops[3](x))
        return self.features[-1] + weights[0] * x


class Several(Mixed):
    """A list is returned."""

    def forward(self, x, weights):
        return [self.ops[3](x) + weights[0] * x, {"x": (self.ops[4](x) + x,)}]


class Plain(Mixed):
    """It has a name of ours."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x, weights):
        return self.ops[3](x) + weights[0] * self.plain(x)


class SharedParameter(Mixed):
    """Read first where the code cannot be followed."""

    class Reader(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            y = x * self.scale
            return y if len(x.shape) == 4 and x.sum() > -1e9 else x

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.reader = self.Reader(self.scale)

    def forward(self, x, weights):
        return self.ops[3](self.reader(x)) + x * self.scale


class OwnNorm(Mixed):
    class Norm(nn.BatchNorm2d):
        """Without code of its own."""

    def __init__(self):
        super().__init__()
        self.ops[3].op[3] = self.Norm(4)

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.ops))


class Uncounted(Mixed):
    def __init__(self):
        super().__init__()
        self.ops[4].norm.num_batches_tracked = None
        self.ops[3].op[3].eps = 0.1
        self.pool = nn.MaxPool2d(3, (1, 1), 1)

    def forward(self, x, weights):
        return self.ops[4](x) + weights[0] * self.ops[3](x) + self.pool(x)


class Caught(Mixed):
    """Errors that a trace raises are not the code's to catch."""

    def forward(self, x, weights):
        try:
            gain = 1 + len(weights) + float(weights[0] > 0)
        except Exception:
            gain = 0
        return self.ops[3](x) * gain + weights[0] * x


class Asked(Mixed):
    def forward(self, x, weights):
        gain = 2 if hasattr(x, "mask") else getattr(x, "gain", 3)
        return self.ops[3](x) * gain + weights[0] * x


class SharedNorm(Mixed):
    """It moves in code that can be followed, and in code that cannot."""

    class Odd(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) if x.shape[0] > 1 else x

    def __init__(self):
        super().__init__(separable(), separable())
        self.odd = self.Odd(self.ops[0].op[3])

    def forward(self, x, weights):
        return self.odd(x) + self.ops[0](x) + weights[0] * self.ops[1](x)


class ReadsStatistics(Mixed):
    def forward(self, x, weights):
        before = self.ops[3].op[3].running_mean.mean()
        return self.ops[3](x) + weights[0] * self.ops[4](x) + before


class WiderZeros(Mixed):
    def forward(self, x, weights):
        return self.ops[3](x) * weights[0] + torch.zeros(x.shape, dtype=torch.complex128)


class PaddedByNumbers(Mixed):
    def __init__(self):
        super().__init__()
        self.ops[4].depthwise.padding = 2

    def forward(self, x, weights):
        return self.ops[4](x) + weights[0] * self.ops[3](x)


class Unregistered(Mixed):
    """An object of a class of one's own."""

    class Settings:
        gain = 1.0

    def __init__(self):
        super().__init__()
        self.settings = self.Settings()

    def forward(self, x, weights):
        return self.ops[3](x) * self.settings.gain + weights[0] * x


class Keyed(Mixed):
    def __init__(self):
        super().__init__()
        self.names = dict.fromkeys(["a"])

    def forward(self, x, weights):
        return self.ops[3](x) + weights[0] * (x if "a" in self.names else 2 * x)


class FewerWeights(Mixed):
    def __init__(self):
        super().__init__()
        self.shares = nn.Parameter(torch.rand(4))

    def forward(self, x, weights):
        return sum(p * op(x) for p, op in zip(torch.softmax(self.shares, -1), self.ops)) + weights[0] * x


class UnusedStatistics(Mixed):
    def forward(self, x, weights):
        norm = self.ops[3].op[3]
        F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
        return self.ops[4](x) + weights[0] * x


BETWEEN = {  # changes between calls, of which the code depends
    Equal: lambda module: module.mask.data.zero_(),
    RequiresGrad: lambda module: module.ops[4].norm.weight.requires_grad_(False),
    Unregistered: lambda module: setattr(module.settings, "gain", 2.0),
    Keyed: lambda module: (module.names.pop("a"), module.names.update(b=None)),
    Namespace: lambda module: (setattr(module.args, "gain", 2.0), module.array.fill(3)),
}
TRAPS = [Leaky, KeptDimension, AddedTwice, Complementary, Switched, WeightOfItsOwn, ExactNumber, InPlaceInABranch]
TRAPS += [WritesElements, InPlaceFunction, Power, OutOf, InPlaceAfter, InPlaceOfTheInput, Equal, RequiresGrad]
TRAPS += [Namespace, Generator, IsTensor, Keeps, Several, Plain, SharedParameter, OwnNorm, Uncounted, Caught, Asked]
TRAPS += [SharedNorm, ReadsStatistics, WiderZeros, PaddedByNumbers, Unregistered, Keyed, FewerWeights]
TRAPS += [UnusedStatistics]


@pytest.mark.filterwarnings("ignore:nothing of the network is fused")
@pytest.mark.parametrize("kind", TRAPS)
def test_what_looks_like_something_else_computes_what_it_says(kind):
    torch.manual_seed(0)
    plain = kind().double()
    mine = kernels.fuse(copy.deepcopy(plain))
    inputs, results = (torch.randn(2, 4, 6, 6).double(), torch.rand(5).double()), []
    for module in (plain, mine):
        found = []
        for call in range(3):
            torch.manual_seed(call)
            if call == 2 and kind in BETWEEN:
                BETWEEN[kind](module)
            x, weights = (t.detach().clone().requires_grad_() for t in inputs)
            tensors, _ = torch.utils._pytree.tree_flatten(module(x * 1, weights))
            loss = sum(t.abs().square().mean() for t in tensors)
            leaves = [x, weights, *(p for p in module.parameters() if p.requires_grad)]
            found += [*tensors, *torch.autograd.grad(loss, leaves, allow_unused=True)]
            found += [buffer.clone() for buffer in module.buffers()]
        results.append(found)
    for right, one in zip(*results, strict=True):
        assert (right is None) == (one is None)
        assert one is None or torch.allclose(one.to(right.dtype), right, rtol=1e-10, atol=1e-12)


def test_the_path_of_a_sum_is_dropped_as_a_whole():
    class Dropped(Mixed):
        def __init__(self):
            super().__init__()
            self.register_buffer("rate", torch.tensor(0.5))

        def forward(self, x, weights):
            y = self.ops[3](x) + weights[0] * self.ops[4](x)
            mask = ((torch.rand_like(y[:, :1, :1, :1]) >= self.rate) / (1 - self.rate)).to(y.dtype)
            return y * mask + 0.5 * x

    plain, x = Dropped().double(), torch.randn(64, 4, 5, 5).double()
    mine = kernels.fuse(copy.deepcopy(plain), strict=True)
    weights = torch.ones(1).double()
    whole = plain.ops[3](x) + plain.ops[4](x)
    scale = ((mine(x, weights) - 0.5 * x) / whole).detach()
    dropped = scale[:, :1, :1, :1]
    assert torch.allclose(scale, dropped.expand_as(scale), atol=1e-6)
    assert 10 < int((dropped.abs() < 1e-6).sum()) < 54 and float(dropped.max()) == pytest.approx(2)


def test_a_result_may_be_changed_in_place_by_a_module_that_says_so():
    torch.manual_seed(0)

    class Network(nn.Sequential):
        def __init__(self):
            super().__init__(Fixed(), nn.ReLU(inplace=True))

        def forward(self, x, weights):
            return self[1](self[0](x, weights))

    plain = Network().double()
    mine, x, weights = kernels.fuse(copy.deepcopy(plain)), torch.randn(2, 4, 5, 5).double(), torch.rand(2).double()
    assert mine[0]._kernels_state.plans
    gradients = [
        torch.autograd.grad(network(x, weights).square().sum(), list(network.parameters())[0])[0]
        for network in (plain, mine)
    ]
    assert torch.allclose(*gradients, rtol=1e-10)


def test_a_branch_counts_by_the_way_that_the_code_goes():
    class Rated(Mixed):
        def __init__(self):
            super().__init__()
            self.register_buffer("rate", torch.zeros(()))

        def forward(self, x, weights):
            y = self.ops[3](x) + weights[0] * x
            return y if self.rate == 0 else 2 * y

    plain, x, weights = Rated().double(), torch.randn(2, 4, 5, 5).double(), torch.rand(2).double()
    mine = kernels.fuse(copy.deepcopy(plain))
    for rate in (0.0, 0.3, 0.0, 0.2, 0.1):
        plain.rate.fill_(rate), mine.rate.fill_(rate)
        assert torch.allclose(mine(x, weights), plain(x, weights), rtol=1e-10)
    assert mine._kernels_state.traces == 2


@pytest.mark.filterwarnings("ignore:torch computes what is no cell")
def test_statistics_move_once_where_torch_computes_what_the_kernels_refuse():
    class Gate(Mixed):
        def forward(self, x, weights):
            y = self.ops[3](x) + weights[0] * x
            return self.ops[4](y) + weights[0] * x.mean((2, 3), keepdim=True)

    plain, x, weights = Gate().bfloat16(), torch.randn(2, 4, 5, 5).bfloat16(), torch.ones(1).bfloat16()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    mine = kernels.fuse(copy.deepcopy(plain))
    for module in (plain, mine):
        module(x, weights)
    torch.testing.assert_close(mine.ops[3].op[3].running_mean, plain.ops[3].op[3].running_mean, rtol=0.02, atol=1e-3)


def test_modes_are_part_of_what_is_traced():
    class Modes(Mixed):
        def forward(self, x, weights):
            y = self.ops[3](x) + weights[0] * x
            return y if torch.is_grad_enabled() else 2 * y

    plain, x, weights = Modes().double(), torch.randn(2, 4, 5, 5).double(), torch.rand(2).double()
    mine = kernels.fuse(copy.deepcopy(plain))
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.allclose(mine(x, weights), plain(x, weights), rtol=1e-10)
    mine(x, weights).sum().backward()


class Copied(Mixed):
    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain

    def forward(self, x, weights):
        return self.gain * self.ops[3](x) + weights[0] * x

    def again(self):
        return type(self)(3.0).double()


class OwnReduce(Copied):
    def __reduce__(self):
        return _own_reduce, (self.gain,)


def _own_reduce(gain):
    return OwnReduce(gain).double()


def test_copies_of_other_kinds_compute_as_they_say():
    mine, x, weights = kernels.fuse(Copied().double()), torch.randn(2, 4, 5, 5).double(), torch.rand(2).double()
    mine(x, weights)
    other = copy.copy(mine)
    other.gain = 2.0
    assert torch.allclose(other(x, weights) - mine(x, weights), mine.ops[3](x), rtol=1e-9)
    assert mine.again()(x, weights).shape == x.shape  # of our class, but never fused
    assert copy.deepcopy(kernels.fuse(OwnReduce(5.0).double())).gain == 5.0
    assert str(mine) == str(Copied())


def test_a_module_whose_plans_are_of_no_use_becomes_plain():
    mine, x, weights = kernels.fuse(Copied().double()), torch.randn(1, 4, 5, 5).double(), torch.rand(2).double()
    for i in range(30):
        mine.gain = float(i)
        mine(x, weights)
    assert mine._kernels_state.traces == kernels.modules.TRACES + 1
    assert torch.allclose(mine(x, weights), Copied.forward(mine, x, weights), rtol=1e-10)
