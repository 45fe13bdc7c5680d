"""What `import finetune` offers: the commands `run` and `baseline` as functions, for scripts and notebooks.

Keyword names, defaults and checks are the recipe's. The two TypedDicts below hold names and types only, so that editors
and type checkers know every keyword; a test compares them with the recipe. Nothing here imports torch before a run.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_type_hints

from finetune.events import Events, printed
from finetune.launch import is_first
from finetune.recipe import AUTO, Recipe, check, from_table, read_toml, typed_settings
from finetune.scratch import BY_RECIPE, choose_baseline
from weights.errors import UsageError, near_matches
from weights.guard import read_json

# What all processes of a run have alike in their summaries: times and places are each one's own.
SAME = (
    "arch", "trained_layers", "data", "processes", "epochs", "images_seen",
    "test_accuracy", "test_loss", "train_accuracy", "val_accuracy",
)  # fmt: skip


class BaselineSettings(TypedDict, total=False):
    """Keywords of `finetune.baseline` that are settings of a recipe; None is chosen when the run starts."""

    data: str | Path
    data_dir: str | Path | None
    labels: str
    weights: str | Path
    weights_dir: str | Path | None
    blocks: str | Sequence[str] | Sequence[int]
    shortcut: str | None
    hidden: int | None
    dropout: float | None
    image_size: int | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    lr_scales: str | Sequence[str]
    optimizer: str
    momentum: float
    weight_decay: float | None
    schedule: str
    warmup: float
    label_smoothing: float
    class_weights: str
    ema: float
    freeze_norms: float
    budget: str | None
    patience: int
    augment: str
    cutout: int
    views: int | None
    skip_easy: float | None
    val_fraction: float
    limit: int | None
    shots: int | None
    hold_test: bool
    seed: int
    device: str
    precision: str
    compile: str
    cache: str
    cache_dir: str | Path | None
    cache_limit: str
    memory_budget: str | None
    image_memory: str | None
    log: str


class RunSettings(BaselineSettings, total=False):
    """Keywords of `finetune.run` that are settings of a recipe; None is chosen when the run starts."""

    arch: str
    train_layers: str | Sequence[str]
    allow_missing: str | Sequence[str]
    keep_head: bool
    head_lr_scale: float
    windows: str


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run directory.
        checkpoint: its model.safetensors, beside the config.json that timm needs to load the folder.
        report: its report.html.
        test_accuracy: in percent; None where the data bring no test split.
        test_loss: cross-entropy in nats; likewise.
        val_accuracy: in percent, of the epoch that was kept; None without validation images.
        train_accuracy: in percent, in eval mode, of up to 10,000 training images.
        epochs: how many were trained.
        seconds: of the whole run.
        metrics: the rows of metrics.jsonl, one per epoch; none in a process that does not see the run directory, or
            sees another run's in its place.
        summary: everything in summary.json, and the run directory under "output".
    """

    folder: Path
    checkpoint: Path
    report: Path
    test_accuracy: float | None
    test_loss: float | None
    val_accuracy: float | None
    train_accuracy: float
    epochs: int
    seconds: float
    metrics: list[dict[str, Any]] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)


def run(
    *,
    config: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool = False,
    **settings: Unpack[RunSettings],
) -> Result:
    """Fine-tune a pretrained classifier, as `finetune run` does.

    Args:
        config: a recipe file, such as the recipe.toml of another run; keywords win over it.
        output: the run directory; None makes the next free one under runs/.
        progress: print what the run is going to do and how far it has come.
        **settings: settings of the recipe. A list may be given as on the command line: "layer4,fc".

    Returns:
        The finished run.

    Raises:
        UsageError: a setting that is unknown or cannot be right; its message names it as the command line does.
        WeightsError: weights that cannot be used.
        DataError: data that cannot be used.
        TrainingError: the loss is not finite, or a frozen tensor moved.
        RunError: the output folder or the cache cannot be used.
    """
    given = _given(run, settings)
    path = _path(config)
    base = from_table(read_toml(path), str(path)) if path else Recipe()
    return _carry_out(dataclasses.replace(base, **given), output, progress)


def baseline(
    *,
    arch: str | None = None,
    recipe: str | None = None,
    config: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool = False,
    **settings: Unpack[BaselineSettings],
) -> Result:
    """Train a network from scratch, as `finetune baseline` does, to see what transfer is worth.

    Args:
        arch: one of our networks, with or without `finetune_`, or any timm architecture; None is figure1.
        recipe: fast, which is ours, or assignment, what the assignments prescribe; None is fast.
        config: a recipe file of such a run; keywords win over it, and it wins over `recipe`.
        output: the run directory; None makes the next free one under runs/.
        progress: print what the run is going to do and how far it has come.
        **settings: settings of the recipe, where they are to differ from what `recipe` says.

    Returns:
        The finished run.

    Raises:
        UsageError, WeightsError, DataError, TrainingError, RunError: as for `run`.
    """
    return _carry_out(choose_baseline(arch, recipe, _given(baseline, settings), _path(config)), output, progress)


def resume(folder: str | Path, *, progress: bool = False) -> Result:
    """Go on with a run that was interrupted or killed, to the result that it would have had.

    Args:
        folder: its run directory. A finished run is returned as it stands.
        progress: print how far it has come.

    Returns:
        The finished run.

    Raises:
        RunError: there is no such run, its checkpoint is damaged, or data or weights are not those it began with.
        UsageError, WeightsError, DataError, TrainingError: as for `run`.
    """
    from finetune import pipeline

    return _watch(lambda events: pipeline.resume(Path(folder).expanduser(), events=events), progress)


def _carry_out(recipe: Recipe, output: str | Path | None, progress: bool) -> Result:
    check(recipe)  # before torch is imported: a wrong setting is answered at once
    from finetune import pipeline

    return _watch(lambda events: pipeline.run(recipe, _path(output), events=events), progress)


def _watch(begin: Callable[[Events], dict[str, Any]], progress: bool) -> Result:
    """Begin a run that is printed or silent, and return what came of it."""
    import torch

    with torch.random.fork_rng(devices=[]):  # a run seeds PyTorch's generator, which belongs to the caller
        summary = begin(printed() if progress else Events())
    folder = Path(summary["output"])
    return Result(
        folder=folder,
        checkpoint=folder / "model.safetensors",
        report=folder / "report.html",
        test_accuracy=summary["test_accuracy"],
        test_loss=summary["test_loss"],
        val_accuracy=summary["val_accuracy"],
        train_accuracy=summary["train_accuracy"],
        epochs=summary["epochs"],
        seconds=summary["seconds"]["total"],
        metrics=_rows(folder, summary),
        summary=summary,
    )


def _rows(folder: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl.

    Only the first process writes the folder. On another machine the same path may lead nowhere, or to another run.
    """
    if not is_first():
        try:
            there = read_json(folder / "summary.json")
            if any(there.get(name) != summary.get(name) for name in SAME):
                return []
        except (OSError, ValueError, AttributeError):
            return []
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value).expanduser()


def _given(function: Callable[..., Result], settings: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings of a call as the recipe has them.

    Raises:
        UsageError: an unknown name (near matches are offered) or a value of the wrong type.
    """
    where, known = f"finetune.{function.__name__}()", inspect.signature(function).parameters
    for name in settings:
        if name not in known:
            raise UsageError(f"{where} takes no '{name}'{near_matches(name, known) or '; leave it out.'}")
    kinds = {item.name: str(item.type) for item in dataclasses.fields(Recipe)}
    return typed_settings({name: _plain(value, kinds[name]) for name, value in settings.items()}, where)


def _plain(value: object, kind: str) -> object:
    """Return a Python value as a recipe file would hold it: paths as texts, NumPy's numbers as Python's."""
    if value is None and "None" in kind:
        return AUTO
    if isinstance(value, PathLike):
        return fspath(value)
    if kind.startswith("tuple") and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind.startswith("tuple") and isinstance(value, Iterable):
        return [str(part) if isinstance(part, Integral) else part for part in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _complete(function: Callable[..., Result], settings: type, by_recipe: Sequence[str] = ()) -> None:
    """Put the settings behind `**settings` into a function's signature and help, for notebooks.

    Args:
        function: ends in `**settings`.
        settings: the TypedDict of those that it takes.
        by_recipe: those among them without a default of their own; it is shown as Ellipsis.
    """
    types = get_type_hints(settings)
    items = [item for item in dataclasses.fields(Recipe) if item.name in types]
    own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
    parameters = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=... if item.name in by_recipe else item.default,
            annotation=types[item.name],
        )
        for item in items
    ]
    signature = inspect.Signature([*own, *parameters], return_annotation=Result)
    function.__signature__ = signature  # type: ignore[attr-defined]
    lines = "\n".join(f"    {item.name}: {item.metadata['help']}" for item in items)
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nSettings:\n{lines}\n"


_complete(run, RunSettings)
_complete(baseline, BaselineSettings, BY_RECIPE)
