"""The engine: fine-tune a pretrained image classifier, computing what does not train once.

    import finetune

    result = finetune.run(data="photos", train_layers=["layer4", "fc"])

Importing this imports neither torch nor timm. It makes `timm.create_model("finetune_figure1")` work, whichever of the
two packages is imported first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.api import Result, baseline, resume, run
from finetune.registration import register_networks
from weights.errors import (
    DataError,
    FinetuneError,
    RunError,
    StoppedError,
    TrainingError,
    UsageError,
    WeightsError,
)

__all__ = [
    "DataError",
    "FinetuneError",
    "Result",
    "RunError",
    "StoppedError",
    "TrainingError",
    "UsageError",
    "WeightsError",
    "baseline",
    "load",
    "resume",
    "run",
]

if TYPE_CHECKING:
    from os import PathLike

    from finetune.classifier import Classifier

register_networks()


def load(checkpoint: str | PathLike[str], *, device: str = "auto", precision: str = "fp32") -> Classifier:
    """Load a trained model; see `finetune.classifier.load_classifier`. Images go to `load(...).predict(...)`."""
    from finetune.classifier import load_classifier

    return load_classifier(checkpoint, device=device, precision=precision)
