"""Inputs that are nearly sound: a seed, changed in a few places. Equal seeds of the generator give equal inputs."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

LONGEST = 1 << 17  # bytes of an input: a quarter of a million of them is one second of copying
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**64 - 1)


def mutated(generator: random.Random, corpus: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """Return one of the corpus with one to eight changes.

    Args:
        generator: decides everything.
        corpus: inputs to begin with.
        words: pieces that suit the format.
    """
    content = bytearray(generator.choice(corpus))
    for _ in range(1 << generator.randrange(4)):
        _change(generator, content, corpus, words)
    return bytes(content[:LONGEST])


def _change(generator: random.Random, content: bytearray, corpus: Sequence[bytes], words: Sequence[bytes]) -> None:
    """Make one change, of a kind that is chosen evenly."""
    size = len(content)
    place = generator.randrange(size + 1)
    end = min(size, place + (1 << generator.randrange(8)))
    kind = generator.randrange(10)
    if kind == 0 and place < size:  # a bit
        content[place] ^= 1 << generator.randrange(8)
    elif kind == 1 and place < size:  # a byte
        content[place] = generator.randrange(256)
    elif kind == 2:  # a number, in either order of bytes
        form = generator.choice("<>") + generator.choice("BHIQ")
        number = generator.choice(NUMBERS) % (1 << 8 * struct.calcsize(form))
        content[place : place + struct.calcsize(form)] = struct.pack(form, number)
    elif kind == 3:  # left out
        del content[place:end]
    elif kind == 4:  # twice
        content[place:place] = content[place:end] * generator.randrange(1, 5)
    elif kind == 5 and words:  # a word instead
        content[place:end] = generator.choice(words)
    elif kind == 6 and words:  # a word between
        content[place:place] = generator.choice(words)
    elif kind == 7:  # a part of another input
        other = generator.choice(corpus)
        start = generator.randrange(len(other) + 1)
        content[place:end] = other[start : start + (1 << generator.randrange(10))]
    elif kind == 8:  # a decimal number, where there is one
        digits = str(generator.choice((*NUMBERS, -1, 10**30))).encode()
        numbers = [at for at in range(size) if content[at : at + 1].isdigit()]
        at = generator.choice(numbers) if numbers else place
        content[at : at + 1] = digits
    elif generator.randrange(4) == 0:  # the rest is missing
        del content[place:]
