"""A transcription in the forms that callers ask for: json, verbose_json, text, srt, vtt."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FORMS", "Segment", "answer", "plain_text", "srt", "vtt"]

FORMS = ("json", "verbose_json", "text", "srt", "vtt")
"""The values of `response_format`."""

_SHORTEST_CUE = 0.001


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of what was said, in seconds from the beginning of the audio."""

    start: float
    end: float
    text: str

    def to_json(self, number: int) -> dict[str, Any]:
        """As the service answers it; segments are counted from 0."""
        return {"id": number, "start": round(self.start, 3), "end": round(self.end, 3), "text": self.text}


def answer(form: str, model: str, text: str, segments: Sequence[Segment], more: dict[str, Any]) -> dict[str, Any]:
    """The service's answer in one of FORMS. `more` is what verbose_json has beside it: task, language, duration,
    words."""
    shown = {"json": text, "verbose_json": text, "text": plain_text(text, segments)}
    if form in ("srt", "vtt"):
        shown[form] = srt(segments) if form == "srt" else vtt(segments)
    shape: dict[str, Any] = {
        "text": shown[form],
        "model": model,
        "segments": [segment.to_json(number) for number, segment in enumerate(segments)],
    }
    return {**more, **shape} if form == "verbose_json" else shape


def plain_text(text: str, segments: Sequence[Segment]) -> str:
    """The text alone, or, where the engine gave none, its segments'."""
    return text.strip() or "".join(segment.text for segment in segments).strip()


def srt(segments: Sequence[Segment]) -> str:
    """SubRip: numbered cues, HH:MM:SS,mmm. It knows no escaping, so that an arrow in a text is made shorter: players
    take it for the line of a cue's times."""
    cues = enumerate(_cues(segments), 1)
    texts = (f"{number}\n{_span(cue, ',')}\n{cue.text.replace('-->', '->')}\n" for number, cue in cues)
    return "\n".join(texts)


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT: HH:MM:SS.mmm, with &, < and > escaped, so that no text can be taken for a tag or an arrow."""
    cues = (f"{_span(cue, '.')}\n{html.escape(cue.text, quote=False)}\n" for cue in _cues(segments))
    return "\n".join(("WEBVTT\n", *cues))


def _cues(segments: Sequence[Segment]) -> list[Segment]:
    """What can be shown: no empty texts, no empty line inside one, which would end the cue, and no negative times."""
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
