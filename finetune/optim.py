"""Optimiser, learning-rate schedule and parameter groups, all PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from timm.optim.muon import Muon
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from finetune.rates import parse_scales, scale_of
from finetune.recipe import AUTO, DECAY, MUON_DECAY, Recipe, peak_rate

SGD = (AUTO, "sgd")  # auto is settled before a run; by itself it is SGD
MUON_RATE = 0.5  # of the rate that SGD would take: 0.05 for layers that start fresh (docs/decisions/0012)
MUON_MOMENTUM = 0.95  # Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"
MUON_FALLBACK = 0.04  # what NAdamW, for all but matrices, takes of Muon's rate: 0.002 for a fresh head
FRESH_CONVOLUTION_DECAY = 2e-3  # docs/log.md, 2026-11-21: a whole stage from random values gains a point by it


def parameter_groups(suffix: nn.Module, fresh: Collection[str], recipe: Recipe) -> list[dict[str, Any]]:
    """Return the trained parameters in groups with their peak learning rates.

    Parameters that start fresh (the head, layers that the weights lacked) learn `head_lr_scale` times faster than
    those that start from pretrained values. Biases and norm scales, one-dimensional, get no weight decay (He et al.
    2019, "Bag of Tricks for Image Classification", section 3.1). Without a `weight_decay` in the recipe, convolutions
    that start fresh decay faster than the rest: the norm behind them undoes their scale, so decay only keeps their
    steps large (van Laarhoven 2017, "L2 Regularization versus Batch and Weight Normalization").

    Args:
        suffix: what trains; only parameters with requires_grad count.
        fresh: names of parameters that start fresh.
        recipe: lr, head_lr_scale, lr_scales and weight_decay are read.
    """
    scales = parse_scales(recipe.lr_scales)
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in suffix.named_parameters():
        if parameter.requires_grad:
            is_fresh = name in fresh
            kind = (is_fresh, _decay(parameter, is_fresh, recipe), scale_of(name, scales))
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": peak_rate(recipe) * (recipe.head_lr_scale if is_fresh else 1.0) * scale,
            "weight_decay": decay,
        }
        for (is_fresh, decay, scale), parameters in groups.items()
    ]


def _decay(parameter: nn.Parameter, is_fresh: bool, recipe: Recipe) -> float:
    """Return the weight decay of one parameter."""
    if parameter.ndim <= 1:
        return 0.0
    if recipe.weight_decay is not None:
        return recipe.weight_decay
    if recipe.optimizer == "muon":
        return MUON_DECAY
    return FRESH_CONVOLUTION_DECAY if is_fresh and parameter.ndim == 4 and recipe.optimizer in SGD else DECAY


def make_optimizer(suffix: nn.Module, fresh: Collection[str], recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over the trained parameters of `suffix`."""
    groups = parameter_groups(suffix, fresh, recipe)
    if recipe.optimizer == "muon":
        return _make_muon(suffix, groups, recipe)
    if recipe.optimizer in SGD:
        return torch.optim.SGD(groups, lr=peak_rate(recipe), momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=peak_rate(recipe))


def _make_muon(suffix: nn.Module, groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """Return timm's Muon: its own steps for convolutions and matrices, NAdamW's for the classifier and all else.

    Args:
        suffix: what trains. The last matrix in it is taken for the classifier, which Muon is not made for.
        groups: of `parameter_groups`.
        recipe: lr is read.
    """
    matrices = [value for value in suffix.parameters() if value.requires_grad and value.ndim == 2]
    classifier = matrices[-1] if matrices else None
    split = []
    for group in groups:
        by_fallback: dict[bool, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_fallback.setdefault(parameter.ndim < 2 or parameter is classifier, []).append(parameter)
        for fallback, parameters in by_fallback.items():
            split.append({**group, "params": parameters, "lr": MUON_RATE * group["lr"], "use_fallback": fallback})
    return Muon(
        split,
        lr=MUON_RATE * peak_rate(recipe),
        momentum=MUON_MOMENTUM,
        nesterov=True,
        ns_coefficients="original",
        adjust_lr_fn="original",
        fallback_lr_scale=MUON_FALLBACK,
    )


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> lr_scheduler.LRScheduler:
    """Return the learning-rate schedule, to be stepped once per batch.

    onecycle rises for the warm-up share of the steps and falls to nearly zero along cosines (Smith and Topin 2018,
    "Super-Convergence"); momentum stays as it is. cosine rises linearly and falls along one cosine. constant stays.

    Args:
        optimizer: its groups' learning rates are the peaks.
        recipe: schedule and warmup are read.
        steps: steps in the whole run.
    """
    if recipe.schedule == "onecycle":
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        share = min(max(recipe.warmup, 1 / steps), 0.95)  # one step of rising at least
        return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps + 1, pct_start=share, cycle_momentum=False)
    if recipe.schedule == "cosine":
        rise = min(round(recipe.warmup * steps), steps - 1)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - rise))
        if not rise:
            return fall
        start = lr_scheduler.LinearLR(optimizer, start_factor=1 / (rise + 1), total_iters=rise)
        return lr_scheduler.SequentialLR(optimizer, [start, fall], milestones=[rise])
    return lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def warmed_average(decay: float) -> Callable[..., None]:
    """Return a `multi_avg_fn` of `AveragedModel`: an exponential moving average that forgets its beginning.

    In the first steps a slow average would be little else than the random values that training began with, and in a
    short run to its end. So the decay is (1 + n) / (10 + n) after n updates until that reaches `decay`, as TensorFlow's
    `ExponentialMovingAverage` has it with `num_updates`: the average is then over about the last ninth of all steps.

    Args:
        decay: of the finished warm-up, 0 to below 1.
    """

    def move(averages: Any, current: Any, updates: Any) -> None:
        done = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averages, current, updates)

    return move


@torch.no_grad()
def update_average(average: AveragedModel, module: nn.Module) -> None:
    """Move a moving average of weights and buffers on after a step; what is no fraction is copied.

    The values are those of `AveragedModel.update_parameters`, which sends the count of updates to the device in every
    step, and waits for the device to take it.

    Args:
        average: made with a `multi_avg_fn`, such as `warmed_average`'s.
        module: what it is the average of.
    """
    kept = [*average.module.parameters(), *average.module.buffers()]
    pairs = list(zip(kept, [*module.parameters(), *module.buffers()], strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    if int(average.n_averaged) and average.multi_avg_fn is not None:  # the count stays on the CPU
        average.multi_avg_fn([mean for mean, _ in floating], [now for _, now in floating], average.n_averaged)
        pairs = [pair for pair in pairs if not pair[0].is_floating_point()]  # a count of batches has no average
    for mean, now in pairs:
        mean.copy_(now)
    average.n_averaged += 1
