#!/usr/bin/env bash
# torchao 0.18.0, X86InductorQuantizer: a sum of feature maps by Python's sum(), which begins with 0 + x.
# Expected: the addition of a number is left as it is, and the network is prepared as its twin with a + b is.
# Seen: prepare_pt2e raises an AssertionError without a message, which names neither the node nor the reason.
# Exit status 0: still so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 torchao==0.18.0 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86


class Node(torch.nn.Module):
    def __init__(self, add):
        super().__init__()
        self.a, self.b, self.add = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1), add

    def forward(self, x):
        return self.add(self.a(x), self.b(x))


def outcome(add):
    x = (torch.randn(2, 3, 8, 8),)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    try:
        prepare_pt2e(torch.export.export(Node(add).eval(), x).module(), quantizer)(*x)
        return "prepared"
    except AssertionError as error:
        return f"AssertionError({str(error)!r})"


print("torch", torch.__version__, "torchao", version("torchao"))
plain, with_sum = outcome(lambda a, b: a + b), outcome(lambda a, b: sum([a, b]))
print(f"a + b: {plain}\nsum([a, b]): {with_sum}; expected: prepared")
raise SystemExit((plain, with_sum) != ("prepared", "AssertionError('')"))
PYTHON
