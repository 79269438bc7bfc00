"""Text to speech: OpenVINO GenAI's Text2SpeechPipeline (SpeechT5, Kokoro).

Text is spoken in pieces of whole sentences: a long text does not fit into a model, and could not be cancelled.
"""

from __future__ import annotations

import math
import re
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services import base
from openvino_server.errors import RequestError
from openvino_server.pipelines import Job, OneAtATime, PipelineSettings, json_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Served", "pieces"]

_PIECE = 100  # characters of a piece, at most; SpeechT5 gets worse with length
_FRAMES_OF_LETTER = 8  # of 16 ms
_FRAMES_SPARE = 200
_LETTERS_OF_DIGIT = 6
_SPARE = 8  # positions for tokens that are not characters
_VOICE_VALUES = 512  # of a speaker embedding of SpeechT5
_DEFAULT = "default"

Wave = np.ndarray[Any, np.dtype[np.float32]]


class Served(OneAtATime):
    """A speech model. Made by `pipelines.load`."""

    def __init__(self, settings: PipelineSettings) -> None:
        import openvino_genai

        options = settings.options
        self._speeds = (float(options.get("speed_min") or 0.25), float(options.get("speed_max") or 4.0))
        self._pipeline = openvino_genai.Text2SpeechPipeline(settings.path, settings.device, **settings.properties())
        shape = [int(size) for size in self._pipeline.get_speaker_embedding_shape()]
        self._is_kokoro = math.prod(shape) != _VOICE_VALUES
        self._voices = {
            str(voice["name"]): _voice(settings.path, str(voice["path"]), shape)
            for voice in options.get("voices") or []
        }
        config = json_file(settings.path / "config.json")
        positions = config.get("max_text_positions")
        self._frames = int(config.get("max_speech_positions") or 0) * int(config.get("reduction_factor") or 1)
        self._piece = min(_PIECE, max(int(positions) - _SPARE, 16)) if positions else _PIECE
        self.facts = {"capabilities": ["text-to-speech"], "voices": list(self._voices)}

    def run(self, job: Job) -> dict[str, Any]:
        text: str = job.request["text"]
        voice = self._voice(job.request.get("voice"))
        speed = base.number(job.request, "speed", *self._speeds)
        speed = 1.0 if speed is None else speed
        options: dict[str, Any] = {}
        if self._is_kokoro:
            options["speed"] = speed
            if job.request.get("language"):
                options["language"] = str(job.request["language"]).lower()
        parts = pieces(text, self._piece)
        waves: list[Wave] = []
        rate = 0
        for number, part in enumerate(parts):
            job.check()
            job.progress(number, len(parts))
            result = self._pipeline.generate(part, voice, **options, **self._bounds(part))
            rate = int(result.output_sample_rate)
            waves += [np.array(speech.data, dtype="<f4").reshape(-1) for speech in result.speeches]
        job.check()
        wave = np.concatenate(waves)
        if not self._is_kokoro and speed != 1:
            wave = _stretch(wave, speed, rate)
        return {"pcm": wave.astype("<f4").tobytes(), "rate": rate}

    def _bounds(self, part: str) -> dict[str, Any]:
        """The limit on the length of SpeechT5's speech, which sometimes does not end by itself.

        The cost of a frame grows with its position, and after the last position the model fails. Slow speech has
        about five frames for a letter.
        """
        if not self._frames:
            return {}
        digits = sum(character.isdigit() for character in part)
        wanted = _FRAMES_SPARE + _FRAMES_OF_LETTER * (len(part) + digits * _LETTERS_OF_DIGIT)
        return {"maxlenratio": min(wanted, self._frames * 0.98) / (len(part) + _SPARE)}

    def _voice(self, given: Any) -> Any:
        """A speaker embedding; None for the model's own. Raises RequestError."""
        if given in (None, "", _DEFAULT) or not self._voices:  # some clients always send a voice
            if self._is_kokoro:
                if not self._voices:
                    raise RequestError("voice: this model needs one; configure voices with their files", 412)
                return next(iter(self._voices.values()))
            return None
        if given not in self._voices:
            raise InvalidRequestError.at("voice", f"{given!r} is not one of {', '.join([_DEFAULT, *self._voices])}")
        return self._voices[given]


def pieces(text: str, most: int) -> list[str]:
    """Text in pieces of at most `most` characters, divided after sentences, else after words, else anywhere."""
    found: list[str] = []
    for sentence in re.split(r"(?<=[.!?;:。！？；])\s+|\n+", text):
        for part in textwrap.wrap(sentence, most, break_on_hyphens=False):
            if found and len(found[-1]) + 1 + len(part) <= most:
                found[-1] += f" {part}"
            else:
                found.append(part)
    return found


def _voice(folder: Path, path: str, shape: list[int]) -> Any:
    """A speaker embedding from a file of bare 32-bit floats, or of NumPy's; relative to the model's folder."""
    import openvino

    file = folder / path
    try:
        values = np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.fromfile(file, dtype="<f4")
    except (OSError, ValueError) as error:
        raise RequestError(f"voices: cannot read {file}: {error}") from error
    if values.size != math.prod(shape):
        raise RequestError(f"voices: {file} has {values.size} values, but the model's voices have {math.prod(shape)}")
    return openvino.Tensor(np.ascontiguousarray(values, dtype=np.float32).reshape(shape))


def _stretch(wave: Wave, speed: float, rate: int) -> Wave:
    """Change the speed but not the pitch, for models with one speed: overlapping pieces of 40 ms, each taken from
    where it continues the one before best (WSOLA, Verhelst and Roelands 1993)."""
    size = rate // 25
    half, reach = size // 2, size // 4
    if len(wave) < 2 * size + reach:
        return wave
    fade = np.hanning(size + 1)[:size].astype(np.float32)
    count = int((len(wave) - size - reach) / (half * speed))
    out = np.zeros(count * half + size, dtype=np.float32)
    at = 0
    for number in range(count):
        wanted = int(number * half * speed)
        if number:
            follows = wave[at + half : at + half + half]
            first = max(wanted - reach, 0)
            around = wave[first : wanted + reach + half]
            at = first + int(np.argmax(np.correlate(around, follows, "valid"))) if len(follows) == half else wanted
        out[number * half : number * half + size] += wave[at : at + size] * fade
    return out[: count * half + half]
