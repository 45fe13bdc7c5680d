"""Commands that are killed at a seeded moment and called again: what tests/test_kills.py and tests/kills.py share.

Import with `from make_kills import ...`. All runs are in fp32, eager, on the CPU, where equal bytes are promised.
"""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

from make_data import make_images, write_cifar100_python
from make_process import PHASES, count_calls, finish, kill_at, log_rows, phase_of, random_moment, rows_logged, start
from make_run import metrics, tiny_recipe, write_weights

from finetune.recipe import to_toml

CHUNK_ROWS = 8
CHUNK_BYTES = CHUNK_ROWS * 3072  # test_resnet's features at 32 pixels have 3 kB an image
ROWS = 2 * 58 + 6 + 20  # both views of the training images, validation, test
FILES = ("model.safetensors", "predictions.safetensors", "config.json")
CUTS = ("layer4,fc", "fc")


class Kills:
    """A folder with data, weights, `own.toml`, and what each command does there when nothing disturbs it.

    Args:
        root: the folder; what is in it already is used again.

    Attributes:
        root: the folder. The cache of whoever uses `own.toml` is in the folder that it works in.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / "own.toml").exists():
            write_cifar100_python(root / "cifar", made=make_images(64, 20))
            weights = write_weights(root / "test_resnet.safetensors")
            recipe = tiny_recipe(root / "cifar", weights, Path("cache"), epochs=3, batch_size=8, ema=0.9)
            (root / "own.toml").write_text(to_toml(recipe))

    def words(self, command: str) -> tuple[str, ...]:
        """Return the command line."""
        if command == "export":
            model = self.whole("run") / "run"
            return ("export", str(model), "--to", "safetensors", "--output", "model.safetensors", "--force")
        cuts = [word for cut in CUTS for word in ("--train-layers", cut)] if command == "sweep" else []
        return (command, "--config", str(self.root / "own.toml"), "--output", command, *cuts)

    def again(self, command: str) -> tuple[str, ...]:
        """Return the command line that goes on after a kill."""
        return self.words(command) if command == "export" else (command, "--resume", command)

    def whole(self, command: str) -> Path:
        """Return the folder in which nothing disturbed a command; `calls.txt` in it counts the calls of each phase."""
        folder = self.root / "whole" / command
        if not (folder / "calls.txt").exists():
            words, rows = self.words(command), folder / "rows.txt"
            count = partial(count_calls, command, folder / "calls.txt", rows, CHUNK_BYTES)
            assert finish(start(folder, *words, prepare=count)) == 0, (folder / "err.txt").read_text()
            if command == "run":
                assert rows_logged(rows) == ROWS
            if command == "sweep":  # with equal ones the clock would choose
                assert len({run["val_accuracy"] for run in _read(folder / "sweep/sweep.json")["runs"]}) == len(CUTS)
        return folder

    def kill(self, seed: int, folder: Path) -> None:
        """Kill a command in the phase whose turn it is, call it again, and compare what it leaves."""
        command, _ = phase_of(seed)
        whole = self.whole(command)
        calls = dict(line.split() for line in (whole / "calls.txt").read_text().splitlines())
        moment = random_moment(seed, {phase: int(calls[phase]) for phase in PHASES[command]})
        rows = folder / "rows.txt"
        killing = partial(kill_at, command, moment, rows, CHUNK_BYTES)
        killed = finish(start(folder, *self.words(command), prepare=killing))
        assert killed == -signal.SIGKILL, (folder / "err.txt").read_text()
        ended = finish(start(folder, *self.again(command), prepare=partial(log_rows, rows, CHUNK_BYTES)))
        said = (folder / "err.txt").read_text()
        assert ended == 0, said
        assert "damaged" not in said
        left, expected = outcome(command, folder), outcome(command, whole)
        assert [name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name)] == []
        if command == "run":
            assert rows_logged(rows) <= ROWS + CHUNK_ROWS, "a kill costs at most the chunk that was being written"


def outcome(command: str, folder: Path) -> dict[str, Any]:
    """Return everything that a command leaves but what depends on the clock."""
    if command == "run":
        return _run(folder / "run", folder)
    if command == "export":
        return {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    found = _read(folder / "sweep/sweep.json")
    timed = ("seconds", "quicker", "recommendation")
    plain = {key: value for key, value in found.items() if key not in timed}
    plain["runs"] = [
        {key: value for key, value in run.items() if key not in ("seconds", "on_frontier")} for run in found["runs"]
    ]
    return {
        "sweep": plain,
        "names": sorted(entry.name for entry in (folder / "sweep").iterdir()),
        **{run["name"]: _run(folder / "sweep" / run["name"], folder) for run in found["runs"]},
    }


def _run(run: Path, folder: Path) -> dict[str, Any]:
    summary = _read(run / "summary.json")
    del summary["features"]["test_seconds"]
    clock = ("seconds", "estimate", "computed")  # `computed` has measured rates
    return {
        **{name: (run / name).read_bytes() for name in FILES if (run / name).exists()},
        "recipe": (run / "recipe.toml").read_text().replace(str(folder.absolute()), "here"),  # its cache_dir
        "metrics": metrics(run),
        "summary": {key: value for key, value in summary.items() if key not in clock},
        "names": sorted(entry.name for entry in run.iterdir()),
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
