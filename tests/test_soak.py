"""The verdict of tests/soak.py, on figures that are made up."""

from __future__ import annotations

import pytest
from soak import LIMITS, Sample, rises


def test_what_rises_in_the_second_half_is_seen() -> None:
    warming = [Sample(number, 100 + 10 * number, 5 + number, 3) for number in range(20)]
    flat = [Sample(number, 300 + number % 3, 30, 3) for number in range(20, 40)]
    assert all(rise < LIMITS[name] for name, rise in rises(warming + flat).items())
    leaking = [Sample(number, 300 + number / 2, 30 + number // 10, 3 + number % 2) for number in range(20, 40)]
    found = rises(warming + leaking)
    assert found["rss_mb"] == pytest.approx(9.5)
    assert found["rss_mb"] > LIMITS["rss_mb"]
    assert found["files"] > LIMITS["files"]
    assert found["threads"] < LIMITS["threads"]
