"""Where a server is looked for: OLLAMA_HOST's rules, and whose word counts first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.ollama.address import ServerAddress, attach_address

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
def test_what_an_address_means(text: str, url: str) -> None:
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
def test_what_is_no_address(text: str) -> None:
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
def test_which_addresses_are_this_machine(text: str, *, local: bool) -> None:
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
def test_whose_word_counts_first(
    configured: str, engine_host: str, environ: Mapping[str, str], url: str, source: str
) -> None:
    address = attach_address(configured, engine_host, environ)
    assert (address.url, address.source) == (url, source)


def test_a_wrong_address_of_the_manifest_is_an_error_and_one_of_the_environment_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ValueError, match=r"provider\.engine_host is 'box:x': 'x' is no port"):
        attach_address("", "box:x", {})
    assert attach_address("", "", {"OLLAMA_HOST": "box:x"}).url == "http://127.0.0.1:11434"
    assert "OLLAMA_HOST is 'box:x', which cannot be used: 'x' is no port" in caplog.text
    told = attach_address("", "", {"OLLAMA_HOST": "me:secret@box"}).passed_over
    assert told.startswith("OLLAMA_HOST is '…@box', which cannot be used: an address has no credentials")
