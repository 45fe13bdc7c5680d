"""One small `finetune run` with its time taken apart, phase by phase."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import whole_job

EPOCHS = 2  # the last one's rate counts, so that compiling and first calls are part of the start


def watched_run(data: Path, layers: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """Run what `finetune run` calls, and take its own account of time apart.

    Args:
        data: folder of images.
        layers: as for `--train-layers`.
        folder: new folder for the run directory and for a cache of its own, so that nothing is remembered.
        settings: of the recipe.

    Returns:
        Figures as in whole_job.Figures but start and memory; "formats" in words; "known", the seconds that the figures
        account for: what is left of the process's time is its start.
    """
    from finetune.pipeline import run
    from finetune.recipe import Recipe

    names = tuple(layers.split(","))
    recipe = Recipe(data=str(data), train_layers=names, epochs=EPOCHS, cache_dir=folder / "cache", **settings)
    with whole_job.choices_of_whole_job(), watched() as seen:
        summary = run(recipe, folder / "run")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last, counts = rows[-1], summary["data"]
    phases = {phase: [sum(column) for column in zip(*times, strict=True)] for phase, times in seen.items()}
    rates = {phase: images / seconds for phase, (images, seconds) in phases.items() if images}
    known = sum(seconds for _, seconds in phases.values()) + EPOCHS * (last["seconds"] + last["eval_seconds"])
    computed = summary["computed"]
    formats = [
        f"{part} {choice['precision']} {'compiled' if choice['compiled'] else 'eager'}"
        for part, choice in computed.items()
        if choice
    ]
    if windows := summary["windows"]:
        formats.append(f"windows of {windows['sides'][-1]} on maps of {windows['map']}")
    return {
        **rates,
        "train": counts["train"] / last["seconds"] / cost_in_whole_job(windows),
        "eval": counts["val"] / last["eval_seconds"],
        "compile": summary["seconds"]["compile"],
        "checkpoint": phases["checkpoint"][1] / EPOCHS,
        "cache": summary["features"]["bytes"] / 2**30,
        "known": known,
        "formats": ", ".join(formats),
    }


def cost_in_whole_job(windows: dict[str, Any] | None) -> float:
    """Return what the whole job's mean epoch costs against the last measured one: 1 while all epochs are alike.

    Where the windows of feature maps differ between epochs, cost is taken to go with their area.

    Args:
        windows: of the summary: side of the map, and sides of the windows by epoch; None for whole maps.
    """
    from finetune.windows import Windows, window_sides

    if windows is None:
        return 1.0
    side = windows["map"]
    return Windows(side, window_sides(side, whole_job.EPOCHS)).cost / Windows(side, (windows["sides"][-1],)).cost


@contextmanager
def watched() -> Iterator[dict[str, list[tuple[int, float]]]]:
    """Watch the phases of a run that its summary does not tell apart: phase → (images, seconds) of each call."""
    from finetune import forecast, outcome
    from finetune.rundir import RunDirectory
    from finetune.sources import FeatureBuilder

    seen: dict[str, list[tuple[int, float]]] = {}

    def watch(owner: Any, name: str, what: Callable[..., tuple[str, int]]) -> Any:
        original = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **named)
            phase, images = what(*args)
            seen.setdefault(phase, []).append((images, time.perf_counter() - start))
            return result

        return patch.object(owner, name, timed)

    def features(_builder: Any, data: Any, views: Any, name: str) -> tuple[str, int]:
        return ("test_features" if name == "test" else "features"), len(data) * views.count

    with ExitStack() as stack:
        stack.enter_context(watch(FeatureBuilder, "features", features))
        sampled = forecast.TRAIN_SAMPLE
        stack.enter_context(
            watch(outcome, "train_figures", lambda _, split, *rest: ("sample", min(sampled, len(split.labels))))
        )
        stack.enter_context(watch(outcome, "test_logits", lambda _, test, *rest: ("test", len(test.labels))))
        stack.enter_context(watch(RunDirectory, "write_checkpoint", lambda *_: ("checkpoint", 0)))
        yield seen
