"""docs/troubleshooting.md quotes the program: every message stands in the source, up to the values in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cli", "finetune", "weights")
LITERAL = 14  # characters of a message that the source has to bring itself; the rest may be values


def quoted(page: str) -> list[str]:
    """Return the messages on a page, each on one line and without what is printed before all errors."""
    blocks = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    return [" ".join(block.split()).removeprefix("Error: ") for block in blocks]


def templates(source: str) -> Iterator[list[str]]:
    """Yield every text in a module as what stands between its values; a text without values is one piece."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            pieces = [""]
            for part in node.values:
                if isinstance(part, ast.Constant):
                    pieces[-1] += str(part.value)
                else:
                    pieces.append("")
            yield pieces
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [node.value]


def stands_in(message: str, sources: list[list[str]]) -> bool:
    """Say whether one of the texts is this message, whatever the values."""
    return any(sum(map(len, pieces)) >= LITERAL and fits(message, pieces) for pieces in sources)


def fits(message: str, pieces: list[str]) -> bool:
    """Say whether the pieces follow each other in the message, the first at its start and the last at its end."""
    if len(pieces) == 1:
        return message == pieces[0]
    position = len(pieces[0]) if message.startswith(pieces[0]) else -1
    for piece in pieces[1:-1]:
        found = message.find(piece, position) if position >= 0 else -1
        position = found + len(piece) if found >= 0 else -1
    return position >= 0 and len(message) - len(pieces[-1]) >= position and message.endswith(pieces[-1])


@pytest.fixture(scope="module")
def sources() -> list[list[str]]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [pieces for file in files for pieces in templates(file.read_text(encoding="utf-8"))]


def test_every_quoted_message_stands_in_the_source(sources: list[list[str]]) -> None:
    messages = quoted((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(messages) > 40
    assert [message for message in messages if not stands_in(message, sources)] == []


def test_a_message_that_nothing_prints_is_noticed(sources: list[list[str]]) -> None:
    assert stands_in("--optimizer is 'sdg'; did you mean sgd? It can be sgd, adam, adamw.", sources)
    assert not stands_in("--optimizer is 'sdg'; did you mean sgd? It may be sgd, adam, adamw.", sources)
    assert not stands_in("W holds 2 files for resnet18: a.pth and b.pth; choose one with --weights FILE.", sources)
