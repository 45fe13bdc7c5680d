"""Every reader on inputs that are nearly sound: it returns something sound, or ends with one of the project's errors.

A short pass; `make fuzz` goes on for as long as one likes. What was found once is kept in tests/fuzz/kept and read
again.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.built import STRATEGIES
from fuzz.mutate import mutated
from fuzz.place import Place, Target
from fuzz.targets import targets
from hypothesis import HealthCheck, given, settings
from PIL import Image

from finetune.decode import set_warnings
from weights.errors import FinetuneError

KEPT = Path(__file__).parent / "fuzz" / "kept"
MUTATED, BUILT = 8, 8  # inputs of each target


@pytest.fixture(scope="module")
def readers() -> Iterator[dict[str, Target]]:
    place = Place()
    largest, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 2**20
    yield {target.name: target for target in targets(place)}
    Image.MAX_IMAGE_PIXELS = largest
    place.remove()


def read(target: Target, content: bytes) -> str:
    """Return the sentence that reading ended with, "" where it did not; any other end fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries remark on odd files
        set_warnings()
        try:
            target.read(content)
        except FinetuneError as error:
            return str(error)
    return ""


def test_sound_inputs_are_read(readers: dict[str, Target]) -> None:
    for target in readers.values():
        assert target.seeds, target.name
        if not target.name.startswith(("image ", "tar", "feature")):
            target.read(target.seeds[0])


def test_mutated_inputs_are_read_or_refused(readers: dict[str, Target]) -> None:
    for target in readers.values():
        for number in range(MUTATED):
            content = mutated(random.Random(f"{target.name} {number}"), target.seeds, target.words)
            assert "\n" not in read(target, content)


@pytest.mark.parametrize("name", STRATEGIES)
def test_built_inputs_are_read_or_refused(readers: dict[str, Target], name: str) -> None:
    @settings(
        max_examples=BUILT, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(STRATEGIES[name])
    def one(content: bytes) -> None:
        assert "\n" not in read(readers[name], content)

    one()


def test_what_was_found_once(readers: dict[str, Target]) -> None:
    cases = sorted(KEPT.glob("*/*.bin"))
    assert cases
    for case in cases:
        assert "\n" not in read(readers[case.parent.name], case.read_bytes())
