"""The fused cell against its plain twin in torch: values, gradients, statistics, what is kept, messages."""

import functools
import itertools
import re

import pytest
import torch

import kernels
from kernels import Dropout, FactorizedReduce, Norm, Pool, Separable, Sum, cell, cell_ref
from kernels.tests.conftest import FOLDER
from kernels.tests.helpers import FRESH, SLOW, layout_of, thinned


@pytest.fixture(autouse=True)
def _cases_on_device(device, monkeypatch):
    monkeypatch.setattr(Case, "device", device)


class Case:
    """A cell with all that there is: every kind of step, sums as terms, a sum that is no output, two outputs, dropout.

    tensors: those that gradients are asked for; running: the statistics.
    """

    device = "cpu"

    def __init__(self, shape=(2, 4, 5, 6), stride=1, affine=True, images=False, training=True, dropout=True):
        torch.manual_seed(0)
        n, c, h, w = shape
        self.training, self.tensors = training, []
        large = (h, w) if stride == 1 else (2 * h - 1, 2 * w)
        a, b, small = (self.leaf(n, *size) for size in ((c, *large), (c + 3, *large), (c, h, w)))
        depthwise = [self.leaf(channels, 1, k, k) for channels, k in ((c, 3), (c, 5), (c + 3, 3), (c, 7))]
        pointwise = [self.leaf(*size, 1, 1) for size in ((c, c), (c, c), (c, c + 3), (c, c), (c, c))]
        halves = [self.leaf(half, c + 3, 1, 1) for half in (c // 2, c - c // 2)]
        self.inputs = [a, b, small]
        self.operations = [
            Separable(0, depthwise[0], pointwise[0], stride, 1, 1),  # 3
            Separable(3, depthwise[1], pointwise[1], 1, 2, 1),  # 4
            Separable(1, depthwise[2], pointwise[2], stride, 2, 2),  # 5
            Pool(0, "max", stride),  # 6
            Sum([4, 2, 5, 6, 2]),  # 7
            Pool(7, "avg"),  # 8
            Separable(2, None, pointwise[3]),  # 9
            Sum([8, 7, 9, 7]),  # 10
            Separable(10, depthwise[3], pointwise[4], 1, 3, 1),  # 11
            Sum([11, 10]),  # 12
            Sum([7]),  # 13, not an output, as the first
            Pool(13, "max"),  # 14
            Sum([14, 12]),  # 15
        ]
        if stride == 2:
            self.operations += [FactorizedReduce(1, *halves), Sum([16])]  # 17
        else:
            del self.tensors[-2:]
        self.outputs = [10, 15, 17][: stride + 1]
        normed = [3, 4, 5, 6, 8, 9, 11, 16][: 7 + (stride == 2)]
        # Of values 2 and 7, where each is a term for the second time, and of 10 and 12.
        rates, places = torch.tensor([0.4, 0.0, 0.05, 0.7]), [4, 8, 10, 13]
        self.dropout = Dropout(kernels.dropout_key("cpu"), rates, places) if dropout else None
        self.norms = [None] * (len(self.inputs) + len(self.operations))
        self.running = []
        for value in normed:
            self.running += [torch.randn(c, dtype=torch.float64), torch.rand(c, dtype=torch.float64) + 0.5]
            gamma, beta = (self.leaf(c), self.leaf(c)) if affine and value % 4 else (None, None)
            self.norms[value] = Norm(*self.running[-2:], gamma, beta)
        terms = sum(len(op.terms) for op in self.operations if isinstance(op, Sum))
        self.probabilities = self.leaf(terms, *[n] * images)

    def leaf(self, *size):
        self.tensors.append(torch.randn(size, dtype=torch.float64))
        return self.tensors[-1]

    def leaves(self):
        return [t.to(self.device, copy=True).requires_grad_() for t in self.tensors]

    def statistics(self):
        return [t.to(self.device, copy=True) for t in self.running]

    def call(self, function, tensors, running):
        """The result of `cell` or `cell_ref`, with these instead of its own."""
        known = {id(mine): other for mine, other in zip(self.tensors + self.running, [*tensors, *running])}
        dtype = tensors[0].dtype

        def swap(t):
            return known.get(id(t), t.to(self.device, dtype)) if isinstance(t, torch.Tensor) else t

        operations = [type(op)(*map(swap, op)) for op in self.operations]
        norms = [norm and Norm(*map(swap, norm)) for norm in self.norms]
        inputs, probabilities = [swap(x) for x in self.inputs], swap(self.probabilities)
        key, rates, places = self.dropout or (None, None, None)
        dropout = self.dropout and Dropout(key.to(self.device), rates.to(self.device), places)
        settings = {"training": self.training, "momentum": 0.3, "dropout": dropout}
        return function(inputs, operations, self.outputs, probabilities, norms, **settings)

    def run(self, function, dtype=torch.float64, needed=None, of_parameters=None):
        """Result, gradients and running statistics."""
        types = [dtype] * len(self.inputs) + [of_parameters or dtype] * (len(self.tensors) - len(self.inputs))
        tensors = [t.detach().to(self.device, of) for t, of in zip(self.tensors, types)]
        for i in needed if needed is not None else range(len(tensors)):
            tensors[i].requires_grad_()
        running = [t.to(self.device, of_parameters or dtype, copy=True) for t in self.running]
        y = self.call(function, tensors, running)
        gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y)
        gradients = torch.autograd.grad(y, [t for t in tensors if t.requires_grad], gradient)
        return [t.detach().cpu() for t in (y, *gradients, *running)]


SHAPES = (2, 3, 5, 7), (3, 16, 8, 8), (4, 36, 9, 9), (2, 20, 1, 33), (5, 64, 4, 4)
# affine, images, dropout
OPTIONS = (True, False, True), (False, True, True), (True, True, True), (True, True, False)


@pytest.mark.parametrize(
    "training, options, stride, shape", thinned(itertools.product((True, False), OPTIONS, (1, 2), SHAPES), 7)
)
def test_fused_cell_equals_plain_torch(shape, stride, options, training):
    affine, images, dropout = options
    case = Case(shape, stride, affine, images, training, dropout)
    for mine, right in zip(case.run(cell), case.run(cell_ref), strict=True):
        assert mine.shape == right.shape and (mine - right).norm() <= 1e-11 * right.norm().clamp_min(1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_fused_cell_in_float32_is_about_as_exact_as_plain_torch(stride):
    case = Case((4, 36, 16, 16), stride)
    right, mine, plain = case.run(cell_ref), case.run(cell, torch.float32), case.run(cell_ref, torch.float32)
    for a, b, r in zip(mine, plain, right, strict=True):
        errors = [float((t.double() - r).norm() / r.norm()) for t in (a, b)]
        assert errors[0] <= 3 * errors[1] + 1e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_cell_in_16_bits_is_as_exact_as_plain_torch(dtype, stride):
    case = Case((4, 36, 16, 16), stride)
    right, plain = case.run(cell_ref), case.run(cell_ref, dtype)
    types = [dtype, torch.float32] if case.device == "cuda" else [dtype]  # of a network in 16 bits, and under autocast
    for of_parameters in types:
        mine = case.run(cell, dtype, of_parameters=of_parameters)
        for a, b, r in zip(mine, plain, right, strict=True):
            errors = [float((t.double() - r).norm() / r.norm()) for t in (a, b)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=SLOW)])
def test_fused_cell_gradients_are_numerical_derivatives(fast):
    case = Case((2, 2, 3, 3), 2, images=True)

    def function(*tensors):  # every call finds the same running statistics
        return case.call(cell, tensors, case.statistics())

    assert torch.autograd.gradcheck(function, case.leaves(), fast_mode=fast)


OPCHECKS = "test_schema", "test_faketensor"


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize("tests", [OPCHECKS, pytest.param((*OPCHECKS, "test_aot_dispatch_static"), marks=SLOW)])
def test_fused_cell_operators_pass_opcheck(training, tests, monkeypatch):
    case, calls = Case((2, 3, 4, 4), 2, training=training), []
    tensors = case.leaves()
    operator = torch.ops.pdarts.cell
    monkeypatch.setattr(torch.ops.pdarts, "cell", lambda *arguments: calls.append(arguments) or operator(*arguments))
    case.call(cell, tensors, case.statistics())
    monkeypatch.undo()
    (arguments,) = calls
    check = functools.partial(torch.library.opcheck, test_utils=tests)
    assert set(check(torch.ops.pdarts.cell, (*arguments[:-1], True)).values()) == {"SUCCESS"}
    with torch.no_grad():
        y, statistics, values = operator(*arguments[:-1], True)
        *some, probabilities, given, key, rates, places, program, outputs, batch, _, _ = arguments
        detached = [[t if t is None else t.detach() for t in part] for part in some]
        given = statistics if given is None else given
        needs = [t is not None and t.requires_grad for part in some for t in part] + [True]
        tail = *detached, probabilities.detach(), given, key, rates, places, program, outputs, batch, needs
    results = check(torch.ops.pdarts.cell_backward, (torch.randn_like(y), y, values, *tail))
    assert set(results.values()) == {"SUCCESS"}


@SLOW  # test_dynamic.py compiles one too
def test_fused_cell_compiles_without_graph_breaks():
    case = Case((2, 3, 4, 4))
    tensors = case.leaves()

    def function(*tensors):
        return case.call(cell, tensors, case.statistics())

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mine, right = (torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (compiled, function))
    assert all(map(torch.equal, mine, right))


def test_fused_cell_gives_the_same_bits_with_any_number_of_threads_and_streams(monkeypatch):
    case, threads, results = Case((9, 16, 16, 16), 2, images=True), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            monkeypatch.setenv("PDARTS_CUDA_STREAMS", str(min(n, 2)))
            results.append(case.run(cell, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_fused_cell_computes_only_the_gradients_that_are_asked_for():
    case = Case((3, 5, 6, 6), 2)
    y, *every = case.run(cell)
    count = len(case.tensors)
    for needed in ([0], [count - 1], [1, 4], [3], range(2), range(3, count), *([i] for i in range(5, count - 1))):
        _, *some = case.run(cell, needed=set(needed))
        for mine, i in zip(some, needed):
            assert torch.allclose(mine, every[i], rtol=1e-12, atol=1e-14)


def test_fused_cell_without_gradients_keeps_nothing_and_computes_the_same():
    for training in True, False:
        case = Case((9, 5, 6, 6), 2, training=training)
        y, *_ = case.run(cell)
        with torch.no_grad():
            other = case.call(cell, case.leaves(), case.statistics())
        assert torch.equal(y, other.cpu())


def test_fused_cell_keeps_its_values_inputs_and_result_only(device):
    case, kept = Case((2, 4, 5, 6)), {}
    tensors = case.leaves()
    in_layout = [t.contiguous(memory_format=layout_of(device)) if t.dim() == 4 else t for t in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        case.call(cell, in_layout, case.statistics())
    values = len(case.operations) * 2 * 4 * 5 * 6
    others = sum(t.numel() for t in tensors) + 3 * len(case.norms) * 4 + 1 + 4  # weights, statistics, key and rates
    # On CUDA also what the pointwise convolutions of four steps read, and both outputs one by one.
    more = 0 if device == "cpu" else (4 + 4 + 7 + 4 + 2 * 4) * 2 * 5 * 6
    assert sum(kept.values()) <= values + others + more


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 16, 8, 8), (2, 4, 1, 1), (1, 20, 6, 6)])
@pytest.mark.parametrize("function", [cell, cell_ref])
def test_dropout_multiplies_terms_by_masks_of_their_places(device, shape, function):
    x, p, g = (torch.randn(size, device=device, dtype=torch.float64) for size in (shape, 5, shape))
    x.requires_grad_(), p.requires_grad_()
    key, rates = kernels.dropout_key(device), torch.tensor([0.5, 0.0, 1.0], device=device)
    masks = kernels.dropout_masks_ref(key, rates, [1, 3, 4], shape).double()
    y = function([x], [Sum([0]), Sum([0, 0, 1, 1])], [2], p, dropout=Dropout(key, rates, [1, 3, 4]))
    of_x, of_p = torch.autograd.grad(y, (x, p), g)
    factor = p[1] * masks[0] + p[2] + p[0] * (p[3] * masks[1] + p[4] * masks[2])
    assert torch.allclose(y, factor * x) and torch.allclose(of_x, factor * g)
    parts = torch.stack([p[3] + 0 * x, masks[0], 1 + 0 * x, p[0] * masks[1], p[0] * masks[2]])
    assert torch.allclose(of_p, (parts * x * g).sum((1, 2, 3, 4)))
    assert 0 < (masks[0] == 0).sum() < x.numel() and (masks[1] == 1).all() and (masks[2] == 0).all()


def test_where_torch_convolves_one_relu_does_for_all_readers_of_a_value(device):
    torch.manual_seed(0)
    weights = [torch.randn(4, 1, 3, 3), torch.randn(4, 4, 1, 1), torch.randn(4, 1, 5, 5), torch.randn(4, 4, 1, 1)]
    halves = [torch.randn(2, 4, 1, 1), torch.randn(2, 4, 1, 1)]
    tensors = [t.to(device).requires_grad_() for t in (torch.randn(2, 4, 6, 6), *weights, *halves, torch.rand(4))]
    results, relus = [], []
    for function in cell, cell_ref:
        x, *w, p = tensors
        steps = [FactorizedReduce(0, *w[4:]), Separable(0, *w[:2], 2, 1), Separable(0, *w[2:4], 2, 4, 2)]
        with torch.autocast(device, torch.bfloat16), torch.profiler.profile() as profile:
            y = function([x], [*steps, Pool(0, "max", 2), Sum([1, 2, 3, 4])], [5], p)
        relus.append(sum(event.key == "aten::relu" and event.count for event in profile.key_averages()))
        results.append([y.float(), *torch.autograd.grad(y.float().square().sum(), tensors)])
    assert relus == [1, 3]
    for mine, right in zip(*results, strict=True):
        assert (mine - right).norm() <= 2e-2 * right.norm()


def test_second_derivative_of_the_fused_cell_is_refused():
    case = Case()
    tensors = case.leaves()
    y = case.call(cell, tensors, case.statistics())
    (gradient,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


X = torch.rand(2, 4, 6, 6)
ONE = torch.ones(1)
POINTWISE = torch.rand(4, 4, 1, 1)
NORM = Norm(torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize("inputs, operations, outputs, probabilities, norms, message", [
    ([X, X.double()], [Sum([0])], [2], ONE, None, "inputs.1. is a Double .2, 4, 6, 6. on cpu; expected a Float"),
    ([X, X[:1]], [Sum([0])], [2], ONE, None, "inputs.1. is a Float .1, 4, 6, 6. on cpu; expected a Float .2,C,H,W."),
    ([X[0]], [Sum([0])], [1], ONE, None, "inputs.0. is a Float .4, 6, 6. on cpu; expected"),
    ([X], [Sum([0, 1])], [1], torch.ones(2), None, "operation 0 reads value 1; expected 0 to 0"),
    ([X], [Sum([])], [1], torch.ones(0), None, "operation 0 is a sum of 0 terms; expected 1 or more"),
    ([X, X[:, :, 1:]], [Sum([0, 1])], [2], torch.ones(2), None, "terms of operation 0 differ in size"),
    ([X], [Pool(0, "max"), Sum([0])], [2], ONE, None, "value 1 is used 0 times; expected 1"),
    ([X], [Pool(0, "max"), Sum([1, 1])], [2], torch.ones(2), None, "value 1 is used 2 times; expected 1"),
    ([X], [Pool(0, "max"), Sum([1])], [1], ONE, None, "value 1 is used 2 times; expected 1"),
    ([X], [Pool(0, "max"), Sum([0])], [2, 1], ONE, None, "outputs.1. is 1; expected sums of one size, each once"),
    ([X], [Pool(0, "max")], [1, 1], ONE[:0], None, "value 1 is used 2 times; expected 1"),
    ([X], [Pool(0, "max")], [1], ONE[:0], [None, NORM], "outputs.0. is 1; .* or one step without a norm"),
    ([X], [Sum([0])], [0], ONE, None, "outputs.0. is 0; expected sums of one size, each once"),
    ([X], [Sum([0])], [1, 1], ONE, None, "outputs.0. is 1; expected sums of one size, each once"),
    ([X], [Sum([0])], [], ONE, None, "outputs has 0 entries; expected 1 or more"),
    ([X], [Sum([0])], [1], torch.ones(2), None, "probabilities has shape .2.; expected .1."),
    ([X], [Sum([0])], [1], torch.ones(1, 3), None, "probabilities has shape .1, 3.; expected .1."),
    ([X], [Sum([0])], [1], ONE, [NORM, None], "value 0 has a norm; expected none, since it is an input"),
    ([X], [Sum([0])], [1], ONE, [None], "norms has 1 entries; expected 1 . 1, one for each value"),
    ([X], [Separable(0, None, None), Sum([1])], [2], ONE, None, "weights.1. is None; expected a Float .-1, 4, 1, 1."),
    ([X], [Separable(0, X, POINTWISE), Sum([1])], [2], ONE, None, "weights.0. is a Float .2, 4, 6, 6."),
    ([X], [Separable(0, torch.rand(4, 1, 7, 7), POINTWISE), Sum([1])], [2], ONE, None, "not larger than"),
    ([X], [Pool(0, "max", 0), Sum([1])], [2], ONE, None, "stride, padding and dilation of operation 0 are 0"),
    ([X], [Pool(0, "max", 2**32), Sum([1])], [2], ONE, None, "expected at least 1, 0 and 1, and at most 256"),
    ([X], [FactorizedReduce(0, None, POINTWISE), Sum([1])], [2], ONE, None, "weights.0. is None; expected a Float"),
    ([X], [Separable(0, None, POINTWISE), Pool(1, "max"), Sum([2])], [3], ONE, [None, NORM, None, None],
     "operation 1 reads value 1, which has a norm; expected that of a separable convolution only"),
    ([X], [Separable(0, None, torch.rand(3, 4, 1, 1)), Sum([1]), Pool(0, "max"), Sum([3])], [2], ONE, None,
     "operation 2 computes 4 channels; expected 3 as the first one does"),
    ([X[:1, :, :1, :1]], [Pool(0, "max"), Sum([1])], [2], ONE, [None, NORM, None],
     "value 1 has shape .1,4,1,1.; expected more than one value per channel"),
])
def test_fused_cell_names_what_does_not_fit(inputs, operations, outputs, probabilities, norms, message):
    with pytest.raises(RuntimeError, match=message):
        cell(inputs, operations, outputs, probabilities, norms, training=True)


def test_a_kind_of_pooling_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="the kind of pooling is 'mean'; expected max or avg"):
        cell([X], [Pool(0, "mean"), Sum([1])], [2], ONE)


KEY = torch.ones(1, dtype=torch.int64)


@pytest.mark.parametrize("dropout, message", [
    (Dropout(KEY.int(), ONE, [0]), "key of the dropout is a Int .1. on cpu; expected a Long .1. on cpu"),
    (Dropout(torch.cat([KEY, KEY]), ONE, [0]), "key of the dropout is a Long .2. on cpu; expected a Long .1. on cpu"),
    (Dropout(None, ONE, [0]), "key of the dropout is None; expected a Long .1. on cpu"),
    (Dropout(KEY, ONE.double(), [0]), "rates of the dropout is a Double .1. on cpu; expected a Float .1. on cpu"),
    (Dropout(KEY, ONE, [0, 2]), "rates of the dropout is a Float .1. on cpu; expected a Float .2. on cpu"),
    (Dropout(KEY, torch.ones(2), [2, 2]),
     "terms.1. of the dropout is 2; expected places of probabilities, 0 to 2, in ascending order"),
    (Dropout(KEY, ONE, [3]), "terms.0. of the dropout is 3; expected places of probabilities, 0 to 2"),
    (Dropout(KEY, ONE, [-1]), "terms.0. of the dropout is -1; expected places of probabilities, 0 to 2"),
    (Dropout(KEY, ONE, [1]),
     "the term with probability 1 has dropout and is what a step computes; expected dropout of inputs and sums only"),
])
def test_fused_cell_names_what_does_not_fit_of_the_dropout(dropout, message):
    with pytest.raises(RuntimeError, match=message):
        cell([X], [Pool(0, "max"), Sum([0, 1, 0])], [2], torch.ones(3), dropout=dropout)


def of_size(kernel, *settings):
    return Separable(0, torch.rand(4, 1, kernel, kernel), POINTWISE, *settings)


@pytest.mark.parametrize("operations, norms, known", [
    ([of_size(5, 2, 4, 2), Pool(0, "max", 2), Sum([1, 2])], [], True),
    ([of_size(3, 1, 1), Separable(1, None, POINTWISE), Sum([2])], [None, NORM], True),
    ([of_size(7, 2, 6, 2), Sum([1])], [], True),
    ([of_size(9, 1, 4), Sum([1])], [], False),
    ([of_size(3, 1, 3), Sum([1])], [], False),
    ([of_size(3, 3), Sum([1])], [], False),
    ([Separable(0, None, POINTWISE), Pool(1, "max"), Sum([2])], [], False),
    ([Sum([0] * 65)], [], False), ([Sum([0] * 40), Sum([0] * 30)], [], False),
])
def test_cells_that_are_fused_on_cuda_are_known(operations, norms, known):
    norms = norms + [None] * (1 + len(operations) - len(norms))
    assert kernels.program.known_on_cuda(operations, norms, [len(operations)]) == known


def test_the_sizes_of_kernels_on_cuda_are_those_of_its_sources():
    (sizes,) = re.findall(r"PdartsKernels = .*<int, ([\d, ]+)>;", (FOLDER.parent / "csrc/cuda/cell.cuh").read_text())
    assert tuple(map(int, sizes.split(","))) == kernels.program.CUDA_KERNEL_SIZES


# --- A cell of one step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["separable", "pointwise", "reduce", "max", "avg"])
@pytest.mark.parametrize("read", ["input", "sum", "step"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (3, 20, 8, 8), (1, 4, 1, 1), (0, 4, 5, 7)])
def test_the_output_may_be_one_step(device, kind, read, shape):
    """The step reads an input, a sum or another step, which a convolution normalises first."""
    torch.manual_seed(0)
    c, convolution = shape[1], kind in ("separable", "pointwise")
    sizes = {"separable": [(c, 1, 3, 3), (c, c, 1, 1)], "pointwise": [(c, c, 1, 1)], "reduce": [(c // 2, c, 1, 1)] * 2}
    sizes = [shape, (2,), (c, c, 1, 1), (c,), (c,), *sizes.get(kind, [])]
    tensors = [torch.randn(size, dtype=torch.float64).to(device).requires_grad_() for size in sizes]
    x, probabilities, before, *affine = tensors[:5]
    weights = tensors[5:]
    first = {"input": [], "sum": [Sum([0, 0])], "step": [Separable(0, None, before)]}[read]
    if kind == "separable":
        step = Separable(len(first), *weights, padding=1)
    elif kind == "pointwise":
        step = Separable(len(first), None, *weights)
    elif kind == "reduce":
        step = FactorizedReduce(len(first), *weights)
    else:
        step = Pool(len(first), kind)
    results = []
    for function in cell, cell_ref:
        running = [f(c, dtype=torch.float64, device=device) for f in FRESH]
        norms = [None] * (len(first) + 2)
        if read == "step" and convolution:
            norms[1] = Norm(*running, *affine)
        p = probabilities if read == "sum" else x.new_empty(0)
        y = function([x], [*first, step], [len(first) + 1], p, norms, training=len(x) > 1)
        gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(device)
        gradients = torch.autograd.grad(y, tensors, gradient, allow_unused=True)
        results.append([y, *(g for g in gradients if g is not None and g.numel()), *running])
    assert results[0][0].is_contiguous(memory_format=layout_of(device)) or not len(x)
    for mine, right in zip(*results, strict=True):
        assert mine.shape == right.shape and (mine - right).norm() <= 1e-11 * right.norm().clamp_min(1e-12)


def step_arguments(step, x):
    """Of the operator, for a cell of one step."""
    program, weights = kernels.program.cell_program([step])
    return [x], weights, [], [], x.new_empty(0), None, None, None, [], program, [1], [False, False], 0.0, True


@pytest.mark.parametrize("kind", ["separable", "max"])
def test_operators_of_one_step_pass_opcheck(device, kind):
    """Of how they are compiled, other tests tell."""
    torch.manual_seed(0)
    x, *weights = (torch.randn(size, device=device) for size in ((2, 4, 6, 6), (4, 1, 3, 3), (4, 4, 1, 1)))
    arguments = step_arguments(Separable(0, *weights) if kind == "separable" else Pool(0, kind), x)
    y, statistics, values = torch.ops.pdarts.cell(*arguments)
    inputs, weights, gammas, betas, probabilities, _, *middle, _, _ = arguments
    needs = [True, *[w is not None for w in weights], *[False] * 5]
    backward = torch.randn_like(y), y, values, inputs, weights, gammas, betas, probabilities, statistics, *middle, needs
    check = functools.partial(torch.library.opcheck, test_utils=OPCHECKS)
    assert set(check(torch.ops.pdarts.cell, arguments).values()) == {"SUCCESS"}
    assert set(check(torch.ops.pdarts.cell_backward, backward).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["max", "separable"])
def test_the_backward_operator_names_what_does_not_fit(device, kind):
    x = torch.rand(2, 4, 6, 6, device=device)
    pointwise = torch.rand(4, 4, 1, 1, device=device)
    arguments = step_arguments(Separable(0, None, pointwise) if kind == "separable" else Pool(0, kind), x)
    y, statistics, values = torch.ops.pdarts.cell(*arguments)
    head, (*tail, _, _) = arguments[:5], arguments[6:]
    for g, of, kept, message in (
        (y[:1], y, values, f"grad is a Float .1, 4, 6, 6. on {device}.*; expected a Float .2, 4, 6, 6. on {device}"),
        (y, y[:, :, 1:], values, "y is a Float .2, 4, 5, 6. on .*; expected a Float .2, 4, 6, 6."),
        (y.double(), y, values, "grad is a Double"),
        (y, y, [*values, y], "values has . tensors; expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pdarts.cell_backward(g, of, kept, *head, statistics, *tail, [True, *[False] * 7])


# --- Memory that inputs have in common --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["the same", "three times", "views", "channels", "images", "rows", "broadcast"])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_may_have_memory_in_common(device, how, training):
    """Each input is read by two convolutions of one size, which is its own."""
    torch.manual_seed(0)
    large = torch.randn(5, 6, 12, 12, dtype=torch.float64).to(device, memory_format=layout_of(device))
    cut = {
        "the same": lambda x: [x[:2]] * 2,
        "three times": lambda x: [x[:2]] * 3,
        "views": lambda x: [x[:2].view_as(x[:2]), x[:2].detach(), x[:2, :]],
        "channels": lambda x: [x[:2], x[:2, 1:5], x[:2, 2:]],
        "images": lambda x: [x[:4], x[1:]],
        "rows": lambda x: [x[:2, :, :11], x[:2, :, 1:], x[:2, :, :11].flip(2)],
        "broadcast": lambda x: [x[:1].expand(2, -1, -1, -1), x[:2], x[1:2].expand(2, -1, -1, -1)],
    }[how]
    channels = [x.shape[1] for x in cut(large)]
    kernels = [k for k in (3, 5, 7)[: len(channels)] for _ in range(2)]
    weights = [torch.randn(channels[i // 2], 1, k, k, dtype=torch.float64) for i, k in enumerate(kernels)]
    weights += [torch.randn(4, channels[i // 2], 1, 1, dtype=torch.float64) for i in range(len(kernels))]
    weights = [w.to(device).requires_grad_() for w in weights]
    p, results = torch.randn(len(kernels), device=device, dtype=torch.float64).requires_grad_(), []
    for function in cell, cell_ref:
        leaf = large.clone(memory_format=torch.preserve_format).requires_grad_()
        inputs, count = cut(leaf), len(kernels)
        steps = [Separable(i // 2, weights[i], weights[count + i], 1, kernels[i] // 2) for i in range(count)]
        norm = Norm(*(f(4, dtype=torch.float64, device=device) for f in FRESH))
        norms = [None] * len(inputs) + [norm] * count + [None]  # a norm of all of them
        terms = range(len(inputs), len(inputs) + count)
        y = function(inputs, [*steps, Sum(list(terms))], [len(inputs) + count], p, norms, training)
        gradient = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(device)
        results.append([y, *torch.autograd.grad(y, [leaf, p, *weights], gradient), *norm[:2]])
    for mine, right in zip(*results, strict=True):
        assert (mine - right).norm() <= 1e-11 * right.norm()
