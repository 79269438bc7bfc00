"""Words that stay."""

from __future__ import annotations

import pytest

from engine_plugin.speech.agreement import Agreement, Word, words_of
from engine_plugin.speech.subtitles import Segment


def said(text: str, start: float = 0.0) -> list[Word]:
    """Words of half a second each."""
    return [Word(f" {word}", start + n / 2, start + (n + 1) / 2) for n, word in enumerate(text.split())]


def test_what_two_windows_agree_on_stays() -> None:
    agreement = Agreement()
    agreement.hear(said("the cat sad"))
    assert (agreement.stable, agreement.text) == ("", "the cat sad")
    agreement.hear(said("the cat sat on"))
    assert (agreement.stable, agreement.text) == ("the cat", "the cat sat on")
    agreement.hear(said("a cat sat on the mat"))
    assert (agreement.stable, agreement.text) == ("the cat sat on", "the cat sat on the mat")


def test_case_and_punctuation_are_no_disagreement() -> None:
    agreement = Agreement()
    agreement.hear(said("Hello World"))
    agreement.hear(said("hello, world. And"))
    assert agreement.stable == "hello, world."


def test_a_window_that_begins_later_goes_on_where_the_settled_words_end() -> None:
    agreement = Agreement()
    agreement.hear(said("one two three four five six"))
    agreement.hear(said("one two three four five six"))
    assert agreement.settled_until == 3
    agreement.hear(said("five six seven", 2.2))
    agreement.hear(said("hive five six seven eight", 1.6))
    assert agreement.stable == "one two three four five six seven"
    assert agreement.text == "one two three four five six seven eight"


def test_a_repeated_word_is_found_where_it_was_said() -> None:
    agreement = Agreement()
    for _ in range(2):
        agreement.hear(said("no no no"))
    agreement.hear(said("no no no no yes"))
    assert agreement.text == "no no no no yes"


def test_without_any_match_time_decides() -> None:
    agreement = Agreement()
    for _ in range(2):
        agreement.hear(said("one two"))
    agreement.hear(said("mumble mumble three four"))
    assert agreement.text == "one two three four"


def test_settling_and_cutting() -> None:
    agreement = Agreement()
    agreement.hear(said("one two three four"))
    agreement.settle(1.0)
    assert agreement.stable == "one two"
    agreement.cut(1.4)
    assert agreement.text == "one two three"
    agreement.hear([])
    assert agreement.text == "one two"
    agreement.cut(0.2)
    assert agreement.text == "one"


@pytest.mark.parametrize(
    ("texts", "count", "whole"),
    [
        ([" Hello there.", " General."], 3, "Hello there. General."),
        (["Hello", "you"], 2, "Hello you"),
        (["今天天气", "很好。"], 7, "今天天气很好。"),
        (["OK 今天", " ok"], 4, "OK 今天 ok"),
        (["今天", "，好", "“Hi”"], 5, "今天，好 “Hi”"),
        (["สวัสดี"], 6, "สวัสดี"),
        (["안녕 하세요"], 2, "안녕 하세요"),
        (["", "  ", "a"], 1, "a"),
        ([], 0, ""),
    ],
)
def test_words_of_any_script(texts: list[str], count: int, whole: str) -> None:
    segments = [Segment(float(n), n + 1.0, text) for n, text in enumerate(texts)]
    words = words_of(segments, 10.0)
    assert len(words) == count
    agreement = Agreement()
    agreement.hear(words)
    assert agreement.text == whole
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert all(10 <= time < 10.001 + len(texts) for time in times)
