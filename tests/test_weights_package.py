"""The face of the package: what it exports, that it is lazy, and that everything in it is documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import weights

ROOT = Path(weights.__file__).parent
MODULES = sorted(ROOT.glob("*.py"))


def test_importing_the_package_and_its_errors_does_not_import_torch() -> None:
    code = "import sys, weights, weights.errors; print(sorted({'torch', 'timm', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_loads_and_is_documented() -> None:
    assert sorted(weights.__all__) == sorted(set(weights.__all__))
    for name in weights.__all__:
        exported = getattr(weights, name)
        assert inspect.getdoc(exported), name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'weights' has no attribute 'nonsense'"):
        weights.nonsense  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_public_functions_say_what_they_take_and_raise(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} does not explain itself"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node) or ""
        assert text, f"{path.name}: {node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
            missing = [a for a in arguments if f"    {a}:" not in text]
            assert not missing, f"{path.name}: {node.name} does not document {missing}"


def test_the_package_imports_nothing_from_above() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not {n.partition(".")[0] for n in names} & {"finetune", "cli", "typer", "rich"}, path.name
