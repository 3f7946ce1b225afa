"""What the tests of the operations share."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = pytest.mark.cuda  # skipped without a GPU, see conftest.py
SLOW = pytest.mark.slow
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
FRESH = (torch.zeros, torch.ones)  # running means and variances
LAYOUTS = (torch.contiguous_format, torch.channels_last)
MAPS = (  # shapes [N,C,H,W]
    (2, 3, 5, 7),
    (3, 16, 8, 8),
    (1, 2, 1, 1),
    (4, 36, 9, 9),
    (2, 20, 1, 33),
    (2, 64, 8, 8),
    (0, 3, 4, 4),
)


def thinned(cases, n):
    """Parameters of a test: every n-th of the cases, and the others as slow ones.

    With an n that divides none of the numbers of values that are combined, any two values meet."""
    return [case if i % n == 0 else pytest.param(*case, marks=SLOW) for i, case in enumerate(cases)]


def numbers(*shape, device="cpu", dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def layout_of(device):
    """The memory format of what a cell computes."""
    return torch.channels_last if device == "cpu" else torch.contiguous_format


def saved_for_backward(run):
    """Numbers of elements by address, of the tensors that `run()` saves for backward; its result stays alive."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        result = run()
    return saved, result


def with_threads(run):
    """What `run` returns with one, two and three threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    return results


def assert_same_bits(results):
    first, *others = results
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def assert_passes_opcheck(*calls):
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def assert_compiles(function, inputs):
    """Without graph breaks, and the gradients are the same bits."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mine, right = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, function))
    assert all(map(torch.equal, mine, right))


class DepthwiseConvolutions(TorchDispatchMode):
    """Notes in which memory formats torch's own depthwise convolutions get gradients, inputs and weights.

    torch takes the channels-last way where one of them looks like it, also a weight [C,1,k,k] that is contiguous too.
    """

    of_fused_operators = True

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        aten = torch.ops.aten
        if function in (aten.convolution.default, aten.convolution_backward.default):
            backward = function == aten.convolution_backward.default
            names = ("gradient", "input", "weight") if backward else ("input", "weight")
            if arguments[9 if backward else 8] > 1:  # groups
                for name, t in zip(names, arguments):
                    self.seen.add((name, str(torch._prims_common.suggest_memory_format(t))))
        return function(*arguments, **settings or {})


ALL_CONTIGUOUS = {(name, "torch.contiguous_format") for name in ("gradient", "input", "weight")}
