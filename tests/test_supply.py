"""What is depended on: pinned versions with hashes and without addresses, and what an audit and a bill of them say."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from make_pages import ROOT, load
from packaging.requirements import Requirement

audit = load(".ci/supply/audit.py")
requirements = load(".ci/supply/requirements.py")
sbom = load(".ci/supply/sbom.py")
PINNED = (ROOT / "requirements.txt").read_text(encoding="utf-8")
PINS = dict(text.split("==") for text in audit.pins(ROOT / "requirements.txt"))


def dependencies() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def test_requirements_have_every_dependency_with_a_hash_and_no_address() -> None:
    lines = [line for line in PINNED.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+]+ \\", line) for line in lines[0::2])
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in lines[1::2])
    assert len(PINS) == len(lines) // 2 > len(dependencies())
    assert "//" not in PINNED
    for one in dependencies():
        assert one.specifier.contains(PINS[normal(one.name)]), one.name


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_table_of_versions_is_that_of_pyproject_and_requirements() -> None:
    page = (ROOT / "docs/supply.md").read_text(encoding="utf-8")
    for one in dependencies():
        least = str(one.specifier).removeprefix(">=")
        assert f"| {one.name} | {least} | {PINS[normal(one.name)]} |" in page, one.name


def item(name: str, version: str, **hashes: str) -> dict[str, Any]:
    found = {"url": "https://index.example/a.whl", "archive_info": {"hashes": hashes}}
    return {"metadata": {"name": name, "version": version}, "download_info": found}


def test_pins_are_sorted_and_hold_no_address() -> None:
    report = {"install": [item("Tomli_W", "1.2", sha256="b" * 64), item("numpy", "2.4", sha256="a" * 64)]}
    assert requirements.pinned(report) == (
        f"numpy==2.4 \\\n    --hash=sha256:{'a' * 64}\ntomli-w==1.2 \\\n    --hash=sha256:{'b' * 64}\n"
    )
    with pytest.raises(SystemExit, match=r"numpy 2\.4 comes without a sha256, so it cannot be pinned"):
        requirements.pinned({"install": [item("numpy", "2.4", md5="a")]})


def looked_up(**more: Any) -> dict[str, Any]:
    clean = {"name": "rich", "version": "15", "vulns": []}
    return {"dependencies": [clean, {"name": "numpy", "version": "2.4", "vulns": [], **more}]}


def test_an_audit_counts_only_when_nothing_was_skipped() -> None:
    expected = {"numpy==2.4", "rich==15"}
    assert audit.judge(looked_up(), expected) == audit.Verdict(
        0, "2 packages were looked up, none skipped: no known vulnerability."
    )
    vulnerable = audit.judge(looked_up(vulns=[{"id": "X-1", "fix_versions": ["2.5"]}]), expected)
    assert (vulnerable.code, vulnerable.words.splitlines()[1]) == (1, "numpy 2.4: X-1, mended in 2.5")
    skipped = looked_up(skip_reason="not found")
    assert audit.judge(skipped, expected) == audit.Verdict(
        2, "Not auditable here: 1 of 2 packages were skipped: numpy==2.4."
    )
    assert audit.judge({"dependencies": []}, expected).code == 2
    assert audit.judge(None, expected, "Traceback\nConnectionError: no route\n") == audit.Verdict(
        2, "Nothing was audited: pip-audit made no report (ConnectionError: no route). Try where it has a network."
    )


def test_a_bill_of_materials_holds_hashes_and_no_address() -> None:
    digest = {"alg": "SHA-256", "content": "a" * 64}
    sources = [{"type": "distribution", "url": "https://index.example/numpy/", "hashes": [digest]}]
    one = {"name": "numpy", "version": "2.4", "type": "library", "externalReferences": sources}
    bill = {"metadata": {"tools": {"components": [one]}}, "components": [one]}
    assert sbom.clean(bill) == {
        "metadata": {"tools": {}},
        "components": [{"name": "numpy", "version": "2.4", "type": "library", "hashes": [digest]}],
    }
    with pytest.raises(SystemExit, match=r"rich 15 has no sha256; run make requirements first"):
        sbom.clean({"components": [{"name": "rich", "version": "15"}]})
