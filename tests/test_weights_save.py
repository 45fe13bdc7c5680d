"""Files that are whole or not there, equal bytes for equal content, and folders that timm loads."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors
import safetensors.torch
import timm
import torch

from weights.atomic import write_atomically
from weights.errors import RunError, WeightsError
from weights.load import read_tensors
from weights.save import read_about, save_checkpoint, write_config


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bytes_and_functions_are_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"first")
    write_atomically(tmp_path / "a", b"second")
    write_atomically(tmp_path / "b", lambda file: file.write(b"third"))
    assert (tmp_path / "a").read_bytes() == b"second"
    assert (tmp_path / "b").read_bytes() == b"third"
    assert names_in(tmp_path) == ["a", "b"]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise failure

    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(type(failure)):
        write_atomically(tmp_path / "a", fail)
    assert names_in(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def full(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match=r"^Could not write .*a: No space left on device; free the space or choose"):
        write_atomically(tmp_path / "a", full)
    assert names_in(tmp_path) == []


def test_a_folder_that_is_absent_or_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file or directory"):
        write_atomically(tmp_path / "absent" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="Is a directory"):
        write_atomically(tmp_path / "folder", b"")
    assert names_in(tmp_path) == ["folder"]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{i}.weight": torch.rand(3, 4, generator=generator) for i in range(20)}
    tensors["count"] = torch.tensor(3)
    tensors["half"] = torch.rand(5, generator=generator).bfloat16()
    about = {"arch": "resnet18", "classes": ["ä", "b"], "lr": 0.1, "nested": {"x": 1, "y": [1, 2]}}
    save_checkpoint(tmp_path / "a.safetensors", tensors, about)
    other = dict(reversed(tensors.items()))
    other["layer3.weight"] = other["layer3.weight"].t().contiguous().t()  # same values, other memory layout
    again = {"nested": {"y": [1, 2], "x": 1}, "lr": 0.1, "classes": ["ä", "b"], "arch": "resnet18"}
    save_checkpoint(tmp_path / "b.safetensors", other, again)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    save_checkpoint(tmp_path / "c.safetensors", tensors, {**about, "lr": 0.2})
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "c.safetensors").read_bytes()


def test_a_checkpoint_has_one_metadata_key_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shared = torch.rand(4, 4).to(memory_format=torch.contiguous_format)
    save_checkpoint(path, {"a": shared, "tied": shared, "row": shared[1]}, {"b": 1, "a": ["x"]})
    with safetensors.safe_open(str(path), "pt") as file:
        assert file.metadata() == {"finetune": '{"a":["x"],"b":1}'}
    assert read_about(path) == {"a": ["x"], "b": 1}
    assert torch.equal(safetensors.torch.load_file(path)["row"], shared[1])
    assert torch.equal(read_tensors(path)["tied"], shared)


def test_read_about_of_other_files(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "odd.safetensors", {"finetune": "not json"})
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    assert [read_about(tmp_path / n) for n in ("plain.safetensors", "odd.safetensors", "a.pth")] == [None] * 3
    with pytest.raises(WeightsError, match=r"^There is no weight file at .*b\.pth\.$"):
        read_about(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 64, {}),
        ("test_convnext", 96, {}),
        ("test_vit", 160, {}),
        ("test_vit", 96, {"img_size": 96}),
    ],
)
def test_timm_loads_the_folder_with_the_same_logits(
    tmp_path: Path, name: str, size: int, options: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).eval()
    classes = [f"class {i}" for i in range(10)]
    save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), {"arch": name})
    write_config(
        tmp_path / "config.json",
        arch=name,
        num_classes=10,
        classes=classes,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        interpolation="bilinear",
        input_size=(3, size, size),
    )
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    config = loaded.pretrained_cfg
    assert tuple(config["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(config["input_size"]) == (3, size, size)
    assert (config["crop_pct"], config["interpolation"], config["num_classes"]) == (1.0, "bilinear", 10)
    assert list(config["label_names"]) == classes


def test_model_arguments_and_equal_bytes_of_config(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        write_config(
            tmp_path / name,
            arch="resnet18.a1_in1k",
            num_classes=2,
            classes=["cat", "dög"],
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            interpolation="bicubic",
            input_size=(3, 32, 32),
            crop_pct=0.9,
            model_args={"global_pool": "max"},
        )
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    config = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "resnet18"
    assert config["label_names"] == ["cat", "dög"]
    assert config["model_args"] == {"global_pool": "max"}
    assert not {"url", "tag", "hf_hub_id"} & config["pretrained_cfg"].keys()
