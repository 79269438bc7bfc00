"""Bodies of requests and answers, whatever the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine_plugin.errors import InvalidRequestError
from engine_plugin.openai_api.bodies import request_json, slots_needed


@pytest.mark.parametrize(
    ("service", "request_", "slots"),
    [
        ("chat", {}, 1),
        ("chat", {"n": 3}, 3),
        ("chat", {"n": None}, 1),
        ("chat", {"n": "3"}, 1),
        ("chat", {"n": -1}, 1),
        ("text-to-image", {"n": 4}, 1),
        ("chat", {"prompt": ["a", "b"]}, 1),
        ("generate", {"prompt": "a"}, 1),
        ("generate", {"prompt": [1, 2, 3]}, 1),
        ("generate", {"prompt": ["a", "b"]}, 2),
        ("generate", {"prompt": [[1], [2]], "n": 2}, 4),
        ("embed", {"input": ["a", "b"], "n": 5}, 1),
        ("rerank", {"documents": ["a", "b"]}, 1),
    ],
)
def test_each_choice_of_each_prompt_needs_a_slot(service: str, request_: dict[str, Any], slots: int) -> None:
    assert slots_needed(service, request_) == slots


def test_request_is_sent_unchanged() -> None:
    request = {"text": "d\u00fcnn", "number": 1}
    sent = request_json(request)
    assert "d\u00fcnn".encode() in sent
    assert json.loads(sent) == request


def test_request_that_cannot_be_encoded_is_rejected() -> None:
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"a": nested}
    with pytest.raises(InvalidRequestError, match=r"^request_data: is nested too deeply$"):
        request_json(nested)
