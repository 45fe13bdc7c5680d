"""A run that is killed at any moment and resumed gives the bytes of the undisturbed run.

The moments are seeded and go through features, training steps, checkpoint writes and the final export in turn.
`make test` tries four of them, `make kill-test` thirty (the environment variable KILLS says how many).
"""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from make_data import make_images, write_cifar100_python
from make_process import PHASES, count_calls, finish, kill_at, log_rows, random_moment, rows_logged, start
from make_run import metrics, tiny_recipe, write_weights

from finetune.recipe import to_toml

KILLS = int(os.environ.get("KILLS", "4"))
CHUNK_ROWS = 8
CHUNK_BYTES = CHUNK_ROWS * 3072  # test_resnet's features at 32 pixels have 3 kB an image
ROWS = 2 * 58 + 6 + 20  # both views of the training images, validation, test
FILES = ("model.safetensors", "predictions.safetensors", "config.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, weights and `own.toml`, whose cache is in the folder of whoever uses it."""
    root = tmp_path_factory.mktemp("kills")
    write_cifar100_python(root / "cifar", made=make_images(64, 20))
    weights = write_weights(root / "test_resnet.safetensors")
    recipe = tiny_recipe(root / "cifar", weights, Path("cache"), epochs=3, batch_size=8, ema=0.9)
    (root / "own.toml").write_text(to_toml(recipe))
    return root


def run_words(place: Path) -> tuple[str, ...]:
    return ("run", "--config", str(place / "own.toml"), "--output", "run")


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The folder of the undisturbed run; `calls.txt` beside it says how many calls each phase has."""
    folder = place / "whole"
    count = partial(count_calls, folder / "calls.txt", folder / "rows.txt", CHUNK_BYTES)
    assert finish(start(folder, *run_words(place), prepare=count)) == 0, (folder / "err.txt").read_text()
    assert rows_logged(folder / "rows.txt") == ROWS
    return folder


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a run leaves but what depends on the clock."""
    summary = json.loads((run / "summary.json").read_text())
    del summary["features"]["test_seconds"]
    clock = ("seconds", "estimate", "computed")  # `computed` has measured rates
    return {
        **{name: (run / name).read_bytes() for name in FILES},
        "recipe": (run / "recipe.toml").read_text().replace(str(run.parent.absolute()), "here"),  # its cache_dir
        "metrics": metrics(run),
        "summary": {key: value for key, value in summary.items() if key not in clock},
        "names": sorted(entry.name for entry in run.iterdir()),
    }


# From 4: the first kill in a step and the first in a checkpoint then find an earlier checkpoint to go on from.
@pytest.mark.parametrize("seed", range(4, 4 + KILLS), ids=lambda seed: f"{list(PHASES)[seed % len(PHASES)]}-{seed}")
def test_a_killed_run_goes_on_to_the_same_bytes(place: Path, whole: Path, tmp_path: Path, seed: int) -> None:
    calls = dict(line.split() for line in (whole / "calls.txt").read_text().splitlines())
    moment = random_moment(seed, {phase: int(calls[phase]) for phase in PHASES})
    rows = tmp_path / "rows.txt"
    killed = start(tmp_path, *run_words(place), prepare=partial(kill_at, moment, rows, CHUNK_BYTES))
    assert finish(killed) == -signal.SIGKILL, (tmp_path / "err.txt").read_text()
    resumed = start(tmp_path, "run", "--resume", "run", prepare=partial(log_rows, rows, CHUNK_BYTES))
    assert finish(resumed) == 0, (tmp_path / "err.txt").read_text()
    assert outcome(tmp_path / "run") == outcome(whole / "run")
    assert rows_logged(rows) <= ROWS + CHUNK_ROWS, "a kill costs at most the chunk that was being written"
    assert "damaged" not in (tmp_path / "err.txt").read_text()


def test_four_runs_at_once_share_one_cache(place: Path, whole: Path, tmp_path: Path) -> None:
    """They take turns at each entry, so that every row is computed by one of them."""
    rows, shared = tmp_path / "rows.txt", ("--cache-dir", str(tmp_path / "cache"))
    prepare = partial(log_rows, rows, CHUNK_BYTES)
    folders = [tmp_path / str(number) for number in range(4)]
    runs = [start(folder, *run_words(place), *shared, prepare=prepare) for folder in folders]
    assert [finish(run) for run in runs] == [0] * 4, [(folder / "err.txt").read_text() for folder in folders]
    for folder in folders:
        assert (folder / "run" / "model.safetensors").read_bytes() == (whole / "run/model.safetensors").read_bytes()
        assert metrics(folder / "run") == metrics(whole / "run")
    assert rows_logged(rows) == ROWS
