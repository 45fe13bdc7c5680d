"""predictions.safetensors: what a model said of the test images, and small pictures of those that a report shows.

Legend: N images, C classes, M pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from finetune.examples import choose_examples, shrink
from finetune.images import Images
from weights.errors import RunError
from weights.save import write_atomically


@dataclass(frozen=True)
class Predictions:
    """Logits of one split.

    Attributes:
        logits: float32 (N, C).
        labels: int64 (N,).
        shown: int64 (M,), the images of which there are pictures.
        pictures: uint8 (M, 3, S, S), S of 64 at most.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    shown: torch.Tensor
    pictures: torch.Tensor


def illustrate(logits: torch.Tensor, labels: torch.Tensor, images: Images) -> Predictions:
    """Return predictions with pictures of the images that a report shows.

    Args:
        logits: float32 (N, C).
        labels: int64 (N,).
        images: uint8 (N, 3, H, W).
    """
    shown = torch.tensor(choose_examples(logits, labels).rows, dtype=torch.int64)
    return Predictions(logits, labels, shown, shrink(images[shown]))


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions as safetensors, a tensor for each attribute; without pictures, `logits` and `labels` alone.

    Raises:
        RunError: the file cannot be written.
    """
    tensors = {"logits": predictions.logits, "labels": predictions.labels}
    if len(predictions.shown):
        tensors |= {"shown": predictions.shown, "pictures": predictions.pictures}
    plain = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(plain))


def read_predictions(path: Path) -> Predictions | None:
    """Return what `write_predictions` wrote, or None when there is no such file.

    Raises:
        RunError: the file is damaged, or holds something else.
    """
    if not path.exists():
        return None
    try:
        tensors = safetensors.torch.load_file(path)
        logits, labels = tensors["logits"], tensors["labels"]
        shown = tensors.get("shown", torch.zeros(0, dtype=torch.int64))
        pictures = tensors.get("pictures", torch.zeros((0, 3, 1, 1), dtype=torch.uint8))
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(shown) != len(pictures):
            raise ValueError(f"logits {tuple(logits.shape)} do not go with labels {tuple(labels.shape)}")
    except (safetensors.SafetensorError, OSError, LookupError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise RunError(
            f"{path} is damaged ({first}); make it again with finetune eval {path.parent} --output {path}."
        ) from error
    return Predictions(logits, labels, shown, pictures)
