"""The shapes and memory formats of the operators' results, for torch.compile and torch.export."""

from __future__ import annotations

import torch

from .program import KINDS


def register():
    """Registers them with torch, once the library is loaded."""

    def accumulated(x):
        return torch.promote_types(x.dtype, torch.float32)

    def empty(x):
        channels_last = torch._prims_common.suggest_memory_format(x) == torch.channels_last
        return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def channels_last(x, *size):
        n, c, h, w = size
        return x.new_empty(n, h, w, c).permute(0, 3, 1, 2)

    def cell_map(x, *size):
        return x.new_empty(size) if x.device.type == "cuda" else channels_last(x, *size)

    def needed(needs, *makers):
        """What is made for those that are needed."""
        return [make() for need, make in zip(needs, makers, strict=True) if need]

    def fresh(t):
        return lambda: torch.empty_like(t, memory_format=torch.contiguous_format)

    @torch.library.register_fake("pdarts::mixed")
    def _(outputs, probabilities, gammas, betas, statistics, batch, eps):
        x = outputs[0]
        return empty(x), x.new_empty(3 if any(batch) else 0, len(outputs), x.shape[1], dtype=accumulated(x))

    @torch.library.register_fake("pdarts::mixed_backward")
    def _(grad, outputs, probabilities, gammas, betas, statistics, batch, needs):
        like = next((y for y in outputs if y is not None), grad)
        affine = [*(gammas or [None] * len(outputs)), *(betas or [None] * len(outputs))]
        return needed(needs, *[lambda: empty(like)] * len(outputs), fresh(probabilities), *map(fresh, affine))

    def convolved(size, kernel, stride, padding, dilation):
        return [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size]

    @torch.library.register_fake("pdarts::cell")
    def _(inputs, weights, gammas, betas, probabilities, statistics, key, rates, dropped, program, outputs, *settings):
        *_, keep = settings
        sizes, numbers = [x.shape[1:] for x in inputs], iter(program)
        between, on_cuda = [], inputs[0].device.type == "cuda"  # what convolutions leave for the pointwise ones
        pools, again = set(), []  # pools that are there already
        for weight, pointwise in zip(weights[::2], weights[1::2]):
            kind, source = next(numbers), next(numbers)
            if kind == len(KINDS):
                sizes.append(sizes[[next(numbers) for _ in range(source)][0]])
                continue
            (c, *size), (stride, padding, dilation) = sizes[source], (next(numbers) for _ in range(3))
            if KINDS[kind] == "separable":
                if weight is not None:
                    size = convolved(size, weight.shape[2], stride, padding, dilation)
                    between += [(c, *size)] * on_cuda
                c = pointwise.shape[0]
            elif KINDS[kind] == "reduce":
                size = [(n + 1) // 2 for n in size]
                between += [(c, *size)] * 2 * on_cuda
                c = weight.shape[0] + pointwise.shape[0]
            else:
                size = [(n - 1) // stride + 1 for n in size]
                if on_cuda and (kind, source, stride) in pools:
                    again.append(len(sizes))
                pools.add((kind, source, stride))
            sizes.append((c, *size))
        x, (c, *size) = inputs[0], sizes[outputs[0]]
        omitted = outputs if x.device.type == "cpu" or len(outputs) == 1 else ()
        kept = [sizes[v] for v in range(len(inputs), len(sizes)) if v not in (*omitted, *again)] + between
        of_values = x.new_empty((3, len(sizes), c) if statistics is None else 0, dtype=accumulated(x))
        values = [cell_map(x, x.shape[0], *of) for of in kept] if keep else []
        return cell_map(x, x.shape[0], c * len(outputs), *size), of_values, values

    @torch.library.register_fake("pdarts::cell_backward")
    def _(grad, y, values, inputs, weights, gammas, betas, probabilities, *settings):
        *_, needs = settings
        none = [None] * (len(inputs) + len(weights) // 2)
        of_inputs = [lambda x=x: cell_map(grad, *x.shape) for x in inputs]
        return needed(needs, *of_inputs, *map(fresh, (*weights, *(gammas or none), *(betas or none), probabilities)))

    @torch.library.register_fake("pdarts::dropout_masks")
    def _(key, rates, terms, size):
        return rates.new_empty(len(terms), *size)

    @torch.library.register_fake("pdarts::update_running")
    def _(running_means, running_vars, statistics, batch, momentum):
        return None
