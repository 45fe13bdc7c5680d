"""`make sbom`: a software bill of materials of the pinned packages, CycloneDX in JSON, without addresses and paths.

    .venv/bin/python .ci/supply/sbom.py --output build/sbom.json

cyclonedx-bom reads requirements.txt. The index that it would name as the source of every package is taken out: which
one is used is the business of whoever installs, and the hashes say what has to come of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def made(path: Path) -> dict[str, Any]:
    """Let cyclonedx-bom describe a requirements file.

    Raises:
        SystemExit: it cannot; its words are on standard error.
    """
    options = ["--output-reproducible", "--output-format", "JSON", "--pyproject", str(ROOT / "pyproject.toml")]
    words = [sys.executable, "-m", "cyclonedx_py", "requirements", *options, str(path)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit("cyclonedx-bom made no bill of materials; its words are above.")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def clean(bill: dict[str, Any]) -> dict[str, Any]:
    """Take the addresses out, and require a hash of every component.

    Args:
        bill: as cyclonedx-bom makes it.

    Raises:
        SystemExit: a component has no sha256.
    """
    bill.get("metadata", {}).get("tools", {}).clear()  # its own version and addresses, which say nothing of ours
    components = []
    for one in bill["components"]:
        hashes = [
            each
            for reference in one.get("externalReferences", ())
            for each in reference.get("hashes", ())
            if each["alg"] == "SHA-256"
        ]
        if not hashes:
            sys.exit(f"{one['name']} {one['version']} has no sha256; run make requirements first.")
        kept = {
            key: value for key, value in one.items() if key not in ("externalReferences", "description", "properties")
        }
        components.append({**kept, "hashes": hashes})
    own = bill.get("metadata", {}).get("component", {})
    own.pop("externalReferences", None)
    return {**bill, "components": components}


def main() -> None:
    """Write the bill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sbom.json")
    parser.add_argument("--requirements", type=Path, default=ROOT / "requirements.txt")
    given = parser.parse_args()
    bill = clean(made(given.requirements))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(bill, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(bill['components'])} components are in {given.output}.")


if __name__ == "__main__":
    main()
