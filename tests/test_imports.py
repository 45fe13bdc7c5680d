"""The house rules that can be read from the source: which way imports point, how long things are, what is explained."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"weights": {"weights"}, "finetune": {"finetune", "weights"}, "cli": {"cli", "finetune", "weights"}}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
# Where the name that is imported is not the name that is installed.
DISTRIBUTIONS = {"PIL": "pillow", "imagehash": "ImageHash"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(params=FILES, ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """The first part of every absolute import, wherever in the file it stands."""
    roots = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            roots.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            roots.add(str(node.module).partition(".")[0])
    return roots


def test_there_are_modules_to_read() -> None:
    assert {path.parent.name for path in FILES} >= set(MAY_IMPORT)
    assert len(FILES) > 30


def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) & set(MAY_IMPORT) <= MAY_IMPORT[package]


def test_only_cli_knows_the_terminal(path: Path) -> None:
    roots = imported(path)
    assert "click" not in roots, "typer brings its own"
    if path.parent.name != "cli":
        assert not roots & {"typer", "rich"}
    elif path.name != "console.py":
        assert "rich" not in roots


def test_everything_imported_is_declared(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "dev" for text in texts]
    declared = {re.split(r"[^\w-]", text)[0].replace("-", "_") for text in [*project["dependencies"], *extras]}
    outside = imported(path) - set(sys.stdlib_module_names) - set(MAY_IMPORT)
    assert {DISTRIBUTIONS.get(name, name) for name in outside} <= declared


def definitions(path: Path) -> list[tuple[str, Definition]]:
    """Every class and function of a file with its dotted name, nested functions included."""
    found = []

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition):
                found.append((inside + child.name, child))
                visit(child, f"{inside}{child.name}.")
            else:
                visit(child, inside)

    visit(tree_of(path), "")
    return found


def test_lengths(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    sizes = {
        name: (node.end_lineno or 0) - node.lineno + 1
        for name, node in definitions(path)
        if not isinstance(node, ast.ClassDef)
    }
    assert {name: size for name, size in sizes.items() if size > 60} == {}


def test_everything_public_is_explained(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree) or not tree.body, "the module does not say what it is"
    classes = {name for name, node in definitions(path) if isinstance(node, ast.ClassDef)}
    silent = []
    for name, node in definitions(path):
        owner, _, last = name.rpartition(".")
        public = not any(part.startswith("_") for part in name.split("."))
        reachable = not owner or owner in classes  # not a function inside a function
        if public and reachable and not ast.get_docstring(node):
            silent.append(f"{name_of(path)}:{node.lineno} {last}")
    assert silent == []


QUICK = (
    ["--help"],
    ["--version"],
    ["run", "--help"],
    ["layers", "--help"],
    ["cache", "--help"],
    ["plan", "--help"],
    ["check", "--help"],
    ["sweep", "--help"],
    ["init", "--help"],
    ["run", "--epochs", "0"],
    ["plan", "--epochs", "0"],
    ["run", "--optimizer", "sdg"],
    ["sweep", "--lr", "0.1,fast"],
    ["run", "--no-such-flag"],
    ["baseline", "--config", "none.toml"],
    ["run", "--resume", "r", "--lr", "1"],
)


def test_help_and_wrong_flags_do_not_wait_for_torch(tmp_path: Path) -> None:
    """One process for all of them, told apart by what had been imported after each."""
    quick = (*QUICK, ["init", str(tmp_path / "recipe.toml")])
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from cli.main import app\n"
        f"for words in {quick!r}:\n"
        "    code = CliRunner().invoke(app, words).exit_code\n"
        "    print(code, *[name for name in ('torch', 'timm', 'torchvision', 'numpy', 'PIL') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == ["0"] * 9 + ["2"] * 7 + ["0"]
    assert (tmp_path / "recipe.toml").exists()


def test_the_package_starts_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "cli", "--version"], capture_output=True, text=True, cwd=ROOT)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"finetune {version}\n", "")
