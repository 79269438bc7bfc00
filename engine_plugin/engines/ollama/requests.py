"""Converts service requests to Ollama's own: OpenAI's JSON is translated, native JSON completed.

`exchange` calls `upstream_request` for each request to the server.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama import messages
from engine_plugin.engines.ollama.options import keep_alive_value
from engine_plugin.errors import InvalidRequestError
from engine_plugin.models.families import parameters_of
from engine_plugin.openai_api.bodies import request_json
from engine_plugin.services.base import check_stop, integer, optional

if TYPE_CHECKING:
    from engine_plugin.engines.ollama.models import ModelFacts

__all__ = ["STREAMED", "single_requests", "upstream_request"]

log = logging.getLogger(__name__)

STREAMED = frozenset({"chat", "generate"})

_MAX_CHOICES = 128
_MAX_ANSWERS = 1024
_SMALL_MODEL = 7e9

# OpenAI's fields and the names of their options in Ollama. Other options have the same name in both.
_RENAMED = {
    "max_tokens": "num_predict",
    "max_completion_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
}
_INTEGERS = ("num_predict", "top_k", "seed", "num_ctx", "repeat_last_n", "num_keep")
_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repeat_penalty")
_OPTION_FIELDS = (*_RENAMED, *_INTEGERS, *_NUMBERS)
_CONVERTED = frozenset({*_OPTION_FIELDS, "stop", "options", "tool_choice", "messages"})

# Fields that both formats have.
_COMMON = ("format", "keep_alive", "truncate", "shift")
_OF_SERVICE = {
    "chat": ("tools",),
    "generate": ("prompt", "suffix", "system", "template", "context", "raw"),
    "embed": ("dimensions",),
}

_EFFORTS: dict[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}


def single_requests(service: str, request: dict[str, Any], *, native: bool) -> list[dict[str, Any]]:
    """Split a request into one for each prompt and choice, in the order of the choices.

    Raises InvalidRequestError for unsupported fields: `echo`, `logit_bias`, `best_of`, prompts of tokens.
    """
    if native or service == "embed":
        return [request]
    for field, feature in (("echo", "repeating the prompt"), ("logit_bias", "token biases")):
        if request.get(field):
            raise InvalidRequestError.at(field, f"Ollama does not support {feature}; leave it out")
    prompts = [{"prompt": text} for text in _texts(request, "prompt")] if service == "generate" else [{}]
    count = integer(request, "n", 1, _MAX_CHOICES) or 1
    if (request.get("best_of") or 1) != 1 and request.get("best_of") != count:
        raise InvalidRequestError.at("best_of", "Ollama does not support it; leave it out")
    if len(prompts) * count > _MAX_ANSWERS:
        raise InvalidRequestError.at(
            "prompt", f"{len(prompts)} prompts with {count} choices each exceed the limit of {_MAX_ANSWERS} answers"
        )
    seed = request.get("seed")
    # The same seed would repeat the answer.
    seeds = [{"seed": seed + number} if number and isinstance(seed, int) else {} for number in range(count)]
    return [request | prompt | seeded for prompt in prompts for seeded in seeds]


def _texts(request: dict[str, Any], field: str) -> list[str]:
    texts = request[field] if isinstance(request[field], list) else [request[field]]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequestError.at(f"{field}[{index}]", "must be a text: Ollama does not accept tokens")
    return texts


def upstream_request(service: str, request: dict[str, Any], facts: ModelFacts) -> tuple[str, bytes]:
    """The path and the JSON to send. Raises InvalidRequestError for unsupported fields.

    Chat and generate always stream: the server notices only in a stream that its caller has left.
    """
    body = _native_body(request) if facts.native else _translated(service, request)
    body["model"] = facts.name
    if service == "chat":
        body["messages"] = messages.native_messages(request.get("messages") or [], facts)
        _tools(body, request, facts)
    elif service == "generate" and request.get("images"):
        body["images"] = messages.native_images(request["images"], "images", facts)
    if service in STREAMED:
        body["stream"] = True
        _think(body, request, facts)
    if settings := {**facts.options, **_ollama_options(request)}:
        body["options"] = settings
    kept = keep_alive_value(body.get("keep_alive", facts.keep_alive))
    if kept != "":
        body["keep_alive"] = kept
    return f"/api/{service}", request_json(body)


def _native_body(request: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not converted, without nulls."""
    return {field: value for field, value in request.items() if value is not None and field not in _CONVERTED}


def _translated(service: str, request: dict[str, Any]) -> dict[str, Any]:
    fields = (*_COMMON, *_OF_SERVICE[service])
    body = {field: request[field] for field in fields if request.get(field) is not None}
    if service == "embed":
        body["input"] = _texts(request, "input")
        return body
    form = request.get("response_format")
    if form is not None and (converted := _format(form)) is not None:
        body["format"] = converted
    _logprobs(body, request)
    return body


def _format(form: Any) -> Any:
    """The `format` for OpenAI's response_format; None for text."""
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_object":
        return form.get("schema") or "json"
    if kind == "json_schema":
        wrapped = form.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
        if not isinstance(schema, dict):
            raise InvalidRequestError.at("response_format.json_schema.schema", "is missing; it must be a JSON schema")
        return schema
    if kind != "text":
        raise InvalidRequestError.at("response_format.type", "must be text, json_object or json_schema")
    return None


def _logprobs(body: dict[str, Any], request: dict[str, Any]) -> None:
    """Convert chat's `logprobs: true` and `top_logprobs`, or the number in completions' `logprobs`."""
    wanted, top = request.get("logprobs"), request.get("top_logprobs")
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        wanted, top = True, wanted
    if wanted:
        body["logprobs"] = True
        if top:
            body["top_logprobs"] = top


def _ollama_options(request: dict[str, Any]) -> dict[str, Any]:
    """Ollama's `options`: those of the request's top level, overridden by those in its own `options`."""
    given = optional(request, "options", dict) or {}
    settings: dict[str, Any] = {}
    for field in _OPTION_FIELDS:
        value = request.get(field)
        if value is not None:
            name = _RENAMED.get(field, field)
            settings[name] = _number(field, value, whole=name in _INTEGERS)
    check_stop(request)
    if (stop := request.get("stop")) is not None:
        settings["stop"] = [stop] if isinstance(stop, str) else stop
    return settings | {name: value for name, value in given.items() if value is not None}


def _number(field: str, value: Any, *, whole: bool) -> Any:
    """Check a number: the server would report a wrong one with status 500."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value != int(value)):
        raise InvalidRequestError.at(field, f"must be a {'whole ' if whole else ''}number")
    return int(value) if whole else value


def _tools(body: dict[str, Any], request: dict[str, Any], facts: ModelFacts) -> None:
    """Apply tool_choice by the list of tools, since Ollama has no such field:

    it can exclude tools, not force a call.
    """
    choice = request.get("tool_choice")
    if choice == "none" or not body.get("tools"):
        body.pop("tools", None)
        return
    if isinstance(choice, dict):
        name = _tool_name(choice)
        body["tools"] = [tool for tool in body["tools"] if _tool_name(tool) == name]
        if name is None or not body["tools"]:
            raise InvalidRequestError.at("tool_choice", f"the function {name!r} is not in tools")
    if choice not in (None, "auto"):
        _warn_once(
            facts.name, "Ollama cannot be forced to call a tool; tool_choice only limits the tools that it may call"
        )
    if 0 < parameters_of(facts.parameter_size) < _SMALL_MODEL:
        _warn_once(
            facts.name, f"models of {facts.parameter_size} parameters rarely call tools well; use a larger one"
        )


def _tool_name(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


@lru_cache(1024)
def _warn_once(model: str, warning: str) -> None:
    log.warning("%s: %s", model, warning)


def _think(body: dict[str, Any], request: dict[str, Any], facts: ModelFacts) -> None:
    """Set `think` for models with thinking only: the server rejects any value of it for other models."""
    field, wanted = _wanted_thinking(request)
    body.pop("think", None)
    if wanted is None:
        return
    if not facts.features or "thinking" in facts.features:
        body["think"] = wanted
    elif wanted is not False:
        raise InvalidRequestError.at(
            field, f"{facts.name} does not support thinking; leave it out, or use a model that does"
        )


def _wanted_thinking(request: dict[str, Any]) -> tuple[str, bool | str | None]:
    """The field that requests thinking, and its value for Ollama:

    `think`, OpenAI's effort, or a template argument.
    """
    think = request.get("think")
    if think is not None:
        if not isinstance(think, bool | str):
            raise InvalidRequestError.at("think", "must be true, false, low, medium, high or max")
        return "think", think
    reasoning = request.get("reasoning")
    effort, field = request.get("reasoning_effort"), "reasoning_effort"
    if effort is None and isinstance(reasoning, dict):
        effort, field = reasoning.get("effort"), "reasoning.effort"
    if effort is not None:
        if not isinstance(effort, str) or effort not in _EFFORTS:
            raise InvalidRequestError.at(field, f"must be one of {', '.join(_EFFORTS)}")
        return field, _EFFORTS[effort]
    template = request.get("chat_template_kwargs")
    enabled = template.get("enable_thinking") if isinstance(template, dict) else None
    return "chat_template_kwargs.enable_thinking", enabled if isinstance(enabled, bool) else None
