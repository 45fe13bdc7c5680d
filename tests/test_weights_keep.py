"""`finetune weights fetch` and `convert`: files that are checked, then kept whole with their sha256 beside them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from make_run import write_weights
from make_server import Server, empty_caches, hub_at, serve
from typer.testing import CliRunner

from cli.main import app
from weights.arch import resolve_arch
from weights.load import hash_tensors, read_tensors
from weights.locate import locate

ON_THE_HUB = "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
KEPT = "test_resnet.r160_in1k.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of test_resnet."""
    return write_weights(tmp_path_factory.mktemp("original") / "test_resnet.safetensors")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve(monkeypatch) as running:
        yield running


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder and empty caches."""
    empty_caches(tmp_path / "caches", monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def said(*words: str, code: int = 0) -> str:
    """What a command prints, or the one line of one that fails."""
    result = CliRunner().invoke(app, [*words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    if not code:
        return result.stdout
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr.removeprefix("Error: ").strip()


def there() -> list[str]:
    return sorted(path.relative_to(Path()).as_posix() for path in Path().rglob("*") if path.is_file())


def record_of(path: Path) -> str:
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


# fetch


def test_fetch_keeps_the_bytes_of_the_hub_and_a_run_finds_them(
    server: Server, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_at(monkeypatch, server.address)
    server.files[ON_THE_HUB] = original.read_bytes()
    told = said("weights", "fetch", "test_resnet", "--weights-dir", "models/mine").splitlines()
    kept = Path("models/mine") / KEPT
    assert kept.read_bytes() == original.read_bytes()
    assert Path(f"{kept}.sha256").read_text() == record_of(kept)
    assert told[0].startswith(f"{kept} (")
    assert told[0].endswith(" tensors, downloaded)")
    assert told[1] == f"sha256 {record_of(kept).split()[0]}"
    found = locate(resolve_arch("test_resnet"), weights_dir=Path("models/mine"), download=False)
    assert (found.path, found.source) == (kept, f"local file {KEPT}")

    server.asked.clear()
    monkeypatch.setenv("FINETUNE_WEIGHTS", "models/mine")
    assert said("weights", "fetch", "test_resnet.r160_in1k").splitlines()[0].endswith(" tensors, there already)")
    told = said("weights", "fetch", "test_resnet", "--weights-dir", "other")
    assert "tensors, Hugging Face cache, timm/test_resnet.r160_in1k)" in told
    assert server.asked == []


def test_fetch_says_when_the_file_that_is_there_is_damaged_and_replaces_it_by_force(
    server: Server, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_at(monkeypatch, server.address)
    server.files[ON_THE_HUB] = original.read_bytes()
    said("weights", "fetch", "test_resnet", "--weights-dir", "models")
    kept = Path("models") / KEPT
    spoilt = bytearray(original.read_bytes())
    spoilt[-1] ^= 1
    kept.write_bytes(spoilt)
    words = said("weights", "fetch", "test_resnet", "--weights-dir", "models", code=1)
    assert words.startswith(f"{KEPT} is not the file that was recorded: {KEPT}.sha256 says sha256 ")
    assert words.endswith(f"Delete {kept.absolute()} and fetch it again with finetune weights fetch {KEPT[:-12]}.")
    assert kept.read_bytes() == spoilt
    said("weights", "fetch", "test_resnet", "--weights-dir", "models", "--force")
    assert kept.read_bytes() == original.read_bytes()
    assert there() == [f"models/{KEPT}", f"models/{KEPT}.sha256"]


def test_fetch_of_what_is_not_weights_keeps_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_at(monkeypatch, server.address)
    server.files[ON_THE_HUB] = b"<html>Sign in to the network</html>"
    words = said("weights", "fetch", "test_resnet", "--weights-dir", "models", code=1)
    assert words == "model.safetensors is a web page and not weights; download it again."
    assert not Path("models").exists()


def test_fetch_of_an_unknown_network_offers_near_ones() -> None:
    words = said("weights", "fetch", "test_resnat", "--weights-dir", "models", code=2)
    assert words.startswith('Unknown architecture "test_resnat"; did you mean test_resnet')
    words = said("weights", "fetch", "test_resnet.r16_in1k", "--weights-dir", "models", code=2)
    assert words == 'test_resnet has no pretrained weights "r16_in1k"; did you mean r160_in1k?'
    assert not Path("models").exists()


def test_fetch_without_a_network() -> None:
    words = said("weights", "fetch", "test_resnet", "--weights-dir", "models", code=1)
    assert words.startswith(
        "Found no weights for test_resnet.r160_in1k: searched the torch hub cache, the Hugging Face cache, Hugging "
        "Face hub timm/test_resnet.r160_in1k ("
    )
    assert words.endswith(
        "). Run this again with a network, or copy the file into the folder from a machine that has one."
    )
    assert not Path("models").exists()


def test_fetch_wants_a_folder_and_a_network_that_has_weights() -> None:
    assert said("weights", "fetch", "test_resnet", code=2) == (
        "No local model directory is named; give --weights-dir DIR, or set $FINETUNE_WEIGHTS."
    )
    assert said("weights", "fetch", "finetune_figure1", "--weights-dir", "models", code=1) == (
        "timm has no pretrained weights for finetune_figure1 to fetch; finetune list --search finetune_figure1 shows "
        "which there are."
    )
    Path("file").write_text("")
    assert said("weights", "fetch", "test_resnet", "--weights-dir", "file", code=1) == (
        "--weights-dir names file, which is not a folder; give one that is."
    )


# convert


def test_convert_takes_the_tensors_out_of_a_training_checkpoint(original: Path) -> None:
    state = safetensors.torch.load_file(original)
    shared = state["fc.weight"]
    wrapped = {f"module.{name}": value for name, value in state.items()} | {"module.tied": shared}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, "best.pth.tar")
    told = said("weights", "convert", "best.pth.tar").splitlines()
    assert told[0].startswith("best.safetensors (")
    assert told[0].endswith(f", {len(state) + 1} tensors of best.pth.tar)")
    assert hash_tensors(read_tensors(Path("best.safetensors"))) == hash_tensors({**state, "tied": shared})
    with safetensors.safe_open("best.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert Path("best.safetensors.sha256").read_text() == record_of(Path("best.safetensors"))
    said("weights", "convert", "best.pth.tar", "--output", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("best.safetensors").read_bytes()


def test_convert_keeps_a_file_that_is_there_unless_forced() -> None:
    torch.save({"weight": torch.ones(2)}, "a.bin")
    Path("b.safetensors").write_bytes(b"mine")
    words = said("weights", "convert", "a.bin", "--output", "b.safetensors", code=1)
    assert words == "b.safetensors exists and was kept; give --force to replace it, or another --output."
    assert Path("b.safetensors").read_bytes() == b"mine"
    said("weights", "convert", "a.bin", "--output", "b.safetensors", "--force")
    assert torch.equal(read_tensors(Path("b.safetensors"))["weight"], torch.ones(2))


class Rogue:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def test_convert_refuses_what_it_cannot_read_and_writes_nothing(original: Path) -> None:
    torch.save({"weight": torch.ones(2), "rogue": Rogue()}, "rogue.ckpt")
    Path("cut.pth").write_bytes(original.read_bytes()[:1000])
    torch.save({"weight": torch.eye(3).to_sparse()}, "sparse.pt")
    torch.save({"weight": torch.tensor([1.0, float("nan")])}, "nan.pth")
    before = there()
    assert said("weights", "convert", "none.pth", code=1) == (
        "Could not read the weights none.pth (No such file or directory); give a file that can be read."
    )
    assert said("weights", "convert", "rogue.ckpt", code=1).startswith(
        "rogue.ckpt is a pickle that holds more than tensors ("
    )
    assert said("weights", "convert", "cut.pth", code=1).startswith(
        "cut.pth is truncated, damaged or not a weight file (1,000 bytes: "
    )
    assert said("weights", "convert", "sparse.pt", code=1).startswith(
        "sparse.pt was not loaded: it holds sparse, quantised or nested tensors, or some without values; save its "
    )
    assert said("weights", "convert", "nan.pth", code=1) == (
        "The weights (nan.pth) hold NaN or infinite values in weight; they are spoilt, so give others."
    )
    assert said("weights", "convert", "rogue.ckpt", "--output", "out.pth", code=2) == (
        "--output out.pth is written as safetensors; give a name that ends in .safetensors."
    )
    assert said("weights", "convert", "rogue.ckpt", "--output", "no/out.safetensors", code=2).startswith(
        "--output no/out.safetensors lies in a folder that does not exist"
    )
    assert said("weights", "convert", ".", code=2) == ". is a folder; give the weight file in it."
    Path("whole.pth").write_bytes(original.read_bytes())
    Path("whole.safetensors.sha256").mkdir()
    assert said("weights", "convert", "whole.pth", code=1).startswith("whole.safetensors.sha256 cannot be removed (")
    assert there() == sorted([*before, "whole.pth"])
    assert not Path("ran").exists()
