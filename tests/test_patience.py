"""The limits of the tests themselves, which follow the speed of the machine."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from hypothesis import settings

from tests import patience
from tests.examples import FEW, MORE


def of_load(monkeypatch: pytest.MonkeyPatch, *, spawn: float, load: float) -> None:
    monkeypatch.setattr(patience, "SPAWN_SECONDS", spawn)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)


@pytest.mark.promise("T6")
@pytest.mark.parametrize(
    ("spawn", "load", "factor"),
    [
        (0.01, 0.0, 1),  # a fast machine at rest waits no less
        (0.02, 1.5, 1),
        (0.1, 0.0, 5),  # a slow machine
        (0.02, 34.0, 17),  # a busy one
        (0.2, 34.0, 17),
    ],
)
def test_limits_grow_with_the_load_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, spawn: float, load: float, factor: float
) -> None:
    of_load(monkeypatch, spawn=spawn, load=load)
    assert patience.pace(0.5) == pytest.approx(0.5 * factor)
    assert patience.patience(10) >= 5 * patience.pace(10)


async def test_hanging_wait_ends_and_names_its_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    of_load(monkeypatch, spawn=0.01, load=0)
    with pytest.raises(AssertionError, match="a file appears"):
        await patience.until(lambda: False, "a file appears", 0.001)
    with pytest.raises(TimeoutError):
        await patience.within(asyncio.Event().wait(), 0.001)


@pytest.mark.promise("T6")
def test_hypothesis_has_one_profile() -> None:
    assert settings().deadline is None
    assert settings().derandomize == (not MORE)
    assert settings().suppress_health_check == FEW.suppress_health_check
