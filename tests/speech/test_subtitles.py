"""Subtitles, to the letter of their formats."""

from __future__ import annotations

from engine_plugin.speech.subtitles import Segment, answer, plain_text, srt, vtt

SEGMENTS = [Segment(0, 1.5, " Hello there."), Segment(3599.9996, 3661.25, "It is <b>late</b> & dark --> now.\n\n2\n")]


def test_srt() -> None:
    assert srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello there.\n"
        "\n"
        "2\n01:00:00,000 --> 01:01:01,250\nIt is <b>late</b> & dark -> now.\n2\n"
    )


def test_vtt() -> None:
    assert vtt(SEGMENTS) == (
        "WEBVTT\n"
        "\n"
        "00:00:00.000 --> 00:00:01.500\nHello there.\n"
        "\n"
        "01:00:00.000 --> 01:01:01.250\nIt is &lt;b&gt;late&lt;/b&gt; &amp; dark --&gt; now.\n2\n"
    )


def test_no_empty_cues_and_no_cue_without_length() -> None:
    odd = [
        Segment(0, 1, " "),
        Segment(1, 2, "\n\n"),
        Segment(-1, -1, "a"),
        Segment(2, 2, "b"),
        Segment(200_000, 1, "c"),
    ]
    assert srt(odd) == (
        "1\n00:00:00,000 --> 00:00:00,001\na\n"
        "\n"
        "2\n00:00:02,000 --> 00:00:02,001\nb\n"
        "\n"
        "3\n55:33:20,000 --> 55:33:20,001\nc\n"
    )
    assert srt([]) == ""
    assert vtt([]) == "WEBVTT\n"


def test_answers() -> None:
    segments = [Segment(0.12345, 2, "One."), Segment(2, 3, " Two.")]
    more = {"task": "transcribe", "language": "en", "duration": 3.0}
    told = [{"id": 0, "start": 0.123, "end": 2, "text": "One."}, {"id": 1, "start": 2, "end": 3, "text": " Two."}]
    plain = {"text": "One. Two.", "model": "m", "segments": told}
    assert answer("json", "m", "One. Two.", segments, more) == plain
    assert answer("text", "m", "One. Two.", segments, more) == plain
    assert answer("verbose_json", "m", "One. Two.", segments, more) == plain | more
    assert answer("srt", "m", "", segments, more)["text"] == srt(segments)
    assert answer("vtt", "m", "", segments, more)["text"].startswith("WEBVTT\n\n00:00:00.123 -->")
    assert plain_text(" ", segments) == "One. Two."
