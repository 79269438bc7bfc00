"""What each service asks of a request; every complaint begins with the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import InvalidRequestError
from engine_plugin.manifest import SERVICE_NAMES
from engine_plugin.services import SERVICES

USER = {"role": "user", "content": "a"}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"messages": [USER]}),
    ("chat", {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool"}]}),
    ("chat", {"messages": [USER], "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}),
    ("chat", {"messages": [USER], "tools": None, "tool_choice": {"type": "function"}, "anything": object()}),
    ("generate", {"prompt": ""}),
    ("generate", {"prompt": "a"}),
    ("generate", {"prompt": ["a", [1, 2]]}),
    ("embed", {"input": "a"}),
    ("embed", {"input": []}),
    ("embed", {"input": ["a", 1, [1, 2]], "dimensions": 3, "encoding_format": "base64"}),
    ("rerank", {"query": "a", "documents": []}),
    ("rerank", {"query": "", "documents": ["a", {"text": "b", "id": 1}], "top_n": 1, "return_documents": True}),
]

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {}, "messages: is missing; it must be a list"),
    ("chat", {"messages": "a"}, "messages: must be a list, not a string"),
    ("chat", {"messages": []}, "messages: is empty"),
    ("chat", {"messages": [USER, "a"]}, "messages[1]: must be an object with a role and content"),
    ("chat", {"messages": [{"content": "a"}]}, "messages[0]: must be"),
    ("chat", {"messages": [{"role": 1}]}, "messages[0]: must be"),
    ("chat", {"messages": [USER], "tools": {}}, "tools: must be a list"),
    ("chat", {"messages": [USER], "tool_choice": 1}, "tool_choice: must be a string or an object"),
    ("chat", {"messages": [USER], "response_format": "json"}, "response_format: must be an object"),
    ("generate", {}, "prompt: is missing"),
    ("generate", {"prompt": []}, "prompt: is an empty list"),
    ("generate", {"prompt": 1}, "prompt: must be a string or a list"),
    ("embed", {}, "input: is missing"),
    ("embed", {"input": {}}, "input: must be a string or a list"),
    ("embed", {"input": ["a", None]}, "input[1]: must be a string or tokens"),
    ("embed", {"input": [True]}, "input[0]: must be a string or tokens"),
    ("embed", {"input": "a", "dimensions": "3"}, "dimensions: must be an integer"),
    ("embed", {"input": "a", "dimensions": True}, "dimensions: must be an integer"),
    ("embed", {"input": "a", "encoding_format": 1}, "encoding_format: must be a string"),
    ("rerank", {"documents": []}, "query: is missing"),
    ("rerank", {"query": 1, "documents": []}, "query: must be a string"),
    ("rerank", {"query": "a"}, "documents: is missing"),
    ("rerank", {"query": "a", "documents": "a"}, "documents: must be a list"),
    ("rerank", {"query": "a", "documents": ["a", 1]}, "documents[1]: must be a string, or an object with a text"),
    ("rerank", {"query": "a", "documents": [{"text": 1}]}, "documents[0]: must be"),
    ("rerank", {"query": "a", "documents": [], "top_n": 0}, "top_n: must be at least 1, not 0"),
    ("rerank", {"query": "a", "documents": [], "top_n": "1"}, "top_n: must be an integer"),
    ("rerank", {"query": "a", "documents": [], "return_documents": 1}, "return_documents: must be true or false"),
]


def test_each_service_is_known_by_its_name() -> None:
    assert set(SERVICES) < set(SERVICE_NAMES)
    assert all(service.name == name for name, service in SERVICES.items())


@pytest.mark.parametrize(("name", "request_"), GOOD)
def test_good_requests(name: str, request_: dict[str, Any]) -> None:
    before = dict(request_)
    SERVICES[name].check(request_)
    assert request_ == before


@pytest.mark.parametrize(("name", "request_", "message"), BAD)
def test_bad_requests(name: str, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SERVICES[name].check(request_)
    assert refused.value.message.startswith(message)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("role", "text", "a")), inner),
    max_leaves=8,
)
FIELDS = (
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "prompt",
    "input",
    "dimensions",
    "query",
    "documents",
)


@pytest.mark.promise("P23")
@given(st.sampled_from(sorted(SERVICES)), st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_whatever_the_request_a_complaint_names_one_of_its_fields(name: str, request_: dict[str, Any]) -> None:
    try:
        SERVICES[name].check(request_)
        SERVICES[name].trivial_answer(request_ | {"model": "m"})
    except InvalidRequestError as error:
        field = error.message.partition(":")[0].partition("[")[0]
        assert field in FIELDS


def test_trivial_answers() -> None:
    embed, rerank = SERVICES["embed"], SERVICES["rerank"]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    nothing = {"object": "list", "data": [], "model": "m", "usage": usage}
    assert embed.trivial_answer({"input": [], "model": "m"}) == nothing
    assert rerank.trivial_answer({"query": "a", "documents": [], "model": "m"}) == {"model": "m", "results": []}
    assert embed.trivial_answer({"input": "", "model": "m"}) is None
    assert rerank.trivial_answer({"documents": ["a"], "model": "m"}) is None
    assert SERVICES["chat"].trivial_answer({"messages": [], "model": "m"}) is None
    assert SERVICES["generate"].trivial_answer({"prompt": "", "model": "m"}) is None
