"""`fuse(network)` makes a network use the fused operations wherever it can.

What a module computes is traced (trace.py) and matched (match.py); names and source text do not matter. Modules stay
where they are, and so do parameters, buffers and state_dict keys: only the class of a module that joins feature maps,
such as a cell, is exchanged for a subclass (modules.py). It follows its plan only while all that its modules hold is
what was traced; what has changed is traced again. Code is taken to depend on its arguments, on what modules hold and
on nothing else, such as global variables.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.fx as fx
import torch.nn as nn

from .modules import STATE, Fused, convert, placeholders, plain_class, unfuse, units
from .runtime import fused


class Row(NamedTuple):
    """What became of a module. fused: "whole", "in parts" or "no"; why: what torch computes, or the reason."""

    name: str
    module: str
    fused: str
    why: str


class Report(list):
    """Rows; as text a table."""

    def __str__(self):
        rows = [Row("module", "class", "fused", ""), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row.why]).rstrip() for row in rows)


def fuse(network: nn.Module, leaf: tuple[type, ...] = (), strict: bool = False) -> nn.Module:
    """`network`, changed in place, and unchanged where the kernels do not support its device (see `kernels.use`).

    leaf: classes of modules that are not looked into. strict: RuntimeError, with a report, unless all that joins
    feature maps is fused as a whole. A warning is given if nothing is fused.
    """
    device = _device(network)
    if not fused(device):
        if strict:
            raise RuntimeError(f"the kernels do not support {device}; expected a device on which they run")
        return network
    found = units(network, device, leaf)[0]
    within = {inner for module in found for inner in module.modules()}
    in_place = any(getattr(module, "inplace", False) is True for module in network.modules() if module not in within)
    convert(found, device, copies=in_place)
    if not strict and found and all(state.plans and state.plans[0].instructions for state in found.values()):
        return network  # a report, for which the network is traced again, has nothing to warn of
    rows = report(network)
    if strict and (not rows or any(row.fused != "whole" for row in rows)):
        unfuse(network)
        raise RuntimeError(f"not all of the network is fused as a whole:\n{rows}")
    if all(row.fused == "no" for row in rows):
        warnings.warn(f"nothing of the network is fused:\n{rows}", RuntimeWarning, stacklevel=2)
    return network


def report(network: nn.Module) -> Report:
    """A row for each module that is fused, or that joins feature maps and cannot be."""
    device = _device(network)
    names = {module: name for name, module in network.named_modules()}
    rows, inner = Report(), set()
    for module in network.modules():
        if isinstance(module, Fused) and module not in inner:
            state = getattr(module, STATE)
            if not state.plans:
                state.plan_of(module, placeholders(module), device)
            plan = state.plans[0]
            if plan.instructions:
                inner.update(set(module.modules()) - {m for called in plan.refused for m in called.modules()})
            rows.append(Row(names[module], plain_class(module).__name__, *_outcome(plan)))
    for module, why in units(network, device, ())[1].items():
        if why:
            rows.append(Row(names[module], type(module).__name__, "no", why))
    return rows


def _outcome(plan):
    if not plan.instructions:
        return "no", plan.reason
    weights, waiting = set(), [root for part in plan.parts for root in part.roots]
    while waiting:
        weights.add(node := waiting.pop())
        waiting += node.all_input_nodes
    left = [i for i in plan.instructions if isinstance(i, fx.Node) and i.op != "get_attr" and i not in weights]
    if not left and len(plan.parts) == 1:
        return "whole", ""
    why = [_name(n, plan) for n in left]
    why += [f"{type(module).__name__}: {reason}" for module, reason in plan.refused.items()]
    return "in parts", "torch computes " + ", ".join(dict.fromkeys(why)) if why else ""


def _name(node, plan):
    if node in plan.called:
        return f"{plain_class(plan.called[node]).__name__} {node.target}"
    return node.target if isinstance(node.target, str) else node.target.__name__


def _device(network):
    tensors = (*network.parameters(), *network.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
