"""Tar shards of strangers: what is no plain file, what leads elsewhere, and what would take all memory or time."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from make_data import as_png, make_images, write_tar

from finetune import decode
from finetune.data import read_data
from finetune.folder import FOLLOW
from finetune.tar import index_tar
from weights.errors import DataError

PNG = as_png(make_images(1, 0, size=4).train[0])
TWO = {"0.png": PNG, "0.cls": b"ant", "1.png": PNG, "1.cls": b"bee"}
END = bytes(1024)
PLAIN = "not a plain file; write this shard again with plain files"


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_data(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def header(
    name: str, size: int = 0, *, kind: bytes = tarfile.REGTYPE, at: int | None = None, content: bytes = b""
) -> bytes:
    """Return the header of a member, with other content at a place, and a checksum that fits."""
    info = tarfile.TarInfo(name)
    info.type = kind
    made = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    made[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else b"%011o\0" % size
    if at is not None:
        made[at : at + len(content)] = content
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


def pax(kind: bytes = tarfile.XHDTYPE, **values: str) -> bytes:
    """Return a header of pax records."""
    lines = [f"{key}={value}\n" for key, value in values.items()]
    content = "".join(f"{len(line) + 4:03d} {line}" for line in lines).encode()
    return header("pax", len(content), kind=kind) + content + bytes(-len(content) % 512)


def test_only_plain_members_are_read(tmp_path: Path) -> None:
    """A link is no image, wherever it leads, and an absolute name is a name like others."""
    shard = tmp_path / "train.tar"
    write_tar(shard, {"/etc/0.png": PNG, "/etc/0.cls": b"ant", "../1.png": PNG, "../1.cls": b"bee"})
    members = shard.read_bytes().rstrip(b"\0")
    members += bytes(-len(members) % 512)
    shard.write_bytes(
        members + header("readme.txt", kind=tarfile.SYMTYPE) + header("2.png", kind=tarfile.DIRTYPE) + END
    )
    assert len(read_data(str(shard)).train) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["train.tar"]
    for name, kind, words in (
        ("2.png", tarfile.LNKTYPE, f"a hard link, {PLAIN} (GNU tar: --hard-dereference)."),
        ("2.cls", tarfile.SYMTYPE, f"a symbolic link, {PLAIN} (GNU tar: --dereference)."),
        ("2.png", tarfile.GNUTYPE_SPARSE, f"a sparse file, {PLAIN} (GNU tar: without --sparse)."),
        ("2.png", tarfile.FIFOTYPE, f"a named pipe, {PLAIN}."),
        ("2.png", tarfile.BLKTYPE, f"a device, {PLAIN}."),
    ):
        # at 483 stands what a sparse file has when its holes are filled: more than the shard
        shard.write_bytes(members + header(name, kind=kind, at=483, content=b"77777777777\0") + END)
        assert refused(shard) == f"{shard}: {name} is {words}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            header("0.png") + header("1.png") + header("x", -1024, kind=tarfile.GNUTYPE_SPARSE),
            "is damaged or cut short after 1.png (",
        ),
        (
            header("long", 2**16, kind=tarfile.GNUTYPE_LONGNAME) + b"a" * 2**16 + header("0.png"),
            "is no tar file, or damaged at its start (the headers of one member have more than 32,768 bytes)",
        ),
        (
            header("0.png")
            + header("x", kind=tarfile.GNUTYPE_SPARSE, at=482, content=b"\1")
            + (bytes(504) + b"\1" + bytes(7)) * 65,
            "is damaged or cut short after 0.png (",
        ),
        (
            header("0.png") + header("x", 1024, kind=tarfile.XHDTYPE) + b"1" * 1024 + header("1.png"),
            "is damaged or cut short after 0.png (a header holds a number of very many digits)",
        ),
        (
            pax(tarfile.XGLTYPE, **{f"k{number:03d}": "v" for number in range(101)}) + header("0.png"),
            "is no tar file, or damaged at its start (more than 100 records of one header hold for all members)",
        ),
        (
            pax(**{"GNU.sparse.realsize": "600"}) + header("0.png", 512) + bytes(512) + header("1.png"),
            "is no tar file, or damaged at its start (0.png claims 600 bytes, which do not follow)",
        ),
    ],
    ids=["backwards", "long name", "map without end", "digits", "records", "overlap"],
)
def test_headers_that_would_take_all_memory_or_time(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "train.tar").write_bytes(content)
    asked: list[str] = []

    def wanted(name: str) -> bool:
        asked.append(name)
        if len(asked) > 9:
            pytest.fail("it goes round and round")
        return True

    with pytest.raises(DataError) as error:
        index_tar(tmp_path / "train.tar", wanted)
    assert str(error.value).startswith(f"{tmp_path}/train.tar {words}")


def test_members_and_image_files_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "train.tar", TWO)
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(PNG)
    monkeypatch.setattr(decode, "LARGEST_IMAGE", len(PNG) - 1)
    words = f"1.png (it has {len(PNG)} bytes, and such a file may have {len(PNG) - 1}); replace or remove them."
    assert refused(tmp_path / "train.tar").endswith(f", {tmp_path}/train.tar: {words}")
    assert refused(tmp_path / "photos").endswith(f", {tmp_path}/photos/bee/{words}")


def test_links_among_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, elsewhere = tmp_path / "shards", tmp_path / "elsewhere"
    for folder in (shards, elsewhere):
        folder.mkdir()
        write_tar(folder / "train-0.tar", TWO)
    (elsewhere / "classes.txt").write_text("ant\nbee\n")
    (shards / "readme.txt").symlink_to(elsewhere / "classes.txt")  # is not opened
    (tmp_path / "link").symlink_to(shards)
    (tmp_path / "link.tar").symlink_to(shards / "train-0.tar")
    for name in ("link", "link.tar"):
        assert len(read_data(str(tmp_path / name)).train) == 2
    link = shards / "classes.txt"
    link.symlink_to(elsewhere / "classes.txt")
    words = f"{link} is a link that leads out of {shards}; expected a folder that holds its own files, so copy what it"
    assert refused(shards).startswith(words)
    assert refused(shards / "train-0.tar").startswith(words)
    link.unlink()
    (shards / "test-0.tar").symlink_to(elsewhere / "train-0.tar")
    assert refused(shards).startswith(f"{shards}/test-0.tar is a link that leads out of {shards}; expected")
    monkeypatch.setenv(FOLLOW, "1")
    assert len(read_data(str(shards)).train) == 2
