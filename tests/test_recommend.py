"""What follows from a sweep's runs: the frontier, the choice, the words; on figures that are made up."""

from __future__ import annotations

from typing import Any

from finetune.recommend import Tried, best_of, frontier, recommend, standard_error


def tried(name: str, accuracy: float | None, seconds: float = 10.0, **settings: Any) -> Tried:
    known = {"train_layers": ("fc",), "lr": 0.01, "weight_decay": 5e-4, "shots": None, **settings}
    return Tried(
        name, name, val_accuracy=accuracy, seconds=seconds, diverged="" if accuracy is not None else "NaN", **known
    )


def test_the_frontier_holds_what_no_other_run_beats() -> None:
    runs = [
        tried("slow and best", 80, 100),
        tried("beaten", 60, 50),
        tried("quick", 50, 5),
        tried("as good, slower", 70, 40),
        tried("middle", 70, 20),
        tried("lost", None),
    ]
    assert [run.name for run in frontier(runs)] == ["quick", "middle", "slow and best"]


def test_the_best_is_the_quickest_of_equals() -> None:
    best = best_of([tried("a", 70, 30), tried("b", 70, 20), tried("c", None)])
    assert best is not None
    assert best.name == "b"
    assert best_of([tried("c", None)]) is None


def test_a_quicker_run_within_one_standard_error_is_named() -> None:
    assert standard_error(80, 400) == 2.0
    runs = [tried("big", 80, 100), tried("small", 78.5, 20), tried("tiny", 77.5, 1), tried("close", 80, 95)]
    advice = recommend(runs, 400)
    assert (advice.chosen, advice.quicker) == ("close", "small")
    assert advice.sentences == (
        "Take close: 80.00 % of 400 validation images right, the best of 4 runs, in 95 s with the features at hand.",
        "In a hurry, take small: 1.50 points less, where one standard error is 2.00, in 20 s.",
    )
    assert recommend(runs, 40_000).quicker is None, "many images tell them apart"
    almost = [tried("big", 80, 100), tried("close", 80, 95)]
    assert recommend(almost, 400).quicker is None


def test_a_best_value_at_the_edge_is_told() -> None:
    runs = [tried("a", 60, lr=0.01), tried("b", 70, lr=0.1), tried("c", 65, lr=0.1, train_layers=("layer4",))]
    edge = "Its learning rate 0.1 is the largest of those tried with its layers; a larger one may be better."
    assert edge in recommend(runs, 100).sentences
    lost = [*runs, tried("d", None, lr=1.0)]
    assert recommend(lost, 100).sentences[1:] == ("1 of 4 runs diverged: d.",)
    decays = [tried("a", 70, weight_decay=0.0), tried("b", 60, weight_decay=0.1)]
    assert len(recommend(decays, 100).sentences) == 1, "there is nothing below 0"
    assert "weight decay 0.1 is the largest" in recommend([*decays[::-1][:1], tried("c", 10)], 100).sentences[1]


def test_only_runs_with_the_most_images_are_chosen_from() -> None:
    runs = [tried("few", 90, shots=1), tried("more", 50, shots=5), tried("most", 60, shots=10)]
    advice = recommend(runs, 100)
    assert advice.chosen == "most"
    assert advice.sentences[0].startswith("Take most: 60.00 % of 100 validation images right, the only run, in")
    assert (
        advice.sentences[1]
        == "By images of every class, the best run each: 90.00 % with 1, 50.00 % with 5, 60.00 % with 10."
    )


def test_nothing_is_chosen_when_all_diverged() -> None:
    advice = recommend([tried("a", None), tried("b", None)], 100)
    assert advice.chosen is None
    assert advice.sentences == ("Every run diverged; start again with a lower --lr.",)
