"""Tests of captured steps without a GPU: a stand-in freezes what a capture freezes."""

import contextlib
import dataclasses
import importlib
import itertools
import warnings
from unittest import mock

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import pdarts
from harness.conftest import ONE_STAGE, random_images
from harness.graphs import CapturedStep
from harness.settings import EvaluateSettings

SPACE = pdarts.SearchSpace(("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"), nodes=1)  # small, for fast tests
SEARCH = dataclasses.replace(ONE_STAGE, keep=(4,), epochs=4, alpha_start=2)
EVALUATION = EvaluateSettings(depth=3, channels=8, epochs=3, batch_size=4, cutout=4, auxiliary=False)
CELL = pdarts.Genotype(*[[("sep_conv_3x3", 0), ("skip_connect", 1)], [2]] * 2)
IMAGES = random_images((8, 8, 3), 3, 22)  # in halves of 11: two batches of 4 and a tail of 3


class Recorder(TorchDispatchMode):
    """What a capture takes down: every operation with its very tensors and numbers, nothing of the Python around it."""

    of_fused_operators = True

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.found = [], set(), {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        inputs = storages((arguments, keywords))
        for key, storage in inputs.items():
            if key not in self.made | self.found.keys():
                self.found[key] = storage, storage.clone()
        outputs = function(*arguments, **keywords)
        new = [not storages(t).keys() <= inputs.keys() for t in tensors(outputs)]  # neither views nor changed in place
        self.made |= storages(outputs).keys() - inputs.keys()
        if any(new) or function._schema.is_mutable:  # a view lies where its base does
            self.operations.append((function, arguments, keywords, tensors(outputs), new))
        return outputs

    def undo(self):
        """A capture launches nothing: what lay there before lies there again."""
        for storage, before in self.found.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for function, arguments, keywords, outputs, new in self.operations:
            results = tensors(function(*arguments, **keywords))
            for output, result in itertools.compress(zip(outputs, results, strict=True), new):
                output.copy_(result)


def tensors(tree):
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def storages(tree):
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors(tree)}


class Captured(CapturedStep):
    WARM_UP, made = 1, []

    def __init__(self, step):
        super().__init__(step, torch.device("cpu"))
        self.made.append(self)

    def _prepare(self):
        self.replays = 0

    def _plain(self, inputs):
        return self.step(*inputs)

    def _capture(self, buffers):
        recorder, state = Recorder(), torch.get_rng_state()
        try:
            with recorder:
                results = self.step(*buffers)
        finally:
            recorder.undo()
            torch.set_rng_state(state)

        def replay():
            self.replays += 1
            recorder.replay()

        return replay, buffers, results

    def _recover(self):
        pass


def drop_without_looking(x, rate, like):
    """`pdarts.inverted_dropout` as it computes on a GPU, without the CPU's look at the rate."""
    return x * ((torch.rand_like(like, dtype=torch.float32) >= rate) / (1 - rate)).to(x.dtype)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Drops without looking at the rate, and Adam with its count of steps in a tensor."""
    adam = torch.optim.Adam
    monkeypatch.setattr(pdarts, "inverted_dropout", drop_without_looking)
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **options: adam(*a, **options | {"capturable": True}))
    of_adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(of_adam, "_get_capturable_supported_devices", lambda *_: ["cpu"])
    monkeypatch.setattr(Captured, "made", [])


def searched(**options):
    """The alphas that a search ends with, and losses and correct predictions of all of its steps."""
    search = pdarts.Search(SEARCH, pdarts.search_data(IMAGES.x_train, IMAGES.y_train, SEARCH), space=SPACE, **options)
    losses = []
    with torch.random.fork_rng():
        for event in search:
            if isinstance(event, pdarts.Step):
                losses += [t for t in event if isinstance(t, torch.Tensor)]
    return [*search.stages[0][2:], *losses]


def evaluated(**options):
    data = pdarts.Data(pdarts.Loader(IMAGES.x_train[:11], IMAGES.y_train[:11], EVALUATION), 3, 3)
    training = pdarts.Evaluation(CELL, EVALUATION, data, **options)
    with torch.random.fork_rng():
        losses = [event.loss for event in training if isinstance(event, pdarts.Step)]
    return [*training.network.state_dict().values(), *losses]


def same(results, others):
    return all(map(torch.equal, results, others))


# --- captured steps compute what plain ones do ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_captured_search_ends_with_the_bits_of_a_plain_one(mode):
    kernels.use(mode)
    prepare = kernels.fuse if mode == "on" else pdarts.identity
    plain = searched(prepare=prepare)
    assert same(searched(prepare=prepare, wrap_step=Captured), plain)
    (step,) = Captured.made
    shapes = [(4, 3, 8, 8), (3, 3, 8, 8)]
    assert not step.refused
    assert {tuple(tuple(shape) for shape, _ in key)[::2] for key in step.captured} == {
        *((s,) for s in shapes),
        *((s, s) for s in shapes),  # with a batch for the alphas
    }
    assert step.replays == 4 * 3 - 4  # every shape's first step is plain


@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_captured_evaluation_ends_with_the_bits_of_a_plain_one(mode):
    kernels.use(mode)
    prepare = kernels.fuse if mode == "on" else pdarts.identity
    plain = evaluated(prepare=prepare)
    assert same(evaluated(prepare=prepare, wrap_step=Captured), plain)
    (step,) = Captured.made
    assert not step.refused and len(step.captured) == 2 and step.replays == 3 * 3 - 2


# --- and would not if a number were frozen: the tests above can fail --------------------------------------------------


class Rate(float):
    """A learning rate that is a Python number."""

    def fill_(self, value):
        self.group["lr"] = rate = Rate(value)
        rate.group = self.group


def number_as_learning_rate(patch):
    sgd = pdarts.sgd

    def changed(*arguments):
        optimizer = sgd(*arguments)
        (group,) = optimizer.param_groups
        group["lr"] = rate = Rate(group["lr"])
        rate.group = group
        return optimizer

    patch.setattr(pdarts, "sgd", changed)


def number_as_rate(patch):
    drop = pdarts.inverted_dropout
    patch.setattr(pdarts, "inverted_dropout", lambda x, rate, like: drop(x, torch.tensor(float(rate.numpy())), like))


@pytest.mark.parametrize("frozen", [number_as_learning_rate, number_as_rate])
@pytest.mark.parametrize("run", [searched, evaluated])
def test_a_number_that_python_holds_would_be_frozen(monkeypatch, few_weights, run, frozen):
    frozen(monkeypatch)
    assert not same(run(wrap_step=Captured), run())
    assert not Captured.made[0].refused


def test_the_seed_is_not_frozen():
    """Two replays draw different numbers, and the same ones after the same seed."""
    step = Captured(lambda x: [x + torch.rand(3)])
    torch.manual_seed(0)
    first = [step(torch.zeros(3))[0] for _ in range(4)]
    assert step.replays == 3 and len({tuple(t.tolist()) for t in first}) == 4
    torch.manual_seed(0)
    assert same([step(torch.zeros(3))[0] for _ in range(4)], first)


# --- steps that cannot be captured ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run, error", [(searched, RuntimeError), (evaluated, ValueError)])
def test_a_step_that_cannot_be_captured_stays_plain_with_one_warning(monkeypatch, few_weights, run, error):
    def refuses(self, buffers):
        raise error("no capture\n  on this device")

    plain, recovered = run(), []
    monkeypatch.setattr(Captured, "_capture", refuses)
    monkeypatch.setattr(Captured, "_recover", lambda self: recovered.append(self))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert same(run(wrap_step=Captured), plain)
    messages = [str(w.message) for w in seen if issubclass(w.category, RuntimeWarning)]
    assert messages == [f"plain steps instead of CUDA graphs ({error.__name__}: no capture on this device)"]
    assert recovered == Captured.made and Captured.made[0].refused


def test_a_step_that_looks_at_a_number_is_refused_and_changes_nothing_twice():
    """It fails in the middle of the capture: what it had done by then is done once, by the plain step."""
    total = torch.zeros(())

    def step(x):
        total.add_(x.sum())
        return [total * 2 if x.sum() > 0 else total]

    step = Captured(step)
    with pytest.warns(RuntimeWarning, match="plain steps .*not permitted when stream is capturing"):
        results = [float(step(torch.ones(2))[0]) for _ in range(3)]
    assert results == [4, 8, 12]


def test_a_capture_that_fails_at_its_end_leaves_nothing_behind(monkeypatch):
    """As after another thread has broken it: torch.cuda.graph does not put the stream back then, nor end its pool."""
    stream, usual, ended, modes = mock.Mock(), mock.Mock(), [], []
    present = [usual]

    @contextlib.contextmanager
    def on(stream):
        before, present[0] = present[0], stream
        try:
            yield
        finally:
            present[0] = before

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode="global"):
        modes.append(capture_error_mode)
        present[0] = stream
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    fakes = {"Stream": lambda: stream, "graph_pool_handle": lambda: "pool", "stream": on, "graph": graph}
    fakes |= {"device": contextlib.nullcontext, "current_device": lambda: 1, "current_stream": lambda *_: present[0]}
    fakes |= {"synchronize": mock.Mock(), "CUDAGraph": mock.Mock, "default_generators": [None, object()]}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: ended.append(of), raising=False)
    step = CapturedStep(lambda x: [mock.Mock(value=2 * x, on=present[0])], "cuda:1")
    for i in range(4):
        with pytest.warns(RuntimeWarning, match="plain steps") if i == 3 else contextlib.nullcontext():
            (result,) = step(torch.tensor(i))
        assert result.value == 2 * i and result.on is stream and present == [usual]
        assert step.refused == (i == 3) and ended == [(1, "pool")] * (i == 3)
    assert modes == ["thread_local"]  # in which other threads may pin memory


def test_results_are_the_callers_own_and_inputs_stay_as_they_are():
    step = Captured(lambda x: [x.mul_(2)])
    given = [torch.full((2,), float(i)) for i in range(4)]
    results = [step(t.clone())[0] for t in given]
    assert step.replays == 3 and same(results, [2 * t for t in given])
    x = torch.ones(2)
    step(x)
    assert torch.equal(x, torch.ones(2))
