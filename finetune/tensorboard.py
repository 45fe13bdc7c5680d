"""`--log tensorboard`: the rows of metrics.jsonl as TensorBoard shows them, in `tensorboard` in the run directory.

Nothing here imports torch before a log is opened: whether the package is there is asked with the other settings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weights.errors import RunError, UsageError


def require_log(kind: str) -> None:
    """Refuse a log whose package is missing.

    Args:
        kind: what `--log` says.

    Raises:
        UsageError: it says tensorboard, and that is not installed.
    """
    if kind == "tensorboard" and find_spec("tensorboard") is None:
        raise UsageError(
            "--log tensorboard needs the extra `tensorboard`, which is not installed; add it with pip install "
            "tensorboard, or leave --log out."
        )


class TensorBoard:
    """A run's figures, a step per epoch, under the names that they have in metrics.jsonl.

    A resumed run's file is begun anew with the rows of its checkpoint, so no step is there twice and none is missing,
    wherever the run was killed. Its earlier epochs are dated back by the time that they took.

    Args:
        folder: of the event file; made when it is missing.
        rows: epochs that are done already.

    Raises:
        UsageError: the package is not installed.
        RunError: the folder cannot be written.
    """

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        require_log("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._steps = 0
        with self._refusals_explained():
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            # purge_step: a TensorBoard that is watching forgets what it read in the file before.
            self._writer = SummaryWriter(str(folder), purge_step=1 if rows else None)
        self.write(rows)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows that are not there yet, through to the file.

        Args:
            rows: all of metrics.jsonl so far; a figure that is None is left out.

        Raises:
            RunError: the file cannot be written.
        """
        new = rows[self._steps :]
        with self._refusals_explained():
            for number, row in enumerate(new, start=1):
                ended = time.time() - sum(later["seconds"] + later["eval_seconds"] for later in new[number:])
                for name, value in row.items():
                    if name != "epoch" and value is not None:
                        self._writer.add_scalar(name, value, row["epoch"], walltime=ended)
            self._writer.flush()
        self._steps = len(rows)

    def close(self) -> None:
        """Close the file."""
        with self._refusals_explained():
            self._writer.close()

    @contextmanager
    def _refusals_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunError(
                f"Could not write {self.folder}: {reason}; free the space, or run again without --log tensorboard."
            ) from error
