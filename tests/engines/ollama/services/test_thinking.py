"""ThinkParser: separation of thinking by tags, at every cut of the text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.engines.ollama.thinking import ThinkParser, split_thinking

PIECES = st.lists(
    st.sampled_from(("<think>", "</think>", "<", "</", "<think", "think>", ">", " ", "\n", "a", "so ", "<b>", "é")),
    max_size=12,
)


def parts(pieces: list[str]) -> tuple[str, str]:
    parser = ThinkParser()
    parsed = [parser.feed(piece) for piece in pieces]
    parsed.append(parser.end())
    return "".join(thinking for thinking, _ in parsed), "".join(content for _, content in parsed)


@pytest.mark.promise("P25")
@pytest.mark.parametrize(
    ("text", "thinking", "content"),
    [
        ("", "", ""),
        ("hello", "", "hello"),
        ("  hello", "", "  hello"),
        (" \n", "", " \n"),
        ("<think>why</think>because", "why", "because"),
        ("\n<think>\nwhy\n</think>\n\nbecause ", "why\n", "because "),
        ("<think>a</think>b<think>c</think>d", "ac", "bd"),
        ("a <think> b</think> c", "b", "a  c"),
        ("<think>never closed", "never closed", ""),
        ("<think>a <b> c</think>d", "a <b> c", "d"),
        ("<think></think>\n\nhello", "", "hello"),
        ("</think>\nhello", "", "hello"),
        ("\n\n</think>\nhello", "", "hello"),
        ("a < b", "", "a < b"),
        ("  <the end", "", "  <the end"),
        ("hello <thi", "", "hello <thi"),
        ("<think>hello </thi", "hello </thi", ""),
        ("<think>a<think>b</think>c", "ab", "c"),
    ],
)
def test_every_cut_gives_the_same_split(text: str, thinking: str, content: str) -> None:
    assert parts([text]) == (thinking, content)
    assert parts(list(text)) == (thinking, content)
    for cut in range(len(text) + 1):
        assert parts([text[:cut], text[cut:]]) == (thinking, content)


@pytest.mark.promise("P25")
@given(PIECES)
def test_any_text_splits_the_same_at_every_cut(pieces: list[str]) -> None:
    whole = "".join(pieces)
    assert parts(pieces) == parts([whole]) == parts(list(whole))


@given(PIECES)
def test_only_tags_and_white_space_are_dropped(pieces: list[str]) -> None:
    thinking, content = parts(pieces)
    left = re.sub("</?think>", "", "".join(pieces))
    parsed = sorted((thinking + content).replace(" ", "").replace("\n", ""))
    assert parsed == sorted(left.replace(" ", "").replace("\n", ""))


@given(st.text())
def test_text_without_tags_is_unchanged(text: str) -> None:
    if "think>" not in text:
        assert parts(list(text)) == ("", text)
        assert split_thinking(text) == ("", text)


def test_text_is_returned_once_it_cannot_be_a_tag() -> None:
    parser = ThinkParser()
    assert parser.feed("hello ") == ("", "hello ")
    assert parser.plain
    assert parser.feed("<thi") == ("", "")
    assert not parser.plain
    assert parser.feed("s> ") == ("", "<this> ")
    assert parser.plain
    assert parser.feed("a</think>b") == ("", "ab")


def test_whole_text_before_first_closing_tag_is_thinking() -> None:
    assert split_thinking("so then\n</think>\n\nhello") == ("so then", "hello")
    assert split_thinking("so</think>hello<think>hm</think>!") == ("sohm", "hello!")
    assert split_thinking("<think>so</think>hello</think>!") == ("so", "hello!")
    assert split_thinking("</think>hello") == ("", "hello")
