"""Networks in other tools, and how far their results are from torch's: `python -m harness.measure tools`.

The functions of TOOLS run in an environment of PACKAGES, see harness/measure/elsewhere.py.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import pathlib
import tempfile

import torch
import torch.nn as nn

import kernels
from harness.predict import Classifier
from pdarts import GENOTYPES, Network

PACKAGES = (
    "torch==2.13.0 numpy==2.4.6 ninja==1.13.2 setuptools==80.9.0 pillow==13.0.0",
    "onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0",
    "openvino==2026.4.1",
    "ncnn==1.0.20261020 pnnx==20261020",
    "executorch==1.5.1",
    "torchao==0.18.0",
    "torch-pruning==1.6.1",
    "litert-torch==0.10.0",
)
BATCH, SIZE = 2, 32
OTHER = (3, 3, 40, 24)  # another batch and size, where the tool takes them


def networks(run: str):
    """Yield the name and the network of each row."""
    torch.manual_seed(0)
    plain = Network(GENOTYPES["PDARTS"], 8, 10, 3)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if it were trained
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    yield "plain", plain.eval()
    fused = kernels.fuse(copy.deepcopy(plain))
    fused(images())  # follows a plan from now on
    yield "fused", fused
    if run:
        yield "searched", Classifier(run, "cpu").network


def images(shape=(BATCH, 3, SIZE, SIZE)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def difference(found, expected) -> str:
    """Return the largest difference of logits, relative to the largest logit, and whether the classes differ."""
    found = torch.as_tensor(found).float()
    same = found.argmax(1) == expected.argmax(1)
    return f"{((found - expected).abs().max() / expected.abs().max()).item():.0e}" + (
        "" if same.all() else f", {int((~same).sum())} of {len(same)} classes differ")


def program(network, dynamic=True):
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=16), 3: torch.export.Dim("w", min=16)}
    return torch.export.export(network, (images(),), dynamic_shapes=(dims if dynamic else None,))


def compiled(network, _):
    run = torch.compile(network, fullgraph=True, dynamic=True)
    return {"": run(images()), "other sizes": run(images(OTHER))}


def compiled_in_training(network, _):
    network.train().set_drop_path(0.0)
    plain = kernels.unfuse(copy.deepcopy(network))
    both = torch.compile(network, fullgraph=True, dynamic=True), plain
    x = images((8, 3, SIZE, SIZE))  # the auxiliary head, where there is one, normalises over one pixel of each
    logits, expected = (torch.cat([y for y in run(x) if y is not None]) for run in both)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = [max_difference(p.grad, q.grad) for p, q in zip(network.parameters(), plain.parameters())]
    return {"": f"{difference(logits, expected)}, gradients {max(gradients):.0e}"}


def max_difference(a, b):
    return 0.0 if a is None else ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def exported(network, _):
    run = program(network).module()
    return {"": run(images()), "other sizes": run(images(OTHER))}


def aot_inductor(network, folder):
    path = torch._inductor.aoti_compile_and_package(program(network), package_path=f"{folder}/model.pt2")
    run = torch._inductor.aoti_load_package(path)
    return {"": run(images()), "other sizes": run(images(OTHER))}


def onnx_file(network, folder, half=False):
    source = program(network)
    if half:
        source = torch.export.export(copy.deepcopy(network).half(), (images().half(),))
    path = f"{folder}/model.onnx"
    torch.onnx.export(source, dynamo=True, verbose=False, input_names=["images"]).save(path)
    return path


def onnxruntime(network, folder):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file(network, folder))
    results = {name: session.run(None, {"images": x.numpy()})[0] for name, x in inputs().items()}
    session = onnxruntime.InferenceSession(onnx_file(network, folder, half=True))
    return results | {"half": session.run(None, {"images": images().half().numpy()})[0]}


def inputs():
    return {"": images(), "other sizes": images(OTHER)}


def openvino(network, folder):
    import openvino

    run = openvino.compile_model(onnx_file(network, folder), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {name: run(x.numpy())[0] for name, x in inputs().items()}


def ncnn(network, folder):
    import ncnn
    import pnnx

    x = images((1, 3, SIZE, SIZE))
    pnnx.export(network, f"{folder}/model.pt", x, fp16=False)
    with ncnn.Net() as net:
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.load_param(f"{folder}/model.ncnn.param")
        net.load_model(f"{folder}/model.ncnn.bin")
        logits = []
        for image in images():
            with net.create_extractor() as extractor:
                extractor.input("in0", ncnn.Mat(image.numpy()).clone())
                logits.append(torch.from_numpy(extractor.extract("out0")[1].numpy().copy()))
    return {"": torch.stack(logits)}


def executorch(network, folder):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(program(network, dynamic=False), partitioner=[XnnpackPartitioner()])
    path = pathlib.Path(folder, "model.pte")
    path.write_bytes(lowered.to_executorch().buffer)
    return {"": Runtime.get().load_program(path).load_method("forward").execute([images()])[0]}


def litert(network, _):
    import litert_torch

    return {"": litert_torch.convert(network, (images(),))(images())}


def int8(network, _):
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program(network).module(), quantizer)
    prepared(images((8, 3, SIZE, SIZE)))  # notes the ranges of values
    quantized = convert_pt2e(prepared)
    return {"": quantized(images()), "other sizes": quantized(images(OTHER))}


def pruned(network, _):
    import torch_pruning

    kernels.unfuse(network).auxiliary_head = None  # the pruner follows grad_fn, which fused cells have one of
    pruner = torch_pruning.pruner.MagnitudePruner(
        network, images(), torch_pruning.importance.MagnitudeImportance(), pruning_ratio=0.25,
        ignored_layers=[network.classifier],
    )  # fmt: skip
    before = sum(p.numel() for p in network.parameters())
    pruner.step()
    after = sum(p.numel() for p in network.parameters())
    plain, x = kernels.unfuse(copy.deepcopy(network)), images()
    whole = [row.fused for row in kernels.report(kernels.fuse(network))].count("whole")
    about = f"{after / before:.0%} of the weights, {whole} of {len(network.cells)} cells fused"
    return {"": f"{difference(network(x), plain(x))}; {about}"}


TOOLS = {  # name -> (package, function of a network and a folder: what it adds to the name of the row -> logits)
    "torch.compile": ("torch", compiled),
    "torch.compile, training": ("torch", compiled_in_training),
    "torch.export": ("torch", exported),
    "AOTInductor": ("torch", aot_inductor),
    "ONNX, onnxruntime": ("onnxruntime", onnxruntime),
    "OpenVINO": ("openvino", openvino),
    "ncnn by pnnx": ("ncnn", ncnn),
    "ExecuTorch, XNNPACK": ("executorch", executorch),
    "LiteRT": ("litert-torch", litert),
    "torchao, int8": ("torchao", int8),
    "torch-pruning, then fused": ("torch-pruning", pruned),
}


def rows(name: str, run: str = "") -> list[dict]:
    """Return the rows of a tool: one for each kind of input, with a column for each network."""
    package, function = TOOLS[name]
    found = {}
    for which, network in networks(run):
        plain = kernels.unfuse(copy.deepcopy(network)).eval()
        expected = functools.cache(lambda shape, plain=plain: plain(images(shape)).detach())
        try:
            with tempfile.TemporaryDirectory() as folder:
                results = function(network, folder)
        except Exception as error:
            results = {"": f"{type(error).__name__}: {' '.join(str(error).split()):.100}"}
        for suffix, result in results.items():
            row = found.setdefault(suffix, {"tool": f"{name}{', ' * bool(suffix)}{suffix}"})
            row["version"] = importlib.metadata.version(package)
            shape = OTHER if suffix == "other sizes" else (BATCH, 3, SIZE, SIZE)
            with torch.no_grad():
                row[which] = result if isinstance(result, str) else difference(result, expected(shape))
    return list(found.values())
