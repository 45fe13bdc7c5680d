"""Decide how a run is computed: number format, compilation, where features go; and what that will cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.augment import Views
from finetune.cache import default_cache_dir, room_on_disk
from finetune.cut import Cut
from finetune.device import PREFIX_BATCH, device_name, prefix_batch, settle
from finetune.events import Events
from finetune.features import compute_rows, gathered_bytes
from finetune.fit import Trainer
from finetune.forecast import make_plan
from finetune.images import DataSplits, ImageSet
from finetune.machine import find_compiler, free_memory
from finetune.memory import StepMemory, gpu_room, step_memory
from finetune.models import Prepared
from finetune.placement import MEMORIES, MEMORY_SHARE, Placement, memory_for, place, size
from finetune.plan import Plan
from finetune.precision import DTYPES, Choice, choose, compile_module, frozen_part_named, largest_that_runs, remembered
from finetune.prefix import PreparedPrefix, prepare_prefix
from finetune.ranks import Ranks
from finetune.recipe import Recipe
from finetune.residency import ImagePlace, place_images
from finetune.sharing import own_block
from finetune.skipping import Skipping
from finetune.sources import FeatureBuilder
from finetune.units import parse_bytes
from finetune.windows import Windows, choose_windows
from weights.errors import UsageError

DISK_RATE = 10**9  # bytes a second that a good disk gives back; a round number, not measured


@dataclass(frozen=True)
class Computing:
    """How a run is computed.

    Attributes:
        prefix: the frozen part, ready; None when uncut.
        training: number format and compilation of what trains.
        placement: where features go.
        windows: what training sees of each feature map; None is all of it.
        left: bytes of memory that training leaves for features; None where it does not take from them.
        held: features that are in memory already, by key.
        images: where images are while batches are made of them in every epoch.
        smaller: the batch size to try where a GPU's memory runs out; None where that helps little.
    """

    prefix: PreparedPrefix | None
    training: Choice
    placement: Placement
    windows: Windows | None = None
    left: int | None = None
    held: Mapping[str, list[torch.Tensor]] = field(default_factory=dict)
    images: ImagePlace | None = None
    smaller: int | None = None

    @property
    def compile_seconds(self) -> float:
        """Time that compiling took in this run or, when remembered, in the run that measured it."""
        return self.training.compile_seconds + (self.prefix.choice.compile_seconds if self.prefix else 0.0)

    def choices(self) -> dict[str, Any]:
        """Return the choices as plain values, for a checkpoint."""
        return {
            "prefix": asdict(self.prefix.choice) if self.prefix else None,
            "training": asdict(self.training),
        }

    def builder(self, recipe: Recipe, events: Events) -> FeatureBuilder:
        """Return what computes and caches features."""
        if self.prefix is None:
            raise ValueError("an uncut model has no features")
        limit = parse_bytes(recipe.cache_limit, "--cache-limit")
        return FeatureBuilder(self.prefix, self.placement, cache_folder(recipe), limit, events, held=self.held)


def cache_folder(recipe: Recipe) -> Path:
    """Return the folder of cached features and remembered measurements."""
    return (recipe.cache_dir or default_cache_dir()).expanduser()


def decide(
    recipe: Recipe,
    data: DataSplits,
    prepared: Prepared,
    cut: Cut,
    views: Views,
    device: torch.device,
    events: Events,
    choices: dict[str, Any] | None,
    held: Mapping[str, list[torch.Tensor]],
    ranks: Ranks,
) -> tuple[Computing, Plan]:
    """Choose number formats, compilation and places, by measurement, and plan the run.

    Args:
        recipe: with epochs and batch size filled in.
        data: the splits.
        prepared: the model.
        cut: the model, cut.
        views: the training images' views.
        device: where it runs.
        events: told what is being measured.
        choices: what a resumed run had chosen; None measures or remembers.
        held: features that are in memory already, by key.
        ranks: of this process; what is chosen is the first one's choice in all of them.

    Raises:
        UsageError: something does not fit where it has to be.
    """
    pick = _picker(recipe, prepared, device, events, choices, ranks)
    _require_batches(recipe, len(data.train), prepared)
    batch = min(recipe.batch_size or 1, len(data.train))
    memories = _step_memories(recipe, prepared, cut, device, ranks)
    min(memories.values(), key=lambda memory: memory.needed(batch)).require(batch)
    fitting = [name for name, memory in memories.items() if memory.needed(batch) <= memory.free]
    only = replace(recipe, precision=fitting[0]) if len(fitting) == 1 else recipe  # no timing of what cannot be
    counts = (len(data.train), len(data.val or ()), len(data.test or ()))
    rows = (counts[0] * views.count + counts[1] + counts[2]) // ranks.size
    prefix = _prepare_prefix(cut, prepared, data.train, device, pick, rows)
    windows = choose_windows(recipe, [row.shape for row in prefix.prefix.rows] if prefix else [], cut.suffix)
    only = only if ranks.alone else replace(only, compile="off")
    pick_training = _picker(only, prepared, device, events, choices, ranks)
    training = _choose_training(recipe, data.train, prepared, cut, prefix, device, windows, pick_training, ranks)
    memory = memories[training.precision]
    left, room = memory.left(batch), _room(recipe, memory, batch, device, prefix, data, views, ranks)
    placement, missing, on_disk = _place(recipe, data, views, prefix, left, held, room, ranks)
    if not held:
        memory.require_beside(placement, batch)
    if prefix is None:
        placement = Placement("uncut", False, 0, f"none, because {cut.reason}")
    placement = ranks.from_first(lambda: placement)
    where, seen = ranks.from_first(lambda: place_images(data, placement, room))
    taken = {placement.where: placement.bytes // ranks.local_size, where: seen}.get("device", 0)
    smaller = None if room is None else memory.smaller(batch, taken)
    computing = Computing(prefix, training, placement, windows, left, held, ImagePlace(where, device), smaller)
    folder, seats = cache_folder(recipe), (where, seen)
    plan = make_plan(
        recipe, data, prepared, cut, computing, device, missing, on_disk, folder, seats, processes=ranks.size
    )
    return computing, plan


def _prepare_prefix(
    cut: Cut, prepared: Prepared, train: ImageSet, device: torch.device, pick: Callable[..., Choice], rows: int
) -> PreparedPrefix | None:
    """Return the frozen part, ready for `rows` images in all; None where there is none."""
    if cut.prefix is None:
        return None
    few = train.images[: (step := prefix_batch(device))]
    return prepare_prefix(cut, prepared.preprocessing, few, device, lambda build: pick("prefix", build, step, rows))


def _room(
    recipe: Recipe,
    memory: StepMemory,
    batch: int,
    device: torch.device,
    prefix: PreparedPrefix | None,
    data: DataSplits,
    views: Views,
    ranks: Ranks,
) -> int | None:
    """Return the bytes of a GPU's own memory for features or images; None where there is none."""
    runs: list[tuple[Callable[[], object], int]] = []
    largest = -(-max(len(split or ()) for split in (data.train, data.val, data.test)) // ranks.size)
    last = views.count - 1  # the first view may be the image as it is, which takes nothing to make
    for made in (prefix.prefix, prefix.for_test.prefix) if prefix else ():
        work = partial(compute_rows, made, data.train, views, last, 0, min(made.batch, len(data.train)))
        runs.append((work, gathered_bytes(made, largest)))
    with frozen_part_named(prefix.prefix.batch if prefix else None, device):
        room = gpu_room(memory, batch, device, runs)
    return min(room, memory_budget(recipe)) if room is not None and recipe.memory_budget else room


def _picker(
    recipe: Recipe,
    prepared: Prepared,
    device: torch.device,
    events: Events,
    choices: dict[str, Any] | None,
    ranks: Ranks,
) -> Callable[..., Choice]:
    """Return pick(part, build, images per step, images of work, sizes, more): resumed, remembered or measured now.

    Of several processes the first one picks, while the others wait and leave the machine to it.
    """
    about = {
        "device": device_name(device),
        "kind": device.type,
        "arch": prepared.arch.full_name,
        "model_args": prepared.model_args,
        "image_size": prepared.preprocessing.size,
        "layers": list(prepared.selection.names),
        "torch": torch.__version__,
        "precision": recipe.precision,
        "compile": recipe.compile,
        "compiler": bool(find_compiler()),
    }

    def pick(part: str, build: Any, step_images: int, work: int, sizes: int = 1, **more: Any) -> Choice:
        if choices is not None and choices.get(part):
            return replace(Choice(**choices[part]), compile_seconds=0.0)

        def measure() -> Choice:
            events.progress(f"timing steps of {part}", 0, 0)
            return choose(
                build,
                images_per_step=step_images,
                work=work,
                compilations=sizes,
                precision=recipe.precision,
                compile_mode=recipe.compile,
                compiler=find_compiler(),
                device=device,
                **more,
            )

        # The amount of work decides whether compiling is tried, to a factor of two.
        situation = {**about, "part": part, "step": step_images, "work": work.bit_length(), "sizes": sizes}
        return ranks.from_first(lambda: remembered(cache_folder(recipe), situation, measure))

    return pick


def _require_batches(recipe: Recipe, images: int, prepared: Prepared) -> None:
    """Refuse batches of one image where a batch norm trains: it would normalise each image by itself.

    Raises:
        UsageError: with the batch size to take.
    """
    size, epochs = recipe.batch_size or 1, recipe.epochs or 1
    skipping = Skipping(images, epochs, recipe.skip_easy or 0.0)
    seen, smallest = images, images // -(-images // size)
    for count in {skipping.kept(epoch) for epoch in range(epochs)}:
        if count // -(-count // size) < smallest:
            seen, smallest = count, count // -(-count // size)
    trained = [
        module
        for name, module in prepared.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and prepared.selection.covers(name)
    ]
    if smallest < 2 and trained:
        some = "" if seen == images else f", which is what --skip-easy {recipe.skip_easy:g} leaves of {images},"
        raise UsageError(
            f"{seen} training images{some} in batches of {size} leave batches of one image, and the trained layers "
            "hold batch norms, which need at least 2; give a larger --batch-size, or train layers without batch norm, "
            "such as head."
        )


def _step_memories(
    recipe: Recipe, prepared: Prepared, cut: Cut, device: torch.device, ranks: Ranks
) -> dict[str, StepMemory]:
    """Return what training needs at least, in each number format that may be chosen."""
    side = prepared.preprocessing.size
    image = torch.zeros(1, 3, side, side)
    with torch.no_grad():
        values = cut.prefix(image) if cut.prefix is not None else (image,)
    suffix = settle(cut.suffix, device)
    shapes = [tuple(value.shape[1:]) for value in values]
    found = {}
    for name, dtype in DTYPES.items() if recipe.precision == "auto" else [(recipe.precision, DTYPES[recipe.precision])]:
        try:
            found[name] = step_memory(suffix, shapes, dtype, device, recipe).among(ranks.size, ranks.local_size)
        except (RuntimeError, NotImplementedError):
            if name == "fp32" or recipe.precision == "bf16":
                raise  # auto takes fp32 where an operation has no bf16
    return found


def _choose_training(
    recipe: Recipe,
    train: ImageSet,
    prepared: Prepared,
    cut: Cut,
    prefix: PreparedPrefix | None,
    device: torch.device,
    windows: Windows | None,
    pick: Callable[..., Choice],
    ranks: Ranks,
) -> Choice:
    """Time training steps of what trains, on whole maps; its weights are put back afterwards.

    Several processes train eagerly: DistributedDataParallel sends gradients while the backward pass goes on.
    """
    batch = -(-(whole := min(recipe.batch_size or 1, len(train))) // ranks.size)
    rows = torch.arange(batch) % min(PREFIX_BATCH, len(train))
    suffix = settle(cut.suffix, device)
    before = {name: value.clone() for name, value in suffix.state_dict().items()}
    few: list[tuple[torch.Tensor, ...]] = []

    def build(precision: str, compiled: bool, images: int = batch) -> Callable[[], None]:
        if not few:
            pixels = train.images[:PREFIX_BATCH].to(device)
            with frozen_part_named(prefix.prefix.batch if prefix else None, device):
                few.append(prefix.prefix(pixels) if prefix else (prepared.preprocessing(pixels),))
        inputs = tuple(value[rows[:images].to(device)] for value in few[0])
        forward = compile_module(suffix) if compiled else None
        plain = replace(recipe, ema=0.0, lr=1e-6, skip_easy=0.0)
        trainer = Trainer(suffix, prepared.fresh, plain, 10**9, DTYPES[precision], device, forward)
        labels = train.labels[rows[:images]].to(device)
        suffix.train()

        def step() -> None:
            trainer.step(inputs, labels)

        return step

    def fits(precision: str) -> int | None:
        return largest_that_runs(partial(build, precision, False), batch)

    state = torch.get_rng_state()
    work = (recipe.epochs or 1) * len(train) * Skipping(len(train), recipe.epochs or 1, recipe.skip_easy or 0.0).cost
    sizes = len(set(windows.sides)) if windows else 1  # each is compiled by itself
    work = round(work * (windows.cost if windows else 1.0))
    choice = pick("training", build, batch, work, sizes, fits=fits, batch=whole)
    torch.set_rng_state(state)
    suffix.load_state_dict(before)
    suffix.zero_grad(set_to_none=True)
    suffix.eval()
    return choice if ranks.alone else replace(choice, compiled=False)


def _place(
    recipe: Recipe,
    data: DataSplits,
    views: Views,
    prefix: PreparedPrefix | None,
    left: int | None,
    in_memory: Mapping[str, list[torch.Tensor]],
    room: int | None,
    ranks: Ranks,
) -> tuple[Placement, tuple[int, int], int]:
    """Return where features go, the rows to be computed (of train and validation, of the test), and the bytes there.

    Without a --memory-budget, features in memory take no more than training leaves (`left` bytes; None is no limit).
    What is `in_memory` already takes no more of it. `room` is what a GPU's own memory has for them. Rows are those of
    this process, bytes those of its machine.
    """
    if prefix is None:
        return Placement("uncut", False, 0, ""), (0, 0), 0
    plain = Views("none", 1)
    learned = [own_block(ranks, data.train, views)]
    learned += [own_block(ranks, data.val, plain)] if data.val is not None else []
    tested = [own_block(ranks, data.test, plain)] if data.test is not None else []
    needed = held = 0
    fresh = recipe.augment == "crop" and views.count == recipe.epochs
    absent = []
    there = Computing(prefix, prefix.choice, Placement("ram", False, 0, ""), held=in_memory).builder(recipe, Events())
    if all(there.holds(split, view) for split, view in learned):
        needed = sum(row.bytes for row in prefix.prefix.rows) * sum(len(split) * view.count for split, view in learned)
        where = memory_for(needed, needed, room)
        placement = Placement(where, False, needed, f"{size(needed)} {MEMORIES[where]}, shared with other runs")
        return placement, (0, len(data.test or ())), 0
    for made, splits in ((prefix, learned), (prefix.for_test, tested)):
        row_bytes = sum(row.bytes for row in made.prefix.rows)
        builder = Computing(made, made.choice, Placement("ram", True, 0, "")).builder(recipe, Events())
        rows = sum(len(split) * view.count for split, view in splits)
        missing = sum(builder.missing(split, view) for split, view in splits)
        missing = missing if recipe.cache in ("auto", "disk") else rows
        needed += rows * row_bytes * ranks.local_size
        held += (rows - missing) * row_bytes * ranks.local_size
        absent.append((rows, missing))
        if fresh and made is prefix and builder.missing(*learned[0]) == 0:
            fresh = False  # an earlier run kept just these
    placement = place(
        needed,
        mode=recipe.cache,
        free=room_on_disk(cache_folder(recipe)),
        limit=parse_bytes(recipe.cache_limit, "--cache-limit"),
        memory=memory_budget(recipe) if recipe.memory_budget or left is None else min(memory_budget(recipe), left),
        held=held,
        fresh_each_epoch=fresh,
        device=None if room is None else room * ranks.local_size,  # each process has a GPU of its own
        quick=room is not None and quicker_than_disk(prefix),
    )
    which = 1 if placement.on_disk else 0
    return placement, (absent[0][which], absent[1][which]), held if placement.on_disk else 0


def quicker_than_disk(prefix: PreparedPrefix | None) -> bool:
    """Whether a GPU computes features faster than a disk would give them back."""
    return prefix is not None and prefix.choice.rate * sum(row.bytes for row in prefix.prefix.rows) > DISK_RATE


def memory_budget(recipe: Recipe) -> int:
    """Return the most bytes of memory that features may take."""
    asked = recipe.memory_budget
    return parse_bytes(asked, "--memory-budget") if asked else int(MEMORY_SHARE * free_memory())
