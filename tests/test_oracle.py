"""The oracle: a textbook loop that shares nothing with the engine gives the same losses, step for step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from make_data import make_images
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from finetune.augment import Preprocessing, Views, make_views
from finetune.cut import cut_model
from finetune.events import Events
from finetune.fit import Split, Trainer
from finetune.images import ImageSet
from finetune.inference import Source
from finetune.layers import freeze, select_layers
from finetune.order import epoch_batches
from finetune.placement import Placement
from finetune.precision import Choice
from finetune.prefix import PreparedPrefix, prepare_prefix
from finetune.recipe import Recipe
from finetune.sources import FeatureBuilder, Live

CPU = torch.device("cpu")
Plan = list[list[tuple[int, bool]]]
"""An epoch's batches, each a list of (row, mirrored)."""

# The oracle: what anybody would write with torch and torchvision alone.

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.25, 0.3)


class Photos(Dataset[tuple[torch.Tensor, int]]):
    """Images (N, 3, H, W), mirrored where the sampler says so, resized and normalised one by one."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, size: int) -> None:
        self.images, self.labels = images, labels
        self.transform = v2.Compose(
            [
                v2.ToPILImage(),
                v2.Resize((size, size)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        row, mirrored = key
        image = v2.functional.horizontal_flip(self.images[row]) if mirrored else self.images[row]
        return self.transform(image), int(self.labels[row])


def textbook(
    model: nn.Module, trained: tuple[str, ...], head: str, photos: Photos, epochs: list[Plan], recipe: Recipe
) -> list[float]:
    """Fine-tune the layers `trained` of a model on-the-fly; return the loss of every step."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(f"{layer}." for layer in trained)))
        if parameter.requires_grad:
            lr = recipe.lr * recipe.head_lr_scale if name.startswith(head) else recipe.lr
            groups.setdefault((lr, recipe.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    optimizer = torch.optim.SGD(
        [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()],
        momentum=recipe.momentum,
        nesterov=True,
    )
    steps = sum(len(plan) for plan in epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [lr for lr, _ in groups], total_steps=steps + 1, pct_start=recipe.warmup, cycle_momentum=False
    )
    losses = []
    for plan in epochs:
        model.train()
        for name, module in model.named_children():
            if not any(layer == name or layer.startswith(f"{name}.") for layer in trained):
                module.eval()
        for name, module in model.named_modules():
            if name.count(".") == 1 and name.split(".")[0] in ("blocks", "stages") and name not in trained:
                module.eval()
        for images, labels in DataLoader(photos, batch_sampler=plan):
            loss = functional.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return losses


# The engine, from a cut model to a trainer.

IMAGES, BATCH, EPOCHS = 40, 8, 4  # 20 steps
RECIPE = Recipe(weight_decay=5e-4, epochs=EPOCHS, batch_size=BATCH, augment="flip", lr=0.01, head_lr_scale=10.0, seed=3)
ARCHS: dict[str, tuple[int, dict[str, Any], tuple[str, ...], str]] = {
    "resnet18": (64, {}, ("layer4", "fc"), "fc"),
    "test_convnext": (64, {}, ("stages.3", "head.fc"), "head.fc"),
    "test_vit": (32, {"img_size": 32}, ("blocks.5", "norm", "head"), "head"),
}


@pytest.fixture(scope="module")
def data() -> ImageSet:
    made = make_images(IMAGES, 0, classes=4)
    return ImageSet(torch.from_numpy(made.train), torch.from_numpy(made.train_labels), made.classes)


def new_model(arch: str) -> nn.Module:
    """A network that has seen something: its batch norms' statistics are not those of a new one."""
    _, settings, _, _ = ARCHS[arch]
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=4, **settings)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def recorded(trainer: Trainer, split: Split, epochs: int) -> list[float]:
    """Train and return the loss of every step."""
    losses: list[float] = []
    step = trainer.step

    def recording(
        inputs: tuple[torch.Tensor, ...], labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        each, right = step(inputs, labels, weights)
        losses.append(float(each.mean()))
        return each, right

    trainer.step = recording  # type: ignore[method-assign]
    for epoch in range(epochs):
        assert trainer.train_epoch(split, epoch, lambda done, of: None, lambda: False) is not None
    return losses


def engine_source(
    how: str, data: ImageSet, views: Views, preprocessing: Preprocessing, prefix: PreparedPrefix, folder: Path
) -> Source:
    if how == "off":
        return Live(data, views, preprocessing, prefix, CPU, torch.float32)
    builder = FeatureBuilder(prefix, Placement(how, True, 0, ""), folder, 10**9, Events())
    return builder.features(data, views, "train")


@pytest.mark.parametrize("arch", [*ARCHS])
def test_training_gives_the_losses_of_a_textbook_loop(arch: str, data: ImageSet, tmp_path: Path) -> None:
    size, _, layers, head = ARCHS[arch]
    batches = IMAGES // BATCH
    epochs = [
        [list(zip(rows.tolist(), (views == 1).tolist(), strict=True)) for rows, views in plan]
        for plan in (list(epoch_batches(IMAGES, batches, 2, epoch, RECIPE)) for epoch in range(EPOCHS))
    ]
    original = new_model(arch)
    truth = textbook(copy.deepcopy(original), layers, head, Photos(data.images, data.labels, size), epochs, RECIPE)
    assert len(truth) == 20
    assert abs(truth[-1] / truth[0] - 1) > 0.01  # it has learned, so there is something to agree on

    views = make_views("flip", IMAGES, 32, count=None, seed=0)
    preprocessing = Preprocessing(size, MEAN, STD, "bilinear")
    for how in ("ram", "disk", "off"):
        model = copy.deepcopy(original)
        chosen = select_layers(model, layers, [head])
        freeze(model, chosen)
        cut = cut_model(model, chosen, preprocessing(data.images[:2]))
        prefix = prepare_prefix(cut, preprocessing, data.images[:8], CPU, lambda build: Choice("fp32", False, 1, 0, ""))
        fresh = frozenset(name for name in chosen.trained if name.startswith(head))
        trainer = Trainer(cut.suffix, fresh, RECIPE, IMAGES, torch.float32, CPU)
        split = Split(engine_source(how, data, views, preprocessing, prefix, tmp_path), data.labels, views.count)
        assert recorded(trainer, split, EPOCHS) == pytest.approx(truth, rel=1e-4), how


def test_an_uncut_model_gives_the_losses_of_a_textbook_loop(data: ImageSet) -> None:
    model = new_model("test_vit")
    everything = tuple(name for name, _ in model.named_children())
    epochs = [
        [list(zip(rows.tolist(), (views == 1).tolist(), strict=True)) for rows, views in plan]
        for plan in (list(epoch_batches(IMAGES, 5, 2, epoch, RECIPE)) for epoch in range(2))
    ]
    photos = Photos(data.images, data.labels, 32)
    recipe = replace(RECIPE, epochs=2)
    truth = textbook(copy.deepcopy(model), everything, "head", photos, epochs, recipe)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(f"{layer}." for layer in everything)))
    trainer = Trainer(model, frozenset({"head.weight", "head.bias"}), recipe, IMAGES, torch.float32, CPU)
    views = make_views("flip", IMAGES, 32, count=None, seed=0)
    live = Live(data, views, Preprocessing(32, MEAN, STD, "bilinear"), None, CPU, torch.float32)
    assert recorded(trainer, Split(live, data.labels, 2), 2) == pytest.approx(truth, rel=1e-4)
