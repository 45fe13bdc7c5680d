"""Batch-norm folding: the folded prefix computes what the plain one does."""

from __future__ import annotations

import timm
import torch
from timm.layers import StdConv2d
from torch import fx, nn

from finetune.cut import Cut, cut_model
from finetune.fold import fold_batch_norms
from finetune.layers import fingerprint, freeze, select_layers

TOLERANCE = 1e-5  # relative: folding rounds the weights of each layer once


def randomised(module: nn.Module) -> nn.Module:
    """Give every batch norm statistics and an affine map that change something, and switch to eval mode."""
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.5)
    return module.eval()


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


def folded_like(module: nn.Module, images: torch.Tensor) -> int:
    """Fold a module, check that its outputs stay, and return how many batch norms went."""
    plain = fx.symbolic_trace(randomised(module))
    folded, count = fold_batch_norms(plain)
    with torch.no_grad():
        assert relative(folded(images), plain(images)) < TOLERANCE
    assert not folded.training
    return count


def test_a_convolution_takes_its_batch_norm_in() -> None:
    images = torch.randn(4, 3, 8, 8)
    assert folded_like(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()), images) == 1
    assert folded_like(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), images) == 1  # with a bias of its own
    assert folded_like(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), images) == 1


def test_a_batch_norm_that_follows_no_convolution_stays() -> None:
    images = torch.randn(4, 3, 8, 8)
    assert folded_like(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)), images) == 0
    assert folded_like(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), images) == 0


def test_a_batch_norm_without_running_statistics_stays() -> None:
    images = torch.randn(4, 3, 8, 8)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    assert folded_like(module, images) == 0


def test_a_weight_standardised_convolution_stays() -> None:
    images = torch.randn(4, 3, 8, 8)
    assert folded_like(nn.Sequential(StdConv2d(3, 8, 3), nn.BatchNorm2d(8)), images) == 0


class SharedConvolution(nn.Module):
    """One convolution, called twice, each time with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(self.first(self.conv(x))))


class ReadTwice(nn.Module):
    """A convolution whose output goes past its batch norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class SharedNorm(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.one(x)) + self.norm(self.two(x))


def test_what_is_used_twice_stays() -> None:
    images = torch.randn(4, 3, 8, 8)
    assert folded_like(SharedConvolution(), images) == 0
    assert folded_like(ReadTwice(), images) == 0
    assert folded_like(SharedNorm(), images) == 0


def cut_of(arch: str, layers: list[str], size: int) -> Cut:
    torch.manual_seed(0)
    model = randomised(timm.create_model(arch, num_classes=5))
    chosen = select_layers(model, layers, model.pretrained_cfg["classifier"].split())
    freeze(model, chosen)
    return cut_model(model, chosen, torch.randn(2, 3, size, size))


def check_prefix(arch: str, layers: list[str], size: int = 64) -> tuple[int, int]:
    """Fold a model's prefix, check its outputs; return how many batch norms were folded and how many are left."""
    prefix = cut_of(arch, layers, size).prefix
    assert prefix is not None
    before = fingerprint(prefix, prefix.state_dict())
    folded, count = fold_batch_norms(prefix)
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        for value, truth in zip(folded(images), prefix(images), strict=True):
            assert relative(value, truth) < TOLERANCE
    assert fingerprint(prefix, prefix.state_dict()) == before  # the original is not touched
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    return count, left


def test_a_resnet_is_folded_whole() -> None:
    count, left = check_prefix("resnet18", ["layer4", "head"], 32)
    assert (count, left) == (15, 0)  # bn1, then 4 + 5 + 5 in three stages, two of which have a downsampling branch


def test_batch_norms_with_an_activation_keep_it() -> None:
    count, left = check_prefix("test_efficientnet", ["blocks.3", "conv_head", "head"])
    assert count > 5
    assert left == 0


def test_networks_without_foldable_pairs_come_back_as_they_are() -> None:
    assert check_prefix("test_nfnet", ["stages.3", "head"]) == (0, 0)
    assert check_prefix("test_convnext", ["stages.3", "head"]) == (0, 0)


class Untraceable(nn.Module):
    """Looks at values, so it can only be called as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return y * 2 if float(y.sum()) > 0 else y


def test_a_part_that_cannot_be_traced_stays_and_the_rest_is_folded() -> None:
    images = torch.randn(4, 3, 8, 8)
    body = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), Untraceable())
    graph = fx.Graph()
    out = graph.placeholder("images")
    for name in ("0", "1", "2"):
        out = graph.call_module(name, (out,))
    graph.output(out)
    plain = fx.GraphModule(randomised(body), graph)
    folded, count = fold_batch_norms(plain)
    assert count == 1
    with torch.no_grad():
        assert relative(folded(images), plain(images)) < TOLERANCE
