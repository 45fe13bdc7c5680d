"""A trained model that names what is in images: what `finetune.load` returns, and what `finetune predict` uses.

Each image is prepared by itself, so what is said of it does not depend on the images beside it: the shorter side is
brought down to what config.json says, as for a run on photos, and the centre square is kept; a smaller image keeps its
size and is scaled up on the device, as for a run on CIFAR. Files are decoded in parallel, a batch ahead of the model.

Legend: B images in a batch, C classes, S side of the model's input in pixels.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import center_crop

from finetune.decode import set_warnings
from finetune.device import pick_device, settle
from finetune.inference import autocast, evaluation_batch
from finetune.inputs import find_images
from finetune.pictures import Decoded, Framing, Picture, begin, finish
from finetune.precision import DTYPES
from finetune.recipe import Recipe
from finetune.trained import Trained, load_trained
from weights.errors import DataError, UsageError, WeightsError

TOPK = 5


@dataclass(frozen=True)
class ClassProbability:
    """One class and how probable it is.

    Attributes:
        name: of the class.
        probability: 0 to 1, calibrated by the model's temperature.
    """

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        path: of the file; None for an image that was given as pixels.
        topk: the most probable classes, the first one first.
    """

    path: str | None
    topk: tuple[ClassProbability, ...]

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return self.topk[0].name

    @property
    def probability(self) -> float:
        """Probability of `label`."""
        return self.topk[0].probability

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "path": self.path,
            "topk": [{"class": one.name, "probability": one.probability} for one in self.topk],
        }


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read.

    Attributes:
        path: of the file; None for an image that was given as pixels.
        reason: a clause for people.
    """

    path: str | None
    reason: str


class Classifier:
    """A trained model, ready to predict.

    Args:
        trained: the model.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: fp32 or bf16.
        batch_size: images at a time; None is what the model's run evaluated with.

    Attributes:
        trained: all that is known of the model.
        model: the network, in eval mode on `device`; takes what timm's own transform gives and returns logits (B, C).
        classes: names in the order of the logits.
        temperature: logits are divided by it before the softmax; 1 leaves them as they are.
        temperature_reason: what the temperature was fitted on, or why it is 1.
        device: where the model is.
        batch_size: images at a time.

    Raises:
        UsageError: an option that cannot be right.
    """

    def __init__(
        self, trained: Trained, *, device: str = "auto", precision: str = "fp32", batch_size: int | None = None
    ) -> None:
        if precision not in DTYPES:
            raise UsageError(f"--precision is '{precision}'; finetune predict takes fp32 or bf16.")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"--batch-size is {batch_size}; give a whole number of at least 1.")
        self.trained, self.classes = trained, trained.classes
        self.temperature, self.temperature_reason = trained.temperature.value, trained.temperature.reason
        self.device = pick_device(device)
        self.model = settle(trained.model, self.device).eval()
        self.batch_size = batch_size or evaluation_batch(trained.recipe or Recipe())
        self._dtype, self._size = DTYPES[precision], trained.preprocessing.size
        # With a crop, images are scaled to more than S and cut, as timm does: floor(size / crop_pct).
        self._preprocessing = dataclasses.replace(trained.preprocessing, size=math.floor(self._size / trained.crop_pct))
        fill = tuple(round(255 * part) for part in trained.preprocessing.mean)
        self._framing = Framing(self._preprocessing.size, trained.crop_mode, fill)

    def __repr__(self) -> str:
        return f"Classifier({self.trained.arch.name}, {len(self.classes)} classes, temperature {self.temperature:g})"

    def predict(self, images: Picture | Iterable[Picture], topk: int = TOPK) -> list[Prediction]:
        """Return what the model says of images.

        Args:
            images: a path, a Pillow image, uint8 pixels (H, W, 3) or (H, W), a batch of them (N, H, W, 3), or a list of
                any of these. A folder stands for its images at any depth, a pattern for what it finds.
            topk: classes for each image; fewer where the model has fewer.

        Returns:
            A prediction for each image, in their order.

        Raises:
            DataError: a path with no image behind it, or an image that cannot be read.
            UsageError: a `topk` below 1, or something that is no image.
            WeightsError: the model's outputs are not finite numbers.
        """
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) or not isinstance(images, Iterable):
            images = list(images) if isinstance(images, np.ndarray) and images.ndim == 4 else [images]
        pictures: list[Picture] = []
        for one in images:
            pictures += find_images([one]).files if isinstance(one, str | os.PathLike) else [one]
        predictions = []
        for batch in self.predict_batches(pictures, topk):
            for result in batch:
                if isinstance(result, Unreadable):
                    raise DataError(
                        f"{result.path or 'An image'} cannot be read ({result.reason}); leave it out, or use "
                        "predict_batches, which goes on with the others."
                    )
                predictions.append(result)
        return predictions

    def predict_batches(self, images: Iterable[Picture], topk: int = TOPK) -> Iterator[list[Prediction | Unreadable]]:
        """Yield what the model says of images, batch after batch; two batches are in memory at a time.

        Args:
            images: each a file, a Pillow image or uint8 pixels; read as far as they are needed.
            topk: classes for each image; fewer where the model has fewer.

        Yields:
            For each image of a batch, in their order, a prediction, or why it cannot be read.

        Raises:
            UsageError: a `topk` below 1, or something that is no image.
            WeightsError: the model's outputs are not finite numbers.
        """
        if not isinstance(topk, int) or topk < 1:
            raise UsageError(f"--topk is {topk!r}; give a whole number of at least 1.")
        coming = iter(images)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            batch: list[Decoded] | None = None
            while batch is None or batch:
                # No thread runs while the caller has the results, so that the warning filters are the caller's then.
                with warnings.catch_warnings():
                    set_warnings()
                    ahead = [begin(one, self._framing, pool) for one in islice(coming, self.batch_size)]
                    results = self._results(batch or [], topk)
                    batch = [finish(one) for one in ahead]
                if results:
                    yield results

    def _results(self, batch: list[Decoded], topk: int) -> list[Prediction | Unreadable]:
        """Run the model on the images of a batch that could be read."""
        readable = [one.pixels for one in batch if one.pixels is not None]
        best = iter(self._best(readable, topk) if readable else ())
        return [
            Unreadable(one.path, one.reason) if one.pixels is None else Prediction(one.path, next(best))
            for one in batch
        ]

    def _best(self, images: list[NDArray[np.uint8]], topk: int) -> list[tuple[ClassProbability, ...]]:
        try:
            inputs = self._inputs(images)
            with torch.no_grad(), autocast(self.device, self._dtype):
                logits = self.model(inputs).float().cpu()
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"A batch of {len(images)} images needs more memory than {self.device} has; give a smaller "
                "--batch-size."
            ) from error
        if not bool(torch.isfinite(logits).all()):
            raise WeightsError(
                f"The model in {self.trained.folder} gives outputs that are not finite numbers; use --precision fp32, "
                "or another checkpoint."
            )
        # Sorted by logits: probabilities that are rounded to the same number would lose their order.
        order = logits.argsort(dim=1, descending=True, stable=True)[:, :topk]
        chances = (logits.double() / self.temperature).softmax(1).gather(1, order)
        return [
            tuple(ClassProbability(self.classes[index], chance) for index, chance in zip(*row, strict=True))
            for row in zip(order.tolist(), chances.tolist(), strict=True)
        ]

    def _inputs(self, images: list[NDArray[np.uint8]]) -> torch.Tensor:
        """Return the model's inputs (B, 3, S, S) for images (3, H, H) of one or several sizes."""
        scaled = self._preprocessing.size
        inputs = torch.empty((len(images), 3, scaled, scaled), dtype=self._dtype, device=self.device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        for side in {image.shape[-1] for image in images}:
            rows = [row for row, image in enumerate(images) if image.shape[-1] == side]
            pixels = torch.from_numpy(np.stack([images[row] for row in rows])).to(self.device)
            inputs[rows] = self._preprocessing(pixels, self._dtype)
        if scaled != self._size:
            inputs = center_crop(inputs, [self._size, self._size])
        return inputs


def load_classifier(
    checkpoint: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int | None = None,
) -> Classifier:
    """Load a trained model to predict with; `finetune.load` is this function.

    Args:
        checkpoint: a run directory or another folder with model.safetensors and config.json, or the former's path.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: fp32 or bf16.
        batch_size: images at a time; None is what the model's run evaluated with.

    Raises:
        WeightsError: a file is missing, damaged, or does not fit the other.
        UsageError: an option that cannot be right.
    """
    return Classifier(load_trained(Path(checkpoint)), device=device, precision=precision, batch_size=batch_size)
