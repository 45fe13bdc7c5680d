"""The run directory: which folder, what is in it, and how each file is written.

Every file is written whole or not at all. A run is finished when it has summary.json, which is written last; until then
checkpoint.pt holds all that a resumed run needs.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout

from finetune.grid import SWEEP
from finetune.recipe import Recipe, from_table, read_toml, to_toml
from finetune.tensorboard import TensorBoard
from weights.atomic import FULL, cannot_write, write_atomically
from weights.errors import RunError
from weights.guard import read_json, refuse_link
from weights.torch_file import read_torch

RECIPE, METRICS, SUMMARY, CHECKPOINT = "recipe.toml", "metrics.jsonl", "summary.json", "checkpoint.pt"
MODEL, CONFIG, PREDICTIONS, LOCK = "model.safetensors", "config.json", "predictions.safetensors", ".lock"
TENSORBOARD = "tensorboard"
COMMANDS = {RECIPE: "finetune run", SWEEP: "finetune sweep"}  # what goes on in a folder that holds such a file

MENDABLE = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # a user can help, and the run goes on


class RunDirectory:
    """One run's folder, locked while it is in use.

    Args:
        path: the folder; it exists.
        new: whether a run begins in it, which needs it empty.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path, self.new = path, new
        self._log: TensorBoard | None = None
        self._lock = FileLock(path / LOCK, timeout=0)

    def __enter__(self) -> RunDirectory:
        _refuse_links(self.path)
        try:
            self._lock.acquire()
        except Timeout:
            raise _in_use(self.path) from None
        except OSError as error:
            advice = "give another --output" if self.new else "make it writable"
            raise RunError(f"{self.path} cannot be written ({error.strerror}); {advice}.") from error
        if self.new:
            try:
                require_empty(self.path, locked=True)  # two runs may have found it empty; one had the lock first
            except RunError:
                self._unlock()
                raise
            self.new = False
        for half_written in self.path.glob(".*.tmp"):  # what a killed run was writing; the lock says that it is gone
            half_written.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._close_log(error)
        finally:
            self._unlock()
        begun = next((words for name, words in COMMANDS.items() if (self.path / name).is_file()), "")
        if begun == COMMANDS[RECIPE] and isinstance(error, KeyboardInterrupt):  # the command line catches the signal
            error.add_note(f"What was finished is kept: finetune.resume({str(self.path)!r}) goes on.")
        if begun and (first := _first_refusal(error)) is not None:
            raise RunError(
                f"{str(first).rstrip('.')}. What was finished is kept: go on with {begun} --resume {self.path}"
            ) from error

    def _unlock(self) -> None:
        # Deleted while it is held: whoever waits for it finds that it is gone, instead of sharing it with the next run.
        with suppress(OSError):  # Windows does not delete what is open, and filelock does it on release
            (self.path / LOCK).unlink()
        self._lock.release()

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.toml."""
        write_atomically(self.path / RECIPE, to_toml(recipe).encode())

    def open_log(self, kind: str, rows: list[dict[str, Any]]) -> None:
        """From here on keep the log that the recipe asks for beside metrics.jsonl, until the folder is left.

        Args:
            kind: tensorboard, or none.
            rows: of the epochs that a resumed run has behind it.

        Raises:
            UsageError: TensorBoard is not installed.
            RunError: the log cannot be written.
        """
        if kind == "tensorboard":
            self._log = TensorBoard(self.path / TENSORBOARD, rows)

    def _close_log(self, error: BaseException | None) -> None:
        if self._log is not None:
            with suppress(RunError) if error is not None else nullcontext():  # the first error is the one to tell
                self._log.close()
        self._log = None

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl, a line per epoch, and to the log what it lacks."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.path / METRICS, text.encode())
        if self._log is not None:
            self._log.write(rows)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json: from here on the run is finished."""
        write_atomically(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())

    def read_summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, or None."""
        try:
            summary = read_json(self.path / SUMMARY)
            if not isinstance(summary, dict):
                raise ValueError("it is no JSON object")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.path / SUMMARY} is damaged ({error}); delete it and resume the run again."
            ) from error
        return summary

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt: tensors and plain values."""
        write_atomically(self.path / CHECKPOINT, lambda file: torch.save(state, file))

    def read_checkpoint(self) -> dict[str, Any] | None:
        """Return what `write_checkpoint` was given, or None when the run had not finished an epoch.

        Raises:
            RunError: the file is damaged, or is no checkpoint.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = read_torch(path, checked=True)
            if not isinstance(state, dict) or "progress" not in state:
                raise ValueError("it is no checkpoint of a run")
        except Exception as error:  # damaged bytes make the readers of archives and pickles raise nearly anything
            first = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise RunError(f"{path} is damaged ({first}); delete it to start this run from its first epoch.") from error
        return dict(state)

    def drop_checkpoint(self) -> None:
        """Delete checkpoint.pt: a finished run does not need it.

        Raises:
            RunError: the system refuses.
        """
        try:
            (self.path / CHECKPOINT).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.path / CHECKPOINT, error) from error


def _first_refusal(error: BaseException | None) -> RunError | None:
    """Return what was said first of a disk that refused, in this folder or in a run's within it; None without one."""
    while isinstance(error, RunError):
        if isinstance(error.__cause__, OSError):
            return error if error.__cause__.errno in MENDABLE else None
        error = error.__cause__
    return None


def _refuse_links(path: Path) -> None:
    """Refuse a folder in which what is written to in place leads elsewhere: a stranger may have packed it."""
    for name in (LOCK, TENSORBOARD):
        try:
            refuse_link(path / name)
        except OSError as error:
            raise RunError(f"{path / name} is {error.strerror}; remove it, since a run writes to it.") from error


def _in_use(path: Path) -> RunError:
    return RunError(f"{path} is in use by another run; wait until that one has ended, or give another --output.")


def require_empty(output: Path, *, locked: bool = False) -> None:
    """Refuse an output folder that holds something; one that does not exist yet is welcome.

    Args:
        output: the folder.
        locked: whether the caller holds its lock.

    Raises:
        RunError: it holds files or folders, or another run is using it.
    """
    if not output.is_dir():
        there = next(place for place in (output, *output.absolute().parents) if place.exists() or place.is_symlink())
        if not there.is_dir():
            found = "a file" if there.exists() else "a link to nothing"
            raise RunError(f"--output {output} cannot be a folder, since {there} is {found}; give another --output.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise RunError(f"{output} cannot be created, since {there} cannot be written; give another --output.")
        return
    names = {entry.name for entry in output.iterdir()}
    held = sorted(names - {LOCK})
    if LOCK in names and not locked:  # in use, or what a kill left
        try:
            _refuse_links(output)
            with suppress(PermissionError), FileLock(output / LOCK, timeout=0):
                pass
        except Timeout:
            raise _in_use(output) from None
    if held:
        finished = SUMMARY in held
        advice = "" if finished or RECIPE not in held else f" (or go on with --resume {output})"
        raise RunError(
            f"{output} already holds {'a finished run' if finished else held[0]}; give another --output{advice}."
        )


def create_run_directory(output: Path | None, name: str) -> RunDirectory:
    """Make the folder of a new run.

    Args:
        output: the folder that was asked for; it may exist when it is empty. None makes runs/NAME-0001 or the next
            number that is free.
        name: for None.

    Raises:
        RunError: the folder holds files already, or cannot be made.
    """
    try:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            require_empty(output)
            return RunDirectory(output, new=True)
        for number in range(1, 10_000):
            path = Path("runs") / f"{name}-{number:04d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return RunDirectory(path, new=True)
    except OSError as error:
        where = output or Path("runs").resolve()
        raise RunError(f"{where} cannot be created ({error.strerror}); give another --output.") from error
    raise RunError("runs/ holds 9,999 runs of this name; give --output, or clear it.")


def open_run_directory(path: Path) -> tuple[RunDirectory, Recipe]:
    """Return an existing run's folder and recipe.

    Raises:
        RunError: there is no run.
    """
    if not (path / RECIPE).is_file():
        found = "does not exist" if not path.exists() else "holds no recipe.toml"
        raise RunError(f"--resume {path}: it {found}; give the folder of a run that was started before.")
    return RunDirectory(path), from_table(read_toml(path / RECIPE), str(path / RECIPE))
