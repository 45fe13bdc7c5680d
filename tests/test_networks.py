"""Our own networks: they are what their descriptions say, and timm and the cut take them like any other."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from make_data import write_cifar100_python
from make_networks import used
from make_run import tiny_recipe, write_weights
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, cross_entropy, linear, max_pool2d, relu

from finetune.cut import cut_model
from finetune.fold import fold_batch_norms
from finetune.layers import freeze, select_layers
from finetune.models import build, head_names
from finetune.networks import NETWORKS, DownSamplingBlock, IdentityResNet, settings_of
from finetune.networks.identity import PreActivationBlock
from finetune.pipeline import run
from weights.arch import resolve_arch
from weights.errors import UsageError

ROOT = Path(__file__).parents[1]
State = dict[str, Tensor]


def make(name: str, classes: int = 10, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return used(timm.create_model(f"finetune_{name}", num_classes=classes, **settings))


@pytest.mark.parametrize(
    ("name", "classes", "settings", "count"),
    [
        ("figure1", 100, {}, 3_559_556),
        ("figure1_shared", 100, {}, 1_340_260),
        ("singlestage", 100, {}, 116_004),
        ("multistage", 100, {}, 181_572),
        ("vgg16", 10, {}, 15_253_578),
        ("resnet50_layer4", 10, {}, 8_882_762),
        ("identity", 10, {}, 11_171_146),
        ("identity", 10, {"shortcut": "A"}, 10_999_114),
    ],
)
def test_parameter_counts(name: str, classes: int, settings: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"finetune_{name}", num_classes=classes, **settings)
        other = timm.create_model(f"finetune_{name}", num_classes=110 - classes, **settings)
    head = model.get_classifier()
    change = (110 - 2 * classes) * (head.in_features + 1)  # the other class count of the two in the assignments
    assert sum(value.numel() for value in model.parameters()) == count
    assert sum(value.numel() for value in other.parameters()) == count + change


def test_the_page_of_networks_draws_each_and_counts_as_the_code_does() -> None:
    text = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \|", text, re.MULTILINE)
    assert [name for name, *_ in rows] == list(NETWORKS)
    for name, *counts in rows:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "```text\nimages" in section
        for setting in settings_of(name):
            assert f"`--{setting}" in section
        for classes, count in zip((10, 100), counts, strict=True):
            with torch.device("meta"):
                model = timm.create_model(f"finetune_{name}", num_classes=classes)
            assert f"{sum(value.numel() for value in model.parameters()):,}" == count, (name, classes)


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_and_the_cut_take_it_like_any_other(name: str) -> None:
    model = make(name)
    arch = resolve_arch(f"finetune_{name}")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        features = model.forward_features(images)
        assert logits.shape == (3, 10)
        assert torch.equal(model.forward_head(features), logits)
        before = model.forward_head(features, pre_logits=True)
        assert before.shape == (3, model.num_features)

    head = head_names(arch)
    assert model.get_submodule(head[0]) is model.get_classifier()
    assert isinstance(model.get_submodule(arch.config["first_conv"]), nn.Conv2d)
    chosen = select_layers(model, ["head"], head)
    freeze(model, chosen)
    cut = cut_model(model, chosen, torch.randn(2, 3, 32, 32))
    assert cut.prefix is not None
    assert set(cut.suffix.state_dict()) == {f"{head[0]}.weight", f"{head[0]}.bias"}
    with torch.no_grad():
        torch.testing.assert_close(cut.suffix(*cut.prefix(images)), logits)
        folded, count = fold_batch_norms(cut.prefix)
        assert count >= 1  # figure1_shared has one batch norm that is used only once
        torch.testing.assert_close(folded(images)[0], before, rtol=1e-4, atol=1e-5)

    model.reset_classifier(7)
    assert (model.num_classes, model(images).shape) == (7, (3, 7))
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), before)


def test_settings() -> None:
    assert settings_of("figure1") == settings_of("figure1_shared") == {"dropout": 0.25}
    assert settings_of("vgg16") == {"hidden": 512, "dropout": 0.5}
    assert settings_of("singlestage") == {"blocks": 6}
    assert settings_of("multistage") == {"blocks": (2, 2, 2)}
    assert settings_of("resnet50_layer4") == {}
    assert settings_of("identity") == {"blocks": (2, 2, 2, 2), "shortcut": "B"}
    with torch.device("meta"):
        assert len(timm.create_model("finetune_singlestage", blocks=[3]).layer1) == 3
        deep = timm.create_model("finetune_multistage", blocks=(1, 2, 3))
        assert [len(deep.layer1), len(deep.layer2), len(deep.layer3)] == [1, 2, 3]
        assert len(timm.create_model("finetune_identity", blocks=(1, 1, 1, 4)).layer4) == 4
        assert timm.create_model("finetune_vgg16", hidden=64).classifier[3].in_features == 64
        drops = [m.p for m in timm.create_model("finetune_vgg16", dropout=0.1).modules() if isinstance(m, nn.Dropout)]
        assert drops == [0.1, 0.1]
        assert timm.create_model("finetune_figure1", dropout=0).drop.p == 0


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("multistage", {"blocks": (2, 2)}, "blocks is 2,2, and this network needs 3 whole numbers of at least 1"),
        ("identity", {"blocks": (2, 0, 2, 2)}, "blocks is 2,0,2,2, and this network needs 4 whole numbers"),
        ("singlestage", {"blocks": (2, 2)}, "blocks is 2,2, and this network needs one number of at least 1; give for"),
        ("identity", {"blocks": (2, 10**20, 2, 2)}, "blocks is 2,100000000000000000000,2,2; give at most 1,000 for a"),
        ("identity", {"shortcut": "C"}, "shortcut is C; it can be A (max-pool and zeros) or B (1 × 1"),
        ("vgg16", {"hidden": 0}, "hidden is 0; give the width of the linear layers, from 1 to 16,384."),
        ("vgg16", {"hidden": 10**7}, "hidden is 10000000; give the width of the linear layers, from 1 to 16,384."),
        ("figure1", {"dropout": 1}, "dropout is 1; give a number from 0 (off) to below 1."),
    ],
)
def test_settings_that_cannot_be_right(name: str, settings: dict[str, object], words: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError) as error:
        timm.create_model(f"finetune_{name}", **settings)
    assert words in str(error.value)


def test_image_sizes() -> None:
    with torch.device("meta"), pytest.raises(UsageError) as error:
        build(resolve_arch("finetune_figure1"), 10, 64)
    assert str(error.value) == (
        "finetune_figure1 takes images of 32 × 32 pixels and cannot be built for 64 × 64, because its last pooling "
        "would leave more or less than one value per channel; leave --image-size out."
    )
    model, arguments = build(resolve_arch("finetune_resnet50_layer4"), 10, 224)
    assert arguments == {}
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 1024, 2, 2)
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 10)


def test_a_down_sampling_block_doubles_its_channels() -> None:
    assert DownSamplingBlock(16, 32)(torch.zeros(2, 16, 32, 32)).shape == (2, 32, 16, 16)
    for dim in (16, 48):
        with pytest.raises(UsageError, match=rf"dim has to be 32 for dim_in 16, and it is {dim}"):
            DownSamplingBlock(16, dim)


def zero_convolutions(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    return block


def test_identity_blocks() -> None:
    x = torch.randn(4, 64, 32, 32)
    assert torch.equal(zero_convolutions(PreActivationBlock(64, 64, 1, "B"))(x), x)
    for shortcut in ("A", "B"):
        model = IdentityResNet(10, shortcut=shortcut)
        assert model.layer2[0](x).shape == (4, 128, 16, 16)
    halved = zero_convolutions(PreActivationBlock(64, 128, 2, "A"))(x)
    assert torch.equal(halved[:, :64], max_pool2d(x, 2))
    assert halved[:, 64:].abs().max() == 0


def test_shortcuts_of_figure1_shared_begin_by_passing_on_what_they_get() -> None:
    for stage, (channels, stride) in enumerate(((32, 1), (32, 2), (64, 2), (128, 2)), start=1):
        layer = timm.create_model("finetune_figure1_shared").get_submodule(f"layer{stage}")
        x = torch.randn(2, channels, 8, 8)
        begun = layer.shortcut_init(x)
        assert torch.equal(begun[:, :channels], x[..., ::stride, ::stride])
        assert not begun[:, channels:].any()  # channels that the stage adds
        assert torch.equal(layer.shortcut(begun), begun)


def test_resnet50_layer4_begins_with_xavier_weights() -> None:
    model = timm.create_model("finetune_resnet50_layer4", num_classes=10)
    for name, fan_in, fan_out in (("layer4.5.conv2", 9 * 256, 9 * 256), ("fc", 1024, 10)):
        bound = (6 / (fan_in + fan_out)) ** 0.5
        largest = model.get_submodule(name).weight.abs().max().item()
        assert 0.98 * bound < largest <= bound


# Three networks read a second time, with functions on the state dict; make_networks.py has the other four as classes.


def norm(s: State, name: str, x: Tensor) -> Tensor:
    mean, var = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    return batch_norm(x, mean, var, s[f"{name}.weight"], s[f"{name}.bias"])


def figure1(s: State, x: Tensor) -> Tensor:
    x = relu(norm(s, "bn1", conv2d(x, s["conv1.weight"], padding=1)))
    for stage, blocks in enumerate((2, 4, 4, 2), 1):
        for name in (f"layer{stage}.{block}" for block in range(blocks)):
            stride = 2 if stage > 1 and name.endswith(".0") else 1
            y = relu(norm(s, f"{name}.bn1", conv2d(x, s[f"{name}.conv1.weight"], stride=stride, padding=1)))
            y = norm(s, f"{name}.bn2", conv2d(y, s[f"{name}.conv2.weight"], padding=1))
            if stride == 2:
                x = norm(s, f"{name}.shortcut.1", conv2d(x, s[f"{name}.shortcut.0.weight"], stride=2))
            x = relu(x + y)
    return linear(max_pool2d(x, 4).flatten(1), s["fc.weight"], s["fc.bias"])


def identity(s: State, x: Tensor) -> Tensor:
    x = conv2d(x, s["conv1.weight"], padding=1)
    for name in ("1.0", "1.1", "2.0", "2.1", "3.0", "3.1", "4.0", "4.1"):
        stride = 2 if name in ("2.0", "3.0", "4.0") else 1
        block = f"layer{name}"
        y = conv2d(relu(norm(s, f"{block}.bn1", x)), s[f"{block}.conv1.weight"], stride=stride, padding=1)
        y = conv2d(relu(norm(s, f"{block}.bn2", y)), s[f"{block}.conv2.weight"], padding=1)
        if stride == 2:
            option_b = s.get(f"{block}.skip.weight")
            smaller = max_pool2d(x, 2)
            x = torch.cat([smaller, 0 * smaller], 1) if option_b is None else conv2d(x, option_b, stride=2)
        x = y + x
    return linear(avg_pool2d(x, 4).flatten(1), s["fc.weight"], s["fc.bias"])


def vgg16(s: State, x: Tensor) -> Tensor:
    at = 0
    for convolutions in (2, 2, 3, 3, 3):
        for _ in range(convolutions):
            x = conv2d(x, s[f"features.{at}.weight"], s[f"features.{at}.bias"], padding=1)
            x = relu(norm(s, f"features.{at + 1}", x))
            at += 3
        x = max_pool2d(x, 2)
        at += 1
    x = x.flatten(1)
    for layer in (0, 3):
        x = relu(linear(x, s[f"classifier.{layer}.weight"], s[f"classifier.{layer}.bias"]))
    return linear(x, s["classifier.6.weight"], s["classifier.6.bias"])


@pytest.mark.parametrize(
    ("reading", "settings"),
    [(figure1, {}), (identity, {"shortcut": "A"}), (identity, {"shortcut": "B"}), (vgg16, {})],
    ids=["figure1", "identity-A", "identity-B", "vgg16"],
)
def test_a_second_reading_agrees(reading: Callable[[State, Tensor], Tensor], settings: dict[str, object]) -> None:
    model = make(reading.__name__, **settings).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found, expected = model(images), reading(tensors, images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = [images, *model.parameters()]
    gradients = [torch.autograd.grad(logits.square().sum(), wanted) for logits in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_learns_a_batch_by_heart(name: str) -> None:
    small = {"identity": {"blocks": (1, 1, 1, 1)}, "singlestage": {"blocks": 1}, "vgg16": {"dropout": 0, "hidden": 64}}
    torch.manual_seed(0)
    model = timm.create_model(f"finetune_{name}", num_classes=10, **small.get(name, {}))
    labels = torch.tensor([0, 3, 5, 9])
    images = torch.randn(4, 3, 32, 32) + torch.randn(4, 3, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3 if name == "singlestage" else 1e-3)
    losses: list[float] = []
    while len(losses) < 40 and min(losses, default=1) > 0.15:
        loss = cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 1.5
    assert losses[-1] <= 0.15


REGISTRATION = """
import importlib.util, sys
import finetune
assert not {"torch", "timm"} & set(sys.modules)
assert importlib.util.find_spec("timm").name == "timm"  # to look for it is not to import it
import timm
assert not any(type(finder).__module__.startswith("finetune") for finder in sys.meta_path)
assert not type(timm.__spec__.loader).__module__.startswith("finetune")
first = timm.models.model_entrypoint("finetune_figure1")
assert timm.create_model("finetune_singlestage", num_classes=7).fc.out_features == 7

for name in [name for name in sys.modules if name.partition(".")[0] == "finetune"]:
    del sys.modules[name]
for name in timm.list_models("finetune_*"):
    del timm.models._registry._model_entrypoints[name]
import finetune  # now timm is there before
assert timm.models.model_entrypoint("finetune_figure1") is not first
print(*timm.list_models("finetune_*"))
"""


def test_timm_knows_them_whichever_is_imported_first() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REGISTRATION], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stderr == ""
    assert sorted(done.stdout.split()) == sorted(f"finetune_{name}" for name in NETWORKS)


def test_a_run_from_a_checkpoint_of_ours(tmp_path: Path) -> None:
    write_cifar100_python(tmp_path / "cifar", 48, 20)
    weights = write_weights(tmp_path / "w.safetensors", "finetune_multistage")
    recipe = tiny_recipe(tmp_path / "cifar", weights, tmp_path / "cache", "finetune_multistage")
    summary = run(recipe, tmp_path / "run")
    assert summary["arch"] == "finetune_multistage"
    assert summary["trained_layers"] == ["fc"]
    assert summary["features"]["where"] == "ram"
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    assert model.get_classifier().out_features == summary["data"]["classes"]
