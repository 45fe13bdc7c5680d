"""predictions.safetensors: what a model said of the test images, and small pictures of those that a report shows.

Legend: N images, C classes, M pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from finetune.examples import choose_examples, shrink
from finetune.images import Images
from weights.atomic import write_atomically
from weights.errors import RunError
from weights.guard import require_regular

MOST_CLASSES = 30_000  # the confusion matrix of so many takes 7 GB; ImageNet-22k has 21,843


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
        require_regular(path)
        tensors = safetensors.torch.load(path.read_bytes())
        found = Predictions(
            tensors["logits"],
            tensors["labels"],
            tensors.get("shown", torch.zeros(0, dtype=torch.int64)),
            tensors.get("pictures", torch.zeros((0, 3, 1, 1), dtype=torch.uint8)),
        )
        _require_sound(found)
    except Exception as error:  # besides its own errors, whatever a header with odd types and sizes makes torch raise
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise RunError(
            f"{path} is damaged ({first}); make it again with finetune eval {path.parent} --output {path}."
        ) from error
    return found


def _require_sound(found: Predictions) -> None:
    """Refuse what `write_predictions` cannot have written: labels and places are used as indices."""
    logits, labels, shown, pictures = found.logits, found.labels, found.shown, found.pictures
    if logits.ndim != 2 or not logits.shape[1] or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} do not go with labels {tuple(labels.shape)}")
    if logits.shape[1] > MOST_CLASSES:
        raise ValueError(f"{logits.shape[1]:,} classes are more than {MOST_CLASSES:,}")
    if logits.dtype != torch.float32 or not bool(logits.isfinite().all()):
        raise ValueError("its logits are no finite float32 numbers")
    for name, indices, below in (("labels", labels, logits.shape[1]), ("shown", shown, len(logits))):
        if indices.dtype != torch.int64 or bool(((indices < 0) | (indices >= below)).any()):
            raise ValueError(f"its {name} are no whole numbers from 0 to {below - 1}")
    if shown.ndim != 1 or pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"shown {tuple(shown.shape)} and pictures {tuple(pictures.shape)} {pictures.dtype} are none")
    if len(shown) != len(pictures) or 0 in pictures.shape[2:]:
        raise ValueError(f"its pictures {tuple(pictures.shape)} do not go with {len(shown)} places")
