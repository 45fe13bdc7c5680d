"""`finetune export`: every form computes what the model computes, says what belongs to it, and is whole or absent."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors
import timm
import torch
from make_run import tensors
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner

from cli.main import app
from finetune import export_check, export_target, rundir
from finetune.augment import Preprocessing
from finetune.export import export
from finetune.export_graph import Probabilities, resize_weights
from finetune.trained import Trained, load_trained
from weights.errors import FinetuneError, RunError, UsageError
from weights.save import save_checkpoint, write_config

ROOT = Path(__file__).parents[1]
CLASSES = ("daisy", "rose", "tulip", "weiße Lilie")
TEMPERATURE = 1.7
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ABOUT = {
    "arch": "finetune_multistage",
    "classes": list(CLASSES),
    "preprocessing": {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "mean": list(MEAN),
        "std": list(STD),
        "crop_pct": 1.0,
        "crop_mode": "center",
    },
    "temperature": TEMPERATURE,
}


def write_trained(folder: Path, arch: str, size: int, **model_args: Any) -> Path:
    """Write the two files of a model with values that it could have after training: it tells images apart."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=len(CLASSES), **model_args).eval()
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.uniform_(0.5, 1.5)
    with torch.no_grad():
        seen = model(Preprocessing(size, MEAN, STD, "bicubic")(random_pixels(32, size, size)))
        model.get_classifier().bias -= seen.mean(0)
    folder.mkdir()
    save_checkpoint(folder / "model.safetensors", state, {"settings": {"epochs": 3}})
    write_config(
        folder / "config.json",
        arch=arch,
        num_classes=len(CLASSES),
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        interpolation="bicubic",
        input_size=(3, size, size),
        model_args=model_args,
        finetune={"temperature": TEMPERATURE, "reason": "made up"},
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained(tmp_path_factory.mktemp("export") / "run", "finetune_multistage", 32, blocks=[1, 1, 1])


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    return load_trained(folder)


@dataclass(frozen=True)
class Made:
    """A folder of graphs: flowers and pixels, .onnx and .pt2 each; and what the command said of the last two."""

    folder: Path
    lines: list[str]
    json: dict[str, Any]


@pytest.fixture(scope="module")
def made(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("graphs")
    export(trained, "onnx", place / "flowers.onnx")
    export(trained, "torch-export", place / "flowers.pt2")
    told = []
    for to, output, words in (("torch-export", "pixels.pt2", []), ("onnx", "pixels.onnx", ["--json"])):
        command = ["export", str(trained.folder), "--to", to, "--output", str(place / output), "--with-preprocessing"]
        done = CliRunner().invoke(app, [*command, *words])
        assert done.exit_code == 0, done.stderr
        told.append(done.stdout)
    return Made(place, told[0].splitlines(), json.loads(told[1]))


def random_pixels(count: int, height: int, width: int) -> Tensor:
    """Return uint8 (count, 3, height, width), which are not those that the export was checked with."""
    generator = torch.Generator().manual_seed(7)
    flat = torch.randint(0, 256, (count, 3, 1, 1), generator=generator)
    return (flat + torch.randint(-40, 40, (count, 3, height, width), generator=generator)).clamp(0, 255).to(torch.uint8)


def run_onnx(path: Path, batch: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])


def logits_of(trained: Trained, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = trained.model(images)
    return logits


def require_same(values: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(values, truth, rtol=0, atol=1e-4)
    assert torch.equal(values.argmax(1), truth.argmax(1))
    assert len(truth) < 6 or len(set(truth.argmax(1).tolist())) > 1, "all of one class: the labels say nothing"


def refused(kind: type[FinetuneError], *words: Any, **settings: Any) -> str:
    with pytest.raises(kind) as error:
        export(*words, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_images_to_logits_in_batches_of_any_size(trained: Trained, made: Made) -> None:
    program = torch.export.load(made.folder / "flowers.pt2").module()
    for count in (1, 3, 16):
        images = trained.preprocessing(random_pixels(count, 32, 32))
        truth = logits_of(trained, images)
        require_same(run_onnx(made.folder / "flowers.onnx", images), truth)
        require_same(program(images), truth)


def test_pixels_of_any_size_to_probabilities(trained: Trained, made: Made) -> None:
    program = torch.export.load(made.folder / "pixels.pt2").module()
    for count, height, width in ((1, 32, 32), (6, 24, 24), (4, 61, 97)):
        pixels = random_pixels(count, height, width)
        truth = (logits_of(trained, trained.preprocessing(pixels)) / TEMPERATURE).softmax(1)
        require_same(run_onnx(made.folder / "pixels.onnx", pixels), truth)
        require_same(program(pixels), truth)


def test_a_network_with_attention_and_position_embeddings(tmp_path: Path) -> None:
    trained = load_trained(write_trained(tmp_path / "run", "test_vit", 32, img_size=32, depth=2))
    result = export(trained, "onnx", tmp_path / "vit.onnx")
    images = trained.preprocessing(random_pixels(7, 32, 32))
    require_same(run_onnx(result.output, images), logits_of(trained, images))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_scaling_by_matrices_is_torchs_own(interpolation: str) -> None:
    for height, width, size in ((32, 32, 224), (61, 97, 40), (500, 7, 32), (40, 40, 40)):
        image = random_pixels(1, height, width).float()
        rows, columns = (resize_weights(length, size, interpolation) for length in (height, width))
        truth = functional.interpolate(image, size=(size, size), mode=interpolation, antialias=True)
        torch.testing.assert_close(rows @ image @ columns.T, truth, rtol=0, atol=0.01)  # of 255


def test_a_checkpoint_that_crops(folder: Path, tmp_path: Path) -> None:
    """Pixels are scaled and cropped as timm does it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"] |= {"crop_pct": 0.8, "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    noise = random_pixels(1, 70, 70)
    with torch.no_grad():
        truth = (model(transform(to_pil_image(noise[0]))[None]) / TEMPERATURE).softmax(1)
        values = Probabilities(load_trained(tmp_path))(noise)
    torch.testing.assert_close(values, truth, rtol=0, atol=0.01)


def test_what_a_graph_says(made: Made) -> None:
    session = onnxruntime.InferenceSession(str(made.folder / "flowers.onnx"), providers=["CPUExecutionProvider"])
    extra = {"finetune.json": ""}
    torch.export.load(made.folder / "flowers.pt2", extra_files=extra)
    for text in (session.get_modelmeta().custom_metadata_map["finetune"], extra["finetune.json"]):
        assert json.loads(text) == {
            **ABOUT,
            "input": {"name": "images", "dtype": "float32", "shape": ["N", 3, 32, 32]},
            "output": {"name": "logits", "dtype": "float32", "shape": ["N", 4]},
        }
    assert [(port.name, port.shape) for port in session.get_inputs()] == [("images", ["N", 3, 32, 32])]
    assert [(port.name, port.shape) for port in session.get_outputs()] == [("logits", ["N", 4])]
    for name in ("flowers.onnx", "pixels.pt2"):
        content = (made.folder / name).read_bytes()
        assert str(ROOT).encode() not in content
        assert b"site-packages" not in content


def test_timm_reads_a_folder(trained: Trained, folder: Path, tmp_path: Path) -> None:
    result = export(trained, "timm", tmp_path / "flowers")
    assert sorted(file.name for file in (tmp_path / "flowers").iterdir()) == ["config.json", "model.safetensors"]
    assert result.agreement.difference == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'flowers'}", pretrained=True).eval()
    images = trained.preprocessing(random_pixels(8, 32, 32))
    with torch.no_grad():
        assert torch.equal(model(images), logits_of(trained, images))
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    assert model.pretrained_cfg["mean"] == list(MEAN)
    assert json.loads((tmp_path / "flowers/config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_safetensors_with_everything_in_its_metadata(trained: Trained, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "flowers.safetensors"
    export(trained, "safetensors", path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "flowers.safetensors"]
    with safetensors.safe_open(str(path), "pt") as file:
        assert json.loads(file.metadata()["finetune"]) == {**ABOUT, "settings": {"epochs": 3}}
    written, held = tensors(path), tensors(folder / "model.safetensors")
    assert written.keys() == held.keys()
    assert all(torch.equal(written[name], held[name]) for name in held)
    again = load_trained(path)
    assert (again.classes, again.temperature) == (CLASSES, trained.temperature)


def test_what_is_there_is_kept_unless_force_is_given(trained: Trained, tmp_path: Path) -> None:
    weights, config = tmp_path / "flowers.safetensors", tmp_path / "config.json"
    weights.write_text("mine")
    assert refused(RunError, trained, "safetensors", weights) == (
        f"{weights} exists and is kept as it is; give another --output, or --force to replace what is there."
    )
    config.write_text("mine")
    assert f"{weights} and {config} exist and are kept" in refused(RunError, trained, "safetensors", weights)
    assert weights.read_text() == config.read_text() == "mine"
    export(trained, "safetensors", weights, force=True)
    assert load_trained(weights).classes == CLASSES

    assert refused(RunError, trained, "timm", tmp_path) == (
        f"{tmp_path} is not empty and is kept as it is; give another --output, or --force to replace model.safetensors "
        "and config.json in it."
    )
    export(trained, "timm", tmp_path, force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", weights.name, "model.safetensors"]


def test_what_fails_the_check_is_not_kept(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.pt2").write_text("mine")
    monkeypatch.setattr(export_check, "TOLERANCE", -1.0)
    words = r"differs from the model by up to [\d.e-]+ on 8 images, and rounding explains -[\d.]+; it was not kept\.$"
    assert re.match(
        "The torch-export file of finetune_multistage " + words,
        refused(RunError, trained, "torch-export", tmp_path / "old.pt2", force=True),
    )
    assert re.match(
        "The timm form of finetune_multistage " + words, refused(RunError, trained, "timm", tmp_path / "new")
    )
    assert [file.name for file in tmp_path.iterdir()] == ["old.pt2"]
    assert (tmp_path / "old.pt2").read_text() == "mine"


def test_what_cannot_be_read_back_is_not_kept(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TypeError("no such operation\nat line 7")

    monkeypatch.setattr("finetune.export.read_torch", refuse)
    assert refused(RunError, trained, "torch-export", tmp_path / "x.pt2") == (
        "The torch-export file of finetune_multistage cannot be read back (no such operation); it was not kept."
    )
    monkeypatch.setattr(timm, "create_model", refuse)  # as timm's own code does for a config.json of a newer version
    assert refused(RunError, trained, "timm", tmp_path / "new") == (
        "The timm form of finetune_multistage cannot be read back (no such operation); it was not kept."
    )
    assert list(tmp_path.iterdir()) == []


def test_the_folder_one_is_in_can_be_the_output(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    export(trained, "timm", Path())
    assert load_trained(here).classes == CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_check_finds_what_is_wrong() -> None:
    batches = export_check.sample_pixels([(8, 8), (8, 8), (9, 7)])
    assert [tuple(batch.shape) for batch in batches] == [(1, 3, 8, 8), (2, 3, 8, 8), (5, 3, 9, 7)]

    def exact(pixels: Tensor) -> Tensor:
        return pixels.float().mean((2, 3))

    def one_off(pixels: Tensor) -> Tensor:
        return exact(pixels) + (torch.arange(len(pixels)) == 4)[:, None]

    def not_a_number(pixels: Tensor) -> Tensor:
        return exact(pixels) / (torch.arange(len(pixels)) != 1)[:, None] * 0

    def fixed(pixels: Tensor) -> Tensor:
        return exact(pixels).reshape(2, 3)

    def first_only(pixels: Tensor) -> Tensor:
        return exact(pixels)[:1]

    agreement = export_check.compare(exact, exact, batches, "It")
    assert (agreement.images, agreement.difference, agreement.same_labels) == (8, 0, 8)
    for wrong, words in (
        (one_off, r"It differs from the model by up to 1 on 8 images"),
        (not_a_number, r"It differs from the model by up to nan on 8 images"),
        (fixed, r"It cannot compute a batch of 1 × 3 × 8 × 8 \(shape '\[2, 3\]' is invalid"),
        (first_only, r"It cannot compute a batch of 2 × 3 × 8 × 8 \(outputs are \(1, 3\), not \(2, 3\)\)"),
    ):
        with pytest.raises(RunError, match=words):
            export_check.compare(exact, wrong, batches, "It")
    assert export_check.compare(exact, one_off, batches, "It", rounding=1.0).allowed == pytest.approx(1.0)
    with pytest.raises(RunError, match=r"by up to 1 on 8 images, and rounding explains 0\.5"):
        export_check.compare(exact, one_off, batches, "It", rounding=0.5)


def test_options_that_cannot_be_right(trained: Trained, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.onnx"
    file.touch()
    for words, told in (
        (("onx", file), "--to is 'onx'; it can be safetensors, onnx, torch-export or timm; did you mean onnx?"),
        (("tflite", file), "--to is 'tflite'; it can be safetensors, onnx, torch-export or timm."),
        (
            ("onnx", tmp_path),
            f"--output {tmp_path} is a folder, and --to onnx writes a file; give {tmp_path}/model.onnx.",
        ),
        (("timm", file), f"--output {file} is a file, and --to timm writes a folder; give another name."),
        (
            ("torch-export", tmp_path / "v1.5"),
            f"--output {tmp_path}/v1.5 does not end in .pt2, by which programs know such files; give "
            f"{tmp_path}/v1.5.pt2.",
        ),
        (
            ("timm", folder),
            f"--output {folder} would replace files of the checkpoint that is exported; give a place outside of "
            f"{folder}.",
        ),
    ):
        assert refused(UsageError, trained, *words, force=True) == told
    assert refused(UsageError, trained, "timm", tmp_path / "new", with_preprocessing=True) == (
        "--with-preprocessing belongs into a graph, and timm holds weights alone; leave it out, or give --to onnx or "
        "--to torch-export."
    )


def test_names_that_are_written_twice_to_spare_an_import() -> None:
    assert (export_target.MODEL, export_target.CONFIG) == (rundir.MODEL, rundir.CONFIG)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    done = CliRunner().invoke(app, ["export", "run", "--to", "onnx", "--output", str(tmp_path / "x.onnx")])
    assert done.exit_code == 2
    assert done.stderr == (
        "Error: --to onnx needs onnxscript and onnxruntime, which are not installed; install the extra `onnx`: pip "
        "install 'finetune-timm[onnx]'.\n"
    )


def test_an_output_in_no_folder_and_checkpoints_that_are_none(folder: Path, tmp_path: Path) -> None:
    def told(checkpoint: Path, output: Path) -> str:
        done = CliRunner().invoke(app, ["export", str(checkpoint), "--to", "timm", "--output", str(output)])
        assert done.exit_code in (1, 2)
        assert not done.stdout
        return done.stderr

    assert "lies in a folder that does not exist; make " in told(folder, tmp_path / "no" / "flowers")
    bad = tmp_path / "bad"
    bad.mkdir()
    weights = (folder / "model.safetensors").read_bytes()
    config = (folder / "config.json").read_text()
    (bad / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (bad / "config.json").write_text(config)
    assert "model.safetensors is truncated, damaged or not a weight file" in told(bad, tmp_path / "new")
    (bad / "config.json").write_text(config.replace('"finetune_multistage"', '"resnet99"'))
    assert 'names a network that cannot be built here (Unknown architecture "resnet99"' in told(bad, tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["bad"]


def test_the_command(made: Made) -> None:
    path = made.folder / "pixels.pt2"
    written, takes, gives, inside, checked = made.lines
    assert re.fullmatch(rf"written +{path} \([\d.]+ [kM]B\)", written)
    assert takes == "input           pixels: uint8 (N, 3, H, W), any N and H and W"
    assert gives == "output          probabilities: float32 (N, 4), any N"
    assert inside == "inside          4 class names, preprocessing, temperature 1.7 (applied)"
    same = r"same label for 8 of 8 images, in batches of 1, 2 and 5"
    assert re.fullmatch(rf"checked +largest difference from torch [\de.-]+; {same}", checked)

    result, path = made.json, made.folder / "pixels.onnx"
    assert (result["path"], result["files"], result["bytes"]) == (str(path), [str(path)], path.stat().st_size)
    assert result["input"] == {"name": "pixels", "dtype": "uint8", "shape": ["N", 3, "H", "W"]}
    assert result["check"]["largest_difference"] <= result["check"]["allowed"] == 1e-4
    assert (result["check"]["images"], result["check"]["same_labels"]) == (8, 8)


def test_the_examples_of_the_page(
    trained: Trained, made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made.folder)
    photo = random_pixels(1, 40, 32)[0, :, 4:36]  # (3, 32, 32)
    wide = torch.zeros(3, 32, 40, dtype=torch.uint8)
    wide[:, :, 4:36] = photo
    Image.fromarray(wide.permute(1, 2, 0).numpy()).save("photo.jpg", format="PNG")

    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 3
    for block in code:
        exec(compile(block, "docs/export.md", "exec"), {})
    first, second, shape = capsys.readouterr().out.splitlines()
    chances = (logits_of(trained, trained.preprocessing(photo[None])) / TEMPERATURE).softmax(1)[0]
    for line in (first, second):
        label, _, chance = line.rpartition(" ")
        assert label == CLASSES[int(chances.argmax())]
        assert float(chance) == pytest.approx(float(chances.max()), abs=1e-4)
    assert shape == "torch.Size([4, 4])"
