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
    """Return the multiple of a parameter: that of the name which says most exactly where it is.

    Args:
        parameter: its name in the model, such as `layer1.shortcut.weight`.
        scales: of `parse_scales`. A name is one part or several in a row: `layer1`, `shortcut`, `layer1.shortcut`. Of
            several that stand in a parameter's name the one counts that ends last, and of these the longest.
    """
    ends = {name: end for name in scales if (end := _end_in(name, parameter))}
    return scales[max(ends, key=lambda name: (ends[name], len(name)))] if ends else 1.0


def scales_in(texts: Sequence[str], trained: Iterable[str]) -> tuple[str, ...]:
    """Return those of the texts whose name has a parameter that trains.

    Args:
        texts: such as "layer3=0.1"; `parse_scales` has taken them.
        trained: names of the parameters that train.
    """
    parameters = list(trained)
    named = zip(texts, parse_scales(texts), strict=True)
    return tuple(text for text, name in named if any(_end_in(name, parameter) for parameter in parameters))


def _end_in(name: str, parameter: str) -> int:
    """Return where the parts of a name end in a parameter's name, 0 where they do not stand in it."""
    place = f".{parameter}.".rfind(f".{name}.")
    return place + len(name) + 1 if place >= 0 else 0


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
        if not any(_end_in(name, parameter) for parameter in parameters):
            parts = sorted({part for parameter in parameters for part in parameter.split(".")})
            layers = list(dict.fromkeys(parameter.partition(".")[0] for parameter in parameters))
            near = near_matches(name, parts) or "."
            raise UsageError(
                f"--lr-scales names '{name}', and nothing that trains is called so{near} What trains lies in "
                f"{', '.join(layers[:8])}; --head-lr-scale is for the head, whatever its name."
            )
