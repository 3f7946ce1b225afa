"""The multiply-adds of the P-DARTS network by several tools: `python -m harness.measure counters`.

The functions of COUNTERS run in an environment of PACKAGES, see harness/measure/elsewhere.py.
"""

from __future__ import annotations

import importlib.metadata

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from harness.report import cells
from pdarts import GENOTYPES, Network

PACKAGES = (
    "torch==2.13.0 torchvision==0.28.0 numpy==2.4.6 setuptools==80.9.0",
    "thop==0.1.1.post2209072238",
    "fvcore==0.1.5.post20221221",
    "ptflops==0.7.5",
    "torchinfo==1.8.0",
    "calflops==0.3.2 transformers==5.24.0",
    "torchprofile==0.1.0",
    "flopth==0.1.6",
    "deepspeed==0.19.8",
)


class Sum(nn.Module):
    def forward(self, x):
        return x + x


class Alone(nn.Module):
    """A layer as a network, with a parameter, in which some tools look for the device."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.unused = layer, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.layer(x)


LAYERS = {  # name -> (layer, its multiply-adds or the numbers that it puts out, for an input of [1,8,6,6])
    "convolution": (nn.Conv2d(8, 8, 3, padding=1, bias=False), 8 * 8 * 9 * 36),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), 8 * 9 * 36),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 5)), 8 * 36 * 5),
    "batch norm": (nn.BatchNorm2d(8), 8 * 36),
    "ReLU": (nn.ReLU(), 8 * 36),
    "max pool": (nn.MaxPool2d(3, 1, padding=1), 8 * 36),
    "average pool": (nn.AvgPool2d(3, 1, padding=1), 8 * 36),
    "sum": (Sum(), 8 * 36),
}


def ours(network, x):
    if isinstance(network, Network):
        return cells.count(network, tuple(x.shape[2:]), x.shape[1])[1]
    return flop_counter(network, x) // 2  # which `count` does


def flop_counter(network, x):
    with FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops()


def thop(network, x):
    import thop

    return thop.profile(network, (x,), verbose=False)[0]


def fvcore(network, x):
    from fvcore.nn import FlopCountAnalysis

    return FlopCountAnalysis(network, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def ptflops(backend):
    def count(network, x):
        from ptflops import get_model_complexity_info

        options = {"backend": backend, "as_strings": False, "print_per_layer_stat": False, "verbose": False}
        return get_model_complexity_info(network, tuple(x.shape[1:]), **options)[0]

    return count


def torchinfo(network, x):
    from torchinfo import summary

    return summary(network, input_data=x, verbose=0).total_mult_adds


def calflops(which):
    def count(network, x):
        from calflops import calculate_flops

        return calculate_flops(network, tuple(x.shape), output_as_string=False, print_results=False)[which]

    return count


def torchprofile(network, x):
    from torchprofile import profile_macs

    return profile_macs(network, x)


def flopth(network, x):
    from flopth import flopth

    return flopth(network, in_size=(tuple(x.shape[1:]),), bare_number=True)[0]


def deepspeed(network, x):
    from deepspeed.profiling.flops_profiler import get_model_profile

    return get_model_profile(network, tuple(x.shape), print_profile=False, as_string=False)[1]


COUNTERS = {  # name -> (package, function of a network and its input)
    "`harness.report.cells.count`": ("torch", ours),
    "FlopCounterMode (operations)": ("torch", flop_counter),
    "thop": ("thop", thop),
    "fvcore": ("fvcore", fvcore),
    "ptflops, pytorch": ("ptflops", ptflops("pytorch")),
    "ptflops, aten": ("ptflops", ptflops("aten")),
    "torchinfo": ("torchinfo", torchinfo),
    "calflops, MACs": ("calflops", calflops(1)),
    "calflops, FLOPs": ("calflops", calflops(0)),
    "torchprofile": ("torchprofile", torchprofile),
    "flopth": ("flopth", flopth),
    "DeepSpeed, MACs": ("deepspeed", deepspeed),
}


def imagenet_network():
    return Network(GENOTYPES["PDARTS"], 48, 1000, 14, stem="imagenet").eval()


def allow_torchvision():
    """Let torchvision be imported if its wheel is for another build of torch; its operators are not counted."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in "nms", "qnms":
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


def row(name: str) -> dict:
    """Return the row of a counter: millions for the whole network, and numbers for each unit of a layer."""
    allow_torchvision()
    package, count = COUNTERS[name]
    cells_of_row = {"counter": name, "version": importlib.metadata.version(package)}
    cells_of_row |= {"P-DARTS, millions": f"{count(imagenet_network(), torch.zeros(1, 3, 224, 224)) / 1e6:.1f}"}
    for layer, (module, units) in LAYERS.items():
        try:
            counted = count(Alone(module).eval(), torch.zeros(1, 8, 6, 6))
            cells_of_row[layer] = f"{counted / units:.3g}"
        except Exception as error:  # of a tool that refuses a layer alone
            cells_of_row[layer] = type(error).__name__
    return cells_of_row


def backward_ratio(layer: nn.Module, x: torch.Tensor) -> float:
    """Return the operations of forward and backward by FlopCounterMode, relative to those of forward."""
    with FlopCounterMode(display=False) as counter:
        layer(x.requires_grad_()).sum().backward()
    return counter.get_total_flops() / flop_counter(layer, x)


def depthwise_row(_) -> dict:
    """Return the row of the error in FlopCounterMode that docs/COUNTING.md names."""
    layer = nn.Conv2d(36, 36, 3, padding=1, groups=36, bias=False)
    return {
        "forward and backward, relative to forward": "FlopCounterMode",
        "a depthwise convolution of 36 channels": f"{backward_ratio(layer, torch.zeros(1, 36, 8, 8)):.1f}",
        "P-DARTS on ImageNet": f"{backward_ratio(imagenet_network(), torch.zeros(1, 3, 224, 224)):.1f}",
    }
