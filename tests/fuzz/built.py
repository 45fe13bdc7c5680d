"""Inputs that are built, not mutated: what hypothesis makes of descriptions of each format, sound or nearly so."""

from __future__ import annotations

import copy
import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from typing import Any

import numpy as np
import tomli_w
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from make_hostile import CLASSES, row_of, summary_of

from finetune.recipe import Recipe, to_table

NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from((2**31, 2**63, -(2**63), 10**18, 1e308))
)
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(("auto", "", "..", "/", "\x1b[31m", "<b>", "fc", "test_resnet")))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8
)
CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 3,
    "label_names": list(CLASSES),
    "pretrained_cfg": {
        "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
        "crop_mode": "center", "classifier": "fc", "fixed_input_size": False, "license": None, "tag": "",
    },
    "model_args": {"img_size": 32},
    "finetune": {"temperature": 1.5, "reason": "fitted"},
}  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, document: dict[str, Any], values: SearchStrategy[Any] = VALUES) -> dict[str, Any]:
    """Draw a document in which up to three entries, at any depth, are others or absent."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        place = found
        key = draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place)))
        if draw(st.integers(0, 4)) == 0 and len(place) > 1:
            del place[key]
        else:
            place[key] = draw(values)
    return found


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


TOML_VALUES = st.recursive(
    st.booleans() | NUMBERS | TEXTS | st.datetimes(), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
ARRAYS = st.builds(
    lambda kind, shape, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(kind),
    st.sampled_from(("u1", ">i4", "i8", "f4", "?", "S3", "O", "M8[s]")),
    st.sampled_from(((0,), (2,), (3072,), (0, 3072), (1, 3072), (2, 3072), (2, 2), (1, 1, 3))),
    st.integers(0, 9),
)
HELD = st.one_of(VALUES, ARRAYS, st.lists(st.integers(0, 3), max_size=3), st.binary(max_size=4))
KEYS = st.sampled_from(
    (b"data", b"fine_labels", b"coarse_labels", b"batch_label", b"fine_label_names", "data", 1, (1, (2,)))
)
PICKLES = st.builds(
    pickle.dumps, st.dictionaries(KEYS, HELD, max_size=5) | VALUES, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL)
)


@st.composite
def _tensors(draw: st.DrawFn) -> Any:
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16)
    made = torch.zeros(draw(st.lists(st.integers(0, 3), max_size=3)), dtype=draw(st.sampled_from(kinds)))
    form = draw(st.integers(0, 7))
    if form == 0 and made.ndim:
        return made.expand(draw(st.sampled_from((1, 2**20, 2**40))), *made.shape)
    if form == 1 and made.dtype == torch.float32:
        return made.to_sparse() if made.ndim else made.to("meta")
    if form == 2 and made.dtype == torch.float32 and made.ndim:
        return torch.quantize_per_tensor(made, 0.1, 0, torch.qint8)
    return torch.nn.Parameter(made) if form == 3 and made.is_floating_point() else made


SAVED = st.recursive(
    _tensors() | PLAIN,
    lambda inner: (
        st.dictionaries(st.sampled_from(("state_dict", "model", "a.weight", "b", 3, "")), inner, max_size=4)
        | st.lists(inner, max_size=3)
    ),
    max_leaves=6,
)


def _saved(value: object, new: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("F32", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "U16", "C64", "X")) | VALUES,
        "shape": st.lists(st.sampled_from((0, 1, 2, 2**31, 2**62)), max_size=3) | VALUES,
        "data_offsets": st.tuples(st.integers(0, 64), st.integers(0, 64)).map(list) | VALUES,
    }
)


def _safetensors(header: object, length: int | None, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADER = st.dictionaries(
    st.sampled_from(("logits", "labels", "shown", "pictures", "a", "__metadata__")), ENTRY | VALUES
)
SAFETENSORS = st.builds(
    _safetensors, HEADER, st.none() | st.sampled_from((0, 1, 2**27, 2**60, 2**64 - 1)), st.binary(max_size=64)
)


def _member(name: str, size: int, kind: bytes, link: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.type, header.linkname = size, kind, link
    try:
        return header.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape") + content
    except (ValueError, UnicodeError, struct.error):
        return content


MEMBERS = st.builds(
    _member,
    st.sampled_from(("train", "a/meta", "test", "../x", "/x", "a" * 200)) | TEXTS,
    st.sampled_from((0, 1, 512, 513, 2**33, 2**62, -1, -512, -(2**40))),
    st.sampled_from((b"0", b"\0", b"1", b"2", b"5", b"L", b"K", b"S", b"x", b"g", b"7", b"3", b"D")),
    st.sampled_from(("", "train", "../../x", "/etc/passwd")),
    st.sampled_from((b"", bytes(512), b"12 path=ab\n" + bytes(501), b"\xff" * 512)),
)

SHARD = st.lists(
    st.builds(
        _member,
        st.sampled_from(("0.png", "0.cls", "1.jpg", "1.cls", "1.json", "a" * 200 + ".png")) | TEXTS,
        st.sampled_from((0, 1, 3, 512, 2**33, -1, -512)),
        st.sampled_from((b"0", b"0", b"0", b"\0", b"1", b"2", b"5", b"L", b"S", b"x", b"g", b"7", b"D")),
        st.sampled_from(("", "0.png", "/etc/passwd")),
        st.sampled_from((b"", b"ant" + bytes(509), b"3" + bytes(511), b"12 size=600\n" + bytes(500), b"\xff" * 512)),
    ),
    max_size=6,
).map(lambda members: b"".join(members) + bytes(1024))


def _png(width: int, height: int, depth: int, colours: int, pixels: bytes, extra: tuple[bytes, bytes]) -> bytes:
    file = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width % 2**32, height % 2**32, depth, colours, 0, 0, 0)
    for kind, content in ((b"IHDR", header), extra, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return file


SIDES = st.sampled_from((0, 1, 8, 300, 2000, 2**16, 2**31 - 1, 2**32 - 1))
PNG = st.builds(
    _png,
    SIDES,
    SIDES,
    st.sampled_from((1, 2, 4, 8, 16, 3)),
    st.sampled_from((0, 2, 3, 4, 6, 1)),
    st.binary(max_size=100),
    st.tuples(
        st.sampled_from((b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"acTL", b"gAMA", b"x")), st.binary(max_size=30)
    ),
)

STRATEGIES: dict[str, SearchStrategy[bytes]] = {
    "safetensors": SAFETENSORS,
    "predictions": SAFETENSORS,
    "torch archive": st.builds(_saved, SAVED, st.just(True)),
    "torch file before 1.6": st.builds(_saved, SAVED, st.just(False)),
    "CIFAR pickle": PICKLES,
    "CIFAR names, pickled": PICKLES,
    "CIFAR binary": st.integers(0, 3).flatmap(lambda images: st.binary(min_size=images * 3073, max_size=images * 3073)),
    "tar.gz": st.lists(MEMBERS, max_size=4).map(lambda members: gzip.compress(b"".join(members) + bytes(1024), 1)),
    "shard": SHARD,
    "image PNG": PNG,
    "recipe.toml": changed(to_table(Recipe()), TOML_VALUES).map(lambda table: tomli_w.dumps(table).encode()),
    "summary.json": changed(summary_of()).map(_json),
    "metrics.jsonl": st.lists(changed(row_of(1)) | VALUES, max_size=3).map(lambda rows: b"\n".join(map(_json, rows))),
    "config.json": changed(CONFIG).map(_json),
    "feature cache": (VALUES | changed({"chunk": 0, "crc32": [1]})).map(_json),
}
"""By the name of the target that reads them."""
