"""Incremental conversion of tokens to text, and of text to OpenAI's deltas."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.templates.jinja import ChatTemplate
from openvino_server.chat import capabilities, messages, read_templates
from openvino_server.dialect import Deltas
from openvino_server.errors import RequestError
from openvino_server.pipelines.text import Detokenizer, StopStrings
from openvino_server.pipelines.text_to_speech import pieces
from openvino_server.tool_calls import PARSERS, guess, parser

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
def test_text_is_emitted_in_whole_characters(lies: bool) -> None:
    """By the table of tokens, or by the tokenizer if the table would be wrong."""
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
    "glm4": "Well. <tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    '<arg_key>b</arg_key>\n<arg_value>}"]<é</arg_value>\n</tool_call>',
    "lfm2": """Well. <|tool_call_start|>[add(a=1, b='}"]<é')]<|tool_call_end|>""",
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_found_in_pieces_of_any_size(name: str, size: int) -> None:
    text = WRITTEN[name]
    deltas = Deltas(parser(name, TOOLS), False, False)
    found = [delta for at in range(0, len(text), size) for delta in deltas.feed(text[at : at + size])] + deltas.end()
    content, _, calls = told(found)
    assert calls == CALLED
    assert content.strip() == ("" if name == "llama3" else "Well.")
    assert deltas.finish("stop") == "tool_calls"


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("size", [1, 1000])
def test_text_without_calls_is_unchanged(name: str, size: int) -> None:
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


def cut(text: str, size: int, name: str, tools: list[dict[str, Any]]) -> tuple[str, str, list[tuple[str, Any]]]:
    """What a parser makes of a text that comes in pieces."""
    deltas = Deltas(parser(name, tools), False, False)
    found = [delta for at in range(0, len(text), size) for delta in deltas.feed(text[at : at + size])]
    return told(found + deltas.end())


GOOD = f'{{"name": "add", "arguments": {ARGUMENTS}}}'
NO_CALLS = [
    ("phi4", "Use Python functools to cache."),
    ("phi4", "functools[0] is no call"),
    ("hermes3", "<tool_call> is a tag."),
    ("hermes3", "<tool_call>\n{'name': 'add'}\n</tool_call> and more"),
    ("hermes3", '<tool_call>{"nom": "add"}</tool_call>'),
    ("hermes3", '<tool_call>{"name": "add", "arguments": "Paris"}</tool_call>'),
    ("hermes3", "```json\n" + GOOD + "\n```"),
    ("hermes3", "<tool_call>\n```json\nno call\n```\n</tool_call>"),
    ("hermes3", '<tool_call>{"name": "add"'),
    ("hermes3", "<tool_call>hello</tool_call>"),
    ("hermes3", "<function=nope></function>"),
    ("mistral", "[TOOL_CALLS] I cannot call."),
    ("mistral", "[TOOL_CALLS][1, 2]"),
    ("devstral", "[TOOL_CALLS]add[ARGS] nothing"),
    ("llama3", "<|python_tag|>print(1)"),
    ("llama3", '{"name": "Bob", "parameters": {"age": 5}}'),
    ("llama3", '{"name": "add", "param'),
    ("qwen3coder", "<tool_call><function=add><parameter=a>1</parameter>"),
    ("qwen3coder", "<tool_call><function=add>just text</function></tool_call>"),
    ("qwen3coder", "See <function=other> there."),
    ("glm4", "<tool_call>add\n<arg_key>a</arg_key>\n</tool_call>"),
    ("lfm2", "<|tool_call_start|>add(1, 2)<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[add(a=1), 5]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[add(a=1)]"),
]


@pytest.mark.promise("S4")
@pytest.mark.parametrize(("name", "text"), NO_CALLS)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_text_that_is_not_a_call_stays_text(name: str, text: str, size: int) -> None:
    assert cut(text, size, name, TOOLS) == (text, "", [])


FAR = [
    ("hermes3", f"<tool_call>\n```json\n{GOOD}\n```\n</tool_call>", ""),
    ("hermes3", f"<tool_call>[{GOOD}]</tool_call> Done.", "Done."),
    ("hermes3", f"<tool_call>{GOOD} So be it.", "So be it."),
    ("hermes3", f"<tool_call>{GOOD[:-1]}</tool_call> Done.", "Done."),
    ("hermes3", f'<tool_call>{GOOD[:-1]}, "id": "x{{"}}</tool_call> Done.', "Done."),
    ("hermes3", f"<tool_call> no <tool_call>{GOOD}</tool_call>", "<tool_call> no"),
    ("hermes3", WRITTEN["qwen3coder"], "Well."),
    ("qwen3", WRITTEN["glm4"], "Well."),
    ("qwen3coder", f"<tool_call>{GOOD}</tool_call>", ""),
    ("qwen3coder", WRITTEN["qwen3coder"].replace("<tool_call>\n", ""), "Well."),
    ("qwen3coder", WRITTEN["qwen3coder"].replace("<tool_call>\n", "").replace("\n</tool_call>", ""), "Well."),
    ("qwen3coder", f"<function=add>{ARGUMENTS}</function> Done.", "Done."),
    ("phi4", f"functools or functools[{GOOD}] Done.", "functools or  Done."),
    ("phi4", f"<|tool_call|>[{GOOD}]<|/tool_call|>", ""),
    ("mistral", f"[TOOL_CALLS][{GOOD}] [1]", "[1]"),
    ("devstral", f"[TOOL_CALLS]add{ARGUMENTS}", ""),
    ("devstral", f"[TOOL_CALLS]add[CALL_ID]abc[ARGS]{ARGUMENTS}", ""),
    ("llama3", f" {GOOD} and {{1}}", "and {1}"),
    ("lfm2", WRITTEN["lfm2"] + " Done.", "Well.  Done."),
]


@pytest.mark.promise("S4")
@pytest.mark.promise("S5")
@pytest.mark.parametrize(("name", "text", "content"), FAR)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_in_other_formats_are_found_and_the_text_around_them_is_kept(
    name: str, text: str, content: str, size: int
) -> None:
    found, _, calls = cut(text, size, name, TOOLS)
    assert (found.strip(), calls) == (content, CALLED)


MARKS = [
    "<tool_call>",
    "</tool_call>",
    "<function=add>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    "functools[",
]
MARKS += [
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "add(",
]
MARKS += [
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    '{"name": "add"',
    ', "arguments": {',
    '"a": 1',
    "}",
    "]",
    "```json",
]
PIECES = st.one_of(st.sampled_from(MARKS), st.text(st.sampled_from('789 {}[]"\\,\n<>'), max_size=6), st.just("add"))


@pytest.mark.promise("S4")
@given(st.sampled_from(sorted(PARSERS)), st.lists(PIECES, max_size=12), st.integers(1, 9), st.booleans())
def test_content_and_calls_contain_all_of_the_text(name: str, parts: list[str], size: int, cuts: bool) -> None:
    """In pieces of any size: each digit of the text is in the content or in a call."""
    text = "".join(parts)
    deltas = Deltas(parser(name, TOOLS), False, False)
    pieces = [text[at : at + size] for at in range(0, len(text), size)] if cuts else parts
    found = [delta for piece in pieces for delta in deltas.feed(piece)] + deltas.end()
    content = "".join(delta for delta in found if isinstance(delta, str))
    functions = [delta["tool_calls"][0]["function"] for delta in found if not isinstance(delta, str)]
    said = content + "".join(function.get("name", "") + function["arguments"] for function in functions)
    for letter in "789":
        assert said.count(letter) == text.count(letter)
    if not functions:
        assert content == text
    assert content.strip() or functions or not text.strip()


@pytest.mark.promise("S5")
@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "value",
    ["a </tool_call> b", "</parameter>", "</function>", "<parameter=a>", "x</parameter>y", " two\nlines ", ""],
)
def test_parameter_value_may_contain_tags(size: int, value: str) -> None:
    coder = f"<tool_call>\n<function=add>\n<parameter=b>\n{value}\n</parameter>\n</function>\n</tool_call>"
    glm = f"<tool_call>add\n<arg_key>b</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    for name, text in (("qwen3coder", coder), ("glm4", glm)):
        assert cut(text, size, name, TOOLS) == ("", "", [("add", {"b": value})]), name


NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.promise("S5")
@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "75001", "75001"),
        (NULLABLE, "75001", "75001"),
        (NULLABLE, "null", None),
        (NULLABLE, "None", None),
        (NULLABLE, '{"a": 1}', '{"a": 1}'),
        ({"type": ["string", "null"]}, "75001", "75001"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "string"}, "null", "null"),
        ({"oneOf": [{"$ref": "#/$defs/Zip"}, {"type": "null"}]}, "75001", "75001"),
        ({"allOf": [{"type": "string"}]}, "true", "true"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "5"}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "75001", 75001),
        ({"type": "integer"}, "many", "many"),
        ({"type": "boolean"}, "True", True),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({}, "75001", 75001),
        ({"$ref": "#/$defs/Loop"}, "75001", 75001),
        ({"anyOf": 5, "type": 7, "enum": "x"}, "x", "x"),
    ],
)
def test_schema_decides_the_type_of_a_parameter(schema: dict[str, Any], text: str, value: Any) -> None:
    root = {
        "properties": {"p": schema},
        "$defs": {"Zip": {"type": "string"}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}]}},
    }
    tools = [{"function": {"name": "f", "parameters": root}}]
    coder = f"<tool_call><function=f><parameter=p>{text}</parameter></function></tool_call>"
    glm = f"<tool_call>f<arg_key>p</arg_key><arg_value>{text}</arg_value></tool_call>"
    for written in (coder, glm):
        assert cut(written, 1000, "glm4", tools) == ("", "", [("f", {"p": value})])


def test_arguments_are_streamed() -> None:
    deltas = Deltas(parser("hermes3", TOOLS), False, False)
    first = deltas.feed('<tool_call>{"name": "add", "arguments": {"a": ')
    assert first[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": ""}
    assert first[1]["tool_calls"][0]["function"] == {"arguments": '{"a": '}


def test_json_that_is_not_a_call_is_text() -> None:
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
def test_reasoning_is_separated_from_text(size: int, text: str, thinking: bool, content: str, thoughts: str) -> None:
    deltas = Deltas(None, True, thinking)
    found = [delta for at in range(0, len(text), size) for delta in deltas.feed(text[at : at + size])] + deltas.end()
    assert told(found)[:2] == (content, thoughts)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>", "hermes3"),
        ("<tool_call><function=", "qwen3coder"),
        ("<tool_call><arg_key>", "glm4"),
        ("[TOOL_CALLS]", "mistral"),
        ("plain", None),
    ],
)
def test_parser_is_chosen_by_the_template(template: str, name: str | None) -> None:
    assert guess(template) == name


def rendered(folder: Path, tools: list[dict[str, Any]], **extra: Any) -> str:
    template = ChatTemplate(read_templates(folder, lambda: "built in"))
    return template.render([{"role": "user", "content": "hi"}], tools, extra)


@pytest.mark.promise("S12")
def test_templates_are_read_from_each_file_of_a_model(tmp_path: Path) -> None:
    assert rendered(tmp_path, []) == "built in"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert rendered(tmp_path, []) == "json"
    several = [{"name": "default", "template": "plain {{ bos_token }}"}, {"name": "tool_use", "template": "tools"}]
    for named in (several, {one["name"]: one["template"] for one in several}):
        config = {"chat_template": named, "bos_token": {"content": "<s>"}}
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
def test_template_for_tools_is_read(tmp_path: Path, place: str | None) -> None:
    """With a default template from each possible place."""
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


def test_template_of_many_megabytes_is_rejected(tmp_path: Path) -> None:
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(RequestError, match=r"^chat_template\.jinja: is larger than 16 MiB"):
        read_templates(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), ("  ", {}), (None, {}), ("{}", {})],
)
@pytest.mark.promise("S6")
def test_arguments_of_past_calls_become_objects(arguments: Any, plain: dict[str, Any]) -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": arguments}}
    found, _ = messages([{"role": "assistant", "content": None, "tool_calls": [call]}], False)
    assert found[0]["tool_calls"] == [{"id": "1", "function": {"name": "add", "arguments": plain}}]


def test_parts_are_joined_to_one_text_in_order() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:,x"}}
    one, two, three = ({"type": "text", "text": text} for text in ("one", "two", "three"))
    found, pictures = messages([{"role": "user", "content": [one, two, picture, three, picture]}], True)
    assert found[0]["content"] == "one\ntwo<ov_genai_image_0>\nthree<ov_genai_image_1>\n"
    assert pictures == ["data:,x", "data:,x"]


@pytest.mark.promise("S3")
def test_developer_messages_become_system_messages() -> None:
    given = [{"role": role, "content": "x"} for role in ("developer", "system", "user", "assistant", "tool")]
    found, _ = messages(given, False)
    assert [message["role"] for message in found] == ["system", "system", "user", "assistant", "tool"]
    assert given[0]["role"] == "developer"


def test_speech_text_is_divided_at_sentences_and_words() -> None:
    assert pieces("One. Two! Three?", 9) == ["One. Two!", "Three?"]
    assert pieces("word " * 5, 11) == ["word word", "word word", "word"]
    assert pieces("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
