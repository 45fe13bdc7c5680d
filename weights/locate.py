"""Which file holds the weights: `--weights`, a local folder, the caches, or a download.

`auto` looks in the local model directory (`--weights-dir`, else `$FINETUNE_WEIGHTS`), then in the torch hub cache and
the Hugging Face cache, and downloads last. In a folder a file fits when its stem is the architecture's name, alone or
followed by `-` or `.` and anything (`resnet18` fits resnet18-f37072fd.pth and not resnet18d.pth). A stem that begins
with the full name (`resnet18.tv_in1k`) goes before others; a file that names another tag of the architecture is left
alone, unless the user pointed at it and asked for no tag: then its tag decides the preprocessing.
A folder with `config.json` beside `model.safetensors` is a Hugging Face snapshot (a run directory is one too): its own
configuration decides the preprocessing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch.hub

from weights.arch import Arch, known_tags, weights_url
from weights.config import check_args, check_preprocessing
from weights.errors import WeightsError
from weights.fetch import HUB_FILES, hub_files, hub_id, not_found
from weights.fetch import download as fetch_weights
from weights.guard import read_json, shortened
from weights.load import SUFFIXES

ENVIRONMENT = "FINETUNE_WEIGHTS"
_SOURCE_KEYS = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "label_names", "label_descriptions")


@dataclass(frozen=True)
class Found:
    """Where the weights of a run come from.

    Attributes:
        path: the weight file, None for random weights.
        arch: the network, with the preprocessing that belongs to this file.
        source: a short text for the user, without absolute paths.
        model_args: what `timm.create_model` is to be given beside the class count, as config.json states it; None
            without a config.json.
        label_names: of the classes it was trained on, in order; () unless a run of this tool states them.
    """

    path: Path | None
    arch: Arch
    source: str
    model_args: Mapping[str, Any] | None = None
    label_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A file in a folder that may be what is looked for.

    Attributes:
        path: the file.
        arch: the network, with the preprocessing that belongs to this file.
        exact: whether its name begins with the full name, tag included.
        label: what to call it.
        model_args: as in `Found`.
        label_names: as in `Found`.
    """

    path: Path
    arch: Arch
    exact: bool
    label: str
    model_args: Mapping[str, Any] | None = None
    label_names: tuple[str, ...] = ()


def locate(arch: Arch, weights: str = "auto", weights_dir: Path | None = None, *, download: bool = True) -> Found:
    """Find the weights of a network.

    Args:
        arch: the network, as `resolve_arch` gives it.
        weights: `auto`, `none`, a file or a folder.
        weights_dir: local model directory for `auto`; without it `$FINETUNE_WEIGHTS` is used.
        download: whether `auto` may use the network when nothing is on this machine.

    Raises:
        WeightsError: when nothing fits, two files fit, a file belongs to another tag or network, or a download fails.
    """
    if weights == "none":
        return Found(None, arch, "none")
    if weights != "auto":
        return _given(arch, Path(weights).expanduser())
    searched = []
    folder, option = local_folder(weights_dir)
    if folder:
        if not folder.is_dir():
            raise WeightsError(f"{option} names {folder}, which is not a folder; give one that is.")
        best = best_in(folder, arch)
        if best:
            return Found(best.path, best.arch, f"local file {best.label}", best.model_args, best.label_names)
        passed_over = _other_tags(folder, arch)
        searched.append(f"{option} {folder}" + (f" (it holds {passed_over})" if passed_over else ""))
    cached = in_caches(arch)
    if cached:
        return cached
    searched += ["the torch hub cache", "the Hugging Face cache"]
    if not download:
        raise not_found(arch, searched)
    return Found(fetch_weights(arch, searched), arch, "download")


def local_folder(weights_dir: Path | None) -> tuple[Path | None, str]:
    """Return the local model directory and what named it; None when nothing did.

    Args:
        weights_dir: what `--weights-dir` gave; without it `$FINETUNE_WEIGHTS` is used.
    """
    if weights_dir is not None:
        return Path(weights_dir).expanduser(), "--weights-dir"
    value = os.environ.get(ENVIRONMENT)
    return (Path(value).expanduser() if value else None), f"${ENVIRONMENT}"


def _given(arch: Arch, path: Path) -> Found:
    if path.is_dir():
        best = best_in(path, arch, given=True)
        if best is None:
            there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
            raise WeightsError(
                f"Found no weights for {arch.full_name} in {path}: looked for {arch.name}.*, {arch.name}-*.* "
                f"({', '.join(SUFFIXES)}) or config.json with model.safetensors; it holds {there}."
            )
        return Found(best.path, best.arch, f"local file {best.label}", best.model_args, best.label_names)
    if not path.is_file():
        raise WeightsError(f"--weights names {path}, which does not exist; expected auto, none, a file or a folder.")
    if path.name in HUB_FILES and (snapshot := _snapshot(path.parent, arch, given=True)):
        return Found(path, snapshot.arch, f"local file {path.name}", snapshot.model_args, snapshot.label_names)
    tag = tag_of(stem_of(path.name), arch)
    if tag is None:
        return Found(path, arch, f"local file {path.name}")
    return Found(path, _with_tag(arch, tag, path.name), f"local file {path.name}")


def best_in(folder: Path, arch: Arch, *, given: bool = False) -> Candidate | None:
    """Return the one candidate in a folder, None without any.

    Args:
        folder: where to look.
        arch: the network.
        given: whether the user named this very folder.

    Raises:
        WeightsError: when two fit equally well.
    """
    found = _candidates(folder, arch, given=given)
    best = [c for c in found if c.exact] or found
    if len(best) > 1:
        names = " and ".join(c.label for c in best)
        raise WeightsError(
            f"{folder} holds {len(best)} files for {arch.full_name}: {names}; name one with --weights FILE."
        )
    return best[0] if best else None


def _candidates(folder: Path, arch: Arch, *, given: bool) -> list[Candidate]:
    found = []
    for path in sorted(folder.iterdir()):
        if not _stem_fits(path, arch):
            continue
        if path.is_dir():
            inner = _snapshot(path, arch, given=False)
            found += [replace(inner, label=f"{path.name}/{inner.label}")] if inner else []
        elif stem_of(path.name):
            tag = tag_of(stem_of(path.name), arch)
            exact = bool(re.match(rf"{re.escape(arch.full_name)}([-.]|$)", stem_of(path.name)))
            if tag in (None, arch.tag):
                found.append(Candidate(path, arch, exact, path.name))
    snapshot = _snapshot(folder, arch, given=given)
    found += [snapshot] if snapshot else []
    if not found and given:  # the user pointed at this folder: another tag is fine unless a tag was asked for
        for path in sorted(folder.iterdir()):
            if path.is_file() and _stem_fits(path, arch) and (tag := tag_of(stem_of(path.name), arch)):
                found.append(Candidate(path, _with_tag(arch, tag, path.name), False, path.name))
    return found


def _snapshot(folder: Path, arch: Arch, *, given: bool) -> Candidate | None:
    """The folder as a Hugging Face snapshot of this network, None when it is not one.

    With `given` another architecture or tag is an error instead, because the user named the folder.
    """
    weights = next((folder / name for name in HUB_FILES if (folder / name).is_file()), None)
    if weights is None or not (folder / "config.json").is_file():
        return None
    config = read_config(folder)
    if not isinstance(config.get("architecture"), str):
        return None  # a snapshot of some other library
    name, _, tag = config["architecture"].partition(".")
    own = config.get("pretrained_cfg")
    own = own if isinstance(own, dict) else config  # null, or the flat form of older snapshots
    tag = tag or (own["tag"] if isinstance(own.get("tag"), str) else "")
    full = f"{name}.{tag}" if tag else name
    if name != arch.name or (tag and tag != arch.tag and (arch.tag_given or not given)):
        if given:
            way = full if tag in known_tags(name) else name
            raise WeightsError(
                f"{folder} holds weights of {shortened(full)}, not of {arch.full_name}: give --arch {shortened(way)} "
                "instead."
            )
        return None
    # Of runs of this tool alone: others name ImageNet's classes in their own ways.
    model_args, names = config.get("model_args"), config.get("label_names") if "finetune" in config else None
    return Candidate(
        weights,
        _with_config(arch, tag, own, config),
        exact=bool(tag) and tag == arch.tag,
        label=weights.name,
        model_args=model_args if isinstance(model_args, dict) else {},
        label_names=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a folder, {} when it has none, or one that is no JSON object.

    Args:
        folder: such as a Hugging Face snapshot or a run directory.

    Raises:
        WeightsError: when the file is not readable as JSON.
    """
    path = folder / "config.json"
    try:
        config = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is not readable as JSON ({error}); mend it, or name a file with --weights FILE."
        ) from error
    return config if isinstance(config, dict) else {}


def _with_config(arch: Arch, tag: str, own: Mapping[str, Any], config: Mapping[str, Any]) -> Arch:
    said = {k: v for k, v in own.items() if v is not None and k not in _SOURCE_KEYS and k != "architecture"}
    if config.get("num_classes") is not None:
        said["num_classes"] = config["num_classes"]
    try:
        check_preprocessing(said)
        args = config.get("model_args")
        check_args(args if isinstance(args, dict) else {})
    except ValueError as error:
        raise WeightsError(
            f"The config.json of {arch.name} has {error}. Mend it, or give the weights alone in another folder."
        ) from error
    merged = {**arch.config, **said}
    for key in ("input_size", "mean", "std"):
        merged[key] = tuple(merged[key])
    # a tag of somebody's own: timm would not build a network of that name
    return replace(arch, tag=tag if tag in known_tags(arch.name) else "", config=merged)


def _with_tag(arch: Arch, tag: str, name: str) -> Arch:
    """The network with the preprocessing of the tag that a file's name states."""
    if tag == arch.tag:
        return arch
    if arch.tag_given:
        other = f"{arch.name}.{tag}"
        raise WeightsError(f"{name} holds weights of {other}, not of {arch.full_name}: give --arch {other} instead.")
    return replace(arch, tag=tag, config=known_tags(arch.name)[tag])


def published_name(arch: Arch) -> str:
    """Return the name of the network's published file, "" when that does not tell which network it is.

    Names such as checkpoint.pth are shared by many; only a hash or the network's own name tells them apart.

    Args:
        arch: the network.
    """
    name = weights_url(arch.config)[1]
    return name if stem_of(name) and (re.search(r"-[0-9a-f]{8,}\.", name) or arch.name in name) else ""


def stem_of(name: str) -> str:
    """Return a file name without its suffix, "" when that is none of a weight file's.

    Args:
        name: of a file.
    """
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), "")


def _stem_fits(path: Path, arch: Arch) -> bool:
    stem = path.name if path.is_dir() else stem_of(path.name)
    return re.match(rf"^{re.escape(arch.name)}([-.].*)?$", stem) is not None


def tag_of(stem: str, arch: Arch) -> str | None:
    """Return the pretrained tag that a file's stem states, by name or as the published file of that tag, else None.

    Args:
        stem: the file's name without its suffix.
        arch: the network.
    """
    rest = stem[len(arch.name) + 1 :] if stem.startswith((f"{arch.name}.", f"{arch.name}-")) else ""
    tags = known_tags(arch.name)
    for tag in sorted(filter(None, tags), key=len, reverse=True):
        published = stem_of(weights_url(tags[tag])[1])
        if stem == published or re.match(rf"{re.escape(tag)}([-.]|$)", rest):
            return tag
    return None


def _other_tags(folder: Path, arch: Arch) -> str:
    fitting = [p.name for p in sorted(folder.iterdir()) if _stem_fits(p, arch)]
    return f"{', '.join(fitting)}, of another tag than {arch.tag}" if fitting and arch.tag else ""


def in_caches(arch: Arch) -> Found | None:
    """Return the network's weights in the torch hub cache or the Hugging Face cache, None when neither has them.

    Args:
        arch: the network.
    """
    name = published_name(arch)
    if name:
        path = Path(torch.hub.get_dir()) / "checkpoints" / name
        if path.is_file():
            return Found(path, arch, f"torch hub cache, {name}")
    repo, revision = hub_id(arch)
    for file in hub_files(arch) if repo else ():
        cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return Found(Path(cached), arch, f"Hugging Face cache, {repo}")
    return None
