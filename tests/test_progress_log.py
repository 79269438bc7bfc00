"""Progress of an installation as a host's log shows it: every step, and not every byte."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from engine_plugin.download.events import ChunkProgress
from engine_plugin.plugin import ProgressLog

if TYPE_CHECKING:
    import pytest


def test_progress_of_a_download_takes_few_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("engine_plugin.plugin.time.monotonic", lambda: now)
    tell = ProgressLog("InstallEngine")
    with caplog.at_level(logging.INFO):
        tell("fetching it")
        for completed in range(0, 1_000_001, 1000):  # a tenth of a percent each, ten a second
            now += 0.1
            tell(ChunkProgress("sha256:ab", completed, 1_000_000))
        tell(ChunkProgress("sha256:cd", 500, 500))  # the next file, at once
        tell("done")
    lines = [record.message for record in caplog.records]
    assert lines[0] == "fetching it"
    assert lines[-1] == "done"
    assert "977 KiB of 977 KiB downloaded" in lines
    assert "500 bytes of 500 bytes downloaded" in lines
    assert len(lines) <= 105
    assert {vars(record)["progress"] for record in caplog.records} == {"InstallEngine"}
    numbers = [vars(record)["completed"] for record in caplog.records if "completed" in vars(record)]
    assert numbers[:-1] == sorted(numbers[:-1])


def test_progress_of_unknown_size_is_logged_in_steps(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("engine_plugin.plugin.time.monotonic", lambda: now)
    tell = ProgressLog("InstallEngine")
    with caplog.at_level(logging.INFO):
        for step in range(65):
            now += 0.6
            tell(ChunkProgress("", step * 1024 * 1024, 0))
    assert [record.message for record in caplog.records] == [
        *("0 bytes downloaded", "16 MiB downloaded", "32 MiB downloaded", "48 MiB downloaded", "64 MiB downloaded")
    ]
