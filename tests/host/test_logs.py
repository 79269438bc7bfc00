"""Lines of a plugin become log records."""

from __future__ import annotations

import logging

import pytest

from engine_plugin.host.logs import LineSplitter, LogLine, PluginLog, parse_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain words", LogLine("info", "plain words")),
        ("[ERROR] it broke", LogLine("error", "it broke")),
        ("[TRACE] detail", LogLine("trace", "detail")),
        ("[OTHER] text", LogLine("info", "[OTHER] text")),
        ("panic: oh no", LogLine("error", "panic: oh no")),
        (
            '{"@level":"warn","@message":"slow","@timestamp":"2026-01-02T03:04:05.000006Z","ms":7}',
            LogLine("warn", "slow", {"ms": 7}),
        ),
        ('{"@level":"warning","@message":"unknown level"}', LogLine("info", "unknown level")),
        ('{"@message": 5}', LogLine("info", '{"@message": 5}')),
        ('{"half": ', LogLine("info", '{"half": ')),
        ("[1, 2]", LogLine("info", "[1, 2]")),
    ],
)
def test_log_line_is_parsed(text: str, line: LogLine) -> None:
    assert parse_line(text) == line


def test_lines_are_split_at_newlines_and_at_64_kib() -> None:
    splitter = LineSplitter()
    assert list(splitter.feed(b"a\r\nb")) == ["a"]
    assert list(splitter.feed(b"c\nd")) == ["bc"]
    assert list(splitter.feed(b"x" * 65536)) == ["d" + "x" * 65536]
    assert list(splitter.feed(b"\xff\n")) == ["�"]
    assert list(splitter.close()) == []


def test_log_record_has_level_and_fields(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[LogLine] = []
    log = PluginLog("some-plugin", seen.append)
    with caplog.at_level(1, "engine_plugin.host"):
        log.add('{"@level":"debug","@message":"loaded","@module":"m","model":"tiny"}')
        log.add("   ")
        log.add("panic: dead")
        log.add("goroutine 1 [running]:")
        log.add("[INFO] still tagged")
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("engine_plugin.host.some-plugin", logging.DEBUG, "loaded model=tiny"),
        ("engine_plugin.host.some-plugin", logging.ERROR, "panic: dead"),
        ("engine_plugin.host.some-plugin", logging.ERROR, "goroutine 1 [running]:"),
        ("engine_plugin.host.some-plugin", logging.INFO, "still tagged"),
    ]
    assert caplog.records[0].__dict__["kv"] == {"@module": "m", "model": "tiny"}
    assert [line.level for line in seen] == ["debug", "error", "error", "info"]


def test_kept_tail_of_the_log_is_bounded() -> None:
    log = PluginLog("p")
    for number in range(1000):
        log.add(f"{number} " + "x" * 2000)
    assert len(log.tail()) == 20
    assert all(len(line) <= 500 for line in log.tail())
    assert log.tail()[-1].startswith("999 ")
