"""Formats a transcription as json, verbose_json, text, srt or vtt."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Segment", "format_transcription", "plain_text", "srt", "vtt"]

_SHORTEST_CUE = 0.001


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of a transcription. Times are seconds from the beginning of the audio."""

    start: float
    end: float
    text: str

    def to_json(self, number: int) -> dict[str, Any]:
        """The segment in an answer; `number` counts from 0."""
        return {"id": number, "start": round(self.start, 3), "end": round(self.end, 3), "text": self.text}


def format_transcription(
    response_format: str, model: str, text: str, segments: Sequence[Segment], verbose: dict[str, Any]
) -> dict[str, Any]:
    """The answer of speech-to-text: json, verbose_json, text, srt or vtt. `verbose` has the additional fields of
    verbose_json: task, language, duration and words."""
    if response_format == "text":
        text = plain_text(text, segments)
    elif response_format in ("srt", "vtt"):
        text = srt(segments) if response_format == "srt" else vtt(segments)
    shape: dict[str, Any] = {
        "text": text,
        "model": model,
        "segments": [segment.to_json(number) for number, segment in enumerate(segments)],
    }
    return {**verbose, **shape} if response_format == "verbose_json" else shape


def plain_text(text: str, segments: Sequence[Segment]) -> str:
    """The text, or the text of the segments if it is empty."""
    return text.strip() or "".join(segment.text for segment in segments).strip()


def srt(segments: Sequence[Segment], first: int = 1) -> str:
    """SubRip: cues that are numbered from `first` on, HH:MM:SS,mmm.

    The format has no escaping, so `-->`, which players would read as a line of times,
    becomes `->`.
    """
    cues = enumerate(_cues(segments), first)
    texts = (f"{number}\n{_span(cue, ',')}\n{cue.text.replace('-->', '->')}\n" for number, cue in cues)
    return "\n".join(texts)


def vtt(segments: Sequence[Segment], header: str = "WEBVTT\n") -> str:
    """WebVTT: HH:MM:SS.mmm, with &, < and > escaped. Without a header the cues continue a file."""
    cues = (f"{_span(cue, '.')}\n{html.escape(cue.text, quote=False)}\n" for cue in _cues(segments))
    return "\n".join(filter(None, (header, *cues)))


def _cues(segments: Sequence[Segment]) -> list[Segment]:
    """The segments as cues, without empty texts, empty lines, which would end a cue, and negative times."""
    cues = []
    for segment in segments:
        lines = [line.strip() for line in segment.text.splitlines()]
        text = "\n".join(line for line in lines if line)
        start = max(0.0, segment.start)
        if text:
            cues.append(Segment(start, max(segment.end, start + _SHORTEST_CUE), text))
    return cues


def _span(cue: Segment, point: str) -> str:
    return f"{_clock(cue.start, point)} --> {_clock(cue.end, point)}"


def _clock(at: float, point: str) -> str:
    whole, thousandths = divmod(round(at * 1000), 1000)
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}{point}{thousandths:03}"
