"""The operations of ops.py in plain torch, as the books say them: what the kernels are checked against.

This module imports nothing of ours and shares no code with what it checks. A cell's operations are taken as they are
given: a sum has `terms`, a separable convolution `pointwise`, a factorized reduction `first`, a pool `kind`. A norm is
(running_mean, running_var, gamma, beta), the last two perhaps None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mixed_sum_ref(outputs, probabilities):
    """Plain torch version of `mixed_sum`."""
    return sum(p.to(y.dtype).view(-1, 1, 1, 1) * y for p, y in zip(probabilities, outputs, strict=True))


def _normalised_ref(x, norm, training, momentum, eps):
    return x if norm is None else F.batch_norm(x, *norm, training, momentum, eps)


def mixed_norm_sum_ref(outputs, probabilities, norms, training, momentum=0.1, eps=1e-5):
    """Plain torch version of `mixed_norm_sum`."""
    normed = [_normalised_ref(y, norm, training, momentum, eps) for y, norm in zip(outputs, norms, strict=True)]
    return mixed_sum_ref(normed, probabilities)


def separable_ref(
    x, depthwise, pointwise, stride=1, padding=0, dilation=1, norm=None, training=False, momentum=0.1, eps=1e-5
):
    """Plain torch version of `separable`."""
    x = F.relu(_normalised_ref(x, norm, training, momentum, eps))
    if depthwise is not None:
        x = F.conv2d(x, depthwise, None, stride, padding, dilation, groups=x.shape[1])
    return F.conv2d(x, pointwise)


def factorized_reduce_ref(x, first, second):
    """Two 1x1 convolutions of stride 2 after ReLU, the second one row and one column on, side by side."""
    x = F.relu(x)
    shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
    return torch.cat([F.conv2d(x, first, stride=2), F.conv2d(shifted, second, stride=2)], dim=1)


def pool_ref(x, kind, stride=1):
    """Plain torch version of `pool`."""
    if kind == "max":
        return F.max_pool2d(x, 3, stride, padding=1)
    return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)


def philox_ref(counter, key):
    """Philox 4x32-10: the 4 words of each counter, (c0, c1, c2, c3) that broadcast; int64, with 32 bits in use."""
    lower = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key & lower, key >> 32 & lower
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64
        c0, c1, c2, c3 = (b >> 32 & lower) ^ c1 ^ k0, b & lower, (a >> 32 & lower) ^ c3 ^ k1, a & lower
        k0, k1 = k0 + 0x9E3779B9 & lower, k1 + 0xBB67AE85 & lower
    return c0, c1, c2, c3


def dropout_masks_ref(key, rates, terms, size):
    """Plain torch version of `dropout_masks`."""
    n, c, h, w = size
    terms = torch.tensor(list(terms), device=key.device)
    ranges = (torch.arange(count, device=key.device) for count in (n, c, (h * w + 7) // 8))
    term, image, channel, group = torch.meshgrid(terms, *ranges, indexing="ij")
    words = philox_ref((group, channel, image, term & 0xFFFFFFFF), key)
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    bits = bits.flatten(-2)[..., : h * w].unflatten(-1, (h, w))  # [terms,N,C,H,W]
    dropped = (rates * 65536 + 0.5).floor().clamp(0, 65536)
    scale = torch.where(dropped < 65536, 65536 / (65536 - dropped), 0)
    dropped, scale = (t.view(-1, 1, 1, 1, 1) for t in (dropped, scale))
    return torch.where(bits < dropped, 0, scale)


def cell_ref(
    inputs, operations, outputs, probabilities, norms=None, training=False, momentum=0.1, eps=1e-5, dropout=None
):
    """Plain torch version of `cell`."""
    values, place = list(inputs), 0
    norms = norms or [None] * (len(inputs) + len(operations))
    rates = dict(zip(dropout.terms, dropout.rates)) if dropout else {}

    def normed(v):
        return _normalised_ref(values[v], norms[v], training, momentum, eps)

    for op in operations:
        if hasattr(op, "terms"):
            y = 0
            for v in op.terms:
                x = normed(v)
                if place in rates:
                    (mask,) = dropout_masks_ref(dropout.key, rates[place].view(1), [place], x.shape)
                    x = x * mask.to(x.dtype)
                y = y + probabilities[place].to(x.dtype).view(-1, 1, 1, 1) * x
                place += 1
        elif hasattr(op, "pointwise"):
            y = separable_ref(normed(op.source), op.depthwise, op.pointwise, op.stride, op.padding, op.dilation)
        elif hasattr(op, "first"):
            y = factorized_reduce_ref(normed(op.source), op.first, op.second)
        else:
            y = pool_ref(normed(op.source), op.kind, op.stride)
        values.append(y)
    return torch.cat([values[v] for v in outputs], dim=1)
