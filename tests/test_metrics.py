"""Figures of a classifier, each against a second computation in numpy that shares nothing with the first."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from finetune.class_weights import class_weights
from finetune.inference import score
from finetune.metrics import (
    BINS,
    calibrate,
    confusion_matrix,
    is_uneven,
    mean_recall,
    precisions,
    recalls,
    top_5_accuracy,
    top_k_accuracy,
)
from finetune.temperature import SIGNIFICANT, fit_temperature


def guesses(
    images: int = 400, classes: int = 7, *, seed: int = 0, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right about half of the time, and far too sure of themselves."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    logits = random.normal(size=(images, classes))
    logits[np.arange(images), labels] += 1.5
    return torch.tensor(scale * logits, dtype=torch.float32), torch.tensor(labels)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))


def test_top_k_is_the_place_in_the_sorted_logits() -> None:
    logits, labels = guesses()
    order = np.argsort(-logits.numpy(), axis=1)
    for k in (1, 2, 5, 7):
        expected = np.mean([label in row[:k] for label, row in zip(labels.numpy(), order, strict=True)])
        assert top_k_accuracy(logits, labels, k) == pytest.approx(100 * expected, abs=1e-12)
    assert top_k_accuracy(logits, labels, 1) == 100 * (logits.argmax(1) == labels).double().mean().item()
    assert top_5_accuracy(logits, labels) == top_k_accuracy(logits, labels, 5)
    assert top_5_accuracy(logits[:, :5], labels % 5) is None


def test_of_equal_logits_the_first_class_goes_first() -> None:
    labels = torch.arange(4)
    for k in (1, 2, 3, 4):
        assert top_k_accuracy(torch.zeros(4, 4), labels, k) == 25 * k


def test_confusions_and_what_follows_from_them() -> None:
    logits, labels = guesses()
    predicted = logits.argmax(1).numpy()
    labels[labels == 3] = 2  # a class without images
    matrix = confusion_matrix(logits.argmax(1), labels, 7)
    expected = np.zeros((7, 7), dtype=int)
    for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        expected[label, guess] += 1
    assert matrix.tolist() == expected.tolist()
    recall = [np.mean(predicted[labels.numpy() == c] == c) if c != 3 else math.nan for c in range(7)]
    assert recalls(matrix).tolist() == pytest.approx([100 * value for value in recall], nan_ok=True)
    precision = [np.mean(labels.numpy()[predicted == c] == c) for c in range(7)]
    assert precisions(matrix).tolist() == pytest.approx([100 * value for value in precision])
    assert mean_recall(matrix) == pytest.approx(100 * np.nanmean(recall))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_calibration_error(temperature: float) -> None:
    logits, labels = guesses()
    chances = softmax(logits.double().numpy() / temperature)
    confidence, right = chances.max(1), chances.argmax(1) == labels.numpy()
    error = 0.0
    curve = calibrate(logits, labels, temperature)
    for place in range(BINS):
        inside = (confidence > place / BINS) & (confidence <= (place + 1) / BINS)
        assert curve.counts[place] == inside.sum()
        if inside.any():
            assert curve.confidence[place] == pytest.approx(100 * confidence[inside].mean())
            assert curve.accuracy[place] == pytest.approx(100 * right[inside].mean())
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert curve.error == pytest.approx(100 * error)
    assert sum(curve.counts) == len(labels)


def test_confidence_of_one_is_in_the_last_bin() -> None:
    curve = calibrate(torch.tensor([[1000.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 1]))
    assert curve.counts[BINS - 1] == 2
    assert curve.error == pytest.approx(50)


def test_the_temperature_has_the_least_loss_on_a_grid() -> None:
    logits, labels = guesses()
    found = fit_temperature(logits, labels)
    assert found.reason == "fitted on 400 validation images"

    def loss(temperature: float) -> float:
        chances = softmax(logits.double().numpy() / temperature)
        return float(-np.log(chances[np.arange(len(labels)), labels.numpy()]).mean())

    grid = np.geomspace(0.05, 20, 2000)
    best = grid[np.argmin([loss(value) for value in grid])]
    assert found.value == pytest.approx(best, rel=5e-3)
    assert found.value > 1.5, "logits that are too sure are made less so"
    assert calibrate(logits, labels, found.value).error < calibrate(logits, labels).error / 2
    doubled = fit_temperature(2 * logits, labels)
    assert doubled.value == pytest.approx(2 * found.value, rel=1e-3)


def test_images_that_leave_no_temperature() -> None:
    right = fit_temperature(5 * torch.eye(3), torch.arange(3))
    assert (right.value, right.reason) == (
        1.0,
        "3 validation images leave none: so few are wrong that colder is always better",
    )
    wrong = fit_temperature(5 * torch.eye(3), (torch.arange(3) + 1) % 3)
    assert (wrong.value, wrong.reason) == (1.0, "3 validation images leave none: predictions are no better than chance")


def test_a_temperature_that_few_images_ask_for_by_chance_is_not_kept() -> None:
    """Labels are drawn from the confidences themselves, so the right temperature is 1, and 5 in 100 draws are kept."""
    assert math.erfc(math.sqrt(SIGNIFICANT / 2)) == pytest.approx(0.05, abs=1e-4)  # of the chi-squared distribution
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(60, 5))
    chances = softmax(logits)
    kept = []
    for _ in range(200):
        labels = torch.tensor([random.choice(5, p=row) for row in chances])
        found = fit_temperature(torch.tensor(logits, dtype=torch.float32), labels)
        assert found.value == 1 or found.reason == "fitted on 60 validation images"
        assert found.value != 1 or re.fullmatch(r"60 validation images do not tell \d+\.\d+ from 1", found.reason)
        kept.append(found.value != 1)
    assert 0.01 <= np.mean(kept) <= 0.1


def test_uneven_is_more_than_twice_as_many() -> None:
    assert not is_uneven([10, 20, 15])
    assert is_uneven([10, 21])
    assert not is_uneven([0, 10, 0, 20]), "a class without images is none of the smallest"
    assert not is_uneven([0, 0])


def test_balanced_weights() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [3] * 1)
    weights = class_weights("balanced", labels, 4)
    assert weights is not None
    assert weights.tolist() == pytest.approx([10 / (3 * 6), 10 / (3 * 3), 0, 10 / (3 * 1)])
    assert weights[labels].mean().item() == pytest.approx(1)
    assert class_weights("none", labels, 4) is None


def test_top_1_is_what_the_loop_reports() -> None:
    logits, labels = guesses()
    loss, accuracy = score(logits, labels)
    assert accuracy == top_k_accuracy(logits, labels, 1)
    assert loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
