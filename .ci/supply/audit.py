"""`make audit`: known vulnerabilities of the pinned packages, by pip-audit; counted only when it looked at all of them.

    .venv/bin/python .ci/supply/audit.py

Exit code 0: every package was looked up and none has a known vulnerability. 1: some have. 2: nothing counts, because
the service of advisories could not be reached, or packages were skipped.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CLEAN, VULNERABLE, NOT_AUDITED = 0, 1, 2


class Verdict(NamedTuple):
    """What an audit came to.

    Attributes:
        code: exit code.
        words: for people.
    """

    code: int
    words: str


def pins(path: Path) -> set[str]:
    """Return what a requirements file pins, as "name==version"."""
    return set(re.findall(r"^([a-z0-9-]+==\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def judge(report: dict[str, Any] | None, expected: set[str], said: str = "") -> Verdict:
    """Say what a report is worth.

    Args:
        report: of pip-audit, as JSON; None when it gave none.
        expected: what should have been looked up.
        said: what pip-audit wrote beside it.
    """
    if report is None:
        last = (said.strip().splitlines() or ["it gave no reason"])[-1][:300]
        return Verdict(
            NOT_AUDITED, f"Nothing was audited: pip-audit made no report ({last}). Try where it has a network."
        )
    looked = {f"{one['name']}=={one['version']}" for one in report["dependencies"] if "skip_reason" not in one}
    missing = sorted(expected - looked)
    if missing:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        return Verdict(
            NOT_AUDITED, f"Not auditable here: {len(missing)} of {len(expected)} packages were skipped: {named}."
        )
    bad = [
        f"{one['name']} {one['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none yet'}"
        for one in report["dependencies"]
        for found in one["vulns"]
    ]
    if bad:
        return Verdict(VULNERABLE, "\n".join([f"{len(bad)} known vulnerabilities:", *bad]))
    return Verdict(CLEAN, f"{len(expected)} packages were looked up, none skipped: no known vulnerability.")


def run(path: Path) -> Verdict:
    """Let pip-audit look up what a requirements file pins, without installing anything."""
    options = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--timeout", "15"]
    words = [sys.executable, "-m", "pip_audit", "--requirement", str(path), *options]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = None
    return judge(report, pins(path), done.stderr)


def main() -> int:
    """Print the verdict and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requirements", type=Path, default=ROOT / "requirements.txt")
    verdict = run(parser.parse_args().requirements)
    print(verdict.words)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
