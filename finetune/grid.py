"""What a sweep tries: every combination of some settings, each with the name of its run folder.

Nothing here imports torch, so that a wrong flag is answered at once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from finetune.recipe import AUTO, Recipe, check, flag, from_table, peak_rate, read_toml, to_table
from weights.errors import RunError, UsageError

AXES = ("train_layers", "lr", "weight_decay", "shots")
SWEEP = "sweep.toml"
MOST_RUNS = 10_000  # of one sweep; a folder each
LONGEST_LAYERS = 80  # letters; folder names may have 255, and the other settings want some of them


@dataclass(frozen=True)
class Candidate:
    """One combination.

    Attributes:
        name: of its run folder.
        recipe: its settings; the test split is held back.
    """

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """Values of the settings that are swept; each has at least one.

    Attributes:
        train_layers: what trains.
        lr: peak learning rates; None is what suits the optimiser.
        weight_decay: weight decays; None is what suits the layers.
        shots: training images of every class, the fewest first; None, which is all, last.
    """

    train_layers: tuple[tuple[str, ...], ...]
    lr: tuple[float | None, ...]
    weight_decay: tuple[float | None, ...]
    shots: tuple[int | None, ...]

    @property
    def most(self) -> int | None:
        """The most training images of every class."""
        return self.shots[-1]

    def candidates(self, recipe: Recipe) -> list[Candidate]:
        """Return every combination, those of one cut after another.

        Args:
            recipe: the settings that all of them share.
        """
        found = []
        for number, layers in enumerate(self.train_layers, start=1):
            joined = "+".join(layers)
            plain = re.fullmatch(r"\w[\w.+-]*", joined)  # it becomes the name of a folder
            label = joined if plain and len(joined) <= LONGEST_LAYERS else f"cut{number}"
            for lr, decay, shots in itertools.product(self.lr, self.weight_decay, self.shots):
                parts = [label]
                parts += [f"lr{AUTO if lr is None else repr(lr)}"] if len(self.lr) > 1 else []
                parts += [f"wd{AUTO if decay is None else repr(decay)}"] if len(self.weight_decay) > 1 else []
                parts += [f"shots{'all' if shots is None else shots}"] if len(self.shots) > 1 else []
                own = replace(recipe, train_layers=layers, lr=lr, weight_decay=decay, shots=shots, hold_test=True)
                found.append(Candidate("-".join(parts), own))
        return found

    def check(self, recipe: Recipe) -> None:
        """Check every combination as far as that goes without data and weights.

        Raises:
            UsageError: a setting that cannot be right, or a combination that comes twice.
        """
        runs = math.prod(map(len, (self.train_layers, self.lr, self.weight_decay, self.shots)))
        if runs > MOST_RUNS:
            raise UsageError(f"These values make {runs:,} runs; give fewer, {MOST_RUNS:,} runs at most.")
        for candidate in self.candidates(recipe):
            check(candidate.recipe)
        rates = [peak_rate(replace(recipe, lr=lr)) for lr in self.lr]
        cuts = [tuple(sorted(set(layers))) for layers in self.train_layers]
        axes: dict[str, Sequence[Any]] = {"lr": rates, "weight_decay": self.weight_decay, "shots": self.shots}
        for name, values in (*axes.items(), ("train_layers", cuts)):
            twice = [value for place, value in enumerate(values) if value in values[:place]]
            if twice:
                raise UsageError(f"{flag(name)} has {_told(name, twice[0])} twice; name each value once.")


def make_grid(
    recipe: Recipe,
    *,
    train_layers: Sequence[str] = (),
    lr: str | None = None,
    weight_decay: str | None = None,
    shots: str | None = None,
) -> Grid:
    """Return the grid of values as they are typed; what is not given is the recipe's own value.

    Args:
        recipe: the settings that all combinations share.
        train_layers: names separated by commas, once for each cut.
        lr: numbers separated by commas; `auto` is what suits the optimiser.
        weight_decay: likewise; `auto` is what suits the layers.
        shots: whole numbers separated by commas; `all` is every image.

    Raises:
        UsageError: a value that is no number.
    """
    cuts = tuple(tuple(part.strip() for part in text.split(",") if part.strip()) for text in train_layers)
    fewest_first = _values("shots", shots, _count, "whole numbers separated by commas, such as 1,5,10")
    return Grid(
        cuts or (recipe.train_layers,),
        _values("lr", lr, _rate, "numbers separated by commas, such as 0.01,0.03,0.1") or (recipe.lr,),
        _values("weight_decay", weight_decay, _rate, "numbers separated by commas, such as 0,0.0005")
        or (recipe.weight_decay,),
        tuple(sorted(fewest_first, key=lambda count: float("inf") if count is None else count)) or (recipe.shots,),
    )


def _rate(text: str) -> float | None:
    return None if text == AUTO else float(text)


def _count(text: str) -> int | None:
    return None if text == "all" else int(text)


def _values(name: str, text: str | None, read: Callable[[str], Any], wanted: str) -> tuple[Any, ...]:
    """Read a list as it is typed; () when none was given."""
    if text is None:
        return ()
    values = []
    for part in (part.strip() for part in text.split(",")):
        try:
            values.append(read(part))
        except ValueError:
            kind = "no whole number" if read is _count else "no number"
            raise UsageError(f"{flag(name)} is '{text}', and '{part}' is {kind}; give {wanted}.") from None
    return tuple(values)


def to_toml(grid: Grid, recipe: Recipe) -> str:
    """Return sweep.toml's text: the values of the settings that are swept, and all other settings."""
    return "# Go on with this sweep, from the folder above: finetune sweep --resume FOLDER\n" + tomli_w.dumps(
        _table(grid, recipe)
    )


def _table(grid: Grid, recipe: Recipe) -> dict[str, Any]:
    axes = {
        name: [AUTO if value is None else list(value) if isinstance(value, tuple) else value for value in values]
        for name, values in asdict(grid).items()
    }
    return {**axes, "recipe": {name: value for name, value in to_table(recipe).items() if name not in AXES}}


def read_sweep(folder: Path) -> tuple[Grid, Recipe]:
    """Return what the sweep in a folder tries.

    Raises:
        RunError: there is no sweep.
        UsageError: sweep.toml is damaged.
    """
    path = folder / SWEEP
    if not path.is_file():
        found = "does not exist" if not folder.exists() else f"holds no {SWEEP}"
        raise RunError(f"--resume {folder}: it {found}; give the folder of a sweep that was started before.")
    table = read_toml(path)
    axes = {}
    for name in AXES:
        values = table.get(name)
        if not isinstance(values, list) or not values:
            raise UsageError(f"{path} has no list of {name}; start the sweep again in another --output.")
        axes[name] = tuple(getattr(from_table({name: value}, str(path)), name) for value in values)
    own = table.get("recipe")
    return Grid(**axes), from_table(own if isinstance(own, dict) else {}, str(path))


def require_free(folder: Path, grid: Grid, recipe: Recipe) -> None:
    """Refuse a folder that holds a sweep, and say whether it is the same.

    Args:
        folder: where the new sweep is to go.
        grid: of the new sweep.
        recipe: of the new sweep, with paths as they are written.

    Raises:
        RunError: there is a sweep.
    """
    if not (folder / SWEEP).is_file():
        return
    before, now = _table(*read_sweep(folder)), _table(grid, recipe)
    differing = [
        f"{flag(name)} {_told(name, new)} (there {_told(name, old)})"
        for old_table, new_table in ((before, now), (before["recipe"], now["recipe"]))
        for name, new in new_table.items()
        if name != "recipe" and new != (old := old_table.get(name))
    ]
    if differing:
        raise RunError(f"{folder} holds a sweep with other settings: {', '.join(differing)}; give another --output.")
    raise RunError(f"{folder} holds this sweep already; go on with finetune sweep --resume {folder}")


def _told(name: str, value: Any) -> str:
    """Return a setting's value, or a list of them, as it is typed."""
    if isinstance(value, list | tuple):
        nested = any(isinstance(part, list) for part in value)
        return (" and " if nested else ",").join(_told(name, part) for part in value)
    if value in (None, AUTO):
        return "all" if name == "shots" else AUTO
    return str(value)
