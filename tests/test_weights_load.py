"""Files to tensors, tensors into models, and the account of what became of each."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from weights.errors import UsageError, WeightsError
from weights.load import hash_tensors, load_into, read_tensors
from weights.torch_file import read_torch

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10)


@pytest.fixture
def model(_resnet: nn.Module) -> nn.Module:
    """A tiny ResNet (stages `layer1` to `layer4`, head `fc`) with 10 classes."""
    return copy.deepcopy(_resnet)


@pytest.fixture
def tensors(_resnet: nn.Module) -> Tensors:
    """Weights for it, all values different from the model's, with a head of 1000 classes."""
    found = {n: t + 0.5 if t.is_floating_point() else t + 3 for n, t in _resnet.state_dict().items()}
    width = found["fc.weight"].shape[1]
    return {**found, "fc.weight": torch.zeros(1000, width), "fc.bias": torch.zeros(1000)}


def without(tensors: Tensors, *prefixes: str) -> Tensors:
    return {n: t for n, t in tensors.items() if not n.startswith(prefixes)}


def refused(model: nn.Module, tensors: Tensors, **options: object) -> str:
    """The words of the refusal; the model must be as it was."""
    before = hash_tensors(model.state_dict())
    with pytest.raises(WeightsError) as error:
        load_into(model, tensors, **{"head": ("fc",), "where": "file.pth", **options})  # type: ignore[arg-type]
    assert hash_tensors(model.state_dict()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_changes_afterwards_changes_no_tensor(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    found = read_tensors(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert hash_tensors(found) == hash_tensors(tensors)


def test_everything_but_the_head_is_loaded(model: nn.Module, tensors: Tensors) -> None:
    head = model.get_submodule("fc").weight.clone()
    account = load_into(model, tensors, head=("fc",), where="file.pth")
    state = model.state_dict()
    body = [n for n in tensors if not n.startswith("fc.")]
    assert list(account.loaded) == body
    assert all(torch.equal(state[n], tensors[n]) for n in body)
    assert torch.equal(state["fc.weight"], head)
    assert account.reinitialised == ("fc.weight", "fc.bias")
    assert (account.fresh, account.unexpected) == ((), ())
    assert account.sha256 == hash_tensors({n: tensors[n] for n in body})
    assert account.sentence() == f"{len(body)} tensors loaded; the head (fc) starts fresh"


def test_the_head_may_be_absent_from_the_file(model: nn.Module, tensors: Tensors) -> None:
    account = load_into(model, without(tensors, "fc."), head=("fc",), where="file.pth")
    assert account.reinitialised == ("fc.weight", "fc.bias")


def test_keep_head_loads_the_head_and_refuses_another_class_count(model: nn.Module, tensors: Tensors) -> None:
    message = refused(model, tensors, keep_head=True)
    assert message.startswith(
        "The weights (file.pth) were trained for 1000 classes and the data have 10; give data with"
    )
    own = {**tensors, "fc.weight": torch.ones_like(model.get_submodule("fc").weight), "fc.bias": torch.ones(10)}
    account = load_into(model, own, head=("fc",), where="file.pth", keep_head=True)
    assert account.reinitialised == ()
    assert torch.equal(model.state_dict()["fc.bias"], torch.ones(10))


def test_an_absent_layer_is_an_error_that_names_it_and_the_option(model: nn.Module, tensors: Tensors) -> None:
    count = sum(n.startswith("layer4.") and not n.endswith("num_batches_tracked") for n in tensors)
    assert refused(model, without(tensors, "layer4.", "fc.")) == (
        f"The weights (file.pth) do not fit test_resnet: missing layer4 (all {count} tensors). "
        "Next: give complete weights, or --allow-missing layer4 to start from random values there."
    )


def test_an_absent_layer_that_is_allowed_starts_fresh(model: nn.Module, tensors: Tensors) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    account = load_into(
        model, without(tensors, "layer4."), head=("fc",), allow_missing=("layer4", "layer3"), where="file.pth"
    )
    assert account.fresh_layers == ("layer4",)
    assert account.fresh
    assert all(n.startswith("layer4.") for n in account.fresh)
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in account.fresh)
    assert torch.equal(model.state_dict()["layer3.0.conv1.weight"], tensors["layer3.0.conv1.weight"])
    assert f"layer4 starts fresh as allowed ({len(account.fresh)} tensors absent)" in account.sentence()


def test_half_a_layer_is_an_error_even_if_allowed(model: nn.Module, tensors: Tensors) -> None:
    message = refused(model, without(tensors, "layer4.0.conv2"), allow_missing=("layer4",))
    assert "tensors of layer4, and half a layer is more likely a mistake" in message
    assert message.endswith("give --allow-missing layer4.0.conv2 to allow only what is absent.")
    account = load_into(
        model, without(tensors, "layer4.0.conv2"), head=("fc",), allow_missing=("layer4.0.conv2",), where="file.pth"
    )
    assert account.fresh == ("layer4.0.conv2.weight",)


def test_single_missing_tensors_are_grouped_by_layer(model: nn.Module, tensors: Tensors) -> None:
    message = refused(model, without(tensors, "layer1.0.bn1.weight", "layer1.0.bn1.bias", "layer2.0.conv1"))
    assert "missing layer1.0.bn1 (weight, bias), layer2.0.conv1 (weight)." in message
    assert "--allow-missing layer1.0.bn1.weight,layer1.0.bn1.bias,layer2.0.conv1" in message


def test_wrong_shapes_are_listed_with_both_shapes(model: nn.Module, tensors: Tensors) -> None:
    shape = tuple(tensors["layer1.0.conv1.weight"].shape)
    message = refused(model, {**tensors, "layer1.0.conv1.weight": torch.zeros(2, 3)})
    assert f"wrong shape: layer1.0.conv1.weight (2, 3), expected {shape}" in message
    message = refused(model, {**tensors, "bn1.weight": tensors["bn1.weight"].to(torch.int8)})
    assert "bn1.weight int8, expected floating point" in message


@pytest.mark.parametrize(
    ("layer", "rest"), [("layr4", "; did you mean layer4"), ("nonsense", "; its layers are conv1, ")]
)
def test_allowing_an_unknown_layer_is_a_usage_error(model: nn.Module, tensors: Tensors, layer: str, rest: str) -> None:
    with pytest.raises(UsageError) as error:
        load_into(model, tensors, head=("fc",), allow_missing=(layer,), where="file.pth")
    assert f'--allow-missing: test_resnet has no layer "{layer}"{rest}' in str(error.value)


def test_old_files_without_batch_counters_load(model: nn.Module, tensors: Tensors) -> None:
    old = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    account = load_into(model, old, head=("fc",), where="file.pth")
    assert (account.fresh, account.unexpected) == ((), ())
    assert not any(n.endswith("num_batches_tracked") for n in account.loaded)


def test_a_few_unexpected_tensors_are_reported(model: nn.Module, tensors: Tensors) -> None:
    account = load_into(model, {**tensors, "extra.mask": torch.ones(2)}, head=("fc",), where="file.pth")
    assert account.unexpected == ("extra.mask",)
    assert account.sentence().endswith("; 1 without a place here ignored: extra.mask")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(model: nn.Module, tensors: Tensors, dtype: torch.dtype) -> None:
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    load_into(model, cast, head=("fc",), where="file.pth")
    state = model.state_dict()
    assert state["conv1.0.weight"].dtype == torch.float32
    assert torch.equal(state["conv1.0.weight"], cast["conv1.0.weight"].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(model: nn.Module, tensors: Tensors, value: float) -> None:
    spoilt = tensors["layer2.0.conv1.weight"].clone()
    spoilt.view(-1)[7] = value
    message = refused(model, {**tensors, "layer2.0.conv1.weight": spoilt})
    assert message.startswith("The weights (file.pth) hold NaN or infinite values in layer2.0.conv1.weight")


def test_weights_of_another_network_are_called_that() -> None:
    small, deep, wide = (timm.create_model(n) for n in ("resnet18", "resnet34", "resnet50"))
    text = "The weights (file.pth) are those of another network than resnet18 (they look like resnet34): "
    assert refused(small, deep.state_dict()).startswith(text)
    text = "The weights (file.pth) are those of another network than resnet18 (they look like resnet50): "
    assert refused(small, wide.state_dict()).startswith(text)
    assert "another network than resnet50 (they look like resnet18)" in refused(wide, small.state_dict())
    message = refused(deep, small.state_dict())
    text = "The weights (file.pth) do not fit resnet34 (they look like resnet18): missing layer1.2 (all 10 "
    assert message.startswith(text)
    vit = timm.create_model("test_vit")
    assert "another network than test_vit" in refused(vit, small.state_dict(), head=("head",))
    assert "(they look like a vision transformer): of 80 tensors" in refused(small, vit.state_dict())


def test_the_hash_ignores_order_and_layout_and_sees_everything_else() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": torch.arange(6.0).reshape(2, 3).t().contiguous().t()}
    assert hash_tensors(tensors) == hash_tensors(same)
    for name, value in [
        ("a", tensors["a"].reshape(3, 2)),
        ("a", tensors["a"].double()),
        ("a", tensors["a"] + 1e-6),
        ("c", torch.tensor(1)),
    ]:
        assert hash_tensors({**tensors, name: value}) != hash_tensors(tensors)
    assert len(hash_tensors({"x": torch.ones(2, dtype=torch.bfloat16), "y": torch.zeros(0)})) == 64


def test_the_account_does_not_depend_on_the_files_format(model: nn.Module, tensors: Tensors, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"module.{n}": t for n, t in tensors.items()}}, tmp_path / "a.pth.tar")
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    first, second = (
        load_into(copy.deepcopy(model), read_tensors(tmp_path / name), head=("fc",), where=name)
        for name in ("a.pth.tar", "a.safetensors")
    )
    assert first.sha256 == second.sha256


# ---- reading files


class Evil:
    """Would make a folder if anything unpickled it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("hacked",))


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt", "pth.tar", "safetensors", "odd"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_the_content_decides_how_a_file_is_read(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"file.{suffix}"
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    found = read_tensors(path)
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in tensors.items()}


def test_training_checkpoints_with_options_are_read(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, name="run")
    torch.save({"args": args, "epoch": 3, "state_dict": {"module.a": torch.ones(2)}}, tmp_path / "c.pth")
    assert list(read_tensors(tmp_path / "c.pth")) == ["a"]


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_what_else_checkpoints_hold_is_read(tmp_path: Path, kind: str) -> None:
    """Whatever `torch.save` writes in a way of its own and `torch.load` reads with `weights_only`."""
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizers = [torch.optim.Adam(net.parameters(), amsgrad=True), torch.optim.SGD(net.parameters(), momentum=0.9)]
    net(torch.rand(4, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    marked = nn.Parameter(torch.ones(2))
    marked.sharded = True  # type: ignore[attr-defined]
    view = torch.arange(6.0).reshape(2, 3).T
    view.kept = "view"  # type: ignore[attr-defined]
    # torch.load does not read the newer types from the older format
    types = [torch.bfloat16, torch.bool] + [torch.float8_e4m3fn, torch.uint16] * (kind == "zip")
    held: dict[str, Any] = {
        "epoch": 3,
        "state_dict": net.state_dict(),
        "ema": torch.optim.swa_utils.AveragedModel(net).state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], 10).state_dict(),
        "parameters": [marked, nn.Parameter(torch.ones(2)), view, torch.ones(2, dtype=torch.complex64).conj()],
        "types": [torch.ones(2, dtype=one) for one in types],
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95), size=torch.Size([3, 32]), device=torch.device("cuda", 0)),
        "seen": {1, 2, "a", None},
        "empty": [set(), OrderedDict(), Counter(), ()],
        "counted": Counter({"cat": 2, 7: 1}),
        "ordered": OrderedDict([("b", torch.float16), (0, 1 + 2j)]),
        "bytes": [b"abc", 2**70, float("nan"), {0.5: -(2**40), True: "\u20ac"}],
    }
    torch.save(held, tmp_path / "c.pth", _use_new_zipfile_serialization=kind == "zip")
    found: Any = read_torch(tmp_path / "c.pth")
    assert list(found) == list(held)
    for name in ("seen", "counted", "ordered", "args", "empty"):
        assert found[name] == held[name]
    assert (found["parameters"][0].sharded, found["parameters"][2].kept) == (True, "view")
    assert found["optimizers"][0]["state"][0]["exp_avg"].equal(held["optimizers"][0]["state"][0]["exp_avg"])
    assert sorted(read_tensors(tmp_path / "c.pth")) == sorted(net.state_dict())


@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol 2", "protocol 4", "protocol 5"])
def test_an_unsafe_pickle_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    held = {"a": torch.ones(2), "b": Evil()}
    if kind.startswith("protocol"):
        Path("evil.pth").write_bytes(pickle.dumps({"b": Evil()}, protocol=int(kind[-1])))
    else:
        torch.save(held, "evil.pth", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(WeightsError) as error:
        read_tensors(Path("evil.pth"))
    assert str(error.value).startswith("evil.pth is a pickle that holds more than tensors")
    assert "could run code, so it was not loaded; save its state_dict() with" in str(error.value)
    if kind in ("zip", "legacy"):
        assert "mkdir" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pth"]


def test_a_pickled_model_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"holds more than tensors \(torch\.nn\.modules\.linear\.Linear\)"):
        read_tensors(tmp_path / "model.pth")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.002, 0.3, 0.95])
def test_truncated_files_are_named(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "cut.pth"
    tensors = {"a": torch.rand(100, 100)}
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match=r"^cut\.pth is truncated, damaged or not a weight file \([\d,]+ bytes: "):
        read_tensors(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pth", b"", r"^a\.pth is empty; copy or download it again\.$"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer and not the weights"),
        ("a.pth", b"<!DOCTYPE html><html></html>", "is a web page and not weights"),
        ("a.npz", b"PK\x03\x04 and more", "is a NumPy file; expected safetensors or a state dict"),
        ("a.pth", b"some text that is no weights at all", "is truncated, damaged or not a weight file"),
        ("a.pth", json.dumps({"a": 1}).encode(), "is truncated, damaged or not a weight file"),
    ],
)
def test_what_people_mistake_for_weights(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path / name)


def test_files_without_tensors_and_absent_files(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(
        WeightsError, match=r"^a\.pth holds epoch and no tensors; expected a state dict, so give a file"
    ):
        read_tensors(tmp_path / "a.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match=r"^list\.pth holds a list; expected a state dict"):
        read_tensors(tmp_path / "list.pth")
    with pytest.raises(WeightsError, match=r"^Could not read the weights .*b\.pth \(No such file[^)]*\); give"):
        read_tensors(tmp_path / "b.pth")


SHARED = Path(os.environ.get("FINETUNE_SHARED_WEIGHTS", Path(__file__).parents[2] / "shared" / "weights"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs $FINETUNE_SHARED_WEIGHTS or ../shared/weights")
def test_real_partial_imagenet_weights() -> None:
    from weights.arch import resolve_arch
    from weights.locate import locate

    found = locate(resolve_arch("resnet18"), str(SHARED))
    assert found.path is not None
    assert found.arch.full_name == "resnet18.tv_in1k"
    tensors = read_tensors(found.path)
    model = timm.create_model("resnet18", num_classes=100)
    assert "missing layer4 (all 25 tensors). Next: give complete weights, or --allow-missing layer4" in refused(
        model, tensors
    )
    account = load_into(model, tensors, head=("fc",), allow_missing=("layer4",), where=found.source)
    assert (len(account.loaded), len(account.reinitialised), account.unexpected) == (75, 2, ())
