"""Sweeps of tiny runs: shared features, runs as they would be alone, choice and test, resuming, shots, words.

All runs are in fp32, eager and on the CPU, where equal bits are promised.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from make_page import Page
from make_run import cifar_recipe, metrics, model_bytes
from typer.testing import CliRunner

from cli.main import app
from cli.run import result_lines
from cli.sweep import print_sweep
from finetune import features, one_pass
from finetune.cache import list_entries
from finetune.compare import compare
from finetune.events import Events
from finetune.grid import Candidate, Grid, make_grid
from finetune.pipeline import run
from finetune.recipe import Recipe, read_toml
from finetune.sweep import Sweep, resume_sweep, sweep
from weights.errors import RunError, StoppedError, UsageError

CUTS = ("layer3,layer4,fc", "layer4,fc", "fc")
TOO_LARGE = 1e30


@dataclasses.dataclass
class Counts:
    """Rows that a prefix computed: in passes for several cuts, and for one cut alone."""

    together: int = 0
    alone: int = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return count_rows(monkeypatch)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> Counts:
    seen, compute = Counts(), features.compute_rows

    def together(*arguments: Any) -> Any:
        seen.together += arguments[5] - arguments[4]
        return compute(*arguments)

    def alone(*arguments: Any) -> Any:
        seen.alone += arguments[5] - arguments[4]
        return compute(*arguments)

    monkeypatch.setattr(one_pass, "compute_rows", together)
    monkeypatch.setattr(features, "compute_rows", alone)
    return seen


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished sweep of three cuts and two learning rates, of which one is too large."""

    recipe: Recipe
    grid: Grid
    result: Sweep
    folder: Path
    counts: Counts
    notes: list[str]

    def candidates(self) -> list[Candidate]:
        return [one for one in self.grid.candidates(self.recipe) if one.recipe.lr != TOO_LARGE]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    root = tmp_path_factory.mktemp("sweep")
    recipe = cifar_recipe(root)
    grid = make_grid(recipe, train_layers=CUTS, lr=f"0.01,{TOO_LARGE}")
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        seen = count_rows(patch)
        result = sweep(recipe, grid, root / "sweep", events=Events(note=notes.append))
    return Done(recipe, grid, result, root / "sweep", seen, notes)


@pytest.fixture(scope="module")
def alone(done: Done, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs that did not diverge, each by itself, with a cache of its own and with its test."""
    root = tmp_path_factory.mktemp("alone")
    folders = {}
    for number, one in enumerate(done.candidates()):
        recipe = dataclasses.replace(one.recipe, hold_test=False, cache_dir=root / f"cache{number}")
        folders[one.name] = root / str(number)
        run(recipe, folders[one.name])
    return folders


def entries(cache: Path) -> dict[str, list[bytes]]:
    """The bytes of every cache entry's tensors, by key."""
    return {
        entry.key: [file.read_bytes() for file in sorted(entry.folder.glob("tensor-*.bin"))]
        for entry in list_entries(cache)
    }


def words(error: type[Exception], recipe: Recipe, grid: Grid, folder: Path) -> str:
    before = set(folder.parent.iterdir())
    with pytest.raises(error) as caught:
        sweep(recipe, grid, folder)
    assert set(folder.parent.iterdir()) == before, "nothing is left of a sweep that did not begin"
    return str(caught.value)


def test_the_frozen_part_is_computed_once_for_all_cuts(done: Done) -> None:
    train, val = 58, 6
    assert done.counts == Counts(together=2 * train + val, alone=0)
    made = list_entries(done.recipe.cache_dir or Path())
    assert len(made) == 3 * 3, "two views and validation of each cut"
    named = {tuple(entry.about.get(key) for key in ("arch", "data", "split")) for entry in made}
    assert named == {(done.result.arch, done.result.data, split) for split in ("train", "validation")}


def test_no_run_pays_for_the_features_of_all(done: Done, tmp_path: Path) -> None:
    """Of one cut they are computed before the first run as well, whose --budget would else be shorter than others'."""
    recipe = dataclasses.replace(done.recipe, cache_dir=tmp_path / "cache", hold_test=True)
    told: list[str] = []
    events = Events(note=told.append, progress=lambda what, done, total: told.append(what))
    result = sweep(recipe, make_grid(recipe, train_layers=CUTS[2:], lr="0.01,0.02"), tmp_path / "sweep", events=events)
    begun = next(place for place, text in enumerate(told) if text.startswith("run 1 of 2: "))
    assert {"features of train", "features of validation"} <= set(told[:begun])
    assert metrics(tmp_path / "sweep" / "fc-lr0.01") == metrics(done.folder / "fc-lr0.01")
    assert result.feature_seconds > 0


def test_each_run_is_what_it_is_alone(done: Done, alone: dict[str, Path]) -> None:
    """Losses, models, and the very cache entries that a lone run finds and writes."""
    made = entries(done.recipe.cache_dir or Path())
    for one in done.candidates():
        folder = done.folder / one.name
        assert metrics(folder) == metrics(alone[one.name])
        assert model_bytes(folder) == model_bytes(alone[one.name])
        own = entries(alone[one.name].parent / f"cache{alone[one.name].name}")
        both = own.keys() & made.keys()
        assert len(both) == 3
        assert len(own) == 4, "a lone run has features of the test as well"
        assert all(own[key] == made[key] for key in both)


def test_the_test_split_is_read_for_the_chosen_run_alone(done: Done, alone: dict[str, Path]) -> None:
    """Its folder is then that of a run that was tested at its end."""
    assert done.result.chosen is not None
    chosen = done.result.chosen.name
    for one in done.candidates():
        summary = json.loads((done.folder / one.name / "summary.json").read_text())
        expected = json.loads((alone[one.name] / "summary.json").read_text())
        report = (done.folder / one.name / "report.html").read_text()
        if one.name == chosen:
            for key in ("test_accuracy", "test_loss", "test_top5_accuracy", "test_mean_recall", "calibration", "data"):
                assert summary[key] == expected[key], key
            name = "predictions.safetensors"
            assert (done.folder / chosen / name).read_bytes() == (alone[chosen] / name).read_bytes()
            assert "Confusion matrix" in report
        else:
            said = "test accuracy   not known: the test images were left unread (--hold-test)"
            assert result_lines({**summary, "output": ""})[0] == said
            assert summary["data"] == {**expected["data"], "test": 0}
            assert "the test images were left unread (--hold-test)" in report
            assert not (done.folder / one.name / "predictions.safetensors").exists()
        assert read_toml(done.folder / one.name / "recipe.toml")["hold_test"] is (one.name != chosen)
    assert done.result.as_dict()["test_accuracy"] == done.result.chosen.test_accuracy is not None
    result = compare([done.folder / one.name for one in done.candidates()])
    assert set(result.differing) == {"train_layers"}


def test_a_run_that_diverges_is_a_row(done: Done) -> None:
    lost = [one for one in done.result.runs if one.diverged]
    assert [one.name for one in lost] == [f"{cut.replace(',', '+')}-lr1e+30" for cut in CUTS]
    assert all("Lower --lr or --head-lr-scale" in one.diverged for one in lost)
    assert len(done.result.runs) == done.result.planned == 6
    assert any(sentence.startswith("3 of 6 runs diverged:") for sentence in done.result.as_dict()["recommendation"])


def test_the_page_and_the_file_say_what_came_of_it(done: Done) -> None:
    plain = json.loads((done.folder / "sweep.json").read_text())
    assert {**plain, "seconds": None} == {**json.loads(json.dumps(done.result.as_dict())), "seconds": None}
    page = Page((done.folder / "sweep.html").read_text())
    assert page.open == []
    for one in done.result.runs:
        assert one.name in page.text
        assert one.diverged or f"{one.val_accuracy:.2f} %" in page.text
    assert plain["recommendation"][0] in page.text
    assert len([one for one in page.all("circle") if one.get("r") == "4" and "cx" in one]) == 3 + 3 + 6
    assert any(note.startswith("6 runs, expected to take") for note in done.notes)
    assert len(done.notes) == len(set(done.notes)), "what all runs say is said once"


def stop_in(run_number: int, epoch: int) -> tuple[Events, Any]:
    """Events and a stop that says yes in an epoch of one of the runs, both counted from 1."""
    begun: list[str] = []
    reached: list[bool] = []

    def note(text: str) -> None:
        if text.startswith("run "):
            begun.append(text)

    def progress(what: str, done: int, total: int) -> None:
        if len(begun) == run_number and what.startswith(f"epoch {epoch} "):
            reached.append(True)

    return Events(note=note, progress=progress), lambda: bool(reached)


def test_a_sweep_that_was_stopped_goes_on_in_the_run_it_was_in(done: Done, tmp_path: Path, counts: Counts) -> None:
    """One run diverged before, and is not tried again."""
    recipe = dataclasses.replace(done.recipe, cache_dir=tmp_path / "cache")
    grid = make_grid(recipe, train_layers=CUTS[1:], lr=f"0.01,{TOO_LARGE}")
    events, stop = stop_in(3, 2)
    with pytest.raises(StoppedError) as error:
        sweep(recipe, grid, tmp_path / "sweep", events=events, stop=stop)
    assert str(error.value) == (
        "Stopped after 2 of 4 runs; what was finished is kept. Go on with: "
        f"finetune sweep --resume {tmp_path / 'sweep'}"
    )
    assert not (tmp_path / "sweep" / "sweep.html").exists()
    assert [row["epoch"] for row in metrics(tmp_path / "sweep" / "fc-lr0.01")] == [1]
    (tmp_path / "sweep" / "fc-lr1e+30").mkdir()
    (tmp_path / "sweep" / "fc-lr1e+30" / ".recipe.toml.0a1b2c3d.tmp").write_text("what a kill left")
    before, notes = dataclasses.replace(counts), list[str]()
    result = resume_sweep(tmp_path / "sweep", events=Events(note=notes.append))
    assert counts == before, "no feature is computed again"
    assert [note for note in notes if note.startswith("run ")] == ["run 3 of 4: fc-lr0.01", "run 4 of 4: fc-lr1e+30"]
    for name in ("layer4+fc-lr0.01", "fc-lr0.01"):
        assert model_bytes(tmp_path / "sweep" / name) == model_bytes(done.folder / name)
    assert result.chosen is not None
    assert result.chosen.test_accuracy is not None


def test_features_that_stay_in_memory_are_shared_too(done: Done, tmp_path: Path, counts: Counts) -> None:
    """Nothing is written; test images are not read when that is asked for."""
    recipe = dataclasses.replace(done.recipe, cache="ram", cache_dir=tmp_path / "cache", hold_test=True)
    result = sweep(recipe, make_grid(recipe, train_layers=CUTS[1:]), tmp_path / "sweep")
    assert counts == Counts(together=2 * 58 + 6, alone=0)
    assert list_entries(tmp_path / "cache") == []
    for name in ("layer4+fc", "fc"):
        assert metrics(tmp_path / "sweep" / name) == metrics(done.folder / f"{name}-lr0.01")
        assert json.loads((tmp_path / "sweep" / name / "summary.json").read_text())["test_accuracy"] is None
    assert result.chosen is not None
    assert result.as_dict()["test_accuracy"] is None
    assert "no run was tested" in (tmp_path / "sweep" / "sweep.html").read_text()


def test_a_cache_too_small_for_all_cuts_holds_one_after_the_other(done: Done, tmp_path: Path, counts: Counts) -> None:
    bytes_of = [
        json.loads((done.folder / f"{name}-lr0.01" / "summary.json").read_text())["features"]["bytes"]
        for name in ("layer4+fc", "fc")
    ]
    limit = max(bytes_of) + 20_000  # journals and descriptions count as well
    assert limit < sum(bytes_of)
    recipe = dataclasses.replace(
        done.recipe, cache_dir=tmp_path / "cache", cache_limit=f"{limit}B", memory_budget="1kB", hold_test=True
    )
    notes: list[str] = []
    sweep(recipe, make_grid(recipe, train_layers=CUTS[1:]), tmp_path / "sweep", events=Events(note=notes.append))
    assert counts == Counts(together=0, alone=2 * (2 * 58 + 6))
    assert len(list_entries(tmp_path / "cache")) < 2 * 3
    assert any("fit neither the disk budget nor memory together" in note for note in notes)
    assert metrics(tmp_path / "sweep" / "fc") == metrics(done.folder / "fc-lr0.01")


def test_shots_share_the_features_of_the_largest_set(done: Done, tmp_path: Path, counts: Counts) -> None:
    recipe = dataclasses.replace(done.recipe, cache_dir=tmp_path / "cache")
    grid = make_grid(recipe, train_layers=CUTS[1:], shots="5,2")
    result = sweep(recipe, grid, tmp_path / "sweep")
    assert counts.alone == 0
    assert counts.together == 2 * 4 * 5 + 6
    assert [(one.shots, one.images) for one in result.runs] == [(2, 8), (5, 20)] * 2
    assert result.chosen is not None
    assert result.chosen.shots == 5
    assert "By images of every class" in " ".join(result.as_dict()["recommendation"])
    own = dataclasses.replace(recipe, train_layers=("fc",), shots=2, hold_test=True, cache_dir=tmp_path / "own")
    run(own, tmp_path / "alone")
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "sweep" / "fc-shots2")
    there, made = entries(tmp_path / "cache"), entries(tmp_path / "own")
    assert made == {key: there[key] for key in made}, "a lone run finds what it would have written"
    page = Page((tmp_path / "sweep" / "sweep.html").read_text())
    assert "shots-curve-title" in str(page.all("svg"))


def test_values_that_cannot_be_tried(done: Done, tmp_path: Path) -> None:
    recipe = done.recipe
    for typed, said in (
        ({"lr": "0.1,fast"}, "--lr is '0.1,fast', and 'fast' is no number; give numbers separated by commas, such as "
         "0.01,0.03,0.1."),
        ({"weight_decay": "0,,1"}, "--weight-decay is '0,,1', and '' is no number; give numbers separated by commas, "
         "such as 0,0.0005."),
        ({"shots": "1,2.5"}, "--shots is '1,2.5', and '2.5' is no whole number; give whole numbers separated by "
         "commas, such as 1,5,10."),
    ):  # fmt: skip
        with pytest.raises(UsageError) as error:
            make_grid(recipe, **typed)  # type: ignore[arg-type]
        assert str(error.value) == said
    for typed, said in (
        ({"lr": "0.01,auto"}, "--lr has 0.01 twice; name each value once."),
        ({"shots": "5,5"}, "--shots has 5 twice; name each value once."),
        ({"shots": "all,5,all"}, "--shots has all twice; name each value once."),
        ({"weight_decay": "auto,auto"}, "--weight-decay has auto twice; name each value once."),
        (
            {"train_layers": ["fc,layer4", "fc", "layer4, fc"]},
            "--train-layers has fc,layer4 twice; name each value once.",
        ),
        ({"lr": "0.1,-1"}, "--lr is -1.0; give a number above 0."),
    ):
        assert words(UsageError, recipe, make_grid(recipe, **typed), tmp_path / "new") == said  # type: ignore[arg-type]
    assert words(UsageError, recipe, make_grid(recipe, train_layers=["head", "fc"]), tmp_path / "new") == (
        "--train-layers head and fc are the same layers of test_resnet; leave one of them out."
    )
    assert "'layer5' names no layer" in words(
        UsageError, recipe, make_grid(recipe, train_layers=["fc", "layer5"]), tmp_path / "new"
    )


def test_each_cut_takes_the_slower_layers_that_it_trains(done: Done, tmp_path: Path) -> None:
    recipe = dataclasses.replace(done.recipe, lr_scales=("layer4.0=0.1", "fc.bias=2"))
    grid = make_grid(recipe, train_layers=["layer4,fc", "fc"])
    sweep(recipe, grid, tmp_path / "sweep")
    taken = {name: read_toml(tmp_path / "sweep" / name / "recipe.toml")["lr_scales"] for name in ("layer4+fc", "fc")}
    assert taken == {"layer4+fc": ["layer4.0=0.1", "fc.bias=2"], "fc": ["fc.bias=2"]}
    nowhere = dataclasses.replace(recipe, lr_scales=("fc.bias=2", "layer3=0.1"))
    assert words(UsageError, nowhere, grid, tmp_path / "new").startswith(
        "--lr-scales names 'layer3', and nothing that trains is called so; did you mean layer4?"
    )


def test_a_sweep_needs_validation_images(done: Done, tmp_path: Path) -> None:
    recipe = dataclasses.replace(done.recipe, val_fraction=0.0)
    assert words(UsageError, recipe, make_grid(recipe, lr="0.01,0.1"), tmp_path / "new") == (
        "A sweep chooses by validation images, and cifar100 leaves none with --val-fraction 0; give --val-fraction "
        "0.1, or data with a val/ folder."
    )


def test_a_folder_that_holds_a_sweep(done: Done, tmp_path: Path) -> None:
    assert words(RunError, done.recipe, done.grid, done.folder) == (
        f"{done.folder} holds this sweep already; go on with finetune sweep --resume {done.folder}"
    )
    other = dataclasses.replace(done.recipe, epochs=3)
    assert words(RunError, other, make_grid(other, train_layers=CUTS, lr="0.01,0.1"), done.folder) == (
        f"{done.folder} holds a sweep with other settings: --lr 0.01,0.1 (there 0.01,1e+30), --epochs 3 (there 2); "
        "give another --output."
    )
    with pytest.raises(RunError, match=r"it holds no sweep.toml; give the folder of a sweep that was started before"):
        resume_sweep(tmp_path)


def test_other_data_are_not_mixed_in(done: Done, tmp_path: Path) -> None:
    summary = json.loads((done.folder / "fc-lr0.01" / "summary.json").read_text())
    summary["data"]["sha256"] = "0" * 64
    (tmp_path / "fc-lr0.01").mkdir()
    (tmp_path / "fc-lr0.01" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "sweep.toml").write_bytes((done.folder / "sweep.toml").read_bytes())
    with pytest.raises(RunError, match=r"was trained with other images \(sha256 000000000000…, now \w{12}…\); bring"):
        resume_sweep(tmp_path)


def test_the_command(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished sweep is told again; nothing is trained."""
    print_sweep(done.result)
    shown = capsys.readouterr().out
    assert done.result.as_dict()["recommendation"][0] in shown
    assert all(one.name in shown for one in done.result.runs)
    again = CliRunner().invoke(app, ["sweep", "--resume", str(done.folder), "--json"])
    assert again.exit_code == 0, again.stderr
    assert [line for line in again.stderr.splitlines() if line.startswith("epoch ")] == []
    assert json.loads(again.stdout)["runs"] == json.loads(json.dumps(done.result.as_dict()["runs"]))
    refused = CliRunner().invoke(app, ["sweep", "--resume", str(done.folder), "--lr", "0.1"])
    assert refused.exit_code == 2
    assert "--resume goes on with the run's own settings, and --lr was given too" in refused.stderr
