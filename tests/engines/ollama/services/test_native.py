"""Validation of native requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.ollama.native import native_validator
from engine_plugin.errors import InvalidRequestError

if TYPE_CHECKING:
    from engine_plugin.services import RequestValidator


def contract_of(service: str) -> RequestValidator:
    contract = native_validator(service)
    assert contract is not None
    assert contract.name == service
    return contract


@pytest.mark.parametrize(
    ("service", "request_data"),
    [
        ("chat", {}),
        ("chat", {"messages": []}),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["aGk="]}], "think": "low"}),
        ("chat", {"messages": None, "keep_alive": 0, "options": {"seed": 1}, "format": "json", "tools": []}),
        ("generate", {}),
        ("generate", {"prompt": "", "keep_alive": "5m"}),
        ("generate", {"prompt": "a", "suffix": "b", "images": [], "context": [1], "raw": True, "think": False}),
        ("embed", {"input": "a", "truncate": False, "dimensions": 5}),
        ("embed", {"input": ["a", "b"], "options": {}, "keep_alive": 1.5}),
    ],
)
def test_valid_native_requests_are_accepted(service: str, request_data: dict[str, Any]) -> None:
    contract = contract_of(service)
    contract.check(request_data)
    assert contract.trivial_answer({"model": "m"} | request_data | {"input": ["a"]}) is None


@pytest.mark.promise("P23")
@pytest.mark.parametrize(
    ("service", "request_data", "field"),
    [
        ("chat", {"messages": "a"}, "messages"),
        ("chat", {"messages": [{"content": "a"}]}, r"messages\[0\]"),
        ("chat", {"tools": {}}, "tools"),
        ("chat", {"think": 1}, "think"),
        ("chat", {"options": [1]}, "options"),
        ("generate", {"prompt": ["a"]}, "prompt"),
        ("generate", {"images": "a"}, "images"),
        ("generate", {"keep_alive": True}, "keep_alive"),
        ("generate", {"format": 5}, "format"),
        ("embed", {}, "input"),
        ("embed", {"input": [1]}, r"input\[0\]"),
        ("embed", {"input": "a", "truncate": "no"}, "truncate"),
    ],
)
def test_invalid_native_requests_are_rejected(service: str, request_data: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        contract_of(service).check(request_data)


def test_embed_without_texts_needs_no_server() -> None:
    contract = contract_of("embed")
    request = {"model": "m", "input": []}
    contract.check(request)
    assert contract.trivial_answer(request) == {"model": "m", "embeddings": []}


def test_service_without_native_json_has_no_validator() -> None:
    assert native_validator("speech-to-text") is None
    assert native_validator("rerank") is None
