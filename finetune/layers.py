"""Which layers train: names to modules, freezing that holds, and the proof that nothing frozen moved.

A name is a dotted module (or parameter) name and stands for everything below it: `layer4` is `layer4.0`, `layer4.1`, …
but not `layer40`. Two words are special: `all`, and `head`, the classifier that was replaced.

A frozen module has `requires_grad=False` and stays in eval mode whatever `.train()` is called on its parents: in train
mode its batch norms would go on averaging the new images' statistics, and the layer would move without training.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from weights.errors import TrainingError, UsageError, near_matches


@dataclass(frozen=True)
class Selection:
    """The outcome of `--train-layers` on one model.

    Attributes:
        names: module or parameter names, each standing for its whole subtree; ("",) means the whole model.
        trained: names of the parameters that train.
        moving: names of the buffers that training may move (batch-norm statistics of trained modules).
        frozen: names of all other parameters and buffers.
    """

    names: tuple[str, ...]
    trained: tuple[str, ...]
    moving: tuple[str, ...]
    frozen: tuple[str, ...]

    def covers(self, name: str) -> bool:
        """Return whether module or parameter `name` lies inside a selected subtree."""
        return any(is_inside(name, selected) for selected in self.names)


def is_inside(name: str, root: str) -> bool:
    """Return whether dotted `name` is `root` or lies below it; everything lies below ""."""
    return not root or name == root or name.startswith(root + ".")


def select_layers(model: nn.Module, wanted: Sequence[str], head: Sequence[str]) -> Selection:
    """Resolve `--train-layers` on a model.

    Args:
        model: the model, its head already replaced.
        wanted: names as the user gave them, with `all` and `head` among the possible ones.
        head: names of the classifier modules, as in timm's `pretrained_cfg["classifier"]`.

    Returns:
        The selection; `trained` is never empty.

    Raises:
        UsageError: a name that no module or parameter has, or a selection without any parameter.
    """
    known = {name for name, _ in model.named_modules() if name} | {name for name, _ in model.named_parameters()}
    names: list[str] = []
    for name in wanted:
        if name == "all":
            names.append("")
        elif name == "head":
            names.extend(head)
        elif name in known:
            names.append(name)
        else:
            top = [child for child, _ in model.named_children()]
            near = near_matches(name, [*known, "all", "head"]) or "."
            raise UsageError(
                f"'{name}' names no layer of this model{near} Its top-level "
                f"layers are {', '.join(top)}; 'all' and 'head' work everywhere (see `finetune layers ARCH`)."
            )
    selection = Selection(tuple(dict.fromkeys(names)), (), (), ())
    parameters = [name for name, _ in model.named_parameters()]
    trained = tuple(name for name in parameters if selection.covers(name))
    if not trained:
        raise UsageError(
            f"--train-layers {','.join(wanted)} holds no parameter, so nothing would train; name at least one layer "
            "with weights, such as 'head'."
        )
    buffers = [name for name, _ in model.named_buffers()]
    moving = tuple(name for name in buffers if selection.covers(name))
    still = tuple(name for name in [*parameters, *buffers] if not selection.covers(name))
    return Selection(selection.names, trained, moving, still)


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for `Module.train` on a frozen module: switch it and all below it to eval, whatever was asked."""
    return nn.Module.train(self, False)


def stays_in_eval(module: nn.Module) -> bool:
    """Tell whether `freeze` has made a module stay in eval mode."""
    return getattr(module.train, "__func__", None) is _stay_in_eval


def remembers(module: nn.Module) -> bool:
    """Tell whether a module keeps in eval mode what it made of its parameters, as timm's LeViT and its kin do."""
    return isinstance(getattr(module, "attention_bias_cache", None), dict)


def _trains(name: str, selection: Selection) -> bool:
    return any(is_inside(parameter, name) for parameter in selection.trained)


def freeze(model: nn.Module, selection: Selection) -> None:
    """Freeze everything outside `selection`: no gradients, and eval mode that `.train()` on a parent does not lift.

    A module without parameters and buffers that stands outside every frozen module (a dropout before the head) still
    follows `.train()`, because it belongs to what trains.
    A module of which only single parameters are named (a batch norm's weight) stays in eval mode: its statistics are
    frozen. Not so attention whose biases train and that remembers in eval mode what it made of them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(selection.covers(name))
    trained = [name for name, _ in model.named_modules() if selection.covers(name)]
    forgetful = [name for name, module in model.named_modules() if remembers(module) and _trains(name, selection)]
    for name, module in model.named_modules():
        if any(is_inside(other, name) for other in forgetful):
            continue  # its layers below stay in eval mode each by itself
        if any(is_inside(name, other) or is_inside(other, name) for other in trained):
            continue
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
            # A bound method of a module-level function survives copy.deepcopy, bound to the copy.
            module.train = types.MethodType(_stay_in_eval, module)
            module.eval()


def fingerprint(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return a sha256 for each named parameter or buffer, over its dtype, shape and bytes.

    Args:
        model: any module.
        names: names as in `named_parameters` and `named_buffers`.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor_sha256(tensors[name]) for name in names}


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's dtype, shape and elements in row-major order."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype} {tuple(flat.shape)}".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_unchanged(model: nn.Module, before: dict[str, str]) -> None:
    """Prove that frozen tensors are bit-identical to what was loaded.

    Args:
        model: the model after training.
        before: what `fingerprint` returned before training.

    Raises:
        TrainingError: at least one tensor differs; the sentence names the first few.
    """
    after = fingerprint(model, before)
    moved = [name for name, digest in before.items() if after[name] != digest]
    if moved:
        listed = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
        raise TrainingError(
            f"Frozen tensors moved during training ({listed}); they were to stay bit-identical to the loaded weights, "
            "so this result is not kept. Please report it with the run's recipe.toml."
        )
