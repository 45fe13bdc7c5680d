"""`finetune demo`: what pretrained layers are worth, shown in three runs on drawn pictures.

    pretrained   resnet18 from random weights on all of shapes100
    fine-tuned   layer4 and fc of that network on a few images of shapes10, whose outlines it has never seen
    from scratch the same network from random weights on the same few images

Each run is what `finetune run` would do with the same recipe, and leaves its own run directory. The schedule is fixed,
so every machine does the same work and a slower one takes longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune import pipeline
from finetune.events import Events
from finetune.recipe import Recipe
from finetune.rundir import create_run_directory

PRETRAINED, FINE_TUNED, SCRATCH = "pretrained", "fine-tuned", "from-scratch"
"""Names of the three runs and of their folders, in the order in which they happen."""


@dataclass(frozen=True)
class Amount:
    """How much the demo computes; the defaults are `finetune demo`, tests take less.

    Attributes:
        pretrain_images: training images of shapes100; None takes all.
        pretrain_epochs: passes over them.
        images: training images of shapes10 for the other two runs.
        tune_epochs: passes of the fine-tuned run over them.
        scratch_epochs: passes of the run from scratch; it needs more of them.
    """

    pretrain_images: int | None = None
    pretrain_epochs: int = 3
    images: int = 300
    tune_epochs: int = 30
    scratch_epochs: int = 60


@dataclass(frozen=True)
class Demo:
    """What the three runs came to.

    Attributes:
        seed: of all three.
        pretrained: summary of the run on shapes100.
        fine_tuned: summary of the run that starts from it.
        scratch: summary of the run that starts from nothing.
        points: test accuracy of `fine_tuned` minus that of `scratch`, in percentage points.
        seconds: time of the whole demo, without starting the program.
        output: the folder that holds the three run directories.
    """

    seed: int
    pretrained: dict[str, Any]
    fine_tuned: dict[str, Any]
    scratch: dict[str, Any]
    points: float
    seconds: float
    output: str

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)


def recipes(folder: Path, *, seed: int, amount: Amount, cache_dir: Path | None = None) -> dict[str, Recipe]:
    """Return the recipes of the three runs by name.

    Args:
        folder: holds the run directories; the fine-tuned run reads its weights there.
        seed: seed of all three.
        amount: images and epochs.
        cache_dir: where measurements of this machine are remembered; None is the user's cache folder.
    """
    # 32 pixels is the size at which shapes are drawn. Nothing is held out: no setting is chosen by these runs.
    common = Recipe(image_size=32, val_fraction=0.0, seed=seed, cache="ram", cache_dir=cache_dir)
    whole = replace(common, weights="none", train_layers=("all",), optimizer="adamw", head_lr_scale=1.0)
    return {
        PRETRAINED: replace(
            whole,
            data="shapes100",
            limit=amount.pretrain_images,
            epochs=amount.pretrain_epochs,
            lr=2e-3,
        ),
        FINE_TUNED: replace(
            common,
            data="shapes10",
            limit=amount.images,
            weights=str((folder / PRETRAINED).resolve()),
            train_layers=("layer4", "fc"),
            epochs=amount.tune_epochs,
        ),
        SCRATCH: replace(
            whole,
            data="shapes10",
            limit=amount.images,
            epochs=amount.scratch_epochs,
            lr=2e-3,
        ),
    }


def demo(
    output: Path | None = None,
    *,
    seed: int = 0,
    amount: Amount | None = None,
    cache_dir: Path | None = None,
    events: Events | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Demo:
    """Pre-train, fine-tune, train from scratch, and compare.

    Args:
        output: folder for the three run directories; None makes the next free runs/demo-NNNN.
        seed: seed of all three runs.
        amount: how much to compute; None is the usual demo.
        cache_dir: where measurements of this machine are remembered; None is the user's cache folder.
        events: told of everything that the runs tell; silent when None.
        stop: asked by the runs before each step.

    Raises:
        RunError: the output folder holds files already, or cannot be written.
        StoppedError: `stop` asked for it.
    """
    started = time.perf_counter()
    events = events or Events()
    with create_run_directory(output, "demo") as directory:
        folder = directory.path
        wanted = recipes(folder, seed=seed, amount=amount or Amount(), cache_dir=cache_dir)
        summaries = {}
        for number, (name, recipe) in enumerate(wanted.items(), start=1):
            events.note(f"{number} of {len(wanted)}, {name}: {_what(recipe)}")
            summaries[name] = pipeline.run(recipe, folder / name, events=events, stop=stop)
    return Demo(
        seed=seed,
        pretrained=summaries[PRETRAINED],
        fine_tuned=summaries[FINE_TUNED],
        scratch=summaries[SCRATCH],
        points=summaries[FINE_TUNED]["test_accuracy"] - summaries[SCRATCH]["test_accuracy"],
        seconds=time.perf_counter() - started,
        output=str(folder),
    )


def _what(recipe: Recipe) -> str:
    """Return one line that says what a run of the demo does."""
    images = f"{recipe.limit:,} images" if recipe.limit else "all training images"
    start = "random weights" if recipe.weights == "none" else "the pretrained network"
    return f"{recipe.arch} from {start}, {', '.join(recipe.train_layers)} on {images} of {recipe.data}"
