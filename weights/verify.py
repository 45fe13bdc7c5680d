"""Is a weight file whole, and are they the weights of its network? What a run would find out, before one is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from weights.arch import Arch
from weights.check import check_finite, check_room
from weights.errors import FinetuneError, WeightsError
from weights.fetch import has_source
from weights.inventory import WeightFile
from weights.load import load_into, read_tensors
from weights.record import file_sha256

_UNBUILDABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What networks raise that are built with arguments that they cannot have."""


@dataclass(frozen=True)
class Verdict:
    """What came of looking at a weight file.

    Attributes:
        file: the file.
        sha256: of its bytes; "" when they could not be read.
        tensors: how many it holds; 0 when it could not be read.
        fits: full name of the network that the tensors fit; "" where it is not known which they should.
        problem: a sentence that says what is wrong and what to do, "" when nothing is.
    """

    file: WeightFile
    sha256: str
    tensors: int
    fits: str
    problem: str

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem

    def sentence(self) -> str:
        """Return the verdict as one line for people."""
        if self.problem:
            return self.problem
        record = self.file.record
        fits = f"fit {self.fits}" if self.fits else "of an unknown network, so their shapes were not checked"
        told = f"sha256 as {record.where} says" if record else "no sha256 is recorded to compare with"
        return f"{tensor_count(self.tensors)}, {fits}; {told}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "path": str(self.file.path),
            "source": self.file.source,
            "arch": self.file.name,
            "ok": self.ok,
            "problem": self.problem or None,
            "sha256": self.sha256 or None,
            "recorded": self.file.record.where if self.file.record else None,
            "tensors": self.tensors,
            "fits": self.fits or None,
        }


def tensor_count(number: int) -> str:
    """Return a number of tensors for people.

    Args:
        number: how many.
    """
    return f"{number} tensor{'' if number == 1 else 's'}"


def verify(file: WeightFile, arch: Arch | None = None) -> Verdict:
    """Read a weight file whole and compare it with what is known of it.

    Its sha256 is compared with the recorded one, every tensor is read and searched for NaN and infinity, and all but
    the head are put into the network; the head depends on the number of classes.

    Args:
        file: the file, as `describe` gives it.
        arch: the network whose weights it should hold; without it, the one that the file states.
    """
    digest, tensors, network = "", 0, arch or file.arch
    try:
        if file.problem:
            raise WeightsError(file.problem)
        digest = file_sha256(file.path)
        _check_digest(file, digest)
        read = read_tensors(file.path)
        tensors = len(read)
        check_finite(file.path.name, read)
        if network:
            _check_fit(file, network, read)
    except FinetuneError as error:
        return Verdict(file, digest, tensors, "", str(error))
    return Verdict(file, digest, tensors, network.full_name if network else "", "")


def _check_digest(file: WeightFile, digest: str) -> None:
    record = file.record
    if record is None or record.agrees(digest):
        return
    again = "get it again"
    if file.arch and has_source(file.arch) and file.name == file.arch.full_name:
        again = f"fetch it again with finetune weights fetch {file.name}"
    raise WeightsError(
        f"{file.path.name} is not the file that was recorded: {record.where} says sha256 {record.digits} and its bytes "
        f"have {digest}. Delete {file.path.resolve()} and {again}."
    )


def _check_fit(file: WeightFile, arch: Arch, tensors: Mapping[str, Tensor]) -> None:
    named = arch.config.get("classifier") or ()
    head = (named,) if isinstance(named, str) else tuple(named)
    load_into(_network(file, arch), tensors, head=head, where=file.path.name)


def _network(file: WeightFile, arch: Arch) -> nn.Module:
    def build() -> nn.Module:
        return timm.create_model(
            arch.full_name, pretrained=False, num_classes=int(arch.config["num_classes"]), **(file.model_args or {})
        )

    try:
        with torch.device("meta"):
            outline = build()
    except _UNBUILDABLE:  # some networks of older timm read values while they are built; a real fault comes again
        outline = nn.Module()
    check_room(arch.full_name, file.path, outline)
    try:
        return build()
    except _UNBUILDABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{arch.full_name} cannot be built as the config.json beside {file.path.name} states ({reason}); mend it, "
            "or give the weights alone in another folder."
        ) from error
