"""`finetune check`: is a data set sound? Its images are read, compared and judged, and nothing is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data import cannot_read
from finetune.duplicates import BITS, Duplicates, NearPair, find_duplicates
from finetune.findings import Finding, judge
from finetune.images import Progress
from finetune.originals import Originals, read_originals
from weights.errors import UsageError

THRESHOLD = 10  # of 64 bits: at 12, most pairs that are alike in detail show two things of a kind (docs/data.md)
LARGEST_THRESHOLD = 16  # each two bits more name several times as many candidates


@dataclass(frozen=True)
class Check:
    """What `finetune check` found.

    Attributes:
        originals: the images.
        duplicates: what is there twice.
        threshold: bits in which the hashes of look-alikes may differ.
        findings: errors first, then warnings, then notes.
    """

    originals: Originals
    duplicates: Duplicates
    threshold: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.level != "error" for finding in self.findings)

    def sizes(self, split: str) -> Counter[tuple[int, int]]:
        """Return how many images of a split have each (width, height)."""
        return Counter(look.size for index, look in enumerate(self.originals.looks) if self._in(index, split))

    def modes(self, split: str) -> Counter[str]:
        """Return how many images of a split have each of Pillow's modes."""
        return Counter(look.mode for index, look in enumerate(self.originals.looks) if self._in(index, split))

    def _in(self, image: int, split: str) -> bool:
        return self.originals.split_of(image) == split

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        found, twice = self.originals, self.duplicates
        splits = {
            name: {
                "images": sum(counts),
                "classes": dict(zip(found.classes, counts, strict=True)),
                "sizes": {f"{width}x{height}": n for (width, height), n in self.sizes(name).most_common()},
                "modes": dict(self.modes(name).most_common()),
            }
            for name, counts in found.counts().items()
        }
        return {
            "data": found.name,
            "ok": self.ok,
            "findings": [
                {"level": one.level, "kind": one.kind, "text": one.text, "places": list(one.places)}
                for one in self.findings
            ],
            "splits": splits,
            "unreadable": [{"place": place, "reason": reason} for place, reason in found.unreadable],
            "identical": [[self._named(image) for image in members] for members in twice.groups],
            "leaks": [{"test": self._named(test), "train": self._named(train)} for test, train in twice.leaks],
            "near": {
                "threshold": self.threshold,
                "complete": twice.complete,
                "leaks": [
                    {"test": self._named(pair.second), "train": self._named(pair.first), **_likeness(pair)}
                    for pair in twice.near_leaks
                ],
                "pairs": [
                    {"images": [self._named(pair.first), self._named(pair.second)], **_likeness(pair)}
                    for pair in twice.near
                ],
            },
        }

    def _named(self, image: int) -> dict[str, str]:
        found = self.originals
        return {"place": found.places[image], "split": found.split_of(image), "class": found.class_of(image)}


def _likeness(pair: NearPair) -> dict[str, float]:
    return {"bits": pair.distance, "likeness": round(pair.likeness, 3)}


def check_data(
    data: str,
    *,
    data_dir: Path | None = None,
    labels: str = "fine",
    threshold: int = THRESHOLD,
    allow_leaks: bool = False,
    progress: Progress | None = None,
) -> Check:
    """Look at a data set as it lies on disk.

    Args:
        data: as for `--data`.
        data_dir: searched first for CIFAR by name.
        labels: `fine` or `coarse`.
        threshold: most bits of 64 in which the perceptual hashes of look-alikes differ.
        allow_leaks: test images that are among the training images are a warning, not an error.
        progress: called as progress(what, done, total).

    Raises:
        UsageError: a threshold or a name that cannot be right.
        DataError: data that are not there, or have no layout that can be read.
    """
    if not 0 <= threshold <= LARGEST_THRESHOLD:
        raise UsageError(
            f"--threshold is {threshold}; give the bits of {BITS} in which look-alikes may differ, from 0 to "
            f"{LARGEST_THRESHOLD}."
        )
    if labels not in ("fine", "coarse"):
        raise UsageError(f"--labels is {labels!r}; expected fine or coarse.")
    try:
        found = read_originals(data, data_dir=data_dir, labels=labels, progress=progress)
    except OSError as error:
        raise cannot_read(data, error) from error
    twice = find_duplicates(found, threshold, progress)
    return Check(found, twice, threshold, judge(found, twice, threshold, allow_leaks=allow_leaks))
