"""Local agreement: which words of successive windows are confirmed."""

from __future__ import annotations

import pytest

from engine_plugin.speech.agreement import LocalAgreement, Word, split_words
from engine_plugin.speech.subtitles import Segment


def said(text: str, start: float = 0.0) -> list[Word]:
    """Words of half a second each."""
    return [Word(f" {word}", start + n / 2, start + (n + 1) / 2) for n, word in enumerate(text.split())]


def test_words_that_two_windows_agree_on_are_confirmed() -> None:
    agreement = LocalAgreement()
    agreement.add_window(said("the cat sad"))
    assert (agreement.stable, agreement.text) == ("", "the cat sad")
    agreement.add_window(said("the cat sat on"))
    assert (agreement.stable, agreement.text) == ("the cat", "the cat sat on")
    agreement.add_window(said("a cat sat on the mat"))
    assert (agreement.stable, agreement.text) == ("the cat sat on", "the cat sat on the mat")


def test_windows_agree_regardless_of_case_and_punctuation() -> None:
    agreement = LocalAgreement()
    agreement.add_window(said("Hello World"))
    agreement.add_window(said("hello, world. And"))
    assert agreement.stable == "hello, world."


def test_later_window_continues_after_the_confirmed_words() -> None:
    agreement = LocalAgreement()
    agreement.add_window(said("one two three four five six"))
    agreement.add_window(said("one two three four five six"))
    assert agreement.confirmed_until == 3
    agreement.add_window(said("five six seven", 2.2))
    agreement.add_window(said("hive five six seven eight", 1.6))
    assert agreement.stable == "one two three four five six seven"
    assert agreement.text == "one two three four five six seven eight"


def test_repeated_word_is_matched_by_its_time() -> None:
    agreement = LocalAgreement()
    for _ in range(2):
        agreement.add_window(said("no no no"))
    agreement.add_window(said("no no no no yes"))
    assert agreement.text == "no no no no yes"


def test_window_without_a_match_is_aligned_by_time() -> None:
    agreement = LocalAgreement()
    for _ in range(2):
        agreement.add_window(said("one two"))
    agreement.add_window(said("mumble mumble three four"))
    assert agreement.text == "one two three four"


def test_confirm_and_cut_split_words_by_time() -> None:
    agreement = LocalAgreement()
    agreement.add_window(said("one two three four"))
    agreement.confirm(1.0)
    assert agreement.stable == "one two"
    agreement.cut(1.4)
    assert agreement.text == "one two three"
    agreement.add_window([])
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
def test_words_of_each_script_are_split(texts: list[str], count: int, whole: str) -> None:
    segments = [Segment(float(n), n + 1.0, text) for n, text in enumerate(texts)]
    words = split_words(segments, 10.0)
    assert len(words) == count
    agreement = LocalAgreement()
    agreement.add_window(words)
    assert agreement.text == whole
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert all(10 <= time < 10.001 + len(texts) for time in times)
