"""The documents say what the program does: options, links, files and examples are checked against it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from make_pages import ROOT, load
from PIL import Image

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PACKAGES = ("cli", "finetune", "weights")
COMMANDS = list(load("docs/make_cli.py").commands())
IN_SITE = set(load("docs/site/hooks.py").contents(ROOT))

HOSTS = {"github.com", "keepachangelog.com", "semver.org", "www.cs.toronto.edu", "download.pytorch.org"}
OTHER_TOOLS = {"--editable", "--require-hashes", "--requirement", "--no-deps", "--check", "--logdir", "--extra"}
OTHER_TOOLS |= {  # of torchrun
    "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--rdzv-backend", "--no-python",
    "--max-restarts",
}  # fmt: skip
OTHER_TOOLS |= {"--hard-dereference", "--dereference", "--sparse"}  # of GNU tar
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


@pytest.mark.parametrize("name", NAMES)
def test_options_named_in_the_documents_exist(name: str) -> None:
    known = {option for _, command in COMMANDS for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"<!--.*?-->", "", read(name))))
    assert named - known - OTHER_TOOLS - {"--help"} == set()


def anchors(text: str) -> set[str]:
    """Return what links may name after a #: the headings of a page, as git hosts and the site spell them."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = [
        re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line) for line in re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    ]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if urlsplit(target).scheme:
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.is_relative_to(ROOT), f"{target} leads out of the project"
        assert path.exists(), target
        assert path.relative_to(ROOT).as_posix() in IN_SITE, f"{target} is not in the site (docs/site/hooks.py)"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_anchors_are_those_of_headings() -> None:
    assert anchors("# A\n\n## The cache's `key`\n\n```sh\n# no heading\n```\n\n## 2. [See](a.md) x\n") == {
        "a", "the-caches-key", "2-see-x",
    }  # fmt: skip


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
    assert len(named) >= len(rows) > 20, "each row names a test"
    for file, name in named:
        assert re.search(rf"^def {name}\(", read(f"tests/{file}"), re.MULTILINE), f"{file}::{name}"
