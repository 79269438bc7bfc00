from __future__ import annotations

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.goplugin.hclog import HclogFormatter, HclogHandler, install_hclog

if TYPE_CHECKING:
    from collections.abc import Iterator


def formatted(level: int = logging.INFO, message: str = "text", *args: object, **extra: object) -> dict[str, Any]:
    record = logging.makeLogRecord({"name": "a.b", "levelno": level, "msg": message, "args": args} | extra)
    line = HclogFormatter().format(record)
    assert "\n" not in line
    assert len(line.encode()) < 64 << 10
    entry: dict[str, Any] = json.loads(line, parse_constant=pytest.fail)
    for key in ("@level", "@message", "@timestamp"):
        assert isinstance(entry[key], str), "anything else panics the host"
    return entry


@pytest.mark.promise("G27")
@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "trace"),
        (5, "trace"),
        (10, "debug"),
        (15, "debug"),
        (20, "info"),
        (30, "warn"),
        (40, "error"),
        (50, "error"),
    ],
)
def test_log_levels_map_to_the_five_of_hclog(number: int, name: str) -> None:
    """No level but Go's five."""
    assert formatted(number)["@level"] == name


@pytest.mark.promise("G26", "G29")
def test_record_has_the_timestamp_that_go_parses() -> None:
    """The timestamp as Go writes and parses it."""
    entry = formatted(logging.INFO, "%s of %d", "three", 4, created=1767323045.678901, port=10000)
    assert re.fullmatch(r"2026-01-02T03:04:05\.67890\dZ", entry.pop("@timestamp"))
    assert entry == {"@level": "info", "@message": "three of 4", "@module": "a.b", "port": 10000}


@pytest.mark.promise("G29")
def test_newlines_and_control_characters_stay_in_one_record() -> None:
    text = 'a\nb\r\n"c" \x00 \u2028 ü 🦙 \udcff'
    assert formatted(message=text)["@message"] == text.replace("\udcff", "?")


@pytest.mark.promise("G28")
def test_extra_fields_cannot_override_the_keys_of_hclog() -> None:
    theirs: dict[str, Any] = {"@level": 7, "@message": ["x"], "@timestamp": None}
    entry = formatted(**theirs)
    assert (entry["@level"], entry["@message"]) == ("info", "text")


@pytest.mark.promise("G28", "G30")
@pytest.mark.parametrize(
    "text",
    [
        '{"@level": 7, "@message": ["x"], "@timestamp": 1}',
        "panic: the engine has lost it",
        "fatal error: so has its runtime",
        "[ERROR] all is lost",
        "before\npanic: after",
    ],
)
def test_engine_output_with_json_or_levels_is_logged_as_text(text: str) -> None:
    """Its own JSON, or words from which the host would take a level, for this line or all later ones."""
    line = HclogFormatter().format(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))
    assert line.startswith('{"@level": "info", ')
    assert "\n" not in line
    assert json.loads(line)["@message"] == text


@pytest.mark.promise("G26", "G29")
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (10**400, str(10**400)),
        (2**60, str(2**60)),
        (True, True),
        (None, None),
        (1.5, 1.5),
        ({"a": [1]}, "{'a': [1]}"),
        (b"x", "b'x'"),
    ],
)
def test_field_values_are_valid_json_for_go(value: object, shown: object) -> None:
    assert formatted(value=value)["value"] == shown


@pytest.mark.promise("G29")
@pytest.mark.parametrize("character", ["x", "\x00", "🦙", "\n"])
@pytest.mark.parametrize("count", [50_000, 5_000_000])
def test_long_message_is_truncated_in_the_middle(character: str, count: int) -> None:
    """Below 64 KiB, and it says so."""
    message = formatted(message="begin" + character * count + "end")["@message"]
    assert message.startswith("begin" + character)
    assert message.endswith(character + "end")
    if len(message) != count + 8:
        cut = re.search(r" …\[(\d+) characters cut\]… ", message)
        assert cut is not None
        assert len(message) - len(cut[0]) + int(cut[1]) == count + 8


@pytest.mark.promise("G29")
def test_fields_above_the_limit_are_dropped() -> None:
    many: dict[str, Any] = {f"key{n}": "v" * 40 for n in range(10_000)}
    entry = formatted(message="m" * 100_000, **many)
    assert "characters cut" in entry["@message"]


def test_exception_and_stack_become_fields() -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        entry = formatted(exc_info=(type(error), error, error.__traceback__), stack_info="Stack: here")
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("ValueError: wrong")
    assert entry["stack"] == "Stack: here"


class Pipe:
    """A handler that writes to a pipe, and the records read from it."""

    def __init__(self) -> None:
        self.read_end, write_end = os.pipe()
        self.handler = HclogHandler(write_end)
        self.logger = logging.Logger("test")  # noqa: LOG001 - one that pytest does not listen to
        self.logger.addHandler(self.handler)

    def lines(self) -> list[dict[str, Any]]:
        """Close the handler and return all lines."""
        self.handler.close()
        return self.lines_until("")

    def lines_until(self, last: str) -> list[dict[str, Any]]:
        """The lines up to the one that says `last`, or to the end."""
        lines = []
        with os.fdopen(self.read_end, "rb") as pipe:
            for line in pipe:
                lines.append(json.loads(line))
                if lines[-1]["@message"] == last:
                    break
        return lines


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.handler.close()


def test_records_are_written_in_order(pipe: Pipe) -> None:
    for number in range(100):
        pipe.logger.info("line %d", number)
    assert [line["@message"] for line in pipe.lines()] == [f"line {number}" for number in range(100)]


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def test_unformattable_log_call_does_not_raise(pipe: Pipe) -> None:
    wrong = ("needs two: %s %s", "one")
    pipe.logger.info(*wrong)
    pipe.logger.info("%s", Hostile())
    pipe.logger.info(Hostile())
    pipe.logger.warning("fine", extra={"odd": Hostile()})
    lines = pipe.lines()
    assert [line["@message"] for line in lines] == [
        "needs two: %s %s (cannot be shown with its arguments: TypeError)",
        "%s (cannot be shown with its arguments: RuntimeError)",
        "Hostile (cannot be shown with its arguments: RuntimeError)",
        "fine (cannot be shown with its arguments: RuntimeError)",
    ]
    assert lines[3]["@level"] == "warn"
    assert "test_hclog.py:" in lines[0]["where"]


def test_host_that_does_not_read_does_not_block_logging(pipe: Pipe) -> None:
    """8 MB go into a pipe of 64 KiB: the oldest 4 MiB are kept, and a record reports the loss when there is room."""
    text = "x" * 8_000
    for _ in range(1_000):
        pipe.logger.info(text)
    pipe.handler.drain(0.01)
    with ThreadPoolExecutor(1) as reader:
        lines = reader.submit(pipe.lines_until, "reading again")
        pipe.handler.drain(10)
        pipe.logger.info("reading again")
        messages = [line["@message"] for line in lines.result(10)]
    notices = [message for message in messages if message.endswith("dropped: the host had stopped reading stderr")]
    kept = messages.count(text)
    assert 400 < kept < 600
    assert sum(int(notice.split()[0]) for notice in notices) == 1_000 - kept


def test_closed_pipe_does_not_raise(pipe: Pipe) -> None:
    os.close(pipe.read_end)
    pipe.logger.info("not written")
    pipe.handler.drain(10)
    pipe.logger.info("nor this")
    pipe.handler.drain(10)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # force=True closes what is there, and these are pytest's
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("httpx", "httpcore", "grpc"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    ("value", "level", "httpx"),
    [("", 20, 30), ("info", 20, 30), ("DEBUG", 10, 30), ("trace", 5, 5), ("warning", 30, 30), ("error", 40, 40)],
)
def test_log_level_comes_from_the_environment(value: str, level: int, httpx: int) -> None:
    read_end, write_end = os.pipe()
    install_hclog({"ENGINE_PLUGIN_LOG": value}, fd=write_end)
    os.close(read_end)
    os.close(write_end)
    assert logging.getLogger().level == level
    assert logging.getLogger("httpx").level == httpx


@pytest.mark.promise("G26")
@pytest.mark.usefixtures("restored_logging")
def test_logs_and_warnings_of_libraries_are_forwarded() -> None:
    import warnings

    read_end, write_end = os.pipe()
    handler = install_hclog({"ENGINE_PLUGIN_LOG": "loud"}, fd=write_end)
    os.close(write_end)
    logging.getLogger("some.library").error("broken", extra={"port": 1})
    logging.getLogger("some.library").debug("unheard")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    handler.close()
    with os.fdopen(read_end, "rb") as pipe:
        wrong_level, broken, warning = (json.loads(line) for line in pipe)
    assert "ENGINE_PLUGIN_LOG is 'loud'. Set it to one of trace, debug" in wrong_level["@message"]
    assert (broken["@module"], broken["port"], broken["@level"]) == ("some.library", 1, "error")
    assert warning["@level"] == "warn"
    assert "UserWarning: old" in warning["@message"]
