"""How tokens become text, and text becomes OpenAI's deltas, piece by piece."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.openvino.runner.calls import guess, parser
from engine_plugin.engines.openvino.runner.chat import capabilities, messages, read_templates
from engine_plugin.engines.openvino.runner.dialect import Deltas
from engine_plugin.engines.openvino.runner.pipelines import RequestError
from engine_plugin.engines.openvino.runner.pipelines.text import Detokenizer, StopStrings
from engine_plugin.engines.openvino.runner.pipelines.text_to_speech import pieces
from engine_plugin.engines.templates.jinja import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

TOOLS: list[dict[str, Any]] = [
    {"function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}}}
]
ARGUMENTS = '{"a": 1, "b": "}\\"]<é"}'


class Vocabulary:
    """A tokenizer of a few tokens, of which one is special, and of which some are parts of characters."""

    def __init__(self, lies: bool = False) -> None:
        self._words = [b"a", b"b ", b"\xc3", b"\xa9", b"<end>"]
        self._lies = lies

    def get_vocab(self) -> dict[bytes, int]:
        return {word + b"?" * self._lies: number for number, word in enumerate(self._words)}

    def decode(self, tokens: Sequence[Any], skip_special_tokens: bool = True) -> Any:
        if tokens and isinstance(tokens[0], list):
            return [self.decode(one) for one in tokens]
        shown = [self._words[token] for token in tokens if token != 4 or not skip_special_tokens]
        return b"".join(shown).decode("utf-8", "replace")


@pytest.mark.parametrize("lies", [False, True])
def test_text_comes_in_whole_characters(lies: bool) -> None:
    """By the table of tokens, and where that would be wrong by the tokenizer."""
    detokenizer = Detokenizer(Vocabulary(lies))
    assert detokenizer.by_table is not lies
    stream = detokenizer.stream()
    assert [stream.feed([token]) for token in (0, 2, 3, 1, 4)] == ["a", "", "é", "b ", ""]
    assert (stream.feed([2]), stream.end()) == ("", "\ufffd")
    assert detokenizer.stream(special=True).feed([0, 4]) == "a<end>"


@pytest.mark.parametrize("lies", [False, True])
def test_long_text_is_the_same_in_pieces(lies: bool) -> None:
    tokens = [0, 2, 3, 1] * 40
    stream = Detokenizer(Vocabulary(lies)).stream()
    assert "".join(stream.feed([token]) for token in tokens) + stream.end() == "aéb " * 40


def test_stop_strings_are_found_across_pieces() -> None:
    stops = StopStrings(["stop", "top!"])
    assert [stops.feed(piece) for piece in ("a s", "to", "x", "st", "op", "")][:3] == [
        ("a ", False),
        ("", False),
        ("stox", False),
    ]
    assert StopStrings(["b"], keep=True).feed("abc") == ("ab", True)
    held = StopStrings(["stop"])
    assert (held.feed("a sto"), held.end()) == (("a ", False), "sto")


def told(deltas: Iterable[Any]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Text, thoughts, and calls of some deltas put together."""
    text, thoughts = "", ""
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, str):
            text += delta
            continue
        thoughts += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
    return text, thoughts, [(name, json.loads(arguments)) for name, arguments in calls]


CALLED = [("add", json.loads(ARGUMENTS))]
WRITTEN = {
    "hermes3": f'Well. <tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "qwen3": f'Well. <tool_call>{{"arguments": {ARGUMENTS}, "name": "add"}}</tool_call>',
    "llama3": f'<|python_tag|>{{"name": "add", "parameters": {ARGUMENTS}}}',
    "mistral": f'Well. [TOOL_CALLS] [{{"name": "add", "arguments": {ARGUMENTS}, "id": "x"}}]',
    "devstral": f"Well. [TOOL_CALLS]add[ARGS]{ARGUMENTS}",
    "phi4": f'Well. functools[{{"name": "add", "arguments": {ARGUMENTS}}}]',
    "qwen3coder": "Well. <tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
    '<parameter=b>\n}"]<é\n</parameter>\n'
    "</function>\n</tool_call>",
    "lfm2": """Well. <|tool_call_start|>[add(a=1, b='}"]<é')]<|tool_call_end|>""",
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_found_however_their_text_is_cut(name: str, size: int) -> None:
    text = WRITTEN[name]
    deltas = Deltas(parser(name, TOOLS), False, False)
    found = [delta for at in range(0, len(text), size) for delta in deltas.feed(text[at : at + size])] + deltas.end()
    content, _, calls = told(found)
    assert calls == CALLED
    assert content.strip() == ("" if name == "llama3" else "Well.")
    assert deltas.finish("stop") == "tool_calls"


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("size", [1, 1000])
def test_text_without_calls_stays_as_it_is(name: str, size: int) -> None:
    text = "No call: [1, 2], {braces} and <tags> are nothing [TOOL."
    deltas = Deltas(parser(name, TOOLS), False, False)
    found = [delta for at in range(0, len(text), size) for delta in deltas.feed(text[at : at + size])] + deltas.end()
    assert told(found) == (text, "", [])
    assert deltas.finish("stop") == "stop"


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_several_calls_are_numbered(size: int) -> None:
    one = f'{{"name": "add", "arguments": {ARGUMENTS}}}'
    for name, text in (
        ("mistral", f"[TOOL_CALLS][{one}, {one}]"),
        ("hermes3", f"<tool_call>{one}</tool_call>\n<tool_call>{one}</tool_call>"),
        ("llama3", f"{one}; {one}"),
    ):
        deltas = Deltas(parser(name, TOOLS), False, False)
        found = [delta for at in range(0, len(text), size) for delta in deltas.feed(text[at : at + size])]
        assert told(found + deltas.end())[2] == CALLED * 2, name


def test_arguments_are_told_while_they_come() -> None:
    deltas = Deltas(parser("hermes3", TOOLS), False, False)
    first = deltas.feed('<tool_call>{"name": "add", "arguments": {"a": ')
    assert first[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": ""}
    assert first[1]["tool_calls"][0]["function"] == {"arguments": '{"a": '}


def test_json_that_is_no_call_is_text() -> None:
    deltas = Deltas(parser("llama3", TOOLS), False, False)
    assert told(deltas.feed('{"answer": 5}') + deltas.end()) == ('{"answer": 5}', "", [])


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "thinking", "content", "thoughts"),
    [
        ("<think>\nHm < 5.\n</think>\n\nFive", False, "Five", "Hm < 5."),
        ("Hm.</think>Five", True, "Five", "Hm."),
        ("Five <think>", False, "Five <think>", ""),
        ("<th", False, "<th", ""),
        ("<think>Hm", False, "", "Hm"),
    ],
)
def test_thoughts_are_told_apart(size: int, text: str, thinking: bool, content: str, thoughts: str) -> None:
    deltas = Deltas(None, True, thinking)
    found = [delta for at in range(0, len(text), size) for delta in deltas.feed(text[at : at + size])] + deltas.end()
    assert told(found)[:2] == (content, thoughts)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>", "hermes3"),
        ("<tool_call><function=", "qwen3coder"),
        ("[TOOL_CALLS]", "mistral"),
        ("plain", None),
    ],
)
def test_the_template_shows_how_calls_are_written(template: str, name: str | None) -> None:
    assert guess(template) == name


def rendered(folder: Path, tools: list[dict[str, Any]], **extra: Any) -> str:
    template = ChatTemplate(read_templates(folder, lambda: "built in"))
    return template.render([{"role": "user", "content": "hi"}], tools, extra)


@pytest.mark.promise("S12")
def test_templates_come_from_any_of_a_models_files(tmp_path: Path) -> None:
    assert rendered(tmp_path, []) == "built in"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert rendered(tmp_path, []) == "json"
    several = [{"name": "default", "template": "plain {{ bos_token }}"}, {"name": "tool_use", "template": "tools"}]
    for given in (several, {one["name"]: one["template"] for one in several}):
        config = {"chat_template": given, "bos_token": {"content": "<s>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert rendered(tmp_path, []) == "plain <s>"
        assert rendered(tmp_path, TOOLS) == "tools"
    (tmp_path / "chat_template.jinja").write_text(
        "{% generation %}{{ tools | tojson }}{% endgeneration %}{% for m in messages %}{{ m.content }}{% break %}"
        "{% endfor %}{{ strftime_now('%Y') | length }}{{ mood }}"
    )
    assert rendered(tmp_path, [{"é": 1}], mood="good") == '[{"é": 1}]hi4good'


@pytest.mark.promise("S12")
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", None])
def test_tools_are_told_by_a_models_template_for_them(tmp_path: Path, place: str | None) -> None:
    """Beside a default template from wherever that is."""
    if place:
        default = "plain" if place.endswith(".jinja") else json.dumps({"chat_template": "plain"})
        (tmp_path / place).write_text(default)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("<tool_call>{{ tools[0].function.name }}")
    assert rendered(tmp_path, []) == ("plain" if place else "built in")
    assert rendered(tmp_path, TOOLS) == "<tool_call>add"
    templates = read_templates(tmp_path)
    assert "tools" in capabilities(templates)
    assert guess(templates.text) == "hermes3"


def test_a_template_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(RequestError, match=r"^chat_template\.jinja: has more than 16 MiB"):
        read_templates(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), ("  ", {}), (None, {}), ("{}", {})],
)
@pytest.mark.promise("S6")
def test_arguments_of_past_calls_are_objects(arguments: Any, plain: dict[str, Any]) -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": arguments}}
    found, _ = messages([{"role": "assistant", "content": None, "tool_calls": [call]}], False)
    assert found[0]["tool_calls"] == [{"id": "1", "function": {"name": "add", "arguments": plain}}]


def test_parts_become_one_text_in_their_order() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:,x"}}
    one, two, three = ({"type": "text", "text": text} for text in ("one", "two", "three"))
    found, pictures = messages([{"role": "user", "content": [one, two, picture, three, picture]}], True)
    assert found[0]["content"] == "one\ntwo<ov_genai_image_0>\nthree<ov_genai_image_1>\n"
    assert pictures == ["data:,x", "data:,x"]


@pytest.mark.promise("S3")
def test_a_developer_speaks_as_the_system() -> None:
    given = [{"role": role, "content": "x"} for role in ("developer", "system", "user", "assistant", "tool")]
    found, _ = messages(given, False)
    assert [message["role"] for message in found] == ["system", "system", "user", "assistant", "tool"]
    assert given[0]["role"] == "developer"


def test_text_is_cut_where_it_hurts_least() -> None:
    assert pieces("One. Two! Three?", 9) == ["One. Two!", "Three?"]
    assert pieces("word " * 5, 11) == ["word word", "word word", "word"]
    assert pieces("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
