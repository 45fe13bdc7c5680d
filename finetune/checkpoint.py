"""What a resumed run needs, packed for checkpoint.pt and checked when it is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune.compute import Computing
from finetune.fit import Progress, Trainer
from finetune.images import DataSplits
from finetune.models import Prepared
from weights.errors import RunError


def pack(
    progress: Progress,
    trainer: Trainer,
    best: dict[str, torch.Tensor] | None,
    data: DataSplits,
    prepared: Prepared,
    computing: Computing,
) -> dict[str, Any]:
    """Return a checkpoint: tensors and plain values only, so that it can be read without running code."""
    return {
        "progress": asdict(progress),
        "trainer": trainer.state(),
        "best": best,
        "data": data.sha256,
        "weights": prepared.sha256,
        "choices": computing.choices(),
    }


def require_same(path: Path, state: dict[str, Any], data: DataSplits, prepared: Prepared) -> None:
    """Refuse to resume on other data or weights than the run began with.

    Raises:
        RunError: they differ.
    """
    if state["data"] != data.sha256:
        raise RunError(
            f"{path} was trained on other images (sha256 {state['data'][:12]}…, now {data.sha256[:12]}…); bring the "
            "original data back, or start a new run."
        )
    if state["weights"] != prepared.sha256:
        raise RunError(
            f"{path} began with other weights (sha256 {str(state['weights'])[:12]}…, now "
            f"{str(prepared.sha256)[:12]}…); bring the original weights back, or start a new run."
        )
