"""No secret gets into a message, a log record or a progress event."""

from __future__ import annotations

import base64
import json
import logging
from urllib.parse import quote

import pytest

from engine_plugin import redaction
from engine_plugin.cli.advice import explained
from engine_plugin.cli.main import main
from engine_plugin.download.events import Error, StepStarted, progress_json
from engine_plugin.errors import DownloadError
from engine_plugin.goplugin.hclog import HclogFormatter
from engine_plugin.redaction import RedactingFormatter, entered, redacted

pytestmark = pytest.mark.promise("L1")


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_KNOWN", redaction._Known())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http:/user:pw@host/x", "http:/***@host/x"),
        ("http:user:pw@host/x", "http:***@host/x"),
        ("https:///user:pw@host/x", "https:///***@host/x"),
        ("HTTPS://user:pw@host:8080/x", "HTTPS://***@host:8080/x"),
        ("https://user@corp.example:p@w@host/x", "https://***@host/x"),
        ("http://user:p/w@host/x", "http://***@host/x"),
        ("http:\\\\user:pw@host", "http:\\\\***@host"),
        ("socks5://user:pw@proxy:1080 failed", "socks5://***@proxy:1080 failed"),
        ("Illegal header value b'Bearer hf_abc '", "Illegal header value b'Bearer *** '"),
        ("{'Authorization': 'Basic dXNlcjpwdw=='}", "{'Authorization': '***'}"),
        ("Proxy-Authorization: Digest secret words", "Proxy-Authorization: ***"),
        ("token hf_AbCdEfGhIjKlMnOp1234 refused", "token *** refused"),
        ("Incorrect API key provided: sk-proj-abcdefghij0123456789", "Incorrect API key provided: ***"),
        ("https://s3/x?X-Amz-Signature=ab12&X-Amz-Date=1", "https://s3/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://h/x?a=1&sig=ab%2F12&token=t", "https://h/x?a=1&sig=***&token=***"),
        ("https://h/x?Policy=abc&Key-Pair-Id=K1", "https://h/x?Policy=***&Key-Pair-Id=***"),
    ],
)
def test_text_in_the_form_of_a_secret_is_replaced(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf:owner/name@main: there is no such repository (HTTP 404).",
        "https://huggingface.co/owner/name/tree/main and https://host:8080/a@b",
        "Open https://ollama.com/connect?name=pc&key=c3NoLWVk in a browser",
        "install huggingface_hub or hf_transfer; basic models bear a bearer of bad news",
        "model: no model is called 'tiny-chat'. Call StartEngine (engine-plugin engine start)",
        "/home/me/models/task-force-one-and-two-and-three.gguf",
    ],
)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("secret", ["s3cr3t/with+signs", "pass word", "päßwort", "t0kén\\n", "plain-token"])
def test_known_secret_is_replaced_in_any_encoding(secret: str) -> None:
    assert entered(f" \t{secret}\r\n", "me") == secret
    pair = base64.b64encode(f"me:{secret}".encode()).decode()
    for spelling in (secret, quote(secret, safe=""), repr(secret), ascii(secret), pair):
        assert redacted(f"before {spelling} after").count("***") == 1, spelling
        assert secret not in redacted(f"before {spelling} after")


def test_white_space_around_a_secret_is_stripped() -> None:
    assert entered("\ufeff hf_abc\u00a0\u200b\n") == "hf_abc"
    assert entered(" \n") == ""


def test_short_secret_does_not_replace_parts_of_words() -> None:
    entered("cat")
    entered("pull")
    assert redacted("cat pulled concatenation") == "cat pulled concatenation"


def test_errors_events_and_log_records_are_redacted() -> None:
    entered("open-sesame")
    error = DownloadError("refused: open-sesame")
    assert error.message == "refused: ***"
    for event in (StepStarted("sending open-sesame"), Error("open-sesame", 500)):
        assert "***" in json.loads(progress_json(event))["status"]
        assert b"sesame" not in progress_json(event)
    try:
        raise ValueError("open-sesame") from error
    except ValueError as caught:
        exc_info = (type(caught), caught, caught.__traceback__)
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", ("open-sesame",), exc_info)
    record.field = "open-sesame"
    for formatter in (HclogFormatter(), RedactingFormatter("%(message)s %(field)s")):
        line = formatter.format(record)
        assert line.count("***") >= 4
        assert "sesame" not in line


def test_secrets_are_not_printed_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-v", "lint", "http:/me:pa55@host/plugin.yaml"], ["lint", "a", "http:/me:pa55@host/x"]):
        with pytest.raises(SystemExit):
            main(arguments)
        said = capsys.readouterr()
        assert "pa55" not in said.err + said.out
    assert explained(DownloadError("http:/me:pa55@host")) == "http:/***@host"
