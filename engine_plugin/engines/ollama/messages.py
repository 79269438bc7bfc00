"""Converts chat messages to Ollama's form: one text each, images as bare base64, tool arguments as objects.

OpenAI's messages are translated; the fields of native messages are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.openai_api.conversation import call_arguments, joined
from engine_plugin.system.data_urls import base64_start

if TYPE_CHECKING:
    from engine_plugin.engines.ollama.models import ModelFacts

__all__ = ["native_images", "native_messages"]

_ROLES = {"developer": "system", "function": "tool"}
_IMAGE_FORM = "use a data: URL such as data:image/png;base64,…"


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
        images += native_images(message["images"], f"{place}.images", facts)
    if images:
        native["images"] = images
    thinking = message.get("thinking") or message.get("reasoning_content") or message.get("reasoning")
    if thinking:
        native["thinking"] = thinking
    if message.get("tool_calls"):
        native["tool_calls"] = _calls(message["tool_calls"], f"{place}.tool_calls", names)
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
            media += native_images([url], f"{here}.image_url", facts)
        elif kind == "input_audio":
            media.append(_sound(part.get("input_audio"), f"{here}.input_audio", facts))
        else:
            raise InvalidRequestError.at(here, "must be a part of type text, image_url or input_audio")
    return joined(texts), media


def native_images(images: Any, place: str, facts: ModelFacts) -> list[str]:
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


def _calls(calls: Any, place: str, names: dict[str, str]) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequestError.at(place, "must be a list")
    native: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequestError.at(f"{place}[{index}].function", "must be an object with a name and arguments")
        arguments = call_arguments(function.get("arguments"), f"{place}[{index}].function.arguments")
        converted: dict[str, Any] = {"function": {"index": index, "name": function["name"], "arguments": arguments}}
        if call.get("id"):
            converted["id"] = call["id"]
            names[str(call["id"])] = function["name"]
        native.append(converted)
    return native
