"""The exceptions for server errors that the contract server does not send."""

from __future__ import annotations

import pytest

from engine_plugin.engines.ollama.errors import body_complaint, exception_for, line_complaint
from engine_plugin.errors import (
    AuthError,
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    ModelNotFoundError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (400, b'{"error":"\\"x\\" does not support chat"}', InvalidRequestError, "does not support chat"),
        (400, b'{"error":{"message":"bad","type":"api_error"}}', InvalidRequestError, "refuses it: bad"),
        (401, b'{"error":"unauthorized","signin_url":"https://o/x"}', AuthError, "Open https://o/x"),
        (401, b"go away", AuthError, "go away.*OLLAMA_API_KEY"),
        (403, b'{"error":"ollama cloud is disabled"}', PreconditionError, "no_cloud: false"),
        (403, b'{"error":"not for you"}', AuthError, "not for you"),
        (404, b'{"error":"model \'m\' not found"}', ModelNotFoundError, "PullModel m"),
        (404, b"404 page not found", UnsupportedError, "Upgrade it"),
        (499, b'{"error":"request canceled"}', UnavailableError, "dropped the request"),
        (500, b'{"error":"the input length exceeds the context length"}', InvalidRequestError, "Shorten"),
        (
            500,
            b'{"error":"model requires more system memory (9.5 GiB) than is available (3.2 GiB)"}',
            PreconditionError,
            r"m needs 9\.5 GiB of memory, and 3\.2 GiB is free",
        ),
        (500, b'{"error":"this model requires a newer version of Ollama"}', PreconditionError, "newer Ollama"),
        (500, b"[1]", BadGatewayError, r"answered 500: \[1\]"),
        (502, b"", BadGatewayError, "answered 502: no message"),
        (503, b'{"error":"server busy.  maximum pending requests exceeded"}', UnavailableError, "Try again later"),
    ],
)
def test_server_errors_are_mapped(status: int, body: bytes, error: type[EnginePluginError], message: str) -> None:
    mapped = exception_for(body_complaint(status, body), "m")
    assert type(mapped) is error
    with pytest.raises(error, match=message):
        raise mapped


def test_missing_cloud_model_suggests_no_pull() -> None:
    missing = exception_for(body_complaint(404, b'{"error":"model not found"}'), "gpt-oss:120b-cloud")
    assert isinstance(missing, ModelNotFoundError)
    assert missing.pull == ""


@pytest.mark.parametrize(
    ("line", "status"),
    [({"error": "x"}, 500), ({"error": "x", "status": 400}, 400), ({"error": "x", "status_code": 401}, 401)],
)
def test_status_of_error_lines(line: dict[str, object], status: int) -> None:
    assert line_complaint(line).status == status
