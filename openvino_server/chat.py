"""Messages and tools in the form of chat templates, and the chat templates of a model's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.openai_api.conversation import CANNOT_HEAR, CANNOT_SEE, joined, past_calls, plain_role
from engine_plugin.templates.jinja import Templates
from openvino_server.dialect import THOUGHT
from openvino_server.pipelines import json_file, text_file
from openvino_server.tool_calls import Tools

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["capabilities", "messages", "read_templates", "tools"]

_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


def tools(given: Any, choice: Any) -> Tools:
    """The tools of a request that `services.chat` has checked. Raises InvalidRequestError."""
    offered = given or []
    for index, tool in enumerate(offered):
        if tool.get("type", "function") != "function":
            raise InvalidRequestError.at(f"tools[{index}].type", "must be function")
        if not isinstance(tool["function"].get("parameters") or {}, dict):
            raise InvalidRequestError.at(f"tools[{index}].function.parameters", "must be a JSON schema, an object")
    if choice in (None, "auto"):
        return Tools(offered, [])
    if choice == "none":
        return Tools([], [])
    if choice == "required":
        if not offered:
            raise InvalidRequestError.at("tool_choice", "is required, but there are no tools")
        return Tools(offered, offered)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    chosen = [tool for tool in offered if tool["function"]["name"] == name]
    if not chosen:
        raise InvalidRequestError.at("tool_choice", "must be none, auto, required, or name one of the tools")
    return Tools(offered, chosen)


def messages(given: list[Any], sees: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages that `services.chat` has checked, in the form of templates, and their pictures (data: URLs).

    Parts of texts become one text, pictures a mark that the pipeline knows, arguments of calls objects. Raises
    InvalidRequestError.
    """
    found: list[dict[str, Any]] = []
    pictures: list[str] = []
    for index, message in enumerate(given):
        place = f"messages[{index}]"
        plain = message | {"role": plain_role(message["role"])}
        plain["content"] = _content(message.get("content"), f"{place}.content", pictures, sees=sees)
        if message.get("tool_calls"):
            plain["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": arguments}}
                for call, arguments in past_calls(message, place)
            ]
        found.append(plain)
    return found, pictures


def _content(content: Any, field: str, pictures: list[str], *, sees: bool) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidRequestError.at(field, "must be a string or a list of parts")
    text, texts = "", list[str]()
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and sees:
            source = part.get("image_url")
            source = source.get("url") if isinstance(source, dict) else source
            if not isinstance(source, str):
                raise InvalidRequestError.at(f"{field}[{index}].image_url", "must have a url")
            text += f"{joined(texts)}<ov_genai_image_{len(pictures)}>\n"
            texts.clear()
            pictures.append(source)
        else:
            why = {"image_url": CANNOT_SEE, "input_audio": CANNOT_HEAR}.get(
                str(kind), f"parts must be of type text or image_url, not {kind!r}"
            )
            raise InvalidRequestError.at(f"{field}[{index}]", why)
    return text + joined(texts)


def read_templates(folder: Path, otherwise: Callable[[], str] = lambda: "") -> Templates:
    """A model's chat templates, from the files of Hugging Face's tokenizers, else from `otherwise`.

    Raises RequestError for a file that is too large.
    """
    config = json_file(folder / "tokenizer_config.json")
    sources = _sources(folder, config)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        text = text_file(path)
        if text is not None:
            sources[path.stem] = text
    if "default" not in sources and (built_in := otherwise()):
        sources["default"] = built_in
    return Templates(sources, {name: _token(config.get(name)) for name in _SPECIALS})


def capabilities(templates: Templates) -> list[str]:
    """The capabilities of a model with these templates: chat, tools, thinking."""
    source = templates.text
    marks = (("chat", ""), ("tools", "tools"), ("thinking", THOUGHT))
    return [name for name, mark in marks if source and mark in source]


def _sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    text = text_file(folder / "chat_template.jinja")
    if text is not None:
        return {"default": text}
    given = config.get("chat_template") or json_file(folder / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        given = {
            str(one["name"]): one["template"]
            for one in given
            if isinstance(one, dict) and "name" in one and "template" in one
        }
    if isinstance(given, dict):
        return {name: text for name, text in given.items() if isinstance(text, str)}
    return {}


def _token(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""
