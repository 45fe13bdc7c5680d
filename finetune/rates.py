"""Learning rates of single layers, as multiples of what they would have: `--lr-scales layer3=0.1,fc=2`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weights.errors import UsageError, near_matches


def parse_scales(texts: Sequence[str]) -> dict[str, float]:
    """Return the multiple of each name from texts such as "layer3=0.1".

    Raises:
        UsageError: a text of another form, a multiple that is no number above 0, or a name that comes twice.
    """
    scales: dict[str, float] = {}
    for text in texts:
        name, equals, number = (part.strip() for part in text.partition("="))
        try:
            scale = float(number)
        except ValueError:
            scale = 0.0
        if not name or not equals or not 0 < scale < float("inf"):
            raise UsageError(f"--lr-scales has '{text}'; give a layer and a number above 0, such as layer3=0.1.")
        if name in scales:
            raise UsageError(f"--lr-scales names '{name}' twice; give it one number.")
        scales[name] = scale
    return scales


def scale_of(parameter: str, scales: Mapping[str, float]) -> float:
    """Return the multiple of a parameter: of all names that stand in its own, the one with the most parts.

    Args:
        parameter: its name in the model, such as `layer1.shortcut.weight`.
        scales: of `parse_scales`. A name is one part or several in a row: `layer1`, `shortcut`, `layer1.shortcut`.
    """
    held = [name for name in scales if _stands_in(name, parameter)]
    return scales[max(held, key=lambda name: (name.count("."), name))] if held else 1.0


def _stands_in(name: str, parameter: str) -> bool:
    return f".{name}." in f".{parameter}."


def require_scaled(scales: Mapping[str, float], trained: Iterable[str]) -> None:
    """Check that every name has a parameter that trains.

    Args:
        scales: of `parse_scales`.
        trained: names of the parameters that train.

    Raises:
        UsageError: one has none.
    """
    parameters = list(trained)
    for name in scales:
        if not any(_stands_in(name, parameter) for parameter in parameters):
            parts = {part for parameter in parameters for part in parameter.split(".")}
            near = near_matches(name, sorted(parts)) or "."
            raise UsageError(
                f"--lr-scales names '{name}', and nothing that trains is called so{near} Give a layer that trains, or "
                "part of its name, as finetune layers ARCH lists them."
            )
