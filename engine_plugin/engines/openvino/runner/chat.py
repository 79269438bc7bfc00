"""Conversations as a model's template writes them: Jinja, from the model's own files, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from engine_plugin.engines.openvino.runner.dialect import THOUGHT
from engine_plugin.engines.openvino.runner.pipelines import RequestError, json_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Template", "Tools", "messages", "tools"]

_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class Tools(NamedTuple):
    """What a call may, must or must not call."""

    offered: list[dict[str, Any]]
    forced: list[dict[str, Any]]


def tools(given: Any, choice: Any) -> Tools:
    """OpenAI's `tools` and `tool_choice`, checked. Raises RequestError."""
    offered = given or []
    if not isinstance(offered, list):
        raise RequestError("tools: must be a list")
    for index, tool in enumerate(offered):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f'tools[{index}]: must be {{"type": "function", "function": {{"name": …}}}}')
        if not isinstance(function.get("parameters") or {}, dict):
            raise RequestError(f"tools[{index}].function.parameters: must be a JSON schema, an object")
    if choice in (None, "auto"):
        return Tools(offered, [])
    if choice == "none":
        return Tools([], [])
    if choice == "required":
        if not offered:
            raise RequestError("tool_choice: required, but there are no tools")
        return Tools(offered, offered)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    chosen = [tool for tool in offered if tool["function"]["name"] == name]
    if not chosen:
        raise RequestError("tool_choice: must be none, auto, required, or name one of the tools")
    return Tools(offered, chosen)


def messages(given: Any, sees: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """OpenAI's messages as templates want them, and the pictures that they show. Raises RequestError.

    Parts of texts become one text, pictures a mark that the pipeline knows, arguments of calls objects.
    """
    if not isinstance(given, list) or not given:
        raise RequestError("messages: must be a list of at least one message")
    found: list[dict[str, Any]] = []
    pictures: list[str] = []
    for index, message in enumerate(given):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}]: must be an object with a role")
        plain = dict(message)
        plain["content"] = _content(message.get("content"), f"messages[{index}].content", pictures)
        if message.get("tool_calls"):
            if not isinstance(message["tool_calls"], list):
                raise RequestError(f"messages[{index}].tool_calls: must be a list")
            plain["tool_calls"] = [
                _past_call(call, f"messages[{index}].tool_calls") for call in message["tool_calls"]
            ]
        found.append(plain)
    if pictures and not sees:
        raise RequestError("messages: this model reads text only and cannot see pictures; use a vision model")
    return found, pictures


def _content(content: Any, field: str, pictures: list[str]) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(f"{field}: must be a text or a list of parts")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            source = part.get("image_url")
            source = source.get("url") if isinstance(source, dict) else source
            if not isinstance(source, str):
                raise RequestError(f"{field}: image_url must have a url")
            texts.append(f"<ov_genai_image_{len(pictures)}>\n")
            pictures.append(source)
        else:
            raise RequestError(f"{field}: parts must be of type text or image_url, not {kind!r}")
    return "".join(texts)


def _past_call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(f"{field}: each must have a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{field}: arguments must be JSON: {error}") from None
    return {**call, "function": {**function, "arguments": arguments}}


class Template:
    """A model's chat template. Read once; compiled at first use."""

    def __init__(self, folder: Path, otherwise: Callable[[], str] = lambda: "") -> None:
        config = json_file(folder / "tokenizer_config.json")
        self._tokens = {name: _token(config.get(name)) for name in _SPECIALS}
        self._sources = _sources(folder, config)
        if not self._sources:
            built_in = otherwise()
            self._sources = {"default": built_in} if built_in else {}
        self._compiled: dict[str, Any] = {}

    @property
    def source(self) -> str:
        """All that there is to guess from."""
        return "\n".join(self._sources.values())

    def capabilities(self) -> list[str]:
        """What a host may count on: chat, tools, thinking."""
        source = self.source
        marks = (("chat", ""), ("tools", "tools"), ("thinking", THOUGHT))
        return [name for name, mark in marks if source and mark in source]

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], extra: Any = None) -> str:
        """The prompt. Raises RequestError for what the template refuses."""
        if extra is not None and not isinstance(extra, dict):
            raise RequestError("chat_template_kwargs: must be an object")
        template = self._template("tool_use" if tools and "tool_use" in self._sources else "default")
        values = {**self._tokens, "add_generation_prompt": True, "tools": tools or None, **(extra or {})}
        try:
            return str(template.render({**values, "messages": messages}))
        except Exception as error:  # a template is a program, and fails as those do
            raise RequestError(f"messages: the model's chat template refuses them: {error}") from error

    def _template(self, name: str) -> Any:
        if not self._sources:
            raise RequestError("messages: this model has no chat template; it only completes prompts")
        name = name if name in self._sources else next(iter(self._sources))
        if name not in self._compiled:
            import jinja2

            try:
                self._compiled[name] = _environment().from_string(self._sources[name])
            except jinja2.TemplateError as error:
                raise RequestError(f"the model's chat template is broken: {error}", 500, "server_error") from error
        return self._compiled[name]


def _sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    try:
        return {"default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    except (OSError, ValueError):
        pass
    given = config.get("chat_template") or json_file(folder / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        return {
            str(one["name"]): str(one["template"]) for one in given if isinstance(one, dict) and "template" in one
        }
    return {}


def _token(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _environment() -> Any:
    """Jinja as Hugging Face's tokenizers set it up, for which templates are written."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what training wants; it is no more than its content here."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(text: str) -> NoReturn:
        raise TemplateError(text)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().astimezone().strftime(form)
    return environment
