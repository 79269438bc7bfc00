"""Formats of transcriptions."""

from __future__ import annotations

from engine_plugin.speech.subtitles import Segment, format_transcription, plain_text, srt, vtt

SEGMENTS = [Segment(0, 1.5, " Hello there."), Segment(3599.9996, 3661.25, "It is <b>late</b> & dark --> now.\n\n2\n")]


def test_srt_is_formatted() -> None:
    assert srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello there.\n"
        "\n"
        "2\n01:00:00,000 --> 01:01:01,250\nIt is <b>late</b> & dark -> now.\n2\n"
    )


def test_vtt_is_formatted() -> None:
    assert vtt(SEGMENTS) == (
        "WEBVTT\n"
        "\n"
        "00:00:00.000 --> 00:00:01.500\nHello there.\n"
        "\n"
        "01:00:00.000 --> 01:01:01.250\nIt is &lt;b&gt;late&lt;/b&gt; &amp; dark --&gt; now.\n2\n"
    )


def test_cues_have_text_and_a_length() -> None:
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


def test_each_response_format_has_its_fields() -> None:
    segments = [Segment(0.12345, 2, "One."), Segment(2, 3, " Two.")]
    more = {"task": "transcribe", "language": "en", "duration": 3.0}
    told = [{"id": 0, "start": 0.123, "end": 2, "text": "One."}, {"id": 1, "start": 2, "end": 3, "text": " Two."}]
    plain = {"text": "One. Two.", "model": "m", "segments": told}
    assert format_transcription("json", "m", "One. Two.", segments, more) == plain
    assert format_transcription("text", "m", "One. Two.", segments, more) == plain
    assert format_transcription("verbose_json", "m", "One. Two.", segments, more) == plain | more
    assert format_transcription("srt", "m", "", segments, more)["text"] == srt(segments)
    assert format_transcription("vtt", "m", "", segments, more)["text"].startswith("WEBVTT\n\n00:00:00.123 -->")
    assert plain_text(" ", segments) == "One. Two."
