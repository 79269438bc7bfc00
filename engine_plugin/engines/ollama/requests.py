"""Converts service requests to Ollama's own: OpenAI's JSON is translated, native JSON completed.

A message has one text, images as bare base64, and tool arguments as objects.

`exchange` calls `upstream_request` for each request to the server.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.options import keep_alive_value
from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import write_request
from engine_plugin.models.families import parameters_of
from engine_plugin.openai_api.conversation import joined, past_calls
from engine_plugin.services.base import check_stop, integer, optional
from engine_plugin.system.data_urls import base64_start

if TYPE_CHECKING:
    from engine_plugin.engines.ollama.models import ModelFacts

__all__ = ["STREAMED", "native_messages", "single_requests", "upstream_request"]

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

_ROLES = {"developer": "system", "function": "tool"}
_IMAGE_FORM = "use a data: URL such as data:image/png;base64,…"


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
        body["messages"] = native_messages(request.get("messages") or [], facts)
        _tools(body, request, facts)
    elif service == "generate" and request.get("images"):
        body["images"] = _native_images(request["images"], "images", facts)
    if service in STREAMED:
        body["stream"] = True
        _think(body, request, facts)
    if settings := {**facts.options, **_ollama_options(request)}:
        body["options"] = settings
    kept = keep_alive_value(body.get("keep_alive", facts.keep_alive))
    if kept != "":
        body["keep_alive"] = kept
    return f"/api/{service}", write_request(body)


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
        name = _function_of(choice).get("name")
        body["tools"] = [tool for tool in body["tools"] if _function_of(tool).get("name") == name]
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


def _function_of(tool: Any) -> dict[str, Any]:
    """The function of a tool; {} for anything else."""
    function = tool.get("function") if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


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


# Messages


def native_messages(messages: list[Any], facts: ModelFacts) -> list[dict[str, Any]]:
    """The messages to send. Raises InvalidRequestError with the field's path for unsupported content."""
    names: dict[str, str] = {}
    """Names of tools by the ids of their calls."""
    return [_message(message, f"messages[{index}]", names, facts) for index, message in enumerate(messages)]


def _message(message: dict[str, Any], place: str, names: dict[str, str], facts: ModelFacts) -> dict[str, Any]:
    role = message["role"]
    native = {key: value for key, value in message.items() if value is not None} if facts.native else {}
    native["role"] = _ROLES.get(role, role)
    native["content"], images = _content(message.get("content"), f"{place}.content", facts)
    if message.get("images"):
        images += _native_images(message["images"], f"{place}.images", facts)
    if images:
        native["images"] = images
    thinking = message.get("thinking") or message.get("reasoning_content") or message.get("reasoning")
    if thinking:
        native["thinking"] = thinking
    if message.get("tool_calls"):
        native["tool_calls"] = _calls(message, place, names)
    if native["role"] == "tool":
        call = message.get("tool_call_id")
        name = message.get("tool_name") or message.get("name") or names.get(str(call))
        native |= {key: value for key, value in (("tool_name", name), ("tool_call_id", call)) if value}
    return native


def _content(content: Any, place: str, facts: ModelFacts) -> tuple[str, list[str]]:
    """The text of OpenAI's parts, and their images and sounds in base64."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise InvalidRequestError.at(place, "must be a text or a list of parts")
    texts: list[str] = []
    media: list[str] = []
    for index, part in enumerate(content):
        here = f"{place}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            media += _native_images([url], f"{here}.image_url", facts)
        elif kind == "input_audio":
            media.append(_sound(part.get("input_audio"), f"{here}.input_audio", facts))
        else:
            raise InvalidRequestError.at(here, "must be a part of type text, image_url or input_audio")
    return joined(texts), media


def _native_images(images: Any, place: str, facts: ModelFacts) -> list[str]:
    """Images as bare base64, from bare base64 or data: URLs. Raises InvalidRequestError for other forms."""
    if not isinstance(images, list):
        raise InvalidRequestError.at(place, "must be a list of images")
    _require(facts, "vision", "see images", place)
    return [_image(image, place) for image in images]


def _image(image: Any, place: str) -> str:
    if not isinstance(image, str) or not image:
        raise InvalidRequestError.at(place, f"must be an image; {_IMAGE_FORM}")
    if "://" in image[:16]:
        raise InvalidRequestError.at(place, f"Ollama does not fetch images; {_IMAGE_FORM}")
    return _bare_base64(image, place)


def _sound(sound: Any, place: str, facts: ModelFacts) -> str:
    data = sound.get("data") if isinstance(sound, dict) else None
    if not isinstance(data, str) or not data:
        raise InvalidRequestError.at(f"{place}.data", "must be an audio file in base64")
    _require(facts, "audio", "hear audio", place)
    return _bare_base64(data, f"{place}.data")


def _bare_base64(source: str, place: str) -> str:
    try:
        bare = source[base64_start(source) :]
    except ValueError as error:
        raise InvalidRequestError.at(place, f"{error}") from None
    if not bare:
        raise InvalidRequestError.at(place, "is empty")
    return bare


def _require(facts: ModelFacts, feature: str, ability: str, place: str) -> None:
    """Raise InvalidRequestError for a model without the feature, which would ignore the part.

    A model without known features passes.
    """
    if facts.features and feature not in facts.features:
        raise InvalidRequestError.at(
            place,
            f"{facts.name} cannot {ability}; use a model that can, or list the feature of this one in engine.models "
            "of plugin.yaml",
        )


def _calls(message: dict[str, Any], place: str, names: dict[str, str]) -> list[dict[str, Any]]:
    native: list[dict[str, Any]] = []
    for index, (call, arguments) in enumerate(past_calls(message, place)):
        function = call["function"]
        converted: dict[str, Any] = {"function": {"index": index, "name": function["name"], "arguments": arguments}}
        if call.get("id"):
            converted["id"] = call["id"]
            names[str(call["id"])] = function["name"]
        native.append(converted)
    return native
