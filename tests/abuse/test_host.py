"""What a host may set in the environment, and what libraries may log."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine_plugin.errors import EnginePluginError
from engine_plugin.goplugin.handshake import HostEnv, engine_environ, handshake_line, is_hosted
from engine_plugin.goplugin.hclog import HclogHandler
from engine_plugin.protocol.handshake import COOKIE
from tests.abuse.examples import JSON, ODD_TEXT

if TYPE_CHECKING:
    from collections.abc import Iterator

NUMBERS = st.sampled_from(
    [
        "",
        "0",
        "1",
        "10000",
        "25000",
        "65535",
        "65536",
        "-1",
        "1.5",
        "0x10",
        "٣",
        "²",
        " 1",
        "1_0",
        "9" * 5000,
        "1,",
        ",1",
    ]
)
VALUES = NUMBERS | ODD_TEXT | st.lists(NUMBERS, max_size=20).map(",".join)
VARIABLES = {
    "AOG_PLUGIN": VALUES | st.just("aog-provider-plugin-v1"),
    "PLUGIN_PROTOCOL_VERSIONS": VALUES | st.sampled_from(["1", "2,1", "1,1,x"]),
    "PLUGIN_MIN_PORT": VALUES,
    "PLUGIN_MAX_PORT": VALUES,
    "PLUGIN_UNIX_SOCKET_DIR": VALUES,
    "PLUGIN_UNIX_SOCKET_GROUP": VALUES,
    "PLUGIN_CLIENT_CERT": VALUES,
    "PLUGIN_MULTIPLEX_GRPC": VALUES,
    "PLUGIN_OF_ANOTHER_KIND": VALUES,
    "ENGINE_PLUGIN_TRANSPORT": VALUES | st.sampled_from(["unix", "tcp"]),
    "HOME": VALUES,
}


@pytest.mark.promise("P29")
@given(st.fixed_dictionaries({}, optional=VARIABLES), st.booleans())
def test_any_environment_is_accepted_or_the_error_names_the_variable(environ: dict[str, str], windows: bool) -> None:
    assert is_hosted(environ, COOKIE) == (environ.get("AOG_PLUGIN") == "aog-provider-plugin-v1")
    assert set(engine_environ(environ, COOKIE)) <= {"HOME", "ENGINE_PLUGIN_TRANSPORT"}
    try:
        host = HostEnv.from_environ(environ, windows=windows)
    except EnginePluginError as error:
        complaint = error.message
        assert re.match(r"(PLUGIN|ENGINE_PLUGIN)_[A-Z_]+( \([0-9]+\))? (is|does)|ENGINE_PLUGIN_TRANSPORT", complaint)
        return
    assert host.protocol_version == 1
    assert 0 <= host.min_port <= host.max_port <= 65535
    assert host.transport in (("tcp",) if windows else ("unix", "tcp"))
    line = handshake_line(host, "unix", "/tmp/s/sock")
    assert re.fullmatch(rb"1\|1\|unix\|/tmp/s/sock\|grpc\|(\|false)?\n", line)


class Hostile:
    """An object that has no valid text."""

    def __str__(self) -> str:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        return "Hostile()"


ARGUMENTS = JSON | st.binary(max_size=20) | st.builds(Hostile) | st.builds(object) | st.just(10**5000)
KEYS = ODD_TEXT | st.sampled_from(
    ["@level", "@message", "@timestamp", "@module", "@" + "k" * 70_000, "k" * 70_000, "exception"]
)
RECORDS = st.fixed_dictionaries(
    {"name": ODD_TEXT, "levelno": st.integers(-5, 10**6), "msg": ODD_TEXT | ARGUMENTS},
    optional={
        "args": st.lists(ARGUMENTS, max_size=3).map(tuple) | st.dictionaries(ODD_TEXT, ARGUMENTS, max_size=2),
        "created": st.floats() | st.sampled_from([0.0, -1e12, 1e18]),
        "stack_info": ODD_TEXT,
        "extra": st.dictionaries(KEYS, ARGUMENTS | st.just("v" * 100_000), max_size=4),
    },
)


class Sink(HclogHandler):
    """Keeps what it would write."""

    def __init__(self) -> None:
        super().__init__(os.open(os.devnull, os.O_WRONLY))
        self.lines: list[bytes] = []

    def put(self, line: bytes) -> None:
        self.lines.append(line)


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


def refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@pytest.mark.promise("P28", "G28", "G29")
@given(RECORDS)
@example({"name": "n", "levelno": 20, "msg": "m", "extra": {"@" + "k" * 70_000: 1}})
@example({"name": "n" * 100_000, "levelno": 20, "msg": "%s", "args": (Hostile(),)})
@example({"name": "n", "levelno": 20, "msg": "%d", "args": ("x" * 100_000,)})
def test_any_log_record_is_one_line_that_the_host_parses(sink: Sink, shape: dict[str, Any]) -> None:
    sink.lines.clear()
    fields = {key: value for key, value in shape.items() if key != "extra"} | shape.get("extra", {})
    stuck = threading.Thread(target=sink.emit, args=(logging.makeLogRecord(fields),), daemon=True)
    stuck.start()
    stuck.join(10)
    assert not stuck.is_alive(), "the line is never short enough"
    [line] = sink.lines
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert len(line) < 64 * 1024
    entry = json.loads(line.decode(), parse_constant=refuse)
    for key in ("@level", "@message", "@timestamp"):
        assert isinstance(entry[key], str)
    assert entry["@level"] in ("trace", "debug", "info", "warn", "error")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry["@timestamp"])
