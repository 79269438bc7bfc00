"""The validators of the services: what a request, or a message of a conversation, must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import BRIEF
from engine_plugin.services.base import (
    RequestValidator,
    check_stop,
    choice,
    integer,
    number,
    optional,
    parse_request,
    require,
    words,
)
from engine_plugin.services.pictures import IMAGE_FORMATS, check_pictures, listed, picture_size, pictures_of
from engine_plugin.system.data_urls import base64_start

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CONVERSATION_VALIDATORS", "VALIDATORS"]

_MAX_SIDE = 16384
_MAX_IMAGES = 10
_MAX_STEPS = 1000
_MAX_SEED = 2**64 - 1
_GRANULARITIES = ("segment", "word")
_RATES = range(1000, 384_001)

# Quotes inside a sentence's text are escaped: only the event's name can match.
_STARTED, _FAILED = b'"task-started"', b'"task-failed"'


class Chat(RequestValidator):
    """chat, OpenAI's chat completions: `messages` in, a chat.completion (or its chunks) out."""

    name: ClassVar[str] = "chat"
    nested: ClassVar[frozenset[str]] = frozenset(
        {"messages", "tools", "tool_choice", "response_format", "stream_options"}
    )

    def check(self, request: dict[str, Any]) -> None:
        messages = require(request, "messages", list)
        if not messages:
            raise InvalidRequestError.at("messages", "is empty; a chat needs at least one message")
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InvalidRequestError.at(f"messages[{index}]", "must be an object with a role and content")
        check_pictures(pictures_of(messages))
        for index, tool in enumerate(optional(request, "tools", list) or ()):
            _check_tool(tool, f"tools[{index}]")
        check_stop(request)
        optional(request, "tool_choice", str, dict)
        optional(request, "response_format", dict)


def _check_tool(tool: Any, place: str) -> None:
    """Only functions are checked; the engine accepts or rejects other kinds of tools."""
    function = tool.get("function") if isinstance(tool, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
    if not isinstance(tool, dict) or (tool.get("type", "function") == "function" and not named):
        raise InvalidRequestError.at(place, 'must be {"type": "function", "function": {"name": …}}')


class Generate(RequestValidator):
    """generate, OpenAI's text completions: `prompt` in, a text_completion (or its chunks) out."""

    name: ClassVar[str] = "generate"
    nested: ClassVar[frozenset[str]] = frozenset({"response_format", "stream_options"})

    def check(self, request: dict[str, Any]) -> None:
        prompt = require(request, "prompt", str, list)
        if isinstance(prompt, list) and not prompt:
            raise InvalidRequestError.at("prompt", "is an empty list; give at least one prompt")
        check_stop(request)
        check_pictures(listed(request.get("images"), "images"))


class Embed(RequestValidator):
    """embed, OpenAI's embeddings: `input` (a text, a list of texts, or tokens) in, one vector for each out."""

    name: ClassVar[str] = "embed"

    def check(self, request: dict[str, Any]) -> None:
        texts = require(request, "input", str, list)
        if isinstance(texts, list):
            for index, text in enumerate(texts):
                if not isinstance(text, (str, int, list)) or isinstance(text, bool):
                    raise InvalidRequestError.at(f"input[{index}]", "must be a string or tokens")
        optional(request, "dimensions", int)
        optional(request, "encoding_format", str)

    def trivial_answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if request["input"] != []:
            return None
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return {"object": "list", "data": [], "model": request["model"], "usage": usage}


class Rerank(RequestValidator):
    """rerank, in the shape that Cohere and Jina made common.

    `query` and `documents` in, `results` with `relevance_score` in 0..1, best first, out.
    """

    name: ClassVar[str] = "rerank"

    def check(self, request: dict[str, Any]) -> None:
        require(request, "query", str)
        documents = require(request, "documents", list)
        for index, document in enumerate(documents):
            text = document.get("text") if isinstance(document, dict) else document
            if not isinstance(text, str):
                raise InvalidRequestError.at(f"documents[{index}]", "must be a string, or an object with a text")
        top = optional(request, "top_n", int)
        if top is not None and top < 1:
            raise InvalidRequestError.at("top_n", f"must be at least 1, not {top}")
        optional(request, "return_documents", bool)

    def trivial_answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        return None if request["documents"] else {"model": request["model"], "results": []}


class TextToImage(RequestValidator):
    """text-to-image, OpenAI's image generations.

    `prompt` in, `data` with a `b64_json` for each picture out; streamed, events of the steps before it.
    """

    name: ClassVar[str] = "text-to-image"

    def read(self, data: bytes) -> dict[str, Any]:
        request = super().read(data)
        for field, default in (("seed", -1), ("rng_seed", -1), ("size", "auto")):
            if request.get(field) == default:  # the same as leaving it out
                del request[field]
        return request

    def check(self, request: dict[str, Any]) -> None:
        words(request, "prompt")
        optional(request, "negative_prompt", str)
        size = optional(request, "size", str)
        if size not in (None, "auto") and not all(1 <= side <= _MAX_SIDE for side in picture_size(size)):
            raise InvalidRequestError.at("size", f"width and height must be from 1 to {_MAX_SIDE} pixels, not {size}")
        integer(request, "n", 1, _MAX_IMAGES)
        integer(request, "num_inference_steps", 1, _MAX_STEPS)
        for field in ("seed", "rng_seed"):
            integer(request, field, -1, _MAX_SEED)
        number(request, "guidance_scale", 0, 1000)
        choice(request, "response_format", ("b64_json",))
        choice(request, "output_format", IMAGE_FORMATS)


class SpeechToText(RequestValidator):
    """speech-to-text, the transcription of a recording.

    `audio` (base64 of a sound file, or a data: URL) in, `text` and `segments` with their seconds out.
    """

    name: ClassVar[str] = "speech-to-text"

    def check(self, request: dict[str, Any]) -> None:
        _check_audio(words(request, "audio"))
        optional(request, "language", str)
        choice(request, "task", ("transcribe", "translate"))
        choice(request, "response_format", ("json", "verbose_json", "text", "srt", "vtt"))
        number(request, "temperature", 0, 2)
        for index, granularity in enumerate(optional(request, "timestamp_granularities", list) or ()):
            if granularity not in _GRANULARITIES:
                raise InvalidRequestError.at(
                    f"timestamp_granularities[{index}]", f"must be one of {', '.join(_GRANULARITIES)}"
                )


def _check_audio(audio: str) -> None:
    """Check the form only: the engine decodes it, once. The limit of the request bounds its size."""
    try:
        empty = base64_start(audio) == len(audio)
    except ValueError as error:
        raise InvalidRequestError.at("audio", f"{error}") from None
    if empty or not audio.isascii():
        what = "holds no sound" if empty else "is not base64"
        raise InvalidRequestError.at("audio", f"{what}; give a sound file's bytes in base64, or a data: URL")


class TextToSpeech(RequestValidator):
    """text-to-speech.

    `text` (or OpenAI's `input`) in, a WAV out: `audio` in base64, and `url`, its path on the plugin's machine.
    """

    name: ClassVar[str] = "text-to-speech"

    def check(self, request: dict[str, Any]) -> None:
        given = [field for field in ("text", "input") if request.get(field) is not None]
        if len(given) == 2 and request["text"] != request["input"]:
            raise InvalidRequestError.at("text", "differs from input; give one of the two")
        words(request, given[0] if given else "text")
        optional(request, "voice", str)
        optional(request, "language", str)
        number(request, "speed", 0.1, 10)
        choice(request, "response_format", ("wav",))


class LiveTranscription:
    """speech-to-text-ws, live transcription message by message: sound in, sentences with their milliseconds out.

    There is no request: binary messages are sound, text messages are commands in JSON. `model`, `language`, `format`
    and `sample_rate` come in the metadata of a message, or in a command. Stateless, like a `RequestValidator`.
    """

    name: ClassVar[str] = "speech-to-text-ws"

    def tells_failure(self, answer: bytes) -> bool:
        """Whether this answer announces that the conversation fails; the engine then raises the error."""
        return _FAILED in answer

    def tells_start(self, answer: bytes) -> bool:
        """Whether this answer only announces that the conversation has begun."""
        return _STARTED in answer

    def check(self, data: bytes, message_type: str, metadata: Mapping[str, str]) -> None:
        """Raise InvalidRequestError, naming what is wrong, when no engine could understand this message."""
        if message_type == "text":
            _check_command(data)
        elif message_type not in ("binary", ""):
            raise InvalidRequestError.at("message_type", f"must be text or binary, not {message_type[:60]!r}")
        rate = metadata.get("sample_rate")
        if rate and not (rate.isascii() and rate.isdigit() and len(rate) < 8 and int(rate) in _RATES):
            raise InvalidRequestError.at(
                "metadata.sample_rate", f"must be 1000 to 384000 samples a second, not {rate[:60]!r}"
            )


def _check_command(data: bytes) -> None:
    if len(data) > BRIEF:
        raise InvalidRequestError.at(
            "data", f"a command has at most {BRIEF >> 10} KiB, not {len(data)} bytes; send sound as binary messages"
        )
    parse_request(data, "data")


VALIDATORS: dict[str, RequestValidator] = {
    service.name: service
    for service in (Chat(), Generate(), Embed(), Rerank(), TextToImage(), SpeechToText(), TextToSpeech())
}

CONVERSATION_VALIDATORS = {LiveTranscription.name: LiveTranscription()}
