"""What a config.json may say: preprocessing and arguments of a network, checked before they are used.

The file decides how large a network is built and how large its images are, so a hostile one could ask for all memory,
or for a file of its choice to be read. Errors are ValueErrors with a clause for people; whoever reads the file names
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weights.guard import shortened, told

LARGEST_SIDE = 2048
"""Pixels. The largest input of timm's pretrained networks is 1,024 (those of SAM)."""

SMALLEST_CROP = 0.25
"""Share of an image that is kept; images are scaled to the side divided by it, so a small one asks for much memory."""

MOST_CLASSES = 1_000_000
"""Outputs of a head. ImageNet-22k has 21,843 classes; a million of 2,048 features each would be 8 GB."""

LARGEST_ARGUMENT = 16_384
"""In `model_args`: widths, sides and numbers of blocks. Many more blocks would take hours to build."""

LONGEST_LIST = 256
"""Entries of a list in `model_args`, and letters of a text; a list has one entry for each stage or block."""

PLACES = ("pretrained", "checkpoint_path", "cache_dir", "hf_hub", "scriptable", "exportable", "no_jit")
"""How arguments of `timm.create_model` begin that say which file to read or how, and not what is built."""


def check_args(model_args: Mapping[str, Any]) -> None:
    """Check arguments for `timm.create_model` that a file states.

    Args:
        model_args: names and values, as JSON holds them.

    Raises:
        ValueError: one that names a file, or is too large to be built.
    """
    for name, value in model_args.items():
        if name.startswith(PLACES):
            raise ValueError(f"model_args {shortened(name)}, which says what to read and not what to build")
        if not _small(value, 3):
            raise ValueError(f"model_args {shortened(name)} {told(value)}, more than any network has")


def check_preprocessing(said: Mapping[str, Any]) -> None:
    """Check what is used of a timm configuration that a file states; entries that are absent or null are fine.

    Args:
        said: `pretrained_cfg`, or the flat form of older files.

    Raises:
        ValueError: a value of the wrong kind or size, with what was expected.
    """
    for key, (fits, expected) in _EXPECTED.items():
        value = said.get(key)
        if value is not None and not fits(value):
            raise ValueError(f"{key} {told(value)}; expected {expected}")


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number; true and false are none.

    Args:
        value: anything.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not either


def _numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) in (1, 3) and all(is_number(part) for part in value)


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _size(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(_whole(part, 1, LARGEST_SIDE) for part in value)


def _names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value))


def _small(value: object, depth: int) -> bool:
    if isinstance(value, dict | list) and (depth == 0 or len(value) > LONGEST_LIST):
        return False
    if isinstance(value, dict):
        return all(_small(part, depth - 1) for part in value.values())
    if isinstance(value, list):
        return all(_small(part, depth - 1) for part in value)
    if isinstance(value, str):
        return len(value) <= LONGEST_LIST
    return value is None or isinstance(value, bool) or (is_number(value) and abs(value) <= LARGEST_ARGUMENT)  # type: ignore[arg-type]


_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "input_size": (_size, f"three whole numbers from 1 to {LARGEST_SIDE:,}"),
    "mean": (_numbers, "a list of three numbers, or of one for all colours"),
    "std": (
        lambda value: _numbers(value) and 0 not in value,  # type: ignore[operator]
        "a list of three numbers other than 0, or of one for all colours",
    ),
    "interpolation": (lambda value: isinstance(value, str), "a text"),
    "classifier": (_names, "names of layers"),
    "num_classes": (lambda value: _whole(value, 0, MOST_CLASSES), f"a whole number from 0 to {MOST_CLASSES:,}"),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
}
