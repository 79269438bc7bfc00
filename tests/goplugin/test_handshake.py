from __future__ import annotations

import subprocess
import sys

import pytest

from engine_plugin.errors import EnginePluginError, UnsupportedError
from engine_plugin.goplugin.handshake import HostEnv, engine_environ, handshake_line, is_hosted
from engine_plugin.protocol.handshake import COOKIE
from tests.goplugin.hosting import ROOT, environ
from tests.patience import LIMIT


@pytest.mark.promise("G1")
@pytest.mark.parametrize(
    "cookie", [{}, {"AOG_PLUGIN": ""}, {"AOG_PLUGIN": "aog-provider-plugin-v2"}, {"AOG_PLUGINS": "x"}]
)
def test_start_without_the_magic_cookie_is_not_hosted(cookie: dict[str, str]) -> None:
    assert not is_hosted(cookie, COOKIE)
    assert is_hosted({"AOG_PLUGIN": "aog-provider-plugin-v1"}, COOKIE)


@pytest.mark.promise("G1", "G11")
@pytest.mark.parametrize("cookie", ["", "another"])
def test_start_by_hand_explains_itself_and_exits_1(cookie: str) -> None:
    """Stdout stays empty, stderr has an explanation, and no slow module is imported."""
    command = [sys.executable, "-X", "importtime", "-m", "tests.goplugin.plugin"]
    ended = subprocess.run(
        command, env=environ(AOG_PLUGIN=cookie), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    imports, text = ended.stderr.split("This program is a plugin", 1)
    assert "a host such as AOG starts it" in text
    assert "engine-plugin serve\n" in text
    assert "grpc" not in imports
    assert "logging" not in imports.replace("asyncio.log", "").split("engine_plugin")[-1]


@pytest.mark.promise("G2")
@pytest.mark.parametrize(
    ("offered", "agreed"),
    [("1", 1), ("3,1,2", 1), ("2,x,1,,1.0,-1", 1), ("2,3", 1), ("", 1), ("7, 1", 1), ("9" * 5000, 1), ("²", 1)],
)
def test_protocol_version_is_the_highest_common_or_the_lowest_own(offered: str, agreed: int) -> None:
    """The highest common one, else our lowest, for the host to report."""
    assert HostEnv.from_environ({"PLUGIN_PROTOCOL_VERSIONS": offered}).protocol_version == agreed


@pytest.mark.promise("G2")
def test_highest_common_version_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_plugin.goplugin.handshake.PROTOCOL_VERSIONS", (2, 3, 5))
    assert HostEnv.from_environ({"PLUGIN_PROTOCOL_VERSIONS": "4,3,2"}).protocol_version == 3
    assert HostEnv.from_environ({"PLUGIN_PROTOCOL_VERSIONS": "4,1"}).protocol_version == 2
    assert HostEnv.from_environ({}).protocol_version == 2


@pytest.mark.promise("G3")
def test_default_transport_depends_on_the_system() -> None:
    assert HostEnv.from_environ({}, windows=False).transport == "unix"
    assert HostEnv.from_environ({}, windows=True).transport == "tcp"
    assert HostEnv.from_environ({"ENGINE_PLUGIN_TRANSPORT": "tcp"}, windows=False).transport == "tcp"


@pytest.mark.promise("G3")
def test_port_range_applies_to_tcp_only() -> None:
    """It applies to TCP only."""
    ports = {"PLUGIN_MIN_PORT": "10000", "PLUGIN_MAX_PORT": "25000"}
    host = HostEnv.from_environ(ports, windows=True)
    assert (host.min_port, host.max_port) == (10000, 25000)
    assert HostEnv.from_environ({}, windows=True).max_port == 0
    assert HostEnv.from_environ({"PLUGIN_MIN_PORT": "nonsense"}, windows=False).min_port == 0


@pytest.mark.promise("G3")
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PLUGIN_MIN_PORT": "2", "PLUGIN_MAX_PORT": "1"}, "PLUGIN_MIN_PORT (2) is greater than PLUGIN_MAX_PORT (1)"),
        ({"PLUGIN_MIN_PORT": "2"}, "PLUGIN_MIN_PORT (2) is greater than PLUGIN_MAX_PORT (0)"),
        ({"PLUGIN_MIN_PORT": "ten"}, "PLUGIN_MIN_PORT is 'ten', not a port number"),
        ({"PLUGIN_MAX_PORT": "65536"}, "PLUGIN_MAX_PORT is '65536', not a port number"),
        ({"PLUGIN_MAX_PORT": "-1"}, "PLUGIN_MAX_PORT is '-1', not a port number"),
        ({"PLUGIN_MAX_PORT": "9" * 5000}, "not a port number"),
        ({"ENGINE_PLUGIN_TRANSPORT": "pipe"}, "ENGINE_PLUGIN_TRANSPORT is 'pipe'. Set it to unix or tcp"),
    ],
)
def test_invalid_variable_is_named_in_the_error(variables: dict[str, str], said: str) -> None:
    with pytest.raises(EnginePluginError) as raised:
        HostEnv.from_environ({"ENGINE_PLUGIN_TRANSPORT": "tcp"} | variables)
    assert said in str(raised.value)


def test_unix_transport_on_windows_is_rejected() -> None:
    with pytest.raises(UnsupportedError, match="ENGINE_PLUGIN_TRANSPORT"):
        HostEnv.from_environ({"ENGINE_PLUGIN_TRANSPORT": "unix"}, windows=True)


@pytest.mark.promise("G5", "G6", "G7", "G8")
def test_remaining_host_variables_are_parsed() -> None:
    host = HostEnv.from_environ(
        {
            "PLUGIN_UNIX_SOCKET_DIR": "/run/host",
            "PLUGIN_UNIX_SOCKET_GROUP": "staff",
            "PLUGIN_CLIENT_CERT": "-----BEGIN",
            "PLUGIN_MULTIPLEX_GRPC": "true",
        }
    )
    assert (host.socket_dir, host.socket_group, host.client_cert) == ("/run/host", "staff", "-----BEGIN")
    assert host.multiplex
    assert HostEnv.from_environ({"PLUGIN_MULTIPLEX_GRPC": ""}) == HostEnv.from_environ({})


@pytest.mark.promise("G8", "G12", "G14", "G15")
@pytest.mark.parametrize(
    ("multiplex", "network", "address", "line"),
    [
        (False, "unix", "/tmp/x/sock", b"1|1|unix|/tmp/x/sock|grpc|\n"),
        (False, "tcp", "127.0.0.1:10000", b"1|1|tcp|127.0.0.1:10000|grpc|\n"),
        (True, "unix", "/tmp/x/sock", b"1|1|unix|/tmp/x/sock|grpc||false\n"),
        (False, "unix", "/tmp/\udcff", b"1|1|unix|/tmp/\xff|grpc|\n"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the last case has a POSIX path")
def test_handshake_line_has_six_fields_and_a_seventh_on_request(
    multiplex: bool, network: str, address: str, line: bytes
) -> None:
    """Six fields, the last empty; a seventh only for a host that asked."""
    host = HostEnv(protocol_version=1, transport="unix", multiplex=multiplex)
    assert handshake_line(host, network, address) == line


@pytest.mark.promise("G10")
def test_host_variables_are_removed_from_the_engine_environment() -> None:
    given = {"PLUGIN_MIN_PORT": "1", "PLUGIN_CLIENT_CERT": "x", "AOG_PLUGIN": "x", "AOG_VERSION": "1", "PATH": "/bin"}
    assert engine_environ(given, COOKIE) == {"AOG_VERSION": "1", "PATH": "/bin"}
