"""Speech to text: OpenVINO GenAI's WhisperPipeline.

A model takes thirty seconds at a time. Longer audio is divided here into windows, each beginning at the end of the
last whole segment of the one before. The pipeline can do that by itself, but then a call could not be cancelled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import choice, number
from openvino_server.errors import RequestError
from openvino_server.pipelines import Job, OneAtATime, PipelineSettings

__all__ = ["Served"]

RATE = 16000

_WINDOW = 30 * RATE
_LEAST = 400  # samples; the features of fewer than 201 cannot be computed
_STEP = RATE  # samples by which each window advances at least
_MOST_TOKENS = 440  # a decoder has 448 positions

Audio = np.ndarray[Any, np.dtype[np.float32]]
Segment = tuple[float, float, str]


class Served(OneAtATime):
    """A Whisper model. Made by `pipelines.load`."""

    def __init__(self, settings: PipelineSettings) -> None:
        self._settings = settings
        self._words = bool(settings.options.get("enable_word_timestamps", False))
        self._open()
        config = self._pipeline.get_generation_config()
        known = config.lang_to_id if config.is_multilingual else ()
        self._languages: dict[str, str] = {name.strip("<|>"): name for name in known}
        self._can_align = bool(config.alignment_heads)
        self.facts = {"capabilities": ["speech-to-text", *(["words"] if self._can_align else [])]}

    def _open(self) -> None:
        import openvino_genai

        properties = self._settings.properties()
        if self._words:
            properties["word_timestamps"] = True
        self._pipeline = openvino_genai.WhisperPipeline(self._settings.path, self._settings.device, **properties)

    def run(self, job: Job) -> dict[str, Any]:
        audio: Audio = np.frombuffer(job.request["audio"], dtype="<f4")
        config = self._config(job.request)
        if job.request.get("words"):
            self._align()
            config.word_timestamps = True
        transcript = _Transcript()
        start, total = 0, len(audio)
        while start < total or not start:
            job.check()
            job.progress(start, total)
            start += self._transcribe(job, audio[start : start + _WINDOW], start, config, transcript)
        job.check()
        return transcript.answer()

    def _align(self) -> None:
        """Reopen the pipeline with word times, which make it slower. Raises RequestError if the model has none."""
        if not self._can_align:
            raise RequestError("timestamp_granularities: this model has no word times; use segment", 501)
        if not self._words:
            self._words = True
            self._open()

    def _config(self, request: dict[str, Any]) -> Any:
        config = self._pipeline.get_generation_config()
        config.max_new_tokens = _MOST_TOKENS
        config.return_timestamps = True
        if request.get("language") and (language := self._language(request["language"])):
            config.language = language
        task = choice(request, "task", ("transcribe", "translate"))
        if self._languages:
            config.task = task or "transcribe"
        elif task == "translate":
            raise InvalidRequestError.at("task", "this model supports English only and cannot translate")
        if temperature := number(request, "temperature", 0, 2):
            config.do_sample = True
            config.temperature = temperature
        return config

    def _language(self, given: Any) -> str | None:
        """The model's token for a language; None for a model with one language. Raises RequestError."""
        name = str(given).strip("<|>").replace("_", "-").lower()
        for candidate in (name, name.partition("-")[0]):
            if candidate in self._languages:
                return self._languages[candidate]
        if not self._languages and name.partition("-")[0] in ("en", "english"):
            return None
        known = ", ".join(sorted(self._languages)) or "en"
        raise InvalidRequestError.at("language", f"{given!r} is not a language of this model; use one of {known}")

    def _transcribe(self, job: Job, window: Audio, start: int, config: Any, transcript: _Transcript) -> int:
        """Transcribe one window into `transcript`. Returns by how many samples to advance."""
        result = self._generate(job, window, config)
        if result.language and not transcript.language:
            transcript.language = result.language.strip("<|>")
            if self._languages:
                config.language = self._languages.get(transcript.language, config.language)
        offset, length = start / RATE, len(window) / RATE
        segments, through = _segments(result, length, len(window) == _WINDOW)
        transcript.segments += [(offset + begin, offset + end, text) for begin, end, text in segments]
        for word in result.words or []:
            if word.start_ts <= through:
                transcript.words.append((offset + word.start_ts, offset + word.end_ts, word.word))
        return max(int(through * RATE), min(_STEP, len(window)))

    def _generate(self, job: Job, window: Audio, config: Any) -> Any:
        if len(window) < _LEAST:
            window = np.pad(window, (0, _LEAST - len(window)))
        result = self._pipeline.generate(window, config)
        if result.chunks or (result.texts and result.texts[0].strip()):
            return result
        # Some models were not trained on timestamps, and return text only without them.
        job.check()
        config.return_timestamps = False
        try:
            return self._pipeline.generate(window, config, streamer=lambda _text: _status(job))
        finally:
            config.return_timestamps = True


class _Transcript:
    """The segments and words of all windows."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.words: list[Segment] = []
        self.language = ""

    def answer(self) -> dict[str, Any]:
        """The payload of the `done` frame."""
        segments, words = (
            [(round(begin, 2), round(end, 2), text.strip()) for begin, end, text in timed]
            for timed in (self.segments, self.words)
        )
        text = "".join(text for _, _, text in self.segments).strip()
        return {"text": text, "segments": segments, "words": words, "language": self.language}


def _segments(result: Any, length: float, more: bool) -> tuple[list[Segment], float]:
    """The segments of a window, and where its transcribed part ends. Both in seconds.

    A last segment without an end was cut off by the window. If `more` audio follows, the next window begins with it.
    """
    chunks = [(chunk.start_ts, chunk.end_ts, chunk.text) for chunk in result.chunks or [] if chunk.text.strip()]
    if not chunks:
        text = result.texts[0] if result.texts else ""
        return ([(0.0, length, text)] if text.strip() else []), length
    *whole, (begin, end, text) = chunks
    if end >= begin and end < length:
        return chunks, end if more else length
    if more and whole and begin > 0:
        return whole, begin
    return [*whole, (begin, length, text)], length


def _status(job: Job) -> Any:
    import openvino_genai

    running = openvino_genai.StreamingStatus
    return running.CANCEL if job.cancelled() else running.RUNNING
