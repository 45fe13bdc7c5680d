"""The training loop and its parts, on a suffix that trains in no time."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from finetune.fit import (
    Listener,
    Progress,
    Split,
    Trainer,
    fit,
    require_finite,
)
from finetune.inference import cast, predict, score
from finetune.order import epoch_batches
from finetune.recipe import Recipe
from weights.errors import TrainingError

CPU = torch.device("cpu")


class Table:
    """A source that holds its inputs: float32 (views, N, width)."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.values[views, rows],)


SMALL = Recipe(epochs=3, batch_size=8, augment="flip", label_smoothing=0.0, lr=0.05, head_lr_scale=1.0)


def make_split(images: int = 30, *, shift: int = 0) -> Split:
    """Four classes that can be told apart; `shift` labels every image as another class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 4
    values = torch.randn(2, images, 6, generator=generator)
    values[:, :, :4] += 3 * functional.one_hot(labels, 4)
    return Split(Table(values), (labels + shift) % 4, 2)


def make_trainer(recipe: Recipe = SMALL, images: int = 30) -> Trainer:
    torch.manual_seed(0)
    suffix = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
    return Trainer(suffix, frozenset(), recipe, images, torch.float32, CPU)


def listen(heard: list[Any], *, stop_after: int | None = None) -> Listener:
    """Write down what the loop tells; ask it to stop at a step."""
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return stop_after is not None and asked[0] > stop_after

    return Listener(
        batch=lambda epoch, done, of: heard.append(("batch", epoch, done, of)),
        epoch=lambda row: heard.append(("epoch", row["epoch"])),
        save=lambda progress, best: heard.append(("save", progress.epoch, best)),
        stop=stop,
    )


@pytest.mark.parametrize(("images", "batches"), [(30, 4), (32, 4), (7, 7), (5, 1), (1000, 63)])
def test_an_epoch_visits_every_image_once_in_even_batches(images: int, batches: int) -> None:
    made = list(epoch_batches(images, batches, 2, 0, SMALL))
    sizes = {len(rows) for rows, _ in made}
    assert len(made) == batches
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([rows for rows, _ in made]).tolist()) == list(range(images))
    assert all(len(rows) == len(views) for rows, views in made)


def flat(plan: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[int], list[int]]:
    rows, views = zip(*plan, strict=True)
    return torch.cat(rows).tolist(), torch.cat(views).tolist()


def test_order_and_views_depend_on_seed_and_epoch_alone() -> None:
    first = flat(epoch_batches(100, 5, 2, 1, SMALL))
    torch.manual_seed(99)
    assert flat(epoch_batches(100, 5, 2, 1, SMALL)) == first
    for other in (epoch_batches(100, 5, 2, 2, SMALL), epoch_batches(100, 5, 2, 1, replace(SMALL, seed=1))):
        rows, views = flat(other)
        assert rows != first[0]
        assert views != first[1]


def test_both_views_of_flip_are_drawn_about_as_often() -> None:
    _, views = flat(epoch_batches(2000, 5, 2, 0, SMALL))
    assert 0.45 < sum(views) / 2000 < 0.55


def test_crop_has_a_view_for_each_epoch_or_draws_one_for_each_image() -> None:
    crop = replace(SMALL, augment="crop")
    for epoch in range(3):
        assert set(flat(epoch_batches(50, 5, 3, epoch, crop))[1]) == {epoch}
    assert set(flat(epoch_batches(50, 5, 2, 1, crop))[1]) == {0, 1}


def test_altflip_shows_each_image_from_its_other_side_in_the_next_epoch() -> None:
    seen = []
    for epoch in range(2):
        rows, views = flat(epoch_batches(50, 5, 2, epoch, replace(SMALL, augment="altflip")))
        seen.append(dict(zip(rows, views, strict=True)))
    assert all(seen[0][row] + seen[1][row] == 1 for row in range(50))


def test_an_epochs_figures_are_means_over_its_images() -> None:
    trainer, split = make_trainer(), make_split()
    sizes = [len(rows) for rows, _ in epoch_batches(30, 4, 2, 0, SMALL)]
    seen: list[tuple[float, int]] = []
    step = trainer.step

    def recording(
        inputs: tuple[torch.Tensor, ...], labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, right = step(inputs, labels, weights)
        seen.append((float(losses.mean()), int(right.sum())))
        return losses, right

    trainer.step = recording  # type: ignore[method-assign]
    rates: list[float] = []
    metrics = trainer.train_epoch(
        split, 0, lambda done, of: rates.append(trainer.optimizer.param_groups[0]["lr"]), lambda: False
    )
    assert metrics is not None
    assert metrics["train_loss"] == pytest.approx(
        sum(loss * size for (loss, _), size in zip(seen, sizes, strict=True)) / 30
    )
    assert metrics["train_accuracy"] == pytest.approx(100 * sum(right for _, right in seen) / 30)
    assert metrics["images"] == 30
    assert metrics["lr"] == rates[-2]  # the rate of the last step, which the schedule has moved on from since


def test_an_epoch_that_skips_easy_images_counts_them_by_the_others() -> None:
    """The figures of a skipping epoch are estimates for all images: those kept of the easy ones count twice."""
    trainer, split = make_trainer(replace(SMALL, skip_easy=0.5)), make_split()
    easy = torch.arange(30) < 18
    trainer.losses[~easy] = 5.0
    given: list[torch.Tensor] = []
    step = trainer.step

    def recording(
        inputs: tuple[torch.Tensor, ...], labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert weights is not None
        given.append(weights)
        _, right = step(inputs, labels, weights)
        return torch.where(weights == 2, torch.tensor(1.0), torch.tensor(3.0)), right

    trainer.step = recording  # type: ignore[method-assign]
    metrics = trainer.train_epoch(split, 1, lambda done, of: None, lambda: False)
    assert metrics is not None
    assert len(given) == trainer.batches[1] == 3  # 21 images of 30
    assert sorted(torch.cat(given).tolist()) == [1.0] * 12 + [2.0] * 9
    assert metrics["images"] == 21
    assert metrics["train_loss"] == pytest.approx((18 * 1 + 12 * 3) / 30)
    assert (trainer.losses == 1).sum() == 9  # what was seen; the others keep what they had
    assert (trainer.losses == 3).sum() == 12


def test_a_run_tells_saves_first_and_learns() -> None:
    heard: list[Any] = []
    progress = Progress()
    trainer = make_trainer()
    assert fit(trainer, make_split(), make_split(), progress, listen(heard))
    per_epoch = [
        [*(("batch", epoch, done, 4) for done in range(1, 5)), ("save", epoch, True), ("epoch", epoch)]
        for epoch in (1, 2, 3)
    ]
    assert heard == [event for events in per_epoch for event in events]
    assert [row["epoch"] for row in progress.rows] == [1, 2, 3]
    assert set(progress.rows[0]) == {
        "epoch",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "lr",
        "seconds",
        "eval_seconds",
        "images_per_second",
    }
    assert progress.rows[-1]["val_loss"] < progress.rows[0]["val_loss"]
    assert (progress.best_epoch, progress.best_loss) == (3, progress.rows[-1]["val_loss"])
    assert progress.seconds == pytest.approx(sum(row["seconds"] for row in progress.rows))


def test_without_validation_images_its_figures_are_none() -> None:
    progress = Progress()
    fit(make_trainer(), make_split(), None, progress, listen([]))
    assert {row["val_loss"] for row in progress.rows} == {row["val_accuracy"] for row in progress.rows} == {None}
    assert progress.best_epoch == 0


def test_patience_ends_a_run_that_gets_no_better() -> None:
    recipe = replace(SMALL, epochs=20, patience=2, schedule="constant", lr=0.2)
    heard: list[Any] = []
    progress = Progress()
    trainer, split = make_trainer(recipe), make_split()
    worse = make_split(shift=1)  # the better the training labels are learned, the worse these are
    assert fit(trainer, split, worse, progress, listen(heard))
    assert (progress.epoch, progress.best_epoch) == (3, 1)
    assert [event for event in heard if event[0] == "save"] == [
        ("save", 1, True),
        ("save", 2, False),
        ("save", 3, False),
    ]
    assert fit(trainer, split, worse, progress, listen(heard))  # as after a resume: patience is over still
    assert progress.epoch == 3


@pytest.mark.parametrize("stop_after", [0, 2, 4, 6])
def test_a_run_that_is_stopped_keeps_its_whole_epochs(stop_after: int) -> None:
    heard: list[Any] = []
    progress = Progress()
    assert not fit(make_trainer(), make_split(), None, progress, listen(heard, stop_after=stop_after))
    assert progress.epoch == len(progress.rows) == stop_after // 4
    assert sum(event[0] == "batch" for event in heard) == stop_after


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step() -> None:
    recipe = replace(SMALL, lr=1e30, schedule="constant", optimizer="sgd")
    split = make_split()
    twin = make_trainer(recipe)
    first_bad, bad = 0, 0.0
    for number, (rows, views) in enumerate(epoch_batches(30, 4, 2, 0, recipe), start=1):
        twin.suffix.train()
        losses, _ = twin.step(split.source.take(rows, views), split.labels[rows])
        if not math.isfinite(float(losses.sum())):
            first_bad, bad = number, float(losses.sum())
            break
    assert first_bad > 1
    heard: list[Any] = []
    with pytest.raises(TrainingError) as error:
        fit(make_trainer(recipe), split, None, Progress(), listen(heard))
    assert str(error.value) == (
        f"The training loss became {bad} at step {first_bad} (learning rate 1e+30); a finite loss was expected. Lower "
        "--lr or --head-lr-scale, or use --precision fp32, and run again."
    )
    assert not [event for event in heard if event[0] == "save"]


def test_a_finite_loss_is_let_through() -> None:
    require_finite(torch.tensor(3.0), 0, 0.1)
    with pytest.raises(TrainingError, match=r"became inf at step 8 \(learning rate 0\.1\)"):
        require_finite(torch.tensor(math.inf), 7, 0.1)


def test_the_moving_average_is_one() -> None:
    recipe = replace(SMALL, ema=0.75, epochs=8)
    trainer, split = make_trainer(recipe), make_split()
    shadow: dict[str, torch.Tensor] = {}
    batches = [batch for epoch in range(8) for batch in epoch_batches(30, 4, 2, epoch, recipe)]
    assert len(batches) / (9 + len(batches)) > 0.75  # past the warm-up
    for done, (rows, views) in enumerate(batches):
        trainer.suffix.train()
        trainer.step(split.source.take(rows, views), split.labels[rows])
        decay = min(0.75, (1 + done) / (10 + done))
        for name, value in trainer.suffix.state_dict().items():
            if name not in shadow:
                shadow[name] = value.clone().double()
            else:
                shadow[name] = decay * shadow[name] + (1 - decay) * value
    averaged = trainer.evaluated.state_dict()
    assert trainer.evaluated is not trainer.suffix
    for name, value in shadow.items():
        if value.ndim:  # the batch norm's count of batches is a whole number and stands for nothing
            torch.testing.assert_close(averaged[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("share", "moved"), [(0.0, 12), (0.25, 9), (0.5, 6), (1.0, 0)])
def test_batch_norms_keep_their_statistics_at_the_end(share: float, moved: int) -> None:
    trainer, split = make_trainer(replace(SMALL, freeze_norms=share)), make_split()
    assert sum(trainer.batches) == 12
    norm, kept = trainer.suffix[1], trainer.suffix[1].running_mean.clone()
    trainer.suffix[3].p = 0.0  # no dropout, so that two passes can be compared
    steps = 0
    for epoch in range(3):
        trainer.suffix.train()
        for rows, views in epoch_batches(30, 4, 2, epoch, trainer.recipe):
            inputs, labels = split.source.take(rows, views), split.labels[rows]
            trainer.suffix.eval()
            expected = functional.cross_entropy(trainer.suffix(*inputs), labels, reduction="none").detach()
            trainer.suffix.train()
            before = trainer.suffix[0].weight.clone()
            losses, _ = trainer.step(inputs, labels)
            steps += not torch.equal(norm.running_mean, kept)
            assert torch.allclose(losses, expected) == torch.equal(norm.running_mean, kept), "as in evaluation"
            assert not torch.equal(trainer.suffix[0].weight, before), "all the rest goes on training"
            kept = norm.running_mean.clone()
    assert steps == int(norm.num_batches_tracked) == moved


def test_without_an_average_the_suffix_itself_counts() -> None:
    trainer = make_trainer()
    assert trainer.evaluated is trainer.suffix


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "schedule": "onecycle"},
        {"optimizer": "sgd", "schedule": "cosine", "warmup": 0.4},
        {"optimizer": "adam", "schedule": "cosine", "warmup": 0.0},
        {"optimizer": "adamw", "schedule": "constant", "ema": 0.9},
        {"optimizer": "sgd", "skip_easy": 0.5},
        {"optimizer": "muon", "ema": 0.9},
        {"optimizer": "sgd", "freeze_norms": 0.55},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_a_resumed_run_goes_on_to_the_same_bits(settings: dict[str, Any]) -> None:
    recipe = replace(SMALL, patience=3, **settings)
    split = make_split()
    straight, whole = make_trainer(recipe), Progress()
    assert fit(straight, split, split, whole, listen([]))

    saved = io.BytesIO()
    first = make_trainer(recipe)

    def save(progress: Progress, best: bool) -> None:
        if progress.epoch == 1:
            torch.save({"trainer": first.state(), "progress": asdict(progress)}, saved)

    listener = replace(listen([], stop_after=5), save=save)
    assert not fit(first, split, split, Progress(), listener)

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    torch.manual_seed(12345)  # whatever the new process did before
    second, rest = make_trainer(recipe), Progress(**state["progress"])
    second.load_state(state["trainer"])
    assert fit(second, split, split, rest, listen([]))

    for module, twin in ((second.suffix, straight.suffix), (second.evaluated, straight.evaluated)):
        for name, value in twin.state_dict().items():
            assert torch.equal(module.state_dict()[name], value), name
    timed = ("seconds", "eval_seconds", "images_per_second")
    untimed = [[{k: v for k, v in row.items() if k not in timed} for row in made.rows] for made in (whole, rest)]
    assert untimed[0] == untimed[1]


def test_predictions_are_in_order_and_of_the_image_as_it_is() -> None:
    trainer, split = make_trainer(), make_split()
    trainer.suffix.train()
    rows = torch.tensor([4, 29, 0, 4, 11])
    logits = predict(trainer.suffix, split.source, rows, CPU, torch.float32, batch=2)
    assert isinstance(split.source, Table)
    with torch.no_grad():
        expected = trainer.suffix.eval()(split.source.values[0, rows])
    torch.testing.assert_close(logits, expected)


def test_inputs_are_computed_outside_autocast_in_evaluation_as_in_training() -> None:
    """Otherwise a frozen part that is computed on the fly would give other values there."""
    seen = []

    class Watched(Table):
        def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().take(rows, views)

    trainer, split = make_trainer(), make_split()
    assert isinstance(split.source, Table)
    watched = replace(split, source=Watched(split.source.values))
    predict(trainer.suffix, watched.source, torch.arange(8), CPU, torch.bfloat16)
    trainer.train_epoch(watched, 0, lambda done, of: None, lambda: False)
    assert set(seen) == {False}


def test_predictions_that_are_not_finite_are_an_error() -> None:
    trainer, split = make_trainer(), make_split()
    with torch.no_grad():
        trainer.suffix.get_parameter("4.bias")[0] = math.nan
    with pytest.raises(TrainingError) as error:
        predict(trainer.suffix, split.source, torch.arange(3), CPU, torch.float32)
    assert str(error.value) == (
        "The model's predictions are not finite numbers after its last training step. Lower --lr or --head-lr-scale, "
        "or use --precision fp32, and run again."
    )


def test_features_become_fp32_where_autocast_is_off() -> None:
    features = (torch.ones(2, dtype=torch.bfloat16), torch.ones(2))
    assert [value.dtype for value in cast(features, torch.float32)] == [torch.float32, torch.float32]
    assert cast(features, torch.bfloat16) is features


def test_bf16_training_keeps_its_weights_in_fp32_and_learns() -> None:
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(6, 4), frozenset(), SMALL, 30, torch.bfloat16, CPU)
    progress = Progress()
    assert fit(trainer, make_split(), make_split(), progress, listen([]))
    assert trainer.suffix.get_parameter("weight").dtype == torch.float32
    assert progress.rows[-1]["train_loss"] < progress.rows[0]["train_loss"]


def test_a_score_is_mean_loss_and_percent_right() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.8, 0.2], [0.1, 0.9]]))
    loss, accuracy = score(logits, torch.tensor([0, 1, 1, 1]))
    assert loss == pytest.approx(-(math.log(0.5) + math.log(0.75) + math.log(0.2) + math.log(0.9)) / 4)
    assert accuracy == 75.0  # of two equal logits the first counts


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_classes_count_by_their_weight(smoothing: float) -> None:
    """An image of weight 2 counts as two images, whatever else is in the batch."""
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0])
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    recipe = replace(SMALL, label_smoothing=smoothing)
    trainer = Trainer(nn.Linear(6, 4), frozenset(), recipe, 30, torch.float32, CPU, class_weights=weights)
    twice = torch.tensor([0, 0, 1, 2, 3, 4, 4])
    expected = functional.cross_entropy(logits[twice], labels[twice], label_smoothing=smoothing, reduction="sum") / 5
    torch.testing.assert_close(trainer._losses(logits, labels).mean(), expected)
    trainer.class_weights = None
    plain = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(trainer._losses(logits, labels).mean(), plain)


def test_a_recipe_that_is_not_resolved_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="resolve the recipe first"):
        make_trainer(replace(SMALL, epochs=None))
