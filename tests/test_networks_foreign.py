"""Checkpoints that somebody's own class made, with the assignment's module names, load and give the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from make_networks import StudentResNet50, StudentShared, StudentStages, used
from torch import Tensor, nn

import finetune  # noqa: F401  timm knows our networks after it
from weights.errors import WeightsError
from weights.load import load_into, read_tensors

Tensors = dict[str, Tensor]
SINGLE: dict[str, Any] = {"widths": (32,), "depth": 6}
MULTI: dict[str, Any] = {"widths": (16, 32, 64), "depth": 2}


def load(name: str, tensors: Tensors, *, keep_head: bool = True) -> nn.Module:
    """Return our network with the tensors in it, in eval mode."""
    model = timm.create_model(f"finetune_{name}", num_classes=10)
    account = load_into(model, tensors, head=("fc",), where="student.pth", keep_head=keep_head)
    assert account.unexpected == account.fresh == ()
    return model.eval()


def refused(name: str, tensors: Tensors) -> str:
    with pytest.raises(WeightsError) as error:
        load(name, tensors)
    return str(error.value)


def gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensors]:
    """Logits, and of their squares' sum the gradient of the images and of each parameter."""
    images = images.clone().requires_grad_()
    logits = model(images)
    names = [name for name, _ in model.named_parameters()]
    wanted = [images, *model.parameters()]  # figure1_shared never asks for its first shortcut
    of_images, *rest = torch.autograd.grad(logits.square().sum(), wanted, allow_unused=True, materialize_grads=True)
    return logits, of_images, dict(zip(names, rest, strict=True))


def renamed(name: str, student: nn.Module, found: Tensors) -> Tensors:
    """Values of a student's parameters under our names, by the way that their weights take."""
    state = {key: value.float() for key, value in {**student.state_dict(), **found}.items()}
    return {key: value.detach().double() for key, value in load(name, state).named_parameters()}


def assert_same(found: Tensor, expected: Tensor) -> None:
    nothing = 1e-12  # what is left in fp64 of a bias's gradient where a norm takes the bias away again
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.detach().abs().max().item() + nothing)


@pytest.mark.parametrize(
    ("name", "student_class"),
    [
        ("figure1_shared", lambda: StudentShared(10)),
        ("singlestage", lambda: StudentStages(10, **SINGLE, flat=True)),
        ("multistage", lambda: StudentStages(10, **MULTI, flat=True)),
        ("multistage", lambda: StudentStages(10, **MULTI, flat=False)),
        ("resnet50_layer4", lambda: StudentResNet50(10, bias=True)),
        ("resnet50_layer4", lambda: StudentResNet50(10, bias=False)),
    ],
)
def test_equal_logits_and_gradients(name: str, student_class: Callable[[], nn.Module], tmp_path: Path) -> None:
    student = used(student_class())
    for module in student.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)  # large enough to matter
    parallel = {f"module.{key}": value for key, value in student.state_dict().items()}
    torch.save({"epoch": 300, "state_dict": parallel}, tmp_path / "student.pth.tar")
    model = load(name, read_tensors(tmp_path / "student.pth.tar"))
    model, student = model.double(), student.double()  # in fp32 a value near 0 may be on either side of a ReLU
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for training in (False, True):  # in training batch norms go by the batch, so this is another function
        student.train(training)
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        (logits, of_images, found), (their_logits, of_theirs, theirs) = (
            gradients(network, images) for network in (model, student)
        )
        assert_same(logits, their_logits)
        assert_same(of_images, of_theirs)
        if len(found) == len(theirs):  # else ours has no convolution biases, and what they did is in its norms
            for key, value in renamed(name, student, theirs).items():
                assert_same(found[key], value)


def test_names_in_safetensors_order_and_a_new_head() -> None:
    student = used(StudentStages(100, (16, 32, 64), 12, flat=True))  # blocks.10 sorts before blocks.2
    tensors = {name: student.state_dict()[name] for name in sorted(student.state_dict())}
    model = timm.create_model("finetune_multistage", num_classes=10, blocks=(12, 12, 12))
    account = load_into(model, tensors, head=("fc",), where="student.pth")
    assert account.reinitialised == ("fc.weight", "fc.bias")
    assert torch.equal(model.get_submodule("layer3.11.conv2").weight, tensors["blocks.35.conv2.weight"])


def test_convolutions_without_biases_where_ours_have_them() -> None:
    student = used(StudentStages(10, **SINGLE, flat=True))
    for module in student.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load("singlestage", student.state_dict())(images), student(images))


def test_a_vgg_whose_classifier_begins_with_a_dropout() -> None:
    source = used(timm.create_model("finetune_vgg16", num_classes=10))
    numbers = {"classifier.0.": "classifier.1.", "classifier.3.": "classifier.4."}
    tensors = {}
    for name, value in source.state_dict().items():
        start = next((old for old in numbers if name.startswith(old)), "")
        tensors[numbers.get(start, "") + name.removeprefix(start)] = value
    assert "classifier.4.bias" in tensors
    model = timm.create_model("finetune_vgg16", num_classes=10).eval()
    load_into(model, tensors, head=("classifier.6",), where="student.pth", keep_head=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), source(images))


def test_a_tensor_without_a_place_is_named() -> None:
    resnet = StudentResNet50(10, bias=True).state_dict()
    extra = "layer2.1.make_equal_channel.0.weight"
    assert refused("resnet50_layer4", {**resnet, extra: torch.zeros(256, 256, 1, 1)}) == (
        f"The weights (student.pth) do not fit finetune_resnet50_layer4: there is no place for {extra}, although other "
        "names are those of its assignment; leave these out of the file, or give the --arch that it belongs to."
    )
    shared = StudentShared(10).state_dict()
    assert "finetune_figure1_shared: there is no place for block5.bn.bias, " in refused(
        "figure1_shared", {**shared, "block5.bn.bias": torch.zeros(4)}
    )
    single = StudentStages(10, **SINGLE, flat=True).state_dict()
    assert "finetune_singlestage: there is no place for norm.weight, " in refused(
        "singlestage", {**single, "norm.weight": torch.zeros(4)}
    )
    multi = StudentStages(10, **MULTI, flat=True).state_dict()
    assert "finetune_singlestage: there is no place for blocks.2.shortcut.0.weight, " in refused("singlestage", multi)


def test_another_number_of_blocks_and_what_is_missing() -> None:
    deep = StudentStages(10, (16, 32, 64), 3, flat=False).state_dict()
    assert refused("multistage", deep) == (
        "The weights (student.pth) do not fit finetune_multistage: it holds 9 blocks, stage1.0 to stage3.2, and the "
        "network has 6; give the network as many, or another file."
    )
    shared = StudentShared(10).state_dict()
    del shared["block3.conv.weight"]
    missing = refused("figure1_shared", shared)
    assert missing.endswith("missing layer3.conv (weight). Next: give complete weights.")  # no start from random there
    assert refused("figure1_shared", StudentShared(100).state_dict()) == (
        "The weights (student.pth) were trained for 100 classes and the data have 10; give data with the same classes, "
        "or use finetune run without --keep-head, which gives them a new head."
    )
    ours = timm.create_model("finetune_multistage", num_classes=100).state_dict()  # only the head has another name
    assert "were trained for 100 classes and the data have 10" in refused(
        "multistage", {name.replace("fc.", "linear."): tensor for name, tensor in ours.items()}
    )


def test_files_of_other_networks_are_told_as_before() -> None:
    other = timm.create_model("test_resnet", num_classes=10).state_dict()
    for name in ("figure1_shared", "singlestage", "multistage", "resnet50_layer4", "vgg16"):
        model = timm.create_model(f"finetune_{name}", num_classes=10)
        with pytest.raises(WeightsError, match="are those of another network than finetune_"):
            load_into(model, other, head=("fc",), where="file.pth")
