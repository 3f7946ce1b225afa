"""The operations under torch.compile and torch.export with a batch of any size."""

import pytest
import torch
import torch.nn as nn

import kernels
from kernels import Dropout, FactorizedReduce, Norm, Pool, Separable, Sum
from kernels.tests.helpers import SLOW

pytestmark = pytest.mark.usefixtures("fused")
BATCHES = 4, 7, 3


class Operation(nn.Module):
    """One of the operations, with weights and a norm of its own."""

    def __init__(self, name, channels=4):
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.depthwise = nn.Parameter(torch.randn(channels, 1, 3, 3))
        self.pointwise = nn.Parameter(torch.randn(channels, channels, 1, 1))
        self.halves = nn.ParameterList([torch.randn(channels // 2, channels, 1, 1) for _ in range(2)])
        self.probabilities = nn.Parameter(torch.rand(4))
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("key", torch.tensor([5]))
        self.register_buffer("rates", torch.tensor([0.5]))

    def forward(self, x):
        bn, p = self.norm, self.probabilities
        norm = Norm(bn.running_mean, bn.running_var, bn.weight, bn.bias)
        settings = {"training": self.training, "momentum": 0.1}
        if self.name == "separable":
            return kernels.separable(x, self.depthwise, self.pointwise, 2, 1, norm=norm, **settings)
        if self.name == "pool":
            return kernels.pool(x, "avg", 2) + kernels.pool(x, "max", 2)
        if self.name == "mixed_sum":
            return kernels.mixed_sum([x, 2 * x], p[:2])
        if self.name == "mixed_norm_sum":
            return kernels.mixed_norm_sum([x, 2 * x], p[:2], [norm, None], **settings)
        if self.name == "dropout_masks":
            return x * kernels.dropout_masks(self.key, self.rates, [3], x.shape)[0]
        steps = [
            Separable(0, self.depthwise, self.pointwise, 2, 1),
            FactorizedReduce(0, *self.halves),
            Pool(0, "max", 2),
            Sum([1, 2, 3]),
            Sum([4]),
        ]
        dropout = Dropout(self.key, self.rates, [3])
        norms = [None, norm, norm, None, None, None]
        return kernels.cell([x], steps, [4, 5], p, norms, dropout=dropout, **settings)


NAMES = pytest.mark.parametrize("name", ["separable", "pool", "mixed_sum", "mixed_norm_sum", "dropout_masks", "cell"])


def images(batch):
    return torch.randn(batch, 4, 6, 6, generator=torch.Generator().manual_seed(batch))


def run(module, function, x):
    """Result, gradients and running statistics."""
    x = x.requires_grad_()
    y = function(x)
    used = [t for t in (x, *module.parameters()) if t.requires_grad]
    gradients = torch.autograd.grad(y.square().sum(), used, allow_unused=True)
    return [t.detach() for t in (y, *gradients, *module.norm.buffers()) if t is not None]


@NAMES
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=SLOW)])
def test_a_compiled_operation_takes_a_batch_of_any_size_without_being_compiled_again(name, training):
    torch.compiler.reset()
    mine, plain = (Operation(name).train(training) for _ in range(2))
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for i, batch in enumerate(BATCHES):
        x = images(batch)
        torch._dynamo.mark_dynamic(x, 0)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            results = run(mine, compiled, x)
        for a, b in zip(results, run(plain, plain, images(batch)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@NAMES
def test_an_exported_operation_takes_a_batch_of_any_size(name):
    module = Operation(name).eval()
    program = torch.export.export(module, (images(4),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    operators = {str(node.target) for node in program.graph.nodes}
    assert any(operator.startswith("pdarts.") for operator in operators)
    for batch in BATCHES:
        assert torch.equal(program.module()(images(batch)), module(images(batch)))
