"""A trained model as a graph: torch's own program, and ONNX made of it.

Legend: N images in a batch, of any number; H and W pixels of an image; S pixels into the model; C classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn

from finetune.augment import Preprocessing, whole
from finetune.trained import Trained
from weights.errors import RunError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

KEY = "finetune"  # of an ONNX file's metadata, as in safetensors files
EXTRA_FILE = "finetune.json"  # in a torch-export file
LARGEST_ONNX = 2**31 - 1  # bytes: an ONNX file is one protobuf message, which ends there
CUBIC = -0.5  # the kernel's coefficient, as Pillow's: pretrained weights were made with images scaled so


class Logits(nn.Module):
    """Images as the network was trained to see them to logits.

    Args:
        trained: the model.
    """

    takes, gives = "images", "logits"

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = trained.model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 (N, C) from float32 (N, 3, S, S)."""
        logits: torch.Tensor = self.model(images)
        return logits


class Probabilities(nn.Module):
    """Pixels to calibrated probabilities: `Preprocessing`, the network, the temperature, softmax.

    Args:
        trained: the model.
    """

    takes, gives = "pixels", "probabilities"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model, self.temperature = trained.model, trained.temperature.value
        self.size, scaled = trained.preprocessing.size, scaling_of(trained)
        self.scaled, self.interpolation = scaled.size, scaled.interpolation
        # On the scale of pixels, as in `Preprocessing`.
        self.register_buffer("mean", 255 * torch.tensor(scaled.mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(scaled.std)[:, None, None])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return float32 (N, C) from uint8 (N, 3, H, W)."""
        rows = resize_weights(pixels.shape[2], self.scaled, self.interpolation)
        columns = resize_weights(pixels.shape[3], self.scaled, self.interpolation)
        images = whole(torch.matmul(pixels.float(), columns.T))  # (N, 3, H, scaled)
        images = (whole(torch.matmul(rows, images)) - self.mean) / self.std
        start = round((self.scaled - self.size) / 2)
        images = images[:, :, start : start + self.size, start : start + self.size]
        logits: torch.Tensor = self.model(images)
        return (logits / self.temperature).softmax(1)


def scaling_of(trained: Trained) -> Preprocessing:
    """Return how pixels are scaled before the centre (S, S) is kept.

    timm scales to floor(S / crop_pct). Runs of this project have a crop_pct of 1: all of the image is seen.
    """
    plain = trained.preprocessing
    return Preprocessing(math.floor(plain.size / trained.crop_pct), plain.mean, plain.std, plain.interpolation)


def resize_weights(length: int, size: int, interpolation: str) -> torch.Tensor:
    """Return antialiased scaling of one axis as a matrix, float32 (size, length): what torch's `interpolate` does.

    As a matrix, because ONNX's own Resize is not the same everywhere: onnxscript up to 0.7.0 exports it with other
    values at the border, and onnxruntime's bicubic kernel for CUDA is reported to take another coefficient than it is
    given. A product of matrices is the same in every runtime.

    Args:
        length: pixels along the axis; a symbol while the graph is traced.
        size: pixels wanted.
        interpolation: bilinear or bicubic.
    """
    source, target = torch.arange(length), torch.arange(size)
    count = source[-1] + 1  # `length`, as a tensor
    # Distance of two pixels' centres, |(j + 1/2) - (i + 1/2) length/size|, in units of the filter, which widens when
    # the image shrinks: max(length/size, 1). In whole numbers up to the division, so that nothing is rounded before it.
    apart = ((2 * source + 1) * size - (2 * target + 1)[:, None] * count).abs()  # (size, length)
    distance = apart.float() / (2 * count.clamp(min=size)).float()
    if interpolation == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:  # Keys 1981, "Cubic convolution interpolation for digital image processing"
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
        far = ((distance - 5) * distance + 8) * distance * CUBIC - 4 * CUBIC
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
    return weights / weights.sum(1, keepdim=True)


def trace(graph: Logits | Probabilities, size: int, name: str) -> ExportedProgram:
    """Return a graph as torch's exported program, for batches of any number of images.

    Args:
        graph: in eval mode.
        size: S.
        name: of the network, for messages.

    Raises:
        RunError: the network does something that no graph can hold.
    """
    free = torch.export.Dim.DYNAMIC
    if graph.takes == "pixels":
        # Two sizes, and neither is the model's: a size that is met twice could be taken for one and the same.
        example = torch.zeros(2, 3, size + 3, size + 5, dtype=torch.uint8)
        shapes = {graph.takes: {0: free, 2: free, 3: free}}
    else:
        example, shapes = torch.zeros(2, 3, size, size), {graph.takes: {0: free}}
    try:
        with torch.no_grad():
            program = torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the network's own code under torch's tracer can raise nearly anything
        raise RunError(
            f"torch.export cannot make a graph of {name} ({_first_line(error)}); --to timm and --to safetensors work "
            "for every network."
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def write_torch(program: ExportedProgram, about: str, file: BinaryIO) -> None:
    """Write a program in torch's format, with `about` as an extra file."""
    torch.export.save(program, file, extra_files={EXTRA_FILE: about})


def read_torch(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what computes a file of `write_torch`."""
    with path.open("rb") as file, warnings.catch_warnings():
        # PyTorch 2.9 warns that the bytes it has read are not to be written to; nothing writes to them.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        module: Callable[[torch.Tensor], torch.Tensor] = torch.export.load(file).module()
    return module


def to_onnx(program: ExportedProgram, graph: Logits | Probabilities, about: str, name: str) -> bytes:
    """Return a program as the bytes of an ONNX file, with `about` in its metadata.

    Raises:
        RunError: the network is too large for a file, or has an operation that ONNX has not.
    """
    held = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if held > LARGEST_ONNX:
        raise RunError(
            f"{name} has {held / 1e9:.1f} GB of weights, and an ONNX file holds 2.1 GB; give --to torch-export."
        )
    axes = {0: "N", **({2: "H", 3: "W"} if graph.takes == "pixels" else {})}
    try:
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[graph.takes],
            output_names=[graph.gives],
            dynamic_shapes={graph.takes: axes},
            verbose=False,
        )
    except Exception as error:  # whatever an operation's translation raises
        raise RunError(
            f"torch.onnx cannot translate {name} ({_first_line(error)}); --to torch-export needs no translation."
        ) from error
    proto = made.model_proto
    for node in proto.graph.node:
        node.ClearField("metadata_props")  # the exporter's notes on where each came from
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, about
    content: bytes = proto.SerializeToString()
    return content


def read_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what computes an ONNX file, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its hints on how a graph could be quicker are not for the user
    # Its bytes, not its path: the file may still be open for writing, and on Windows onnxruntime refuses such a one.
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    takes, gives = session.get_inputs()[0].name, session.get_outputs()[0].name

    def compute(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([gives], {takes: batch.numpy()})[0])

    return compute


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
