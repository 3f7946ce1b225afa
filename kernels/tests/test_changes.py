"""A fused module stays what it is: changes before fusion, after it, and after the first call, against plain torch."""

import copy
import io

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune

import kernels

pytestmark = pytest.mark.usefixtures("fused")


class Operation(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x):
        return self.op(x)


def separable(channels=4, twice=1):
    def unit():
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        return nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    return Operation(*(layer for _ in range(twice) for layer in unit()))


class MixedOp(nn.Module):
    def __init__(self, *more):
        super().__init__()
        pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.BatchNorm2d(4, affine=False))
        self.ops = nn.ModuleList([nn.Identity(), pool, separable(), *more])

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.ops))


class Cell(nn.Module):
    """Of two inputs and one node."""

    def __init__(self):
        super().__init__()
        self.preprocess = nn.ModuleList([Operation(nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4))] * 2)
        self.preprocess[1] = copy.deepcopy(self.preprocess[0])
        self.edges = nn.ModuleList([MixedOp(separable(twice=2)), MixedOp()])
        self.concat = [2, 0]
        self.gain = 1.0

    def forward(self, s0, s1, weights):
        states = [self.preprocess[0](s0), self.preprocess[1](s1)]
        states.append(sum(edge(x, w) for edge, x, w in zip(self.edges, states, weights)))
        return torch.cat([states[i] for i in self.concat], dim=1) * self.gain


def a_cell():
    torch.manual_seed(0)
    cell = Cell().double()
    for norm in cell.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias)
    return cell


def operation(cell):
    return cell.edges[0].ops[2]


def layer(cell, i, of=2):
    return cell.edges[0].ops[of].op[i]


def replace(i, make, of=2):
    def change(cell):
        cell.edges[0].ops[of].op[i] = make(layer(cell, i, of)).double()

    return change


def setting(i, **settings):
    def change(cell):
        for name, value in settings.items():
            setattr(layer(cell, i), name, value)

    return change


def patch(module):
    """Another forward on the instance."""
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


class Adapter(nn.Module):
    """A convolution and a trained correction beside it."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.down, self.up = nn.Conv2d(4, 1, 1, bias=False), nn.Conv2d(1, 4, 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


class Louder(nn.Conv2d):
    def forward(self, x):
        return 3 * super().forward(x)


def of_class(kind):
    def change(cell):
        layer(cell, 2).__class__ = kind

    return change


def every_norm(change):
    def of_all(cell):
        for norm in cell.modules():
            if isinstance(norm, nn.BatchNorm2d):
                change(norm)

    return of_all


def untracked(norm):
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None


def weight_of(i, change):
    def of_cell(cell):
        module = layer(cell, i)
        change(module, module.weight)

    return of_cell


def assigned(cell):
    state = {name: 2 * t if t.is_floating_point() else t + 1 for name, t in cell.state_dict().items()}
    cell.load_state_dict(state, assign=True)


def loaded(cell):
    cell.load_state_dict({name: t / 2 if t.is_floating_point() else t + 1 for name, t in cell.state_dict().items()})


def scaled(cell):
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(1.5)


def pruned(cell):
    prune.l1_unstructured(layer(cell, 2), "weight", 0.5)


def pruned_for_good(cell):
    pruned(cell)
    prune.remove(layer(cell, 2), "weight")


def narrower(cell):
    """A channel less within an operation, as channel pruning leaves it."""
    conv, norm = layer(cell, 2, of=3), layer(cell, 3, of=3)
    second = cell.edges[0].ops[3].op
    conv.weight = nn.Parameter(conv.weight.detach()[:3])
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[:3].clone())
    norm.weight, norm.bias = nn.Parameter(norm.weight.detach()[:3]), nn.Parameter(norm.bias.detach()[:3])
    second[5].weight, second[5].groups = nn.Parameter(second[5].weight.detach()[:3]), 3
    second[5].in_channels = second[5].out_channels = 3
    second[6].weight = nn.Parameter(second[6].weight.detach()[:, :3])


def hook(find, kind, function):
    def change(cell):
        getattr(find(cell), f"register_{kind}_hook")(function)

    return change


def removed_hook(cell):
    layer(cell, 2).register_forward_hook(double_output).remove()


def double_output(module, inputs, output):
    return 2 * output


def double_input(module, inputs):
    return tuple(2 * x for x in inputs)


def double_gradient(module, of_inputs, of_outputs):
    return tuple(g if g is None else 2 * g for g in of_inputs)


def swapped_edges(cell):
    cell.edges[0], cell.edges[1] = cell.edges[1], cell.edges[0]


def swapped_operations(cell):
    ops = cell.edges[0].ops
    ops[0], ops[2] = ops[2], ops[0]


def shared(cell):
    cell.edges[1].ops.append(cell.edges[0].ops[3])


def shared_weight(cell):
    layer(cell, 2).weight = cell.edges[1].ops[2].op[2].weight


def pool(**settings):
    def change(cell):
        cell.edges[0].ops[1][0] = nn.AvgPool2d(3, 1, padding=1, **settings)

    return change


def parametrized(function):
    return lambda cell: function(layer(cell, 2))


CHANGES = {
    "nothing": lambda cell: None,
    "hook of an operation": hook(operation, "forward", double_output),
    "hook of a convolution": hook(lambda c: layer(c, 1), "forward", double_output),
    "hook of a norm": hook(lambda c: layer(c, 3), "forward", double_output),
    "hook of a ReLU": hook(lambda c: layer(c, 0), "forward", double_output),
    "hook of a Sequential": hook(lambda c: operation(c).op, "forward", double_output),
    "hook of an identity": hook(lambda c: c.edges[0].ops[0], "forward", double_output),
    "hook of a mixed operation": hook(lambda c: c.edges[0], "forward", double_output),
    "hook of the cell": hook(lambda c: c, "forward", double_output),
    "hook before an operation": hook(operation, "forward_pre", double_input),
    "hook before a convolution": hook(lambda c: layer(c, 2), "forward_pre", double_input),
    "hook of gradients": hook(operation, "full_backward", double_gradient),
    "hook of a convolution's gradients": hook(lambda c: layer(c, 2), "full_backward", double_gradient),
    "hook that was removed": removed_hook,
    "forward of an operation": lambda cell: patch(operation(cell)),
    "forward of a convolution": lambda cell: patch(layer(cell, 1)),
    "forward of an identity": lambda cell: patch(cell.edges[0].ops[0]),
    "forward of a mixed operation": lambda cell: patch(cell.edges[1]),
    "forward of the cell": patch,
    "class of a convolution": of_class(Louder),
    "operation for an identity": lambda cell: cell.edges[0].ops.__setitem__(2, nn.Identity()),
    "ELU for ReLU": replace(0, lambda old: nn.ELU()),
    "another ReLU": replace(0, lambda old: nn.ReLU(inplace=False)),
    "GroupNorm": replace(3, lambda old: nn.GroupNorm(2, 4)),
    "identity for a norm": replace(3, lambda old: nn.Identity()),
    "another norm": replace(3, lambda old: nn.BatchNorm2d(4)),
    "SyncBatchNorm in evaluation": lambda cell: nn.SyncBatchNorm.convert_sync_batchnorm(cell.eval()),
    "another convolution": replace(2, lambda old: nn.Conv2d(4, 4, 1, bias=False)),
    "a bias": replace(2, lambda old: nn.Conv2d(4, 4, 1)),
    "a dense convolution": replace(1, lambda old: nn.Conv2d(4, 4, 3, padding=1, bias=False)),
    "a dilated convolution": replace(1, lambda old: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)),
    "a 7x7 convolution": replace(1, lambda old: nn.Conv2d(4, 4, 7, padding=3, groups=4, bias=False)),
    "an oblong convolution": replace(1, lambda old: nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4, bias=False)),
    "circular padding": replace(
        1, lambda old: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False, padding_mode="circular")
    ),
    "padding as a name": replace(1, lambda old: nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False)),
    "an adapter": replace(2, Adapter),
    "an operation of one more step": lambda cell: operation(cell).op.append(nn.Tanh()),
    "an operation of one more unit": lambda cell: operation(cell).op.extend(separable().double().op),
    "edges swapped": swapped_edges,
    "operations swapped": swapped_operations,
    "an operation shared by two edges": shared,
    "a weight shared by two convolutions": shared_weight,
    "average pool": pool(count_include_pad=False),
    "average pool that counts the border": pool(),
    "average pool with a divisor": pool(divisor_override=5, count_include_pad=False),
    "eps": setting(3, eps=1e-2),
    "eps of every norm": every_norm(lambda norm: setattr(norm, "eps", 1e-2)),
    "momentum": setting(3, momentum=0.3),
    "momentum of every norm": every_norm(lambda norm: setattr(norm, "momentum", 0.3)),
    "cumulative statistics": setting(3, momentum=None),
    "cumulative statistics of every norm": every_norm(lambda norm: setattr(norm, "momentum", None)),
    "no running statistics": lambda cell: untracked(layer(cell, 3)),
    "no running statistics at all": every_norm(untracked),
    "a frozen norm": lambda cell: layer(cell, 3).eval(),
    "all norms frozen": every_norm(nn.Module.eval),
    "evaluation": nn.Module.eval,
    "padding of a convolution": setting(1, padding=(2, 2), dilation=(2, 2)),
    "frozen weights": weight_of(2, lambda conv, w: w.requires_grad_(False)),
    "everything frozen": lambda cell: cell.requires_grad_(False),
    "another parameter": weight_of(2, lambda conv, w: setattr(conv, "weight", nn.Parameter(2 * w.detach()))),
    "data of a parameter": weight_of(2, lambda conv, w: setattr(w, "data", 2 * w.detach())),
    "channels-last weights": lambda cell: cell.to(memory_format=torch.channels_last),
    "values in place": scaled,
    "load_state_dict": loaded,
    "load_state_dict with assign": assigned,
    "zeros": weight_of(2, lambda conv, w: nn.init.zeros_(w)),
    "weight_norm by hooks": parametrized(torch.nn.utils.weight_norm),
    "spectral_norm by hooks": parametrized(torch.nn.utils.spectral_norm),
    "weight_norm": parametrized(parametrizations.weight_norm),
    "spectral_norm": parametrized(parametrizations.spectral_norm),
    "pruned": pruned,
    "pruned for good": pruned_for_good,
    "a channel less": narrower,
    "a list that the code reads": lambda cell: cell.concat.reverse(),
    "a number that the code reads": lambda cell: setattr(cell, "gain", 0.5),
    "dropout of rate 0": lambda cell: cell.edges[0].ops.__setitem__(0, nn.Dropout(0.0)),
    "dropout in evaluation": lambda cell: cell.edges[0].ops.__setitem__(0, nn.Dropout(0.5).eval()),
    "dropout of everything": lambda cell: cell.edges[0].ops.__setitem__(0, nn.Dropout(1.0)),
    "an operation fewer": lambda cell: cell.edges[0].ops.pop(3),
}


def computed(cell, inputs):
    """What a step and an evaluation give, twice."""
    results, (s0, s1, weights) = [], inputs
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = cell(*leaves)
        gradients = torch.autograd.grad(
            y.square().mean(), [*leaves, *(p for p in cell.parameters() if p.requires_grad)], allow_unused=True
        )
        results += [y.detach(), *gradients]
    results = [t.clone() for t in results + list(cell.buffers()) if t is not None]
    return [*results, cell.eval()(s0, s1, weights).detach()]


# Other changes that run by default go the same way.
ALIKE = {
    "hook of an operation",
    "hook of a norm",
    "hook of a ReLU",
    "hook of a mixed operation",
    "hook before an operation",
    "hook of gradients",
    "forward of an operation",
    "forward of a mixed operation",
    "another ReLU",
    "another norm",
    "another convolution",
    "a dense convolution",
    "a 7x7 convolution",
    "an operation of one more unit",
    "operations swapped",
    "average pool",
    "eps of every norm",
    "cumulative statistics",
    "no running statistics",
    "evaluation",
    "channels-last weights",
    "load_state_dict",
    "zeros",
    "spectral_norm by hooks",
    "weight_norm",
    "pruned for good",
    "a number that the code reads",
    "dropout in evaluation",
}
MOMENTS = "before fusion", "after fusion", "after a call"
WARNINGS = "ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning"


@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize("i, change", list(enumerate(c for c in CHANGES if c not in ALIKE)))
def test_a_fused_cell_stays_what_it_is(i, change):
    stays_what_it_is(change, MOMENTS[i % 3])


@pytest.mark.slow
@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_fused_cell_stays_what_it_is_whenever_it_is_changed(change, moment):
    stays_what_it_is(change, moment)


def stays_what_it_is(change, moment):
    plain = a_cell()
    mine = copy.deepcopy(plain)
    inputs = [torch.randn(2, 6, 6, 5), torch.randn(2, 6, 6, 5), torch.rand(2, 4)]
    inputs = [t.double() for t in inputs]
    results = []
    for cell, convert in ((plain, lambda cell: cell), (mine, kernels.fuse)):
        if moment == "before fusion":
            torch.manual_seed(1)
            CHANGES[change](cell)
        cell = convert(cell)
        if moment == "after a call":
            cell(*inputs)
        if moment != "before fusion":
            torch.manual_seed(1)
            CHANGES[change](cell)
        results.append(computed(cell, inputs))
    assert isinstance(mine, kernels.modules.Fused)
    for right, one in zip(*results, strict=True):
        torch.testing.assert_close(one.contiguous(), right.contiguous(), rtol=1e-10, atol=1e-12)


SAME = {"nothing", "hook that was removed", "another ReLU", "channels-last weights"}
SAME |= {"dropout of rate 0", "dropout in evaluation"}


def test_the_other_changes_change_the_result():
    """So that none of them tests nothing."""
    inputs = [torch.randn(2, 6, 6, 5).double() for _ in range(2)] + [torch.rand(2, 4).double()]
    before, same = computed(a_cell(), inputs), set()
    for name, change in CHANGES.items():
        cell = a_cell()
        torch.manual_seed(1)
        change(cell)
        after = computed(cell, inputs)
        alike = (a.shape == b.shape and torch.allclose(a, b) for a, b in zip(after, before))
        if len(after) == len(before) and all(alike):
            same.add(name)
    assert same == SAME


# --- What users do with a fused module --------------------------------------------------------------------------------


def an_example():
    cell = a_cell()
    return cell, [torch.randn(2, 6, 6, 5).double(), torch.randn(2, 6, 6, 5).double(), torch.rand(2, 4).double()]


def saved_and_loaded(cell):
    file = io.BytesIO()
    torch.save(cell, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_of_a_fused_module_is_fused_and_of_its_own(copied):
    cell, inputs = an_example()
    mine = kernels.fuse(copy.deepcopy(cell))
    other = copied(mine)
    assert type(other) is type(mine) and other._kernels_state is not mine._kernels_state
    with torch.no_grad():
        for p in mine.parameters():
            p.zero_()
    assert torch.allclose(other(*inputs), cell(*inputs), rtol=1e-10, atol=1e-12)


def test_unfuse_undoes_it():
    cell, inputs = an_example()
    mine = kernels.unfuse(kernels.fuse(copy.deepcopy(cell)))
    assert type(mine) is Cell and mine.__dict__.keys() == cell.__dict__.keys()
    assert torch.equal(mine(*inputs), cell(*inputs))


def counted(cell, inputs):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        cell(*inputs)
    return counter.get_total_flops()


def exported(cell, inputs):
    return [str(node.target) for node in torch.export.export(cell, tuple(inputs)).graph.nodes]


def gradient(cell, inputs):
    return torch.func.grad(lambda weights: cell.eval()(*inputs[:2], weights).square().mean())(inputs[2])


def mapped(cell, inputs):
    return torch.func.vmap(lambda weights: cell.eval()(*inputs[:2], weights))(inputs[2].expand(3, 2, 4).clone())


def traced(cell, inputs):
    return torch.jit.trace(cell.eval(), tuple(inputs), check_trace=False)(*inputs)


def compiled(cell, inputs):
    return torch.compile(cell, fullgraph=True, backend="eager")(*inputs)


def followed_by_fx(cell, inputs):
    class Tracer(torch.fx.Tracer):
        def iter(self, proxy):
            return iter([proxy[i] for i in range(2)]) if proxy.node.name == "weights" else (proxy[i] for i in range(4))

    return [node.target for node in Tracer().trace(cell).nodes]


def seen_by_hooks(cell, inputs):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        cell(*inputs)
    finally:
        handle.remove()
    return [name.removeprefix("Fused") for name in seen]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "look", [counted, exported, followed_by_fx, gradient, mapped, traced, compiled, seen_by_hooks]
)
def test_counters_exporters_and_transforms_see_a_fused_module_as_the_plain_one(look):
    cell, inputs = an_example()
    mine = kernels.fuse(copy.deepcopy(cell))
    mine(*inputs), cell(*inputs)
    results = look(mine, inputs), look(cell, inputs)
    assert torch.allclose(*results, rtol=1e-9) if isinstance(results[0], torch.Tensor) else results[0] == results[1]


@pytest.mark.parametrize("kind", [MixedOp, nn.ReLU, nn.Sequential])
def test_methods_that_are_exchanged_on_a_class_are_noticed(monkeypatch, kind):
    cell, inputs = an_example()
    mine, forward = kernels.fuse(copy.deepcopy(cell)), kind.forward
    before = mine(*inputs)
    cell(*inputs)  # statistics move alike
    monkeypatch.setattr(kind, "forward", lambda self, *args: 2 * forward(self, *args))
    after = mine(*inputs)
    torch.testing.assert_close(after, cell(*inputs), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_fused_cell_is_made_and_evaluated_without_gradients(mode):
    with mode():
        cell, inputs = an_example()
        mine = kernels.fuse(copy.deepcopy(cell))
        assert torch.allclose(mine.eval()(*inputs), cell.eval()(*inputs), rtol=1e-10, atol=1e-12)


def test_distributed_data_parallel_sees_the_same_gradients(tmp_path):
    cell, inputs = an_example()
    mine, results = kernels.fuse(copy.deepcopy(cell)), []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in (mine, cell):
            parallel = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
            for _ in range(2):
                parallel(*inputs).square().mean().backward()
            results.append([p.grad for p in module.parameters()] + list(module.buffers()))
    finally:
        torch.distributed.destroy_process_group()
    for one, right in zip(*results, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-10, atol=1e-12)


class Odd(nn.Module):
    def forward(self, x):
        return x if x.shape[0] > 1 else 2 * x


def test_a_report_says_what_is_left_and_why():
    cell, _ = an_example()
    layer(cell, 2).register_forward_hook(double_output)
    cell.edges[1].ops[0] = Odd().double()
    (row,) = kernels.report(kernels.fuse(cell))
    assert row[:3] == ("", "Cell", "in parts") and "Conv2d edges.0.ops.2.op.2" in row.why and "Odd" in row.why
    assert str(kernels.report(cell)).count("\n") == 1


def test_strict_fusion_refuses_what_is_not_whole():
    mixed = MixedOp().double()
    kernels.fuse(copy.deepcopy(mixed), strict=True)
    mixed.ops[2].op[2].register_forward_hook(double_output)
    with pytest.raises(RuntimeError, match="(?s)not all of the network is fused as a whole:.*Conv2d ops.2.op.2"):
        kernels.fuse(mixed, strict=True)
    assert type(mixed) is MixedOp  # and leaves it as it was


def test_modules_of_a_leaf_class_are_not_looked_into():
    cell, inputs = an_example()
    mine = kernels.fuse(copy.deepcopy(cell), leaf=(Operation,))
    assert "Operation edges.0.ops.2" in kernels.report(mine)[0].why
    assert torch.allclose(mine(*inputs), cell(*inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("network", [nn.ReLU(), nn.Linear(2, 3), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))])
def test_a_network_without_anything_to_fuse_gets_a_warning(network):
    with pytest.warns(RuntimeWarning, match="nothing of the network is fused"):
        assert kernels.fuse(network) is network


def test_one_channel_is_no_depthwise_convolution():
    torch.manual_seed(0)
    plain = Operation(nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)).double()
    x = torch.randn(2, 1, 4, 4).double()
    assert torch.allclose(kernels.fuse(copy.deepcopy(plain))(x), plain(x), rtol=1e-10)


@pytest.mark.filterwarnings("ignore:torch computes what is no cell")
def test_tensors_that_are_no_feature_maps_run_in_plain_torch():
    cell, inputs = an_example()
    mine = kernels.fuse(copy.deepcopy(cell))
    s0, s1, weights = inputs
    for wrong in ([s0[0], s1[0], weights], [s0, s1, weights[:, :3]], [s0, s1, weights.float()], [s0, s1[:1], weights]):
        results = []
        for module in (cell.eval(), mine.eval()):
            try:
                results.append(module(*wrong))
            except (RuntimeError, ValueError) as error:
                results.append(type(error))
        if isinstance(results[0], torch.Tensor):
            assert torch.allclose(*results, rtol=1e-6)
        else:
            assert results[0] is results[1]
