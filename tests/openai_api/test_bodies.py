"""The slots that a request needs, whatever the engine."""

from __future__ import annotations

from typing import Any

import pytest

from engine_plugin.openai_api.bodies import slots_needed


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
