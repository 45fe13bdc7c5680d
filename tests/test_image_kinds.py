"""Images as people have them: what each kind of file becomes, pixel by pixel; and how many are decoded at once."""

from __future__ import annotations

import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from make_data import make_images, write_class_folders, write_image_folder
from numpy.typing import NDArray
from PIL import Image

from finetune import decode
from finetune.decode import decode_image, to_rgb
from finetune.folder import read_folder
from finetune.stream import load_splits


def save(path: Path, colour: object = (10, 20, 30), *, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]


def decoded(path: Path, side: int) -> NDArray[np.uint8]:
    """Decode one image that is there: uint8 (3, side, side)."""
    pixels = decode_image(path, side)
    assert pixels is not None
    assert pixels.shape == (3, side, side)
    assert pixels.dtype == np.uint8
    return pixels


# Sizes


def test_images_of_one_size_keep_it(tmp_path: Path) -> None:
    write_image_folder(tmp_path, 40, 0, size=20)
    assert read_folder(tmp_path, image_size=224).train.images.shape == (40, 3, 20, 20)
    assert read_folder(tmp_path, image_size=16).train.images.shape == (40, 3, 16, 16)


def test_one_image_of_another_size_resizes_all(tmp_path: Path) -> None:
    made = make_images(200, 0, classes=2, size=8)
    write_class_folders(tmp_path, made.train, made.train_labels, made.classes)
    odd = tmp_path / "class_00" / "00002.png"  # not among the images that are looked at first
    save(odd, size=(12, 30))
    calls: list[tuple[str, int, int]] = []
    raw = read_folder(tmp_path, image_size=24, progress=lambda *call: calls.append(call))
    assert raw.train.images.shape == (200, 3, 24, 24)
    assert raw.train.images[1].float().mean(dim=(1, 2)).tolist() == [10, 20, 30]
    assert calls[-1] == ("decode", 200, 200)


def test_the_centre_square_is_kept(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    image.save(tmp_path / "wide.png")
    pixels = decoded(tmp_path / "wide.png", 20)
    assert pixels.reshape(3, -1).max(axis=1).tolist() == [0, 0, 255]
    small = decoded(tmp_path / "wide.png", 10)
    assert (small[2, :, 1:-1] == 255).all()


def test_large_jpegs_shrink_without_aliasing(tmp_path: Path) -> None:
    checks = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "checks.jpg", quality=95)
    pixels = decoded(tmp_path / "checks.jpg", 32)
    assert abs(pixels.astype(int) - 128).max() <= 12


def test_a_very_large_photo(tmp_path: Path) -> None:
    photo = Image.new("RGB", (6000, 4000), "blue")
    photo.paste("red", (0, 0, 3000, 4000))
    photo.save(tmp_path / "large.jpg")
    pixels = decoded(tmp_path / "large.jpg", 32).astype(int)
    assert np.abs(pixels[:, :, :15] - np.array([254, 0, 0])[:, None, None]).max() <= 3
    assert np.abs(pixels[:, :, 17:] - np.array([0, 0, 254])[:, None, None]).max() <= 3


def test_a_single_pixel(tmp_path: Path) -> None:
    save(tmp_path / "dot.png", size=(1, 1))
    pixels = decoded(tmp_path / "dot.png", 24)
    assert (pixels == np.array([10, 20, 30])[:, None, None]).all()


def test_a_long_strip_is_not_blown_up_whole(tmp_path: Path) -> None:
    strip = Image.new("RGB", (1, 50_000), "white")  # whole, at side 224, it would take 10 GB
    strip.paste((0, 200, 0), (0, 24_900, 1, 25_100))
    strip.save(tmp_path / "strip.png")
    pixels = decoded(tmp_path / "strip.png", 224)
    assert (pixels == np.array([0, 200, 0])[:, None, None]).all()


def test_cropping_a_strip_first_changes_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 400, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    whole = Image.fromarray(noise).resize((160, 16), Image.Resampling.BILINEAR).crop((72, 0, 88, 16))
    assert (decoded(tmp_path / "wide.png", 16).transpose(1, 2, 0) == np.asarray(whole)).all()


# Kinds


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("I;16", 0xFFFF, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: object, expected: tuple[int, int, int]) -> None:
    save(tmp_path / "image.png", colour, mode=mode)
    pixels = decoded(tmp_path / "image.png", 8)
    assert tuple(pixels[:, 3, 3].tolist()) == expected


def test_palettes_and_their_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    image.save(tmp_path / "bytes.png", transparency=b"\x00\xff")
    for name, left in (("plain", [0, 0, 0]), ("clear", [255, 255, 255]), ("bytes", [255, 255, 255])):
        pixels = decoded(tmp_path / f"{name}.png", 8)
        assert pixels[:, 0, 0].tolist() == left
        assert pixels[:, 0, 7].tolist() == [10, 200, 30]


def test_cmyk_jpeg_and_webp(tmp_path: Path) -> None:
    save(tmp_path / "print.jpg", (0, 255, 255, 0), mode="CMYK")
    pixels = decoded(tmp_path / "print.jpg", 8)
    assert np.abs(pixels[:, 0, 0].astype(int) - [255, 0, 0]).max() <= 8
    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / "image.webp", lossless=True)
    pixels = decoded(tmp_path / "image.webp", 8)
    assert pixels[:, 0, 0].tolist() == [10, 200, 30]


def test_wide_integers_count_as_16_bit() -> None:
    assert to_rgb(Image.new("I", (2, 2), 257 * 100)).getpixel((0, 0)) == (100, 100, 100)
    assert to_rgb(Image.new("I;16B", (2, 2), 257 * 100)).getpixel((0, 0)) == (100, 100, 100)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point pixels have no agreed range"):
        to_rgb(Image.new("F", (8, 8), 0.5))


def png16(path: Path, colour: tuple[int, int, int], *, size: int = 8) -> None:
    """Write a PNG of three channels with 16 bits each, which Pillow reads but does not write."""
    row = b"\0" + struct.pack(">3H", *colour) * size
    file = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", size, size, 16, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(row * size)), (b"IEND", b"")):
        file += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(file)


def test_colours_of_16_bits(tmp_path: Path) -> None:
    png16(tmp_path / "deep.png", (257 * 10, 257 * 200, 257 * 30))
    assert decoded(tmp_path / "deep.png", 8)[:, 3, 3].tolist() == [10, 200, 30]


def test_the_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / "image.png", "WEBP", lossless=True)
    assert decoded(tmp_path / "image.png", 8)[:, 0, 0].tolist() == [10, 200, 30]


def test_a_moving_picture_is_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert decoded(tmp_path / "moving.gif", 8)[:, 3, 3].tolist() == [255, 0, 0]


# EXIF

# By orientation, how a camera stores what stands upright: (H, W, 3) to (H, W, 3), or to (W, H, 3) from 5 on.
STORED = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: np.rot90,
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image, -1),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_every_exif_orientation(tmp_path: Path, suffix: str) -> None:
    upright = np.zeros((64, 96, 3), dtype=np.uint8)
    upright[:32, :48], upright[:32, 48:], upright[32:, :48] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    for orientation, stored in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored(upright))).save(tmp_path / f"turned{suffix}", exif=exif)
        pixels = decoded(tmp_path / f"turned{suffix}", 16).astype(int)
        corners = [pixels[:, row, column] for row, column in ((3, 3), (3, 12), (12, 3), (12, 12))]
        expected = [[250, 0, 0], [0, 250, 0], [0, 0, 250], [0, 0, 0]]
        assert np.abs(np.array(corners) - expected).max() <= 12, orientation


def test_a_photo_is_turned_though_its_exif_is_odd(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    odd = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")  # an image width that is text
    assert odd != exif.tobytes()
    image = Image.new("RGB", (16, 16), "blue")
    image.paste("red", (0, 0, 8, 16))  # what is left when stored is above when shown
    image.save(tmp_path / "odd.png", exif=odd)
    pixels = decoded(tmp_path / "odd.png", 16)
    assert pixels[:, 2, 8].tolist() == [255, 0, 0]
    assert pixels[:, 13, 8].tolist() == [0, 0, 255]


# Many


def test_hundreds_of_classes_of_single_pixels(tmp_path: Path) -> None:
    for number in reversed(range(300)):
        save(tmp_path / "train" / f"{number}" / "a.png", (number % 256, number // 256, 7), size=(1, 1))
    raw = read_folder(tmp_path, image_size=224)
    assert raw.train.classes == tuple(sorted(str(number) for number in range(300)))
    assert raw.train.images.shape == (300, 3, 1, 1)
    shown = [red + 256 * green for red, green, _ in raw.train.images.flatten(1).tolist()]
    assert [str(number) for number in shown] == [raw.train.classes[label] for label in raw.train.labels.tolist()]


def test_images_are_decoded_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)

    def fake(path: Path, side: int, *, resize: bool) -> NDArray[np.uint8]:
        if path.stem in ("0", str(decode.CHUNK)):
            together.wait(timeout=60)  # the first images of two chunks: neither goes on without the other
        return np.full((3, side, side), int(path.stem), dtype=np.uint8)

    monkeypatch.setattr(decode, "decode_image", fake)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    calls: list[tuple[str, int, int]] = []
    count = 2 * decode.CHUNK + 5
    files = [tmp_path / f"{n}.png" for n in range(count)]
    made = load_splits({"train": (files, [0] * count)}, ("a",), image_size=4, progress=lambda *call: calls.append(call))
    assert made["train"].images[:][:, 0, 0, 0].tolist() == list(range(count))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1] == ("decode", count, count)
    assert len(calls) == 3


class Interrupted(Exception):
    """What a test's progress callable raises."""


def test_an_interruption_does_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []

    def fake(path: Path, side: int, *, resize: bool) -> NDArray[np.uint8]:
        begun.append(path)
        time.sleep(0.001)
        return np.zeros((3, side, side), dtype=np.uint8)

    def interrupt(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(decode, "decode_image", fake)
    files = [tmp_path / f"{number}.png" for number in range(100 * decode.CHUNK)]
    with pytest.raises(Interrupted):
        load_splits({"train": (files, [0] * len(files))}, ("a",), image_size=4, progress=interrupt)
    assert len(begun) < len(files) / 2
