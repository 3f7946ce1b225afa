"""The trained network of an evaluation as a file for other programs: ONNX, a program of torch.export, safetensors."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import pathlib
import sys
import warnings

import torch
import torch.nn as nn

from harness.data.images import DataSet, load
from harness.files import write_whole
from harness.predict import Classifier
from harness.run import read_description
from pdarts import InputError

TESTED = 1000  # images, at most, on which a file is compared with torch
TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit


class OfPixels(nn.Module):
    """A trained network with its normalisation: images, uint8 [N,C,H,W], as files hold them -> logits [N,classes]."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.network = classifier.network
        self.register_buffer("mean", classifier.mean)
        self.register_buffer("std", classifier.std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.float() / 255 - self.mean) / self.std)


def export(folder, to, data: str | DataSet | None = None) -> str:
    """Write the network in the folder of an evaluation to the file `to`; return two lines about it.

    The ending of `to` decides the form: .onnx and .pt2 map images, uint8 [N,C,H,W] of any number N, to logits;
    .safetensors holds the state_dict without the auxiliary head. Metadata are the names of the classes, mean and
    deviation, genotype and settings. The file is written under another name and loaded from there, and gets its own
    when its logits are those of torch on the first TESTED test images of the run. data: where these are now, or the
    data set itself. InputError is raised if something is missing or differs.
    """
    to = pathlib.Path(to)
    if to.suffix not in FORMS:
        raise InputError(f"cannot export to {to}; expected a file that ends in {', '.join(FORMS)}")
    needed, content, loaded = FORMS[to.suffix]
    if missing := [name for name in needed if not _installed(name)]:
        raise InputError(f"exporting {to.suffix} needs {', '.join(missing)}; expected: pip install {' '.join(missing)}")
    classifier, about = Classifier(folder, "cpu"), read_description(pathlib.Path(folder))
    classifier.network.auxiliary_head = None  # for training only
    batches = _pixels(classifier, about, data)
    network = OfPixels(classifier).eval()
    metadata = {
        "input": f"images, uint8 [N, {', '.join(map(str, about['shape']))}]",
        "classes": json.dumps(classifier.classes),
        "mean": json.dumps(about["mean"]),
        "std": json.dumps(about["std"]),
        "genotype": json.dumps(about["genotype"]),
        "settings": json.dumps(dataclasses.asdict(classifier.settings)),
    }
    lines = []
    with _quiet(), torch.no_grad():
        written = content(network, batches[0][:2], metadata)
        write_whole(to, written, lambda path: lines.append(_compared(network, loaded(path, network), batches)))
    return f"{lines[0]}\nwritten: {to}, {len(written) / 1e6:.1f} MB"


def _installed(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def _quiet():
    """Keep back the exporters' remarks, which are not about the network."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def _pixels(classifier, about, data) -> list[torch.Tensor]:
    """Return batches of the first test images, uint8 [N,C,H,W]."""
    path = about["path"] if data is None else data
    if path is None and about["data"] != "shapes":
        raise InputError(f"the run was trained on {about['data']}, which no file holds; expected data with test images")
    images = path if isinstance(path, DataSet) else load(classifier.settings, path, **about.get("options", {}))
    if list(images.size) != about["shape"] or images.num_classes != len(classifier.classes):
        raise InputError(
            f"the images of {images.name} are {list(images.size)} of {images.num_classes} classes; expected "
            f"{about['shape']} of {len(classifier.classes)}, as the run had"
        )
    mean, std = (torch.as_tensor(numbers).view(-1, 1, 1) for numbers in (images.mean, images.std))
    return [((x * std + mean) * 255).round().to(torch.uint8) for x, _ in images.test(TESTED, batch=50)]


def _compared(network, run, batches) -> str:
    """Return a line about the differences of logits between a file and torch; InputError if they are large."""
    expected, found = (torch.cat([logits(batch) for batch in batches]) for logits in (network, run))
    difference, largest = (expected - found).abs().max().item(), expected.abs().max().item()
    same = (expected.argmax(1) == found.argmax(1)).sum().item()
    line = (
        f"compared with torch on {len(expected)} test images: {same} predictions are the same, the largest difference "
        f"is {difference:.1e} of logits up to {largest:.3g}"
    )
    if not difference <= TOLERANCE * largest:
        raise InputError(f"{line}; expected a difference of at most {TOLERANCE * largest:.1e}: nothing is written")
    return line


# --- The forms: the bytes of a file, and the logits of a batch by a file ----------------------------------------------


def _program(network, images):
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _pt2(network, images, metadata):
    buffer = io.BytesIO()
    torch.export.save(_program(network, images), buffer, extra_files=metadata)
    return buffer.getvalue()


def _run_pt2(path, _):
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _onnx(network, images, metadata):
    names = {"input_names": ["images"], "output_names": ["logits"]}
    model = torch.onnx.export(_program(network, images), dynamo=True, verbose=False, **names).model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _run_onnx(path, _):
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _safetensors(network, _, metadata):
    from safetensors.torch import save

    return save({key: value.contiguous() for key, value in network.network.state_dict().items()}, metadata)


def _run_safetensors(path, network):
    from safetensors.torch import load_file

    network.network.load_state_dict(load_file(path))
    return network


FORMS = {  # ending -> packages that it needs, its bytes, its logits
    ".onnx": (("onnx", "onnxscript", "onnxruntime"), _onnx, _run_onnx),
    ".pt2": ((), _pt2, _run_pt2),
    ".safetensors": (("safetensors",), _safetensors, _run_safetensors),
}
