"""The documents say what the program does: options, links, files and examples are checked against it."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PACKAGES = ("cli", "finetune", "weights")

HOSTS = {"github.com", "keepachangelog.com", "semver.org", "www.cs.toronto.edu", "download.pytorch.org"}
OTHER_TOOLS = {"--editable", "--check", "--logdir"}  # options of pip, ruff and TensorBoard
PLACEHOLDERS = r"\b(TODO|FIXME|XXX|TBD|lorem ipsum|coming soon)\b"
FILLERS = (
    r"\b(simply|easily|seamless(ly)?|leverag(e|es|ing)|blazing(ly)?|powerful|cutting[- ]edge|state[- ]of[- ]the)\b"
)
ONE_MACHINE = r"(?<![\w.~])/(home|root|tmp|work|mnt|Users)/"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def between(text: str, mark: str) -> str:
    """Return what stands between <!-- mark --> and <!-- /mark -->."""
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]


@pytest.fixture(scope="module")
def make_cli() -> Any:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_md_is_what_the_commands_say_now(make_cli: Any) -> None:
    assert read("docs/cli.md") == make_cli.render(), "run `make docs`"


def test_every_command_and_option_is_in_cli_md(make_cli: Any) -> None:
    sections = dict(part.split("\n", 1) for part in read("docs/cli.md").split("\n## ")[1:])
    commands = dict(make_cli.commands())
    assert list(sections) == list(commands)
    assert {"finetune run", "finetune layers", "finetune cache list", "finetune demo"} <= set(commands)
    for name, command in commands.items():
        for parameter in command.params:
            for option in parameter.opts:
                wanted = option if option.startswith("-") else option.upper()
                assert re.search(rf"^  (\S+ )?{re.escape(wanted)}\b", sections[name], re.MULTILINE), (name, option)


def test_cli_md_fits_its_width(make_cli: Any) -> None:
    blocks = re.findall(r"```text\n(.*?)```", read("docs/cli.md"), re.DOTALL)
    assert max(len(line) for block in blocks for line in block.splitlines()) <= make_cli.WIDTH


@pytest.mark.parametrize("name", NAMES)
def test_options_named_in_the_documents_exist(name: str, make_cli: Any) -> None:
    known = {option for _, command in make_cli.commands() for p in command.params for option in p.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"<!--.*?-->", "", read(name))))
    assert named - known - OTHER_TOOLS - {"--help"} == set()


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if urlsplit(target).scheme:
            continue
        path = ((ROOT / name).parent / target.partition("#")[0]).resolve()
        assert path.is_relative_to(ROOT), f"{target} leads out of the project"
        assert path.exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_addresses_are_known_ones(name: str) -> None:
    found = {urlsplit(address).hostname for address in re.findall(r"https?://[^\s)`>]+", read(name))}
    assert found <= HOSTS


@pytest.mark.parametrize("name", [*NAMES, *PACKAGES])
def test_words_that_do_not_belong_here(name: str) -> None:
    files = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).glob("*.py"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        for pattern in (PLACEHOLDERS, ONE_MACHINE, *([FILLERS] if file.suffix == ".md" else [])):
            found = re.search(pattern, text)
            assert found is None, f"{file.name}: {found[0] if found else ''}"


def tree() -> Iterator[str]:
    """Yield the paths that the README's tree names, folders with a slash at the end."""
    folders: list[str] = []
    for line in between(read("README.md"), "tree").splitlines():
        if not line.strip() or line.startswith("```"):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        folders = [*folders[:depth], entry]
        yield "".join(folders)


def test_every_file_in_the_tree_exists() -> None:
    paths = list(tree())
    assert len(paths) > 40
    for path in paths:
        assert list(ROOT.glob(path.rstrip("/"))), path
        assert not path.endswith("/") or (ROOT / path).is_dir(), path


def test_the_tree_names_every_module_and_page() -> None:
    named = set(tree())
    modules = {f"{p}/{file.name}" for p in PACKAGES for file in (ROOT / p).glob("*.py") if file.name != "__init__.py"}
    pages = {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")}
    assert (modules | pages) - named == set(), "give each a line in README.md"


def test_the_changelog_begins_with_this_version() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)[0] == version


def test_the_quickstart_ends_with_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.pipeline import run
    from finetune.recipe import Recipe

    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for name, base in (("daisy", 30), ("tulip", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            pixels = (base + noise.integers(0, 50, (40, 48, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    Image.open(tmp_path / "photos/daisy/0.png").save("photo.jpg")
    recipe = Recipe(
        arch="test_resnet", weights="none", data="photos", image_size=32, epochs=2, precision="fp32", compile="off",
        cache="ram", cache_dir=tmp_path / "cache",
    )  # fmt: skip
    run(recipe, Path("runs/photos"))

    code = re.findall(r"```python\n(.*?)```", read("docs/quickstart.md"), re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0], "docs/quickstart.md", "exec"), {})
    label, chance = capsys.readouterr().out.split()
    assert label in ("daisy", "tulip")
    assert 0.5 <= float(chance) <= 1


def test_every_test_that_reliability_md_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", read("docs/reliability.md"))
    rows = [
        line for line in read("docs/reliability.md").splitlines() if line.startswith("| ") and "| test |" not in line
    ]
    assert len(named) == len(rows) > 20, "each row names one test"
    for file, name in named:
        assert re.search(rf"^def {name}\(", read(f"tests/{file}"), re.MULTILINE), f"{file}::{name}"
