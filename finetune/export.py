"""`finetune export`: a trained model in a form that other programs read, compared with the model before it is kept.

What belongs to a model goes into every form: class names, preprocessing, temperature. A graph (onnx, torch-export) also
holds the computation; the other two forms hold weights, for which timm has the network.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from torchvision.transforms.functional import center_crop

from finetune.augment import scale, scale_in_float
from finetune.export_check import BATCHES, Agreement, Compute, compare, read_back, sample_pixels
from finetune.export_graph import Logits, Probabilities, read_onnx, read_torch, scaling_of, to_onnx, trace, write_torch
from finetune.export_target import GRAPHS, files_of, require_target
from finetune.trained import Trained, load_trained
from weights.atomic import cannot_write, write_atomically
from weights.errors import UsageError
from weights.save import save_checkpoint

SMALL = 32  # pixels of CIFAR's images, which a network for larger ones has to scale up


@dataclass(frozen=True)
class Port:
    """An input or an output.

    Attributes:
        name: as a graph calls it.
        dtype: of its numbers.
        shape: whole numbers, or a letter where any number will do.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        to: its form.
        output: the file or folder that was asked for.
        files: what it consists of.
        arch: the network.
        takes: its input.
        gives: its output.
        classes: how many.
        temperature: the model's own.
        agreement: the comparison with the model.
    """

    to: str
    output: Path
    files: tuple[Path, ...]
    arch: str
    takes: Port
    gives: Port
    classes: int
    temperature: float
    agreement: Agreement

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "to": self.to,
            "path": str(self.output),
            "files": [str(file) for file in self.files],
            "bytes": self.bytes,
            "arch": self.arch,
            "input": self.takes.as_dict(),
            "output": self.gives.as_dict(),
            "classes": self.classes,
            "temperature": self.temperature,
            "check": {
                "images": self.agreement.images,
                "batches": list(self.agreement.batches),
                "largest_difference": self.agreement.difference,
                "allowed": self.agreement.allowed,
                "same_labels": self.agreement.same_labels,
            },
        }


def export(
    trained: Trained, to: str, output: Path, *, with_preprocessing: bool = False, force: bool = False
) -> Exported:
    """Write a trained model in another form; nothing is left of one that does not compute what the model computes.

    Args:
        trained: the model.
        to: safetensors, onnx, torch-export or timm.
        output: the file or, for timm, the folder; the folder around it exists.
        with_preprocessing: a graph that takes pixels and gives calibrated probabilities, not images and logits.
        force: replace files that are there.

    Raises:
        UsageError: an option that cannot be right, or the target's extra is missing.
        RunError: the output exists or cannot be written, the network cannot be exported, or the check failed.
    """
    require_target(to, output, with_preprocessing=with_preprocessing, force=force)
    _refuse_itself(trained, to, output)
    takes, gives = ports(trained, with_preprocessing)
    if to in GRAPHS:
        agreement = _write_graph(trained, to, output, with_preprocessing)
    else:
        agreement = _write_weights(trained, to, output)
    return Exported(
        to=to,
        output=output,
        files=files_of(to, output),
        arch=trained.arch.name,
        takes=takes,
        gives=gives,
        classes=len(trained.classes),
        temperature=trained.temperature.value,
        agreement=agreement,
    )


def ports(trained: Trained, with_preprocessing: bool) -> tuple[Port, Port]:
    """Return the input and the output of what is exported."""
    size, classes = trained.preprocessing.size, len(trained.classes)
    if with_preprocessing:
        takes = Port(Probabilities.takes, "uint8", ("N", 3, "H", "W"))
        return takes, Port(Probabilities.gives, "float32", ("N", classes))
    return Port(Logits.takes, "float32", ("N", 3, size, size)), Port(Logits.gives, "float32", ("N", classes))


def about(trained: Trained, with_preprocessing: bool = False) -> dict[str, Any]:
    """Return what travels inside every form: class names, preprocessing, temperature; of a graph its ends too."""
    preprocessing, size = trained.preprocessing, trained.preprocessing.size
    # config.json may name a filter that only Pillow has; in a graph stands what the graph does.
    named = None if with_preprocessing else trained.arch.config.get("interpolation")
    return {
        "arch": trained.arch.name,
        "classes": list(trained.classes),
        "preprocessing": {
            "input_size": [3, size, size],
            "interpolation": named or preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "crop_pct": trained.crop_pct,
            "crop_mode": trained.crop_mode,
        },
        "temperature": trained.temperature.value,
    }


def _refuse_itself(trained: Trained, to: str, output: Path) -> None:
    if any(file.resolve().parent == trained.folder.resolve() for file in files_of(to, output)) and to not in GRAPHS:
        raise UsageError(
            f"--output {output} would replace files of the checkpoint that is exported; give a place outside of "
            f"{trained.folder}."
        )


def _write_graph(trained: Trained, to: str, output: Path, with_preprocessing: bool) -> Agreement:
    """Trace the model, write it, read it back and compare; the file takes its name last."""
    graph = (Probabilities if with_preprocessing else Logits)(trained).eval()
    takes, gives = ports(trained, with_preprocessing)
    told = {**about(trained, with_preprocessing), "input": takes.as_dict(), "output": gives.as_dict()}
    text = json.dumps(told, sort_keys=True, ensure_ascii=False, allow_nan=False)
    name, size = trained.arch.name, trained.preprocessing.size
    program = trace(graph, size, name)
    content = to_onnx(program, graph, text, name) if to == "onnx" else b""
    if with_preprocessing:  # at the model's own size, smaller, and larger by different measures
        exact = _exactly(trained, scale_in_float)
        batches = sample_pixels([(size, size), (SMALL, SMALL), (size + size // 2, 2 * size)])
        rounding = _apart(exact, _exactly(trained, scale), batches)
    else:
        exact, batches, rounding = trained.model, _images(trained), 0.0
    checked: list[Agreement] = []

    def write(file: BinaryIO) -> None:
        if to == "onnx":
            file.write(content)
        else:
            write_torch(program, text, file)
        file.flush()
        written = Path(file.name)
        what = f"The {to} file of {name}"
        with read_back(what):
            compute = read_onnx(written) if to == "onnx" else read_torch(written)
        checked.append(compare(exact, compute, batches, what, rounding))

    write_atomically(output, write)
    return checked[0]


def _images(trained: Trained) -> list[torch.Tensor]:
    """Return batches to compare with, as the network was trained to see them; in memory as other programs pass them."""
    sides = [(trained.preprocessing.size, trained.preprocessing.size)] * len(BATCHES)
    return [trained.preprocessing(pixels).contiguous() for pixels in sample_pixels(sides)]


def _exactly(trained: Trained, scaled: Callable[[torch.Tensor, int, str], torch.Tensor]) -> Compute:
    """Return the model behind a way to scale, to compare a graph with: pixels to calibrated probabilities."""
    preprocessing, size = scaling_of(trained), trained.preprocessing.size

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        images = preprocessing(scaled(pixels, preprocessing.size, preprocessing.interpolation))
        logits: torch.Tensor = trained.model(center_crop(images, [size, size]))
        return (logits / trained.temperature.value).softmax(1)

    return compute


@torch.no_grad()
def _apart(one: Compute, other: Compute, batches: Sequence[torch.Tensor]) -> float:
    """Return the largest difference between two computations, here by pixels that each rounds in its own way."""
    return max(float((one(batch) - other(batch)).abs().max()) for batch in batches)


def _write_weights(trained: Trained, to: str, output: Path) -> Agreement:
    """Write weights and config.json into a folder of their own, load and compare them, and move them."""
    files = files_of(to, output)
    target = files[0].parent
    with _short_lived(target if target.is_dir() else target.parent, output) as folder:
        weights, config = (folder / file.name for file in files)
        save_checkpoint(weights, trained.model.state_dict(), {**trained.about, **about(trained)})
        write_atomically(config, (json.dumps(trained.config, indent=2, ensure_ascii=False) + "\n").encode())
        what = f"The {to} form of {trained.arch.name}"
        with read_back(what):
            if to == "timm":
                model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            else:
                model = load_trained(weights).model
        agreement = compare(trained.model, model, _images(trained), what)
        if target.is_dir():
            for file in (weights, config):
                file.replace(target / file.name)
        else:
            folder.rename(target)
    return agreement


@contextmanager
def _short_lived(place: Path, output: Path) -> Iterator[Path]:
    """Make a folder that is gone in the end, whatever happens.

    Args:
        place: where; what is in the folder can be moved to the output from there.
        output: for messages.

    Raises:
        RunError: the system refuses.
    """
    folder = place / f".finetune-{secrets.token_hex(4)}"  # no .tmp: in a run directory those are files to sweep away
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        raise cannot_write(output, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
