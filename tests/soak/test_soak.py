"""The soak itself, short and by one chance: what `make soak` does for minutes."""

from __future__ import annotations

import sys

import pytest

from tests.soak.run import Plan, soak


@pytest.mark.slow
@pytest.mark.promise("P12")
@pytest.mark.skipif(sys.platform == "win32", reason="engines are ended and frozen by signals")
async def test_a_short_soak_leaves_nothing() -> None:
    figures = await soak(Plan(seconds=8.0, warm_up=4.0, streams=40, seed=3))
    assert figures.problems() == []
    assert figures.tally.counts["streams completed"] > 0
    assert figures.tally.counts["engines killed"] > 0
