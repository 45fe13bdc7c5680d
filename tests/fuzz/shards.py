"""Shards as a stranger packs them: tar files whose checksums fit, and names of classes beside them."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import cast

from fuzz.place import Place, Target, require
from make_data import as_png, make_images

from finetune.decode import decode_image, reason_of
from finetune.samples import list_samples
from finetune.shards import ShardSet, find_shards

FORMATS = {"GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
WORDS = (b"\0" * 12, b"\x80", b"\xff", b"7777777", b".png", b".cls", b"GNU.sparse.size=9", b"L", b"S", b"x", b"g")


def shard_targets(place: Place) -> list[Target]:
    """Return the targets, reading and writing in `place`."""
    picture = as_png(make_images(1, 0, size=4).train[0])
    folder = "long/" * 30
    samples = {"0.png": picture, "0.cls": b"0", f"{folder}1.png": picture, f"{folder}1.json": b'{"label": 1}'}
    for name, kind in FORMATS.items():
        with tarfile.open(place.folder / f"{name}.tar", "w", format=kind, pax_headers={"comment": "for all"}) as tar:
            for member, content in samples.items():
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    seeds = [(place.folder / f"{name}.tar").read_bytes() for name in FORMATS]
    beside = place.folder / "shards"
    beside.mkdir()
    shutil.copy(place.folder / "pax.tar", beside / "train-0.tar")

    def read(path: Path) -> None:
        found = find_shards(path)
        require(found is not None, "a shard that is none")
        listed = list_samples(cast(ShardSet, found))
        for images, labels in listed.splits.values():
            require(len(images) == len(labels) and all(0 <= one < len(listed.classes) for one in labels), "labels")
            for image in images[:4]:
                require(0 <= image.offset <= image.offset + image.size <= image.tar.stat().st_size, "a member's place")
                try:
                    decode_image(image, 8)
                except Exception as error:  # as whoever decodes expects of Pillow
                    require(bool(reason_of(image, error)), "an image without pixels and without a reason")

    def classes(content: bytes) -> None:
        (beside / "classes.txt").write_bytes(content)
        read(beside)

    return [
        Target("shard", seeds, lambda content: read(place.file("train.tar", _with_checksums(content))), WORDS),
        Target("shard classes", [b"ant\nbee\n"], classes, (b"\n", b"\r", b"\xff", b"\0", b"ant", b"\xe2\x80\xa8")),
    ]


def _with_checksums(content: bytes) -> bytes:
    """Return a tar file whose headers have the checksums that fit: with others no reader gets beyond the first."""
    blocks = [bytearray(content[start : start + 512]) for start in range(0, len(content), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and len(block) == 512:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)
