"""The engine: fine-tune a pretrained image classifier, computing what does not train once.

Importing this imports neither torch nor timm. It makes `timm.create_model("finetune_figure1")` work, whichever of the
two packages is imported first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.registration import register_networks

if TYPE_CHECKING:
    from os import PathLike

    from finetune.classifier import Classifier

register_networks()


def load(checkpoint: str | PathLike[str], *, device: str = "auto", precision: str = "fp32") -> Classifier:
    """Load a trained model; see `finetune.classifier.load_classifier`. Images go to `load(...).predict(...)`."""
    from finetune.classifier import load_classifier

    return load_classifier(checkpoint, device=device, precision=precision)
