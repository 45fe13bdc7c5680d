"""Several processes share a run: they do what one does, and when one of them ends, all end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from make_data import make_images, write_cifar100_python
from make_process import ROOT, as_rank, finish, start
from make_run import metrics, tiny_recipe, write_weights
from torch import nn
from torch.distributed import HashStore, TCPStore
from typer.testing import CliRunner

from cli.main import app
from finetune.fit import Trainer
from finetune.layers import freeze, select_layers
from finetune.pipeline import resume, run
from finetune.ranks import Ranks, difference
from finetune.recipe import Recipe, to_toml
from finetune.rendezvous import explained
from finetune.sharing import part_of, require_rows, synchronise_batch_norms
from weights.errors import DataError, RunError, StoppedError, UsageError

KILLED = """\
import os, signal
from cli.main import main
from finetune.fit import Trainer

train_epoch = Trainer.train_epoch

def killed(self, split, epoch, *rest):
    if epoch == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_epoch(self, split, epoch, *rest)

Trainer.train_epoch = killed
main()
"""
"""`finetune`, whose second process is killed when the second epoch begins."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and weights."""
    root = tmp_path_factory.mktemp("ranks")
    write_cifar100_python(root / "cifar", made=make_images(64, 20))
    return root


def recipe_of(place: Path, arch: str, **settings: Any) -> Recipe:
    """Write weights and return a recipe of three epochs; each call has a cache of its own."""
    weights = write_weights(place / f"{arch}.safetensors", arch)
    cache = place / f"cache-{arch}"
    return tiny_recipe(place / "cifar", weights, cache, arch, epochs=3, **settings)


@pytest.fixture(scope="module")
def vit(place: Path) -> tuple[Recipe, Path]:
    """A recipe whose losses, averages and skipped images all go from process to process, and the run of one process."""
    recipe = recipe_of(place, "test_vit", ema=0.9, skip_easy=0.5)
    run(recipe, place / "vit")
    return recipe, place / "vit"


def start_two(folder: Path, *words: tuple[str, ...], then: Callable[[], object] | None = None) -> list[tuple[int, str]]:
    """Start two processes in folders of their own and wait for them.

    Args:
        folder: of the two folders.
        words: the command line of both, or of each.
        then: called in the second one before it begins.

    Returns:
        Exit code and standard error of each.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    folders = [folder / "first", folder / "second"]
    processes = [
        start(each, *words[rank % len(words)], prepare=partial(as_rank, rank, store.port, then if rank else None))
        for rank, each in enumerate(folders)
    ]
    codes = [finish(process) for process in processes]
    assert (folders[1] / "out.txt").read_text() == ""
    return [(code, (each / "err.txt").read_text()) for code, each in zip(codes, folders, strict=True)]


def interrupted_in_second_epoch() -> None:
    """Ask this process to stop when its second epoch begins."""
    whole = Trainer.train_epoch

    def train_epoch(self: Trainer, split: Any, epoch: int, *rest: Any) -> Any:
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, split, epoch, *rest)

    Trainer.train_epoch = train_epoch  # type: ignore[method-assign]


def require_same_losses(run: Path, truth: Path, rows: int = 3) -> None:
    """Check metrics of two runs against each other, as far as `rows`."""
    found, expected = metrics(run), metrics(truth)[:rows]
    assert len(found) == rows
    for row, other in zip(found, expected, strict=True):
        assert row == {name: pytest.approx(value, abs=1e-4) for name, value in other.items()}


def test_a_killed_process_ends_the_other_and_one_alone_goes_on(place: Path, tmp_path: Path) -> None:
    """Started by torchrun itself; what the two had done until then is what one does."""
    recipe = recipe_of(place, "test_resnet", train_layers=("fc",))
    run(recipe, tmp_path / "whole")
    (tmp_path / "own.toml").write_text(to_toml(recipe))
    (tmp_path / "killed.py").write_text(KILLED)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*torchrun, "killed.py", "run", "--config", "own.toml", "--output", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Error: Another process of this run has ended or cannot be reached any more (" in done.stderr
    assert "what was finished is kept: go on with finetune run --resume run\n" in done.stderr
    assert "Signal 9 (SIGKILL) received by PID" in done.stderr, "torchrun says which"
    assert "2 processes, each with its part of the images, and of every batch of 16" in done.stderr
    require_same_losses(tmp_path / "run", tmp_path / "whole", rows=1)
    resume(tmp_path / "run")
    require_same_losses(tmp_path / "run", tmp_path / "whole")


def test_one_process_goes_on_where_two_were_stopped(vit: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Only the second one gets the signal, and both stop at the same step."""
    recipe, whole = vit
    (tmp_path / "own.toml").write_text(to_toml(recipe))
    words = ("run", "--config", str(tmp_path / "own.toml"), "--output", str(tmp_path / "run"))
    (first, told), (second, silent) = start_two(tmp_path, words, then=interrupted_in_second_epoch)
    assert (first, second) == (130, 130), (told, silent)
    stopped = "Error: Stopped after epoch 1 of 3; what was finished is kept. Go on with: finetune run --resume "
    assert (told + silent).count(f"{stopped}{tmp_path / 'run'}\n") == 1, (told, silent)
    require_same_losses(tmp_path / "run", whole, rows=1)
    resume(tmp_path / "run")
    require_same_losses(tmp_path / "run", whole)


def test_two_processes_go_on_where_one_was_stopped(vit: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, whole = vit
    folder = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(recipe, folder, stop=(folder / "metrics.jsonl").exists)
    (first, told), (second, silent) = start_two(tmp_path, ("run", "--resume", str(folder), "--json"))
    assert (first, second) == (0, 0), (told, silent)
    assert silent == "", "only the first one says anything"
    require_same_losses(folder, whole)
    summary, truth = (json.loads((each / "summary.json").read_text()) for each in (folder, whole))
    for name in ("test_loss", "test_accuracy", "train_accuracy"):
        assert summary[name] == pytest.approx(truth[name], abs=1e-4)
    assert (summary["processes"], truth["processes"]) == (2, 1)
    pages = [(each / "report.html").read_text() for each in (folder, whole)]
    assert [" on cpu in 2 processes, 3 epochs" in page for page in pages] == [True, False]
    assert json.loads((tmp_path / "first" / "out.txt").read_text()) == {**summary, "output": str(folder)}
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(entry.name for entry in whole.iterdir())


def test_batch_norms_that_keep_their_statistics_do_so_in_all_processes(place: Path, tmp_path: Path) -> None:
    """Then no mean over a part of a batch is left, and two processes train as one does."""
    recipe = recipe_of(place, "test_resnet", freeze_norms=1.0)
    run(recipe, tmp_path / "whole")
    (tmp_path / "own.toml").write_text(to_toml(recipe))
    words = ("run", "--config", str(tmp_path / "own.toml"), "--output", str(tmp_path / "run"))
    (first, told), (second, silent) = start_two(tmp_path, words)
    assert (first, second) == (0, 0), (told, silent)
    require_same_losses(tmp_path / "run", tmp_path / "whole")


def test_a_process_with_other_settings(vit: tuple[Recipe, Path], tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(to_toml(vit[0]))
    words = ("run", "--config", str(tmp_path / "own.toml"), "--output", str(tmp_path / "run"))
    (first, told), (second, silent) = start_two(tmp_path, words, (*words, "--lr", "0.02"))
    assert (first, second) == (1, 1)
    assert told + silent == (
        "Error: Process 1 of this run has --lr 0.02 and process 0 has auto; start all of them with the same command, "
        "data, weights and versions.\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_first_difference_is_named() -> None:
    same = {"data of sha256": "12ab", "torch": "2.9.0"}
    assert difference([same, same, dict(same)]) is None
    assert difference([same, same, {**same, "data of sha256": "34cd"}]) == (
        "Process 2 of this run has data of sha256 34cd and process 0 has 12ab; start all of them with the same "
        "command, data, weights and versions."
    )
    assert str(difference([same, {}])).startswith("Process 1 of this run has data of sha256 not given and process 0 ")


@pytest.mark.parametrize("own", [True, False], ids=["blocks", "equal shares"])
def test_the_parts_of_a_batch_have_the_mean_of_the_batch(own: bool) -> None:
    """The last process has no row of the batch in its block, and a row of weight 0 in its place."""
    rows, views = torch.tensor([11, 0, 3, 5, 9, 2, 1]), torch.tensor([1, 0, 1, 0, 1, 1, 0])
    losses, weights = torch.rand(20, generator=torch.Generator().manual_seed(0)), torch.arange(20.0)
    seen, mean = [], torch.tensor(0.0)
    for rank in range(3):
        ranks = Ranks(rank, 3)
        part = part_of(ranks, rows, views, ranks.part(20) if own else None)
        counts = part.scaled(part.counts(weights, part.rows))
        assert counts is not None
        mean += (losses[part.rows] * counts).mean() / 3
        seen += list(zip(part.trained.tolist(), part.views.tolist(), strict=False))
    assert mean == pytest.approx(float((losses[rows] * weights[rows]).mean()), rel=1e-6)
    assert sorted(seen) == sorted(zip(rows.tolist(), views.tolist(), strict=True))


def test_a_process_that_is_alone_has_the_whole_batch_as_it_is() -> None:
    rows, views = torch.tensor([4, 1]), torch.tensor([0, 1])
    part = part_of(Ranks(), rows, views, None)
    assert part.rows is rows
    assert part.views is views
    assert part.scaled(part.counts(None, part.rows)) is None


def test_a_split_with_fewer_images_than_processes() -> None:
    require_rows(Ranks(0, 4), {"training": 40, "validation": 0})
    with pytest.raises(UsageError) as error:
        require_rows(Ranks(0, 4), {"training": 40, "validation": 3})
    assert str(error.value) == "3 validation images cannot be shared by 4 processes; start 3 at most."


def test_devices_that_processes_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def said(device: str) -> str:
        with pytest.raises(UsageError) as error:
            Ranks(1, 2, 1, 2).device(torch.device(device))
        return str(error.value)

    assert said("cuda") == (
        "2 processes of the run are on this machine, which has 1 GPU; give torchrun --nproc-per-node 1, or the run "
        "--device cpu."
    )
    assert said("cuda:0") == (
        "--device cuda:0 is one GPU and 2 processes of the run are on this machine; give --device cuda, and each takes "
        "its own."
    )
    assert said("mps") == "Several processes train on CPUs or on CUDA GPUs, and this is mps; use one process."


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert Ranks(3, 4, 1, 2).device(torch.device("cuda")) == torch.device("cuda:1")
    assert taken == [torch.device("cuda:1")]


def test_on_gpus_trained_batch_norms_are_synchronised() -> None:
    """Their tensors stay the same ones, and frozen ones stay as they are. No GPU is asked for that."""
    module = nn.Sequential()
    module.add_module("still", nn.BatchNorm2d(3))
    module.add_module("moving", nn.BatchNorm2d(3))
    freeze(module, select_layers(module, ["moving"], []))
    before = dict(module.named_parameters()) | dict(module.named_buffers())
    synchronise_batch_norms(Ranks(0, 2), module, torch.device("cuda"))
    assert [type(part) for part in module] == [nn.BatchNorm2d, nn.SyncBatchNorm]
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    assert all(after[name] is value for name, value in before.items())


LOST = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4000")


def test_the_words_of_a_process_that_ended_are_those_of_the_others() -> None:
    store = HashStore()
    first, second, third = (Ranks(rank, 3, store=store) for rank in range(3))
    error = DataError("photos is damaged.")
    assert explained(second, error) is error
    with pytest.raises(RunError, match=r"^Process 1 of this run ended: photos is damaged\.$"):
        first.check()
    heard = [explained(first, LOST), explained(third, LOST), explained(first, StoppedError("Stopped."))]
    assert [str(each) for each in heard] == ["Process 1 of this run ended: photos is damaged."] * 3
    assert [getattr(each, "told", None) for each in heard] == [False, True, False]
    same = DataError("photos is damaged.")
    assert explained(third, same) is same
    assert same.told, "the second one has said it"


def test_a_process_that_is_lost_without_a_word() -> None:
    store = HashStore()
    survivors = [Ranks(rank, 3, store=store, advice="go on with it") for rank in (0, 2)]
    heard = [explained(ranks, LOST) for ranks in survivors]
    assert [str(each) for each in heard] == [
        f"Another process of this run has ended or cannot be reached any more ({LOST}), so this one ends as well; go "
        "on with it"
    ] * 2
    assert [getattr(each, "told", None) for each in heard] == [False, True], "one of a machine says it"
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert explained(survivors[0], other) is other


def test_commands_that_work_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    result = CliRunner().invoke(app, ["sweep"])
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: finetune sweep works in one process and torchrun started 2; start it without torchrun. finetune run "
        "and finetune baseline are what several processes can share.\n"
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert CliRunner().invoke(app, ["sweep"]).stderr == "", "the first one of a machine says it"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert CliRunner().invoke(app, ["list"]).exit_code == 0
