"""A trained model from its folder: `model.safetensors` and the `config.json` beside it, verified.

A run directory is such a folder, and so is what timm's `save_for_hf` writes. Nothing is read that could run code. What
only this project knows (temperature, layers that trained, settings) is absent from other people's folders, and the
model loads all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from finetune.augment import Preprocessing
from finetune.grid import SWEEP
from finetune.models import build, check_size, outline, preprocessing_of
from finetune.recipe import Recipe, from_table
from finetune.rundir import CHECKPOINT, CONFIG, MODEL, SUMMARY
from finetune.temperature import Temperature
from weights.arch import Arch, resolve_arch
from weights.check import check_room
from weights.config import LARGEST_SIDE, SMALLEST_CROP, check_args, is_number
from weights.errors import UsageError, WeightsError
from weights.guard import read_json, shortened, told
from weights.load import load_into, read_tensors
from weights.save import read_about

CROP_MODES = ("center", "squash", "border")  # timm's
UNKNOWN = Temperature(1.0, "config.json holds none")


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be used.

    Attributes:
        model: in eval mode, on the CPU, in the number format of its parameters.
        arch: the network, with the preprocessing that belongs to these weights.
        classes: names in the order of the logits.
        preprocessing: pixels to model input.
        temperature: logits are divided by it before the softmax.
        trained_layers: names of the modules that trained, as `Selection.names`; None where nobody wrote them down.
        recipe: settings of the run that made it; None where nobody wrote them down.
        crop_pct: share of an image that the centre crop keeps; 1 for every run of this project.
        crop_mode: how timm makes an image square: center, which is that of every run of this project, squash or border.
        folder: where it lies.
        config: all of config.json.
        about: the checkpoint's metadata; empty where nobody wrote any.
    """

    model: nn.Module
    arch: Arch
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: Temperature
    trained_layers: tuple[str, ...] | None
    recipe: Recipe | None
    crop_pct: float
    crop_mode: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of the run that lies beside the model, or None without one that can be read."""
        try:
            found = read_json(self.folder / SUMMARY)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def said_of_data(self) -> dict[str, Any]:
        """Return what that summary says of the data, {} where it says nothing."""
        said = (self.summary() or {}).get("data")
        return said if isinstance(said, dict) else {}


def load_trained(path: Path) -> Trained:
    """Load a trained model.

    Args:
        path: a run directory or another folder with both files, or the `.safetensors` file in it.

    Raises:
        WeightsError: a file is missing, damaged, or does not fit the other; each with its sentence.
    """
    path = path.expanduser()
    file = _weights_file(path)
    place = file.with_name(CONFIG)
    config = _read_config(place)
    try:
        arch = resolve_arch(_known(config, "architecture", str, place))
    except UsageError as error:
        raise WeightsError(
            f"{place} names a network that cannot be built here ({shortened(str(error))}); it may want a newer timm."
        ) from error
    classes = _class_names(config, place)
    arch, size = _with_preprocessing(arch, config, place)
    crop_pct, crop_mode = _crop(config["pretrained_cfg"], place)
    model_args = _model_args(config, place)
    try:
        check_room(arch.name, file, outline(arch, len(classes), size, model_args))
        model, _ = build(arch, len(classes), size, model_args)
    except UsageError as error:
        raise WeightsError(f"{place} does not describe a network that can be built: {error}") from error
    account = load_into(model, read_tensors(file), head=(), where=str(file), keep_head=True)
    if account.unexpected:
        named = ", ".join(account.unexpected[:3])
        raise WeightsError(
            f"{file} holds {len(account.unexpected)} tensors that {arch.name} has no place for ({named}), so it is of "
            f"another network than {place} says; give a folder whose two files were written together."
        )
    check_size(model, arch, size)
    about = read_about(file) or {}
    return Trained(
        model=model.eval(),
        arch=arch,
        classes=classes,
        preprocessing=preprocessing_of(arch, size),
        temperature=_temperature(config, place),
        trained_layers=_trained_layers(about),
        recipe=_recipe(about, file),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        folder=file.parent,
        config=config,
        about=about,
    )


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        file = path / MODEL
        if file.is_file():
            return file
        if (path / CHECKPOINT).exists():
            raise WeightsError(
                f"{path} is a run that was not finished and has no {MODEL}; go on with finetune run --resume {path}"
            )
        if (path / SWEEP).exists():
            raise WeightsError(f"{path} holds the runs of a sweep; give one of them, such as the one that it chose.")
        raise WeightsError(f"{path} holds no {MODEL}; give a run directory that finetune run has finished.")
    if not path.is_file():
        raise WeightsError(
            f"There is nothing at {path}; expected a run directory, or a {MODEL} with its {CONFIG} beside it."
        )
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path} is no .safetensors file; expected a run directory, or a {MODEL} with its {CONFIG} beside it."
        )
    return path


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise WeightsError(
            f"{path} is missing, which names the network and the classes; put it back beside the weights."
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged ({error}); put back the one that was written with the weights."
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is damaged (no JSON object); put back the one that was written with the weights.")
    return config


def _known(config: dict[str, Any], key: str, kind: type, place: Path) -> Any:
    value = config.get(key)
    if not isinstance(value, kind):
        found = "lacks" if value is None else "has a wrong"
        raise WeightsError(f'{place} {found} "{key}"; expected the config.json that finetune or timm writes.')
    return value


def _model_args(config: dict[str, Any], place: Path) -> dict[str, Any]:
    given = _known(config, "model_args", dict, place) if config.get("model_args") else {}
    try:
        check_args(given)
    except ValueError as error:
        raise WeightsError(f"{place} has {error}; put back the one that was written with the weights.") from error
    return dict(given)


def _trained_layers(about: dict[str, Any]) -> tuple[str, ...] | None:
    named = about.get("trained_layers")
    return tuple(named) if isinstance(named, list) and all(isinstance(name, str) for name in named) else None


def _class_names(config: dict[str, Any], place: Path) -> tuple[str, ...]:
    # timm writes the names beside the architecture, older versions of it among the preprocessing
    older = config.get("pretrained_cfg")
    names = config.get("label_names") or (older.get("label_names") if isinstance(older, dict) else None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(
            f'{place} lacks the names of the classes ("label_names"), so predictions could not be named; write them '
            "into it, in the order of the model's outputs."
        )
    count = config.get("num_classes", len(names))
    if count != len(names):
        raise WeightsError(
            f"{place} has num_classes {told(count)} but {len(names)} label_names; mend the one that is wrong."
        )
    return tuple(names)


def _with_preprocessing(arch: Arch, config: dict[str, Any], place: Path) -> tuple[Arch, int]:
    """Return the network with the configuration's preprocessing, and the input side."""
    said = _known(config, "pretrained_cfg", dict, place)
    channels, height, width = _numbers(said, "input_size", place)
    if channels != 3 or height != width or not 1 <= height <= LARGEST_SIDE:
        raise WeightsError(
            f'{place} has "input_size" {said["input_size"]}; expected 3 colours and a square of at most '
            f"{LARGEST_SIDE:,} pixels, such as [3, 224, 224]."
        )
    interpolation = said.get("interpolation")
    merged = {
        **arch.config,
        "input_size": (3, int(height), int(width)),
        "mean": _numbers(said, "mean", place),
        "std": _numbers(said, "std", place),
        "interpolation": interpolation if isinstance(interpolation, str) else arch.config.get("interpolation"),
    }
    # No tag: it would be that of the weights training began with.
    return Arch(arch.name, "", merged), int(height)


def _crop(said: dict[str, Any], place: Path) -> tuple[float, str]:
    """Return which share of an image the model sees, and how timm makes it square."""
    share, mode = said.get("crop_pct") or 1.0, said.get("crop_mode") or CROP_MODES[0]
    if not is_number(share) or not SMALLEST_CROP <= share <= 1:
        raise WeightsError(
            f'{place} has "crop_pct" {told(share)} in "pretrained_cfg"; expected a number from {SMALLEST_CROP} to 1.'
        )
    if mode not in CROP_MODES:
        raise WeightsError(
            f'{place} has "crop_mode" {told(mode)} in "pretrained_cfg"; expected one of {", ".join(CROP_MODES)}.'
        )
    return float(share), mode


def _numbers(said: dict[str, Any], key: str, place: Path) -> tuple[float, ...]:
    value = said.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(is_number(part) for part in value):
        raise WeightsError(f'{place} has "{key}" {told(value)} in "pretrained_cfg"; expected three numbers.')
    if key == "std" and 0 in value:
        raise WeightsError(f'{place} has "std" {value} in "pretrained_cfg"; expected numbers other than 0.')
    return tuple(value)


def _temperature(config: dict[str, Any], place: Path) -> Temperature:
    own = config.get("finetune")
    if not isinstance(own, dict) or "temperature" not in own:
        return UNKNOWN
    value = own["temperature"]
    if not is_number(value) or not value > 1e-6:
        raise WeightsError(f"{place} has a temperature of {told(value)}; expected a number above 0 (1 is none).")
    return Temperature(float(value), str(own.get("reason", "")))


def _recipe(about: dict[str, Any], file: Path) -> Recipe | None:
    """Return the settings in a checkpoint's metadata; those of another version that this one does not know are left."""
    settings = about.get("settings")
    if not isinstance(settings, dict):
        return None
    known = {item.name for item in fields(Recipe)}
    return from_table({name: value for name, value in settings.items() if name in known}, str(file))
