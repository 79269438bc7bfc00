"""Addresses of servers: the rules of OLLAMA_HOST, and the precedence of settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.ollama.address import ServerAddress, configured_address

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":5678", "http://127.0.0.1:5678"),
        ("1.2.3.4:5678", "http://1.2.3.4:5678"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("HTTPS://Box:8443/", "https://Box:8443"),
        ("example.com/ollama", "http://example.com:11434/ollama"),
        ("https://example.com/some/where/", "https://example.com:443/some/where"),
        ("http://127.0.0.1:11434/v1", "http://127.0.0.1:11434"),
        ("http://127.0.0.1:11434/v1/", "http://127.0.0.1:11434"),
        ("https://example.com/ollama/v1//", "https://example.com:443/ollama"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
        ("[::]:1234", "http://[::1]:1234"),
        ("::", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("[fe80::1]:99", "http://[fe80::1]:99"),
        ("ollama.com", "https://ollama.com:443"),
        ("  localhost  ", "http://localhost:11434"),
    ],
)
def test_address_is_parsed(text: str, url: str) -> None:
    assert ServerAddress.parse(text).url == url


@pytest.mark.parametrize(
    "text",
    [
        "ftp://box",
        "box:0",
        "box:65536",
        "box:http",
        "http://user:key@box",
        "a b",
        "box/a\r\nx: y",
        "b\N{LATIN SMALL LETTER O WITH DIAERESIS}x",
        "[::1",
        "[::1]x",
        "unix:///x",
    ],
)
def test_invalid_address_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        ServerAddress.parse(text)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("", True),
        ("localhost", True),
        ("127.3.4.5", True),
        ("::1", True),
        ("0.0.0.0", True),
        ("192.168.1.5", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
    ],
)
def test_is_loopback(text: str, *, local: bool) -> None:
    assert ServerAddress.parse(text).is_loopback is local


@pytest.mark.parametrize(
    ("configured", "engine_host", "environ", "url", "source"),
    [
        ("a", "b", {"OLLAMA_HOST": "c"}, "http://a:11434", "engine.address in plugin.yaml"),
        ("", "http://b:1", {"OLLAMA_HOST": "c"}, "http://b:1", "provider.engine_host in plugin.yaml"),
        ("", "", {"OLLAMA_HOST": ' "c:7" '}, "http://c:7", "OLLAMA_HOST"),
        ("", "", {"OLLAMA_HOST": " "}, "http://127.0.0.1:11434", "the default address"),
        ("", "", {}, "http://127.0.0.1:11434", "the default address"),
    ],
)
def test_precedence_of_address_settings(
    configured: str, engine_host: str, environ: Mapping[str, str], url: str, source: str
) -> None:
    address = configured_address(configured, engine_host, environ)
    assert (address.url, address.source) == (url, source)


def test_invalid_address_fails_in_manifest_and_warns_in_environment(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(
        ValueError, match=r"provider\.engine_host: 'box:x' is not a valid address: 'x' is not a valid port"
    ):
        configured_address("", "box:x", {})
    assert configured_address("", "", {"OLLAMA_HOST": "box:x"}).url == "http://127.0.0.1:11434"
    assert "OLLAMA_HOST is ignored: 'box:x' is not a valid address: 'x' is not a valid port" in caplog.text
    ignored = configured_address("", "", {"OLLAMA_HOST": "me:secret@box"}).ignored
    assert ignored.startswith(
        "OLLAMA_HOST is ignored: '…@box' is not a valid address: an address must not have credentials"
    )
