"""`make requirements`: the versions that were tested, each with the sha256 of its file, and no address.

    .venv/bin/python .ci/supply/requirements.py --output requirements.txt

pip works out what it would install, with the versions of this environment as constraints, and reports it with hashes.
Names, versions and hashes are taken from the report; where pip found the files is left out, so that whoever installs
uses an index of his own, and the hashes tell whether it gives the same files.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OWN = "finetune-timm"


def wanted(extras: list[str]) -> list[str]:
    """Return the requirements in pyproject.toml, with those of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]


def report_of(requirements: list[str]) -> dict[str, Any]:
    """Let pip work out what it would install into an empty environment, with the versions that are installed here.

    Raises:
        SystemExit: pip finds no such set; its own words are on standard error.
    """
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "constraints.txt", Path(folder) / "report.json"
        constraints.write_text("".join(f"{name}=={at}\n" for name, at in installed.items() if name != OWN))
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", str(report)]
        words = [sys.executable, "-m", "pip", "install", *options, "--constraint", str(constraints), *requirements]
        if subprocess.run(words, check=False).returncode:
            sys.exit("pip could not work out the requirements; its words are above.")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def pinned(report: dict[str, Any]) -> str:
    """Return the lines of a requirements file, with a hash for each package and no address.

    Args:
        report: of `pip install --report`, format 1.

    Raises:
        SystemExit: a package comes without a hash.
    """
    lines = []
    for item in report["install"]:
        about = item["metadata"]
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not digest:
            sys.exit(f"{about['name']} {about['version']} comes without a sha256, so it cannot be pinned.")
        name = about["name"].lower().replace("_", "-").replace(".", "-")
        lines.append(f"{name}=={about['version']} \\\n    --hash=sha256:{digest}\n")
    return "".join(sorted(lines))


def heading() -> str:
    """Return what the file says of itself."""
    python = f"{platform.python_implementation()} {'.'.join(platform.python_version_tuple()[:2])}"
    return (
        "# What the dependencies in pyproject.toml bring, in the versions that were tested.\n"
        f"# The hashes are those of the files for {platform.system()} {platform.machine()} and {python}.\n"
        "# Made by make requirements; use: pip install --require-hashes --requirement requirements.txt\n"
    )


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "requirements.txt")
    parser.add_argument("--extra", action="append", default=[], help="include an extra of pyproject.toml")
    given = parser.parse_args()
    text = heading() + pinned(report_of(wanted(given.extra)))
    given.output.write_text(text, encoding="utf-8")
    print(f"{text.count('==')} packages with their hashes are in {given.output}.")


if __name__ == "__main__":
    main()
