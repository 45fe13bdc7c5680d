"""Where weights are found: local folders, Hugging Face snapshots, the caches, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from weights.arch import resolve_arch
from weights.errors import WeightsError
from weights.locate import Found, locate

RESNET = resolve_arch("resnet18")


@pytest.fixture(autouse=True)
def empty_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty torch hub and Hugging Face caches, and no model directory in the environment."""
    home = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("TORCH_HOME", str(home / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.delenv("FINETUNE_WEIGHTS", raising=False)
    return home


def put(folder: Path, *names: str) -> Path:
    """Make files that only have to exist."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights")
    return folder


def snapshot(folder: Path, architecture: str = "resnet18", tag: str = "", **config: object) -> Path:
    """Make a folder as `save_for_hf` does, without real weights."""
    put(folder, "model.safetensors")
    own = {"mean": [0.1, 0.2, 0.3], "input_size": [3, 64, 64], "url": "elsewhere", **config}
    if tag:
        own["tag"] = tag
    text = json.dumps({"architecture": architecture, "num_classes": 7, "pretrained_cfg": own})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def offline(weights: str = "auto", weights_dir: Path | None = None, arch: str = "resnet18") -> Found:
    return locate(resolve_arch(arch), weights, weights_dir, download=False)


def test_none_is_no_file() -> None:
    assert locate(RESNET, "none") == Found(None, RESNET, "none")


@pytest.mark.parametrize(
    "name",
    [
        "resnet18.safetensors",
        "resnet18.pth",
        "resnet18-f37072fd.pth",
        "resnet18-imagenet-layer1-3.safetensors",
        "resnet18.tv_in1k.pt",
        "resnet18.something.bin",
        "resnet18.ckpt",
        "resnet18-best.pth.tar",
    ],
)
def test_fitting_names_in_a_folder(tmp_path: Path, name: str) -> None:
    others = ("resnet18d.pth", "resnet181.pth", "xresnet18.pth", "resnet18_old.pth", "resnet18.txt", "resnet18.md")
    put(tmp_path, name, *others)
    for found in (offline(str(tmp_path)), offline(weights_dir=tmp_path)):
        assert found == Found(tmp_path / name, RESNET, f"local file {name}")


def test_environment_names_the_folder_and_the_option_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a", "resnet18.pth")
    put(tmp_path / "b", "resnet18.pt")
    monkeypatch.setenv("FINETUNE_WEIGHTS", str(tmp_path / "a"))
    assert offline().path == tmp_path / "a" / "resnet18.pth"
    assert offline(weights_dir=tmp_path / "b").path == tmp_path / "b" / "resnet18.pt"
    monkeypatch.setenv("FINETUNE_WEIGHTS", str(tmp_path / "absent"))
    with pytest.raises(
        WeightsError, match=r"^\$FINETUNE_WEIGHTS names .*absent, which is not a folder; give one that is\.$"
    ):
        offline()


@pytest.mark.parametrize("pair", [("resnet18.pth", "resnet18.safetensors"), ("resnet18-a.pth", "resnet18-b.pth")])
def test_two_candidates_are_an_error_that_lists_both(tmp_path: Path, pair: tuple[str, str]) -> None:
    put(tmp_path, *pair)
    message = f"holds 2 files for resnet18.tv_in1k: {pair[0]} and {pair[1]}; name one with --weights FILE\\.$"
    with pytest.raises(WeightsError, match=message):
        offline(str(tmp_path))
    with pytest.raises(WeightsError, match=message):
        offline(weights_dir=tmp_path)


def test_the_full_name_goes_before_the_plain_one(tmp_path: Path) -> None:
    put(tmp_path, "resnet18.pth", "resnet18.tv_in1k.safetensors")
    assert offline(str(tmp_path)).path == tmp_path / "resnet18.tv_in1k.safetensors"


def test_a_folder_without_fitting_files_lists_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, "resnet50.pth", "notes.txt")
    with pytest.raises(WeightsError) as error:
        offline(str(tmp_path))
    assert "Found no weights for resnet18.tv_in1k in" in str(error.value)
    assert "looked for resnet18.*, resnet18-*.*" in str(error.value)
    assert str(error.value).endswith("it holds notes.txt, resnet50.pth.")


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist; expected auto, none, a file or a folder"):
        offline(str(tmp_path / "absent.pth"))
    with pytest.raises(WeightsError, match=r"^--weights-dir names .*, which is not a folder; give one that is\.$"):
        offline(weights_dir=tmp_path / "absent")


def test_a_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    put(tmp_path, "mine.bin")
    assert offline(str(tmp_path / "mine.bin")) == Found(tmp_path / "mine.bin", RESNET, "local file mine.bin")


@pytest.mark.parametrize("name", ["resnet18.a1_in1k.safetensors", "resnet18-a1_in1k.pth"])
def test_another_tag_is_left_alone_by_auto_and_named(tmp_path: Path, name: str) -> None:
    put(tmp_path, name)
    with pytest.raises(WeightsError, match=f"it holds {name}, of another tag than tv_in1k"):
        offline(weights_dir=tmp_path)
    assert offline(weights_dir=tmp_path, arch="resnet18.a1_in1k").path == tmp_path / name


def test_another_tag_pointed_at_brings_its_preprocessing(tmp_path: Path) -> None:
    put(tmp_path, "resnet18.a1_in1k.pth")
    for weights in (str(tmp_path), str(tmp_path / "resnet18.a1_in1k.pth")):
        arch = offline(weights).arch
        assert (arch.full_name, arch.config["interpolation"]) == ("resnet18.a1_in1k", "bicubic")
        message = "holds weights of resnet18.a1_in1k, not of resnet18.tv_in1k: give --arch resnet18.a1_in1k"
        with pytest.raises(WeightsError, match=message):
            offline(weights, arch="resnet18.tv_in1k")


def test_the_published_file_of_another_tag_counts_as_that_tag(tmp_path: Path) -> None:
    put(tmp_path, "resnet50-11ad3fa6.pth")  # torchvision's second version, whose preprocessing differs
    with pytest.raises(WeightsError, match="of another tag than tv_in1k"):
        offline(weights_dir=tmp_path, arch="resnet50")
    assert offline(str(tmp_path), arch="resnet50").arch.full_name == "resnet50.tv2_in1k"
    put(tmp_path, "resnet50-0676ba61.pth")
    assert offline(weights_dir=tmp_path, arch="resnet50").path == tmp_path / "resnet50-0676ba61.pth"


def test_a_snapshot_decides_the_preprocessing(tmp_path: Path) -> None:
    snapshot(tmp_path)
    for found in (offline(str(tmp_path)), offline(weights_dir=tmp_path), offline(str(tmp_path / "model.safetensors"))):
        assert found.path == tmp_path / "model.safetensors"
        assert found.arch.full_name == "resnet18"
        assert found.arch.config["mean"] == (0.1, 0.2, 0.3)
        assert found.arch.config["input_size"] == (3, 64, 64)
        assert found.arch.config["std"] == RESNET.config["std"]
        assert found.arch.config["num_classes"] == 7
        assert found.arch.config["url"] == RESNET.config["url"]
        assert found.source == "local file model.safetensors"


def test_snapshots_of_other_tags_and_networks(tmp_path: Path) -> None:
    other = snapshot(tmp_path / "a1", tag="a1_in1k")
    assert offline(str(other)).arch.full_name == "resnet18.a1_in1k"
    with pytest.raises(WeightsError, match=r"holds weights of resnet18\.a1_in1k, not of resnet18\.tv_in1k"):
        offline(str(other), arch="resnet18.tv_in1k")
    with pytest.raises(WeightsError, match=r"^Found no weights for resnet18\.tv_in1k: searched --weights-dir"):
        offline(weights_dir=other)
    wrong = snapshot(tmp_path / "r50", architecture="resnet50")
    with pytest.raises(WeightsError, match=r"holds weights of resnet50, not of resnet18\.tv_in1k: give --arch"):
        offline(str(wrong))


def test_a_snapshot_with_a_tag_that_timm_does_not_know(tmp_path: Path) -> None:
    found = offline(str(snapshot(tmp_path, tag="my_ft")))
    assert found.arch.full_name == "resnet18"
    assert found.arch.config["mean"] == (0.1, 0.2, 0.3)
    with pytest.raises(WeightsError, match=r"weights of resnet18\.my_ft, not of .+: give --arch resnet18 instead\.$"):
        offline(str(tmp_path), arch="resnet18.tv_in1k")


def test_a_snapshot_without_preprocessing_has_the_networks_own(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    for said in ({"pretrained_cfg": None}, {"pretrained_cfg": {"mean": None}}, {}):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", **said}), encoding="utf-8")
        assert offline(str(tmp_path)).arch.config["mean"] == RESNET.config["mean"]


def test_a_snapshot_in_a_folder_of_its_name(tmp_path: Path) -> None:
    snapshot(tmp_path / "resnet18.tv_in1k", tag="tv_in1k")
    snapshot(tmp_path / "resnet50.tv_in1k", architecture="resnet50", tag="tv_in1k")
    found = offline(weights_dir=tmp_path)
    assert found.path == tmp_path / "resnet18.tv_in1k" / "model.safetensors"
    assert found.source == "local file resnet18.tv_in1k/model.safetensors"


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "config.json")
    with pytest.raises(WeightsError, match=r"config\.json is not readable as JSON"):
        offline(str(tmp_path))


def test_the_torch_hub_cache_goes_before_the_hugging_face_cache(empty_caches: Path) -> None:
    repo = empty_caches / "hub" / "models--timm--resnet18.tv_in1k"
    put(repo / "snapshots" / "abc123", "model.safetensors")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123", encoding="utf-8")
    found = offline()
    assert found.path == repo / "snapshots" / "abc123" / "model.safetensors"
    assert found.source == "Hugging Face cache, timm/resnet18.tv_in1k"
    put(empty_caches / "torch" / "hub" / "checkpoints", "resnet18-f37072fd.pth")
    assert offline().source == "torch hub cache, resnet18-f37072fd.pth"


def test_the_local_folder_goes_before_the_caches(tmp_path: Path, empty_caches: Path) -> None:
    put(empty_caches / "torch" / "hub" / "checkpoints", "resnet18-f37072fd.pth")
    put(tmp_path, "resnet18.pth")
    assert offline(weights_dir=tmp_path).source == "local file resnet18.pth"


def test_nothing_anywhere_says_where_it_looked_and_three_ways_on(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        offline(weights_dir=tmp_path)
    text = str(error.value)
    assert text.startswith(f"Found no weights for resnet18.tv_in1k: searched --weights-dir {tmp_path}, the torch hub")
    assert "the Hugging Face cache" in text
    for way in ("--weights-dir", "--weights FILE", "--weights none", "run again with a network"):
        assert way in text
