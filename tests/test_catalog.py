"""The list of architectures."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from cli.main import app
from finetune.catalog import catalog
from finetune.networks import NETWORKS


def test_ours_come_first_with_their_parameters() -> None:
    found = catalog()
    ours = [one for one in found if one.ours]
    assert found[: len(ours)] == ours
    assert {one.name for one in ours} == {f"finetune_{name}" for name in NETWORKS}
    assert next(one.parameters for one in ours if one.name == "finetune_singlestage") == 116_004
    assert len(found) > 500


def test_a_search_finds_parts_of_names_and_patterns() -> None:
    names = [one.name for one in catalog("resnet18")]
    assert "resnet18" in names
    assert all("resnet18" in name for name in names)
    assert "resnet18" in [one.name for one in catalog("resnet1?")]
    assert "resnet101" not in [one.name for one in catalog("resnet1?")]
    assert [one.name for one in catalog("ResNet18.A1_in1k")] == ["resnet18"]
    assert "resnet18" in [one.name for one in catalog("a1_in1k")]
    assert "tv_in1k" in next(one.tags for one in catalog("resnet18*") if one.name == "resnet18")


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["list", "--search", "figure1", "--json"])
    assert [one["name"] for one in json.loads(done.stdout)] == ["finetune_figure1", "finetune_figure1_shared"]
    table = CliRunner().invoke(app, ["list", "--search", "figure1"])
    assert "3,559,556" in table.stdout
    assert CliRunner().invoke(app, ["list", "figure1"]).stdout == table.stdout
    missing = CliRunner().invoke(app, ["list", "nosuchthing"])
    assert missing.exit_code == 2
    assert "No architecture is called 'nosuchthing'; try a shorter part of its name" in missing.stderr
    both = CliRunner().invoke(app, ["list", "figure1", "--search", "resnet"])
    assert both.exit_code == 2
    assert "finetune list got 'figure1' and --search resnet; give one of the two." in both.stderr
