"""A command that is killed at any moment and called again leaves the bytes of the undisturbed one.

The moments are seeded and go in turn through features, training steps, checkpoint writes and the last files of a run,
features, runs and the choice of a sweep, and an export. `make test` tries four of a run, `make kill-test` a hundred of
all (tests/kills.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from make_kills import CHUNK_BYTES, ROWS, Kills
from make_process import finish, log_rows, phase_of, rows_logged, start
from make_run import metrics, model_bytes


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Kills:
    return Kills(tmp_path_factory.mktemp("kills"))


def phase(seed: int) -> str:
    return f"{phase_of(seed)[1]}-{seed}"


# From 8: the first kill in a step and the first in a checkpoint then find an earlier checkpoint to go on from.
@pytest.mark.parametrize("seed", [8, 9, 10, 11], ids=phase)
def test_a_killed_run_goes_on_to_the_same_bytes(kills: Kills, tmp_path: Path, seed: int) -> None:
    kills.kill(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [12, 13, 14], ids=phase)
def test_a_killed_sweep_goes_on_to_the_same_bytes(kills: Kills, tmp_path: Path, seed: int) -> None:
    kills.kill(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [15], ids=phase)
def test_a_killed_export_that_is_called_again_gives_the_same_bytes(kills: Kills, tmp_path: Path, seed: int) -> None:
    kills.kill(seed, tmp_path)


def test_four_runs_at_once_share_one_cache(kills: Kills, tmp_path: Path) -> None:
    """They take turns at each entry, so that every row is computed by one of them."""
    rows, shared, whole = tmp_path / "rows.txt", ("--cache-dir", str(tmp_path / "cache")), kills.whole("run") / "run"
    prepare = partial(log_rows, rows, CHUNK_BYTES)
    folders = [tmp_path / str(number) for number in range(4)]
    runs = [start(folder, *kills.words("run"), *shared, prepare=prepare) for folder in folders]
    assert [finish(run) for run in runs] == [0] * 4, [(folder / "err.txt").read_text() for folder in folders]
    for folder in folders:
        assert model_bytes(folder / "run") == model_bytes(whole)
        assert metrics(folder / "run") == metrics(whole)
    assert rows_logged(rows) == ROWS
