"""Images that do not fit in memory: decoded as they are wanted, they give what images in memory give."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import as_png, make_images, write_image_folder, write_shards, write_tar
from make_run import metrics, model_bytes, tiny_recipe, write_weights
from PIL import Image

from finetune import stream
from finetune.augment import Preprocessing, Views
from finetune.cache import list_entries
from finetune.data import load_data
from finetune.device import prefix_batch
from finetune.evaluate import evaluate
from finetune.events import Events
from finetune.images import ImageSet
from finetune.job import plan_run
from finetune.pipeline import run
from finetune.recipe import Recipe
from finetune.sources import Live, images_sha256
from finetune.stream import LEAST, Decoder, Streamed, blocks, load_splits
from finetune.trained import load_trained
from weights.errors import DataError

TENTH = "180kB"  # of the images of `root` decoded: 600 of 3,072 bytes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and the same 600 images as an image folder and as shards."""
    root = tmp_path_factory.mktemp("streaming")
    made = make_images(560, 40)
    write_image_folder(root / "images", made=made)
    write_shards(root / "shards" / "images", made, each=100)
    write_weights(root / "test_resnet.safetensors")
    return root


def recipe(root: Path, data: str, **settings: Any) -> Recipe:
    made = tiny_recipe(root / data, root / "test_resnet.safetensors", root / "cache", epochs=1)
    return dataclasses.replace(made, **settings)


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[Decoder]:
    """The decoders that are made in a test."""
    made: list[Decoder] = []

    class Noted(Decoder):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(stream, "Decoder", Noted)
    return made


# Whole runs


def test_a_streamed_run_gives_the_model_of_one_in_memory(root: Path, tmp_path: Path, decoders: list[Decoder]) -> None:
    """With a tenth of the memory, of shards and of the folder: the same splits, features and bytes."""
    whole = run(recipe(root, "images"), tmp_path / "memory")
    assert not decoders
    kept = {entry.key for entry in list_entries(root / "cache")}
    assert kept
    shards = run(recipe(root, "shards/images", image_memory=TENTH, cache="ram"), tmp_path / "shards")
    assert model_bytes(tmp_path / "shards") == model_bytes(tmp_path / "memory")
    assert shards["data"] == whole["data"]
    assert shards["test_accuracy"] == whole["test_accuracy"], "the test images are the same, in another order"
    assert 0 < decoders[0].most <= decoders[0].limit == LEAST < 600
    before = len(decoders)
    again = evaluate(load_trained(tmp_path / "shards"), events=Events())
    assert again.as_dict()["loss"] == shards["test_loss"]
    assert len(decoders) > before, "evaluation keeps to the run's --image-memory"

    folder = run(recipe(root, "images", image_memory=TENTH), tmp_path / "folder")
    assert {entry.key for entry in list_entries(root / "cache")} == kept, "the keys are those of images in memory"
    for name in ("model.safetensors", "predictions.safetensors", "config.json"):
        assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    assert metrics(tmp_path / "folder") == metrics(tmp_path / "memory")
    assert folder["test_loss"] == whole["test_loss"]


def test_a_model_that_trains_uncut_streams_in_every_epoch(root: Path, tmp_path: Path, decoders: list[Decoder]) -> None:
    settings = {"train_layers": ("all",), "limit": 40, "augment": "crop"}
    run(recipe(root, "images", **settings), tmp_path / "memory")
    run(recipe(root, "images", **settings, image_memory=TENTH), tmp_path / "streamed")
    assert model_bytes(tmp_path / "streamed") == model_bytes(tmp_path / "memory")
    assert 0 < decoders[0].most <= LEAST


def test_the_plan_says_that_images_are_streamed(root: Path) -> None:
    size = "in memory they would take 1.8 MB, twice while they are split, and --image-memory is 180.0 kB"
    cut = plan_run(recipe(root, "shards/images", image_memory=TENTH, cache="ram"))
    assert f"images: decoded as they are wanted, once for each feature row: {size}" in cut.sentences()
    told = cut.as_dict()["images"]
    assert (told["streamed"], told["bytes"], told["memory"]) == (True, 600 * 3 * 32 * 32, 180_000)
    assert cut.feature_seconds > 1000 / told["rate"], "504 training images in two views, and 96 others"
    off = plan_run(recipe(root, "shards/images", image_memory=TENTH, cache="off"))
    assert f"images: decoded as they are wanted, in every epoch: {size}" in off.sentences()
    plain = plan_run(recipe(root, "shards/images", image_memory="4MB", cache="ram"))
    assert not any(line.startswith("images:") for line in plain.sentences())
    assert plain.as_dict()["images"] == {"streamed": False}


# Rows


def loaded(root: Path, memory: int, **settings: Any) -> ImageSet:
    files = sorted((root / "images").rglob("*.png"))
    labels = [int(file.parent.name[-1]) for file in files]
    classes = ("class_00", "class_01", "class_02", "class_03")
    return load_splits({"train": (files, labels)}, classes, image_size=64, memory=memory, **settings)["train"]


def test_rows_are_those_of_images_in_memory(root: Path) -> None:
    whole, train = loaded(root, 10**9).images, loaded(root, 1).images
    assert isinstance(whole, torch.Tensor)
    assert isinstance(train, Streamed)
    assert (train.shape, len(train)) == (whole.shape, 600)
    rows = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    for some in (rows[:50], torch.tensor([7, 7, 3]), torch.arange(0)):
        assert torch.equal(train[some], whole[some])
    assert torch.equal(train[590:700], whole[590:700])
    part = train.part(rows[:90].numpy())
    assert torch.equal(part[torch.arange(89, -1, -1)], whole[rows[:90].flip(0)])
    assert images_sha256(part) == images_sha256(whole[rows[:90]]) != images_sha256(train)
    assert torch.equal(torch.cat(list(blocks(train, 5, 600, 32))), whole[5:])
    assert [len(block) for block in blocks(train, 0, 150, 32)] == [64, 64, 22], "two batches, of which three fit"
    assert train.decoder.most <= train.decoder.limit


def test_three_batches_of_a_gpu_are_held_whatever_the_memory(root: Path) -> None:
    train, large = loaded(root, 1).images, prefix_batch(torch.device("cuda"))
    assert isinstance(train, Streamed)
    assert [len(block) for block in blocks(train, 0, 600, large)] == [large, large, 600 - 2 * large]
    assert LEAST < train.decoder.most <= train.decoder.limit == 3 * large


def test_batches_that_do_not_fit_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = loaded(root, 1).images
    assert isinstance(train, Streamed)
    monkeypatch.setattr(stream, "free_memory", lambda: 500 * 3 * 32 * 32)
    train.expect(torch.arange(150))
    fewest = "images of 32 x 32 pixels, the fewest that are held at a time, need 0.0 GiB of memory and 0.0 GiB are free"
    with pytest.raises(DataError) as error:
        train.expect(torch.arange(150), torch.arange(160))
    assert str(error.value) == f"480 {fewest}; give a smaller --image-size or --batch-size."
    with pytest.raises(DataError) as error:
        train.block(prefix_batch(torch.device("cuda")))
    assert str(error.value) == f"600 {fewest}; give a smaller --image-size, or --device cpu."
    assert train.decoder.limit == 450, "what fits"


def test_batches_that_were_announced_are_decoded_ahead(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = loaded(root, 1)
    now, coming = torch.arange(0, 40), torch.arange(300, 340)
    decoded: list[Path] = []
    all_there, real = threading.Event(), stream.decode_image

    def noted(file: Path, side: int, *, resize: bool) -> Any:
        image = real(file, side, resize=resize)
        decoded.append(file)
        if len(decoded) == 80:
            all_there.set()
        return image

    monkeypatch.setattr(stream, "decode_image", noted)
    plain = Preprocessing(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear")
    source = Live(train, Views("none", 1), plain, None, torch.device("cpu"), torch.float32)
    source.expect(now, coming)
    first = source.take(now, torch.zeros_like(now))[0]
    assert all_there.wait(60), "the coming batch is decoded though nobody has asked for it"
    assert torch.equal(source.take(coming, torch.zeros_like(coming))[0], plain(train.images[coming]))
    assert len(first) == 40
    source.expect(now, coming)
    source.expect(coming)  # what is not expected any more is given up
    assert torch.equal(train.images[now], loaded(root, 10**9).images[now])


# What changes on the way


def test_a_file_that_changes_is_named(tmp_path: Path) -> None:
    made = make_images(8, 0)
    write_image_folder(tmp_path / "images", made=made)
    train = load_data(str(tmp_path / "images"), image_memory=1, val_fraction=0).train
    file = tmp_path / "images" / "train" / "class_00" / "00000.png"
    Image.fromarray(made.train[0].transpose(1, 2, 0) ^ 1).save(file)
    with pytest.raises(DataError) as error:
        train.images[:]
    assert str(error.value) == (
        f"{file} has changed since this command began; leave the data as they are, and start it again."
    )
    file.unlink()
    with pytest.raises(DataError, match=r"00000\.png cannot be read any more \(No such file or directory\); bring"):
        train.images[:]


def test_a_shard_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    made = make_images(4, 0)
    write_shards(tmp_path, made)
    train = load_data(str(tmp_path), image_memory=1, val_fraction=0).train
    with (tmp_path / "train-000000.tar").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(DataError, match=r"000\.tar: 00000\d\.png cannot be read any more \(the shard has become short"):
        train.images[:]


def test_one_size_or_another(tmp_path: Path) -> None:
    """One image of another size changes the size of all, streamed or not."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 20, 20)).astype(np.uint8)
    samples = {f"{n}.png": as_png(image) for n, image in enumerate(pixels)}
    samples |= {f"{n}.cls": str(n % 2).encode() for n in range(40)}
    samples["4.png"] = as_png(pixels[4, :, :, :18])  # not among those that are looked at before decoding
    write_tar(tmp_path / "train.tar", samples)
    sets = [load_data(str(tmp_path), image_size=24, image_memory=memory, val_fraction=0) for memory in (None, 1)]
    assert sets[0].sha256 == sets[1].sha256
    assert sets[1].train.images.shape == (40, 3, 24, 24)
    assert torch.equal(sets[0].train.images[:], sets[1].train.images[:])
