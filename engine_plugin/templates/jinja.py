"""Chat templates, compiled and rendered by a sandboxed Jinja as Hugging Face's tokenizers set it up."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BROKEN", "LIMIT", "REFUSED", "ChatTemplate", "TemplateError", "Templates"]

REFUSED = "refused"
"""`TemplateError.kind`: the template raised an error for this conversation."""
BROKEN = "broken"
"""`TemplateError.kind`: the template is missing or does not compile."""
LIMIT = "limit"
"""`TemplateError.kind`: rendering exceeded its limit of time or memory."""


class TemplateError(Exception):
    """A conversation cannot be rendered; `kind` is REFUSED, BROKEN or LIMIT."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Templates(NamedTuple):
    """A model's chat templates by name, and its special tokens by name (`bos_token` and so on)."""

    sources: Mapping[str, str]
    tokens: Mapping[str, str]

    @property
    def text(self) -> str:
        """All templates joined, to detect what they support."""
        return "\n".join(self.sources.values())


class ChatTemplate:
    """Compiles a model's chat templates, each at its first use."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates
        self._compiled: dict[str, Any] = {}

    def render(self, messages: list[Any], tools: list[Any], extra: Mapping[str, Any]) -> str:
        """Render the prompt. `extra` holds further variables of the template, from `chat_template_kwargs`.

        With tools the template `tool_use` is rendered where there is one, else `default`. Raises TemplateError.
        """
        template = self._template("tool_use" if tools and "tool_use" in self._templates.sources else "default")
        values = {**self._templates.tokens, "add_generation_prompt": True, "tools": tools or None, **extra}
        try:
            return str(template.render({**values, "messages": messages}))
        except (MemoryError, OverflowError) as error:  # OverflowError: the sandbox's limit of `range`
            raise TemplateError(LIMIT, str(error) or "takes too much memory") from error
        except Exception as error:  # a template is a program and can raise anything
            raise TemplateError(REFUSED, str(error) or type(error).__name__) from error

    def _template(self, name: str) -> Any:
        sources = self._templates.sources
        if not sources:
            raise TemplateError(BROKEN, "this model has no chat template; it only completes prompts")
        name = name if name in sources else next(iter(sources))
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(sources[name])
            except Exception as error:  # jinja2's errors, and Python's for too deep a nesting
                raise TemplateError(BROKEN, f"the model's chat template is broken: {error}") from error
        return self._compiled[name]


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError as Refusal
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks text for training; only its content is rendered."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(text: str) -> NoReturn:
        raise Refusal(text)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().astimezone().strftime(form)
    return environment
