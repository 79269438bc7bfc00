"""null means "not given", in every optional field of every service."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine_plugin.engines.ollama.native import native_validator
from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import BRIEF
from engine_plugin.services import VALIDATORS

GIVEN: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "a"}]},
    "generate": {"prompt": "a"},
    "embed": {"input": "a"},
    "rerank": {"query": "a", "documents": ["b"]},
    "text-to-image": {"prompt": "a"},
    "speech-to-text": {"audio": "UklGRg=="},
    "text-to-speech": {"text": "a"},
}
OPTIONAL = {
    "chat": "temperature top_p top_k min_p max_tokens stop seed n logprobs top_logprobs frequency_penalty tools "
    "presence_penalty repetition_penalty tool_choice response_format stream stream_options logit_bias user",
    "generate": "temperature max_tokens stop seed n logprobs echo suffix best_of stream stream_options logit_bias",
    "embed": "encoding_format dimensions user",
    "rerank": "top_n return_documents",
    "text-to-image": "negative_prompt size n num_inference_steps seed rng_seed guidance_scale response_format",
    "speech-to-text": "language task response_format temperature timestamp_granularities",
    "text-to-speech": "input voice language speed response_format",
}


@pytest.mark.promise("S7")
@pytest.mark.parametrize("service", GIVEN)
def test_null_field_is_treated_as_absent(service: str) -> None:
    given = GIVEN[service]
    nulls = dict.fromkeys(["model", "no_such_field", *OPTIONAL[service].split()])
    assert VALIDATORS[service].read(json.dumps(nulls | given).encode()) == given
    assert VALIDATORS[service].read(b" " * BRIEF + json.dumps(nulls | given).encode()) == given


@pytest.mark.promise("S7")
def test_nulls_inside_a_chat_are_dropped_except_in_schemas_and_contents() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", None], "default": None}}}
    call = {"id": "1", "function": {"name": "f", "arguments": {"a": None}}}
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    wanted = {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "user", "content": [part]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "stream_options": {},
    }
    given = json.loads(json.dumps(wanted))
    given["messages"][0] |= {"name": None, "tool_call_id": None, "refusal": None}
    given["messages"][0]["tool_calls"][0]["index"] = None
    given["messages"][1]["content"][0]["image_url"]["detail"] = None
    given["tools"][0]["function"] |= {"description": None, "strict": None}
    given["response_format"]["json_schema"]["strict"] = None
    given["stream_options"]["include_usage"] = None
    assert VALIDATORS["chat"].read(json.dumps(given).encode()) == wanted


@pytest.mark.promise("S7")
@pytest.mark.parametrize("service", ["chat", "generate", "embed"])
def test_nulls_in_native_ollama_requests_are_dropped(service: str) -> None:
    contract = native_validator(service)
    assert contract is not None
    given = GIVEN[service] | {"options": {"seed": 1}}
    nulls = {"format": None, "keep_alive": None, "think": None, "model": None, "options": {"seed": 1, "top_k": None}}
    assert contract.read(json.dumps(given | nulls).encode()) == given


@pytest.mark.promise("S13")
def test_empty_image_fields_are_treated_as_absent() -> None:
    read = VALIDATORS["text-to-image"].read
    assert read(b'{"prompt":"a","seed":-1,"rng_seed":-1,"size":"auto"}') == {"prompt": "a"}
    for wrong in (b'"seed":-2', b'"size":"huge"', b'"output_format":"gif"'):
        with pytest.raises(InvalidRequestError):
            read(b'{"prompt":"a",%b}' % wrong)
