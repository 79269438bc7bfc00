"""The JSON requests of ProviderService."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import InvalidRequestError
from engine_plugin.models.store import PullRequest
from engine_plugin.server.payloads import model_name, model_names, pull_request

if TYPE_CHECKING:
    from collections.abc import Callable


def test_valid_model_names_are_read() -> None:
    assert model_name(b'{"model":"a"}') == "a"
    assert model_name(b'{"model":"a","more":1}') == "a"
    assert model_names(b'{"models":["b","a","b"]}') == ["b", "a"]


@pytest.mark.parametrize(
    ("shape", "request_"),
    [
        ({"model": "a"}, PullRequest(model="a")),
        ({"name": "a"}, PullRequest(model="a")),
        ({"model": "", "name": "a"}, PullRequest(model="a")),
        ({"model": "a", "name": "b", "stream": True, "insecure": None}, PullRequest(model="a")),
        (
            {"model": "a", "source": "s", "sha256": "d", "insecure": True, "username": "u", "password": "p"},
            PullRequest(model="a", source="s", sha256="d", insecure=True, username="u", password="p"),
        ),
        ({"model": "a", "model_type": "chat"}, PullRequest(model="a", model_type="chat")),
    ],
)
def test_pull_requests(shape: dict[str, Any], request_: PullRequest) -> None:
    assert pull_request(json.dumps(shape).encode()) == request_


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (model_name, b"", "request_json: is empty"),
        (model_name, b"[]", "request_json: must hold a JSON object"),
        (model_name, b"{}", "model: is missing; it must be a string"),
        (model_name, b'{"model":1}', "model: must be a string, not an integer"),
        (model_names, b"{}", "models: is missing; it must be a list"),
        (model_names, b'{"models":"a"}', "models: must be a list, not a string"),
        (model_names, b'{"models":[]}', "models: must be a list of model names, at least one"),
        (model_names, b'{"models":["a",1]}', "models: must be a list of model names"),
        (model_names, b'{"models":[' + b'"a",' * 1000 + b'"a"]}', "models: 1001 are too many; at most 1000 can be"),
        (pull_request, b"{}", "model: is missing"),
        (pull_request, b'{"model":[]}', "model: is missing"),
        (pull_request, b'{"model":["a"]}', "model: must be a string"),
        (pull_request, b'{"model":"a","insecure":"yes"}', "insecure: must be true or false"),
        (pull_request, b'{"model":"a","sha256":1}', "sha256: must be a string"),
    ],
)
def test_invalid_requests_are_rejected(read: Callable[[bytes], object], data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read(data)
    assert refused.value.message.startswith(message)


@pytest.mark.promise("P21")
@pytest.mark.parametrize("field", ["username", "password"])
def test_secret_is_not_quoted_in_the_error(field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: must be a string$"):
        pull_request(json.dumps({"model": "a", field: ["hunter2"]}).encode())


@pytest.mark.promise("P23")
@given(st.binary())
def test_arbitrary_bytes_are_read_or_rejected(data: bytes) -> None:
    for read in (model_name, model_names, pull_request):
        with pytest.raises(InvalidRequestError, match=r"^(request_json|models?): "):
            read(data)
