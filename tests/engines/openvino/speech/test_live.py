"""speech-to-text-ws: the messages of a conversation."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.errors import EnginePluginError, InvalidRequestError, ModelNotFoundError, UnavailableError
from engine_plugin.messages import ConversationMessage
from engine_plugin.speech import live_task
from tests.patience import LIMIT
from tests.speech.sounds import encoded, silence, spoken, tone, wav

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable

    from tests.engines.openvino.speech.conftest import Server, Speech

FINISH = ConversationMessage(b'{"action": "finish-task"}')
SOUND = silence(0.5) + spoken(0, 6) + silence(1) + spoken(6, 4) + silence(1)


def run(**fields: Any) -> ConversationMessage:
    return ConversationMessage(json.dumps({"action": "run-task", **fields}).encode())


def binary(data: bytes, **metadata: str) -> ConversationMessage:
    return ConversationMessage(data, "binary", metadata)


def cut(sound: bytes, **metadata: str) -> list[ConversationMessage]:
    """Split audio into messages, some of which end within a sample."""
    size = 3201
    return [binary(sound[place : place + size], **metadata) for place in range(0, len(sound), size)]


def raw(samples: bytes) -> list[ConversationMessage]:
    """Raw samples with their format."""
    return cut(samples, format="pcm")


async def sent(messages: Iterable[ConversationMessage]) -> AsyncIterator[ConversationMessage]:
    for message in messages:
        yield message
        await asyncio.sleep(0)


class Talk:
    """One conversation: the answers, and the model that was used."""

    def __init__(self, speech: Speech, served: str = "served/{}") -> None:
        self.speech = speech
        self.served = served
        self.events: list[dict[str, Any]] = []
        self.used: list[str] = []
        self.holding = 0

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[str]:
        if name == "nowhere":
            raise ModelNotFoundError(f"model: {name} is not here")
        self.used.append(name)
        self.holding += 1
        try:
            yield self.served.format(name)
        finally:
            self.holding -= 1

    async def hold(self, messages: AsyncIterator[ConversationMessage], default: str = "default") -> None:
        async with asyncio.timeout(LIMIT), self.speech.converse(self.use, default, messages) as answers:
            async for answer in answers:
                assert answer.message_type == "text"
                self.events.append(json.loads(answer.data))

    @property
    def kinds(self) -> list[str]:
        """The events, with successive sentences as one."""
        found: list[str] = []
        for event in self.events:
            if found[-1:] != [event["header"]["event"]]:
                found.append(event["header"]["event"])
        return found

    @property
    def final(self) -> list[dict[str, Any]]:
        outputs = [event["payload"].get("output", {}) for event in self.events]
        return [output["sentence"] for output in outputs if output.get("sentence", {}).get("is_final")]

    @property
    def words(self) -> list[str]:
        return " ".join(sentence["text"] for sentence in self.final).split()


WORDS = [f"word{number}" for number in range(10)]
ALL = ["task-started", "result-generated", "task-finished"]


async def held(speech: Speech, *messages: ConversationMessage, default: str = "default") -> Talk:
    talk = Talk(speech)
    await talk.hold(sent(messages), default)
    assert talk.holding == 0
    return talk


async def test_task_starts_yields_results_and_finishes(speech: Speech, server: Server) -> None:
    talk = await held(speech, run(model="mine", language="en", task_id="t1"), *raw(SOUND), FINISH)
    assert talk.kinds == ALL
    assert talk.words == WORDS
    assert {event["header"]["task_id"] for event in talk.events} == {"t1"}
    first, second = talk.final
    assert first["begin_time"] == pytest.approx(500, abs=60)
    assert second["begin_time"] == pytest.approx(500 + 6 * 380 + 1000, abs=60)
    assert first["end_time"] < second["begin_time"] < second["end_time"]
    assert talk.used == ["mine"]
    assert {form["model"] for form in server.forms} == {"served/mine"}
    assert {form["language"] for form in server.forms} == {"en"}


async def test_audio_without_commands_is_a_task(speech: Speech) -> None:
    """The half-close ends the task; each message has the same metadata."""
    metadata = {"model": "m", "language": "en", "format": "pcm", "sample_rate": "16000"}
    talk = await held(speech, *cut(SOUND, **metadata))
    assert talk.kinds == ALL
    assert talk.words == WORDS
    assert talk.used == ["m"]
    assert len(talk.events[0]["header"]["task_id"]) == 32


async def test_first_message_without_audio_or_model_is_rejected(speech: Speech) -> None:
    talk = await held(speech, binary(b"", model="m", task_id="7"), *raw(SOUND), FINISH)
    assert (talk.words, talk.used) == (WORDS, ["m"])


async def test_task_without_a_model_uses_the_default_model(speech: Speech) -> None:
    assert (await held(speech, *raw(SOUND), FINISH)).used == ["default"]
    with pytest.raises(InvalidRequestError, match="model: is missing"):
        await held(speech, *raw(SOUND), FINISH, default="")


async def test_commands_with_header_and_payload_are_read(speech: Speech) -> None:
    command = {
        "header": {"action": "run-task", "task_id": "t9", "streaming": "duplex"},
        "payload": {"model": "m", "parameters": {"format": "pcm", "sample_rate": 16000}, "input": {}},
    }
    end = {"header": {"action": "finish-task", "task_id": "t9"}, "payload": {"input": {}}}
    messages = [
        ConversationMessage(json.dumps(command).encode()),
        *cut(SOUND),
        ConversationMessage(json.dumps(end).encode()),
    ]
    talk = await held(speech, *messages)
    assert (talk.words, talk.used) == (WORDS, ["m"])
    assert talk.events[-1]["header"] == {"task_id": "t9", "event": "task-finished"}


PLAIN = ConversationMessage(b'{"model": "m"}')
"""The rest of a command after AOG removed its action."""


@pytest.mark.promise("H1")
@pytest.mark.parametrize("begin", [[PLAIN], [], [PLAIN, PLAIN]], ids=["run-task", "sound", "run-task twice"])
async def test_commands_without_an_action_begin_and_end_a_task(
    speech: Speech, begin: list[ConversationMessage]
) -> None:
    """The host keeps its stream open, as AOG does."""
    metadata = {"model": "m", "language": "en", "format": "pcm", "sample_rate": "16000"}

    async def messages() -> AsyncIterator[ConversationMessage]:
        commands = [ConversationMessage(command.data, "text", metadata) for command in (*begin, PLAIN)]
        async for message in sent([*commands[:-1], *cut(SOUND, **metadata), commands[-1]]):
            yield message
        await asyncio.Event().wait()

    talk = Talk(speech)
    await talk.hold(messages())
    assert talk.kinds == ALL
    assert talk.words == WORDS


@pytest.mark.promise("H1")
async def test_second_command_without_an_action_ends_a_task_without_audio(
    speech: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_task, "_END_TIMEOUT", 0.05)

    async def messages() -> AsyncIterator[ConversationMessage]:
        async for message in sent([PLAIN, PLAIN]):
            yield message
        await asyncio.Event().wait()

    talk = Talk(speech)
    await talk.hold(messages())
    assert talk.kinds == ["task-started", "task-finished"]


@pytest.mark.promise("H1")
async def test_connection_id_is_the_task_id(speech: Speech) -> None:
    """AOG's client knows the task by it, whatever the command says."""
    first = ConversationMessage(run(model="m", task_id="t1").data, "text", {"ws_conn_id": "c1"})
    talk = await held(speech, first, *raw(SOUND), FINISH)
    assert {event["header"]["task_id"] for event in talk.events} == {"c1"}


@pytest.mark.parametrize(
    "messages", [[], [FINISH], [run(model="m"), FINISH], [run(), binary(b""), binary(b"\x01", format="pcm")]]
)
async def test_task_without_audio_finishes(
    speech: Speech, server: Server, messages: list[ConversationMessage]
) -> None:
    talk = await held(speech, *messages)
    assert talk.kinds == ["task-started", "task-finished"]
    assert server.forms == []


async def test_silence_yields_no_sentence(speech: Speech, server: Server) -> None:
    assert (await held(speech, *raw(silence(5)), FINISH)).kinds == ["task-started", "task-finished"]
    assert server.forms == []


async def test_messages_after_the_end_are_not_read(speech: Speech) -> None:
    read: list[ConversationMessage] = []

    async def messages() -> AsyncIterator[ConversationMessage]:
        for message in (*raw(SOUND), FINISH, binary(SOUND)):
            read.append(message)
            yield message

    talk = Talk(speech)
    await talk.hold(messages())
    assert read[-1] is FINISH
    assert talk.words == WORDS


FORMS = {
    "mp3": ("mp3", "libmp3lame", 16_000, "mono"),
    "webm": ("webm", "libopus", 48_000, "stereo"),
    "ogg": ("ogg", "libopus", 48_000, "mono"),
    "wav": ("wav", "pcm_s16le", 44_100, "stereo"),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("form", FORMS)
async def test_encoded_audio_is_transcribed(speech: Speech, server: Server, form: str, named: bool) -> None:
    """A lossy codec changes the words, but not the number and times of sentences."""
    pytest.importorskip("av")
    container, codec, rate, layout = FORMS[form]
    quiet = bytes(2 * rate)
    # Alternating tones: a single tone would become the background.
    voice = b"".join(tone(0.2, 300 + 400 * (n % 2), 0.4, rate) + bytes(rate // 10 * 2) for n in range(6))
    sound = encoded(container, codec, quiet + voice + quiet, rate=rate, layout=layout)
    server.answer = {"text": "hello", "segments": [{"start": 0, "end": 1, "text": " hello"}]}
    metadata = {"format": form} if named else {}
    talk = await held(speech, run(model="m"), *cut(sound, **metadata), FINISH)
    assert talk.kinds == ALL
    (sentence,) = talk.final
    assert sentence["text"] == "hello"
    assert sentence["begin_time"] == pytest.approx(1000, abs=150)
    assert sentence["end_time"] == pytest.approx(2700, abs=200)


@pytest.mark.promise("S9")
@pytest.mark.parametrize(
    ("form", "codec", "options"),
    [
        ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "200000"}),
        ("mp3", "libmp3lame", {"id3v2_version": "0"}),
        ("adts", "aac", {}),
        ("matroska", "libopus", {}),
        ("webm", "libopus", {"live": "1"}),
        ("wav", "pcm_s16le", {"rf64": "always"}),
        ("aiff", "pcm_s16be", {}),
        ("caf", "pcm_s16be", {}),
        ("au", "pcm_s16be", {}),
    ],
)
async def test_container_without_a_format_is_detected(
    speech: Speech, server: Server, form: str, codec: str, options: dict[str, str]
) -> None:
    """The first of the small messages is too short for detection."""
    pytest.importorskip("av")
    server.answer = {"text": "hello", "segments": []}
    sound = bytes(48_000) + tone(0.5, 300, 0.4, 48_000) + tone(0.5, 700, 0.4, 48_000) + bytes(96_000)
    data = encoded(form, codec, sound, rate=48_000, options=options)
    pieces = [data[:3], data[3:10], *(data[place : place + 3201] for place in range(10, len(data), 3201))]
    talk = await held(speech, run(model="m"), *map(binary, pieces), FINISH)
    (sentence,) = talk.final
    assert sentence["begin_time"] == pytest.approx(500, abs=150)


@pytest.mark.promise("S9")
@pytest.mark.parametrize(("container", "codec", "named"), [("adts", "aac", "webm"), ("mp3", "libmp3lame", "wav")])
async def test_wrong_format_is_corrected_from_the_bytes(
    speech: Speech, server: Server, container: str, codec: str, named: str
) -> None:
    """Browsers record MP4 although a page asked for WebM; an ID3 tag precedes MP3, not WAV."""
    pytest.importorskip("av")
    server.answer = {"text": "hello", "segments": []}
    sound = silence(0.5) + tone(0.5, 300, 0.4) + tone(0.5, 700, 0.4) + silence(1)
    talk = await held(speech, *cut(encoded(container, codec, sound), format=named), FINISH)
    assert len(talk.final) == 1


@pytest.mark.promise("S9")
@pytest.mark.parametrize("sound", [SOUND, b"0&\xb2u\x8ef\xcf\x11" + bytes(99), b"GIF89a" + bytes(99), b"\0"])
async def test_undetected_format_is_rejected(speech: Speech, sound: bytes) -> None:
    message = await failed(speech, InvalidRequestError, *map(binary, (sound[:5], sound[5:])), FINISH)
    assert message.startswith("format: is missing, and the first bytes of the audio")


@pytest.mark.promise("S9")
async def test_audio_with_a_sample_rate_is_raw(speech: Speech, server: Server) -> None:
    """Even if it begins like an MPEG audio frame, but not if it begins with a container's magic."""
    server.answer = {"text": "hello", "segments": []}
    for sound in (b"\xff\xfb\x90\x64" + SOUND[4:], SOUND, wav(SOUND)):
        talk = await held(speech, *cut(sound, sample_rate="16000"), FINISH)
        assert talk.final


async def test_raw_audio_of_another_rate_is_resampled(speech: Speech, server: Server) -> None:
    pytest.importorskip("av")
    server.answer = {"text": "hello", "segments": []}
    sound = bytes(16_000) + tone(1, 700, 0.4, 8000) + bytes(16_000)
    talk = await held(speech, *cut(sound, format="pcm", sample_rate="8000"), FINISH)
    (sentence,) = talk.final
    assert sentence["begin_time"] == pytest.approx(1000, abs=100)


async def failed(speech: Speech, kind: type[EnginePluginError], *messages: ConversationMessage) -> str:
    """The message of a failed task, which is the same in the event and in the error."""
    talk = Talk(speech)
    with pytest.raises(kind) as caught:
        await talk.hold(sent(messages))
    header = talk.events[-1]["header"]
    assert header["event"] == "task-failed"
    assert (header["error_code"], header["error_message"]) == (str(caught.value.code), caught.value.message)
    assert talk.kinds.count("task-failed") == 1
    assert talk.holding == 0
    return caught.value.message


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([ConversationMessage(b"no json")], "data: a text message must be a JSON object"),
        ([ConversationMessage(b'["run-task"]')], "data: a text message must be a JSON object"),
        ([ConversationMessage(b"\xff\xfe")], "data: a text message must be a JSON object"),
        ([ConversationMessage(b"[" * 100_000)], "data: a text message must be a JSON object"),
        ([ConversationMessage(b'{"action": "dance"}')], "action: 'dance' is unknown; use run-task or finish-task"),
        ([run(model=["m"])], "model: must be a string or a whole number"),
        ([binary(b"ab", format="midi")], "format: 'midi' is unknown; use one of pcm"),
        ([binary(b"ab", sample_rate="fast")], "sample_rate: must be a whole number from 1000 to 384000, not 'fast'"),
        ([binary(b"ab", sample_rate="999")], "sample_rate: must be a whole number from 1000"),
        ([binary(b"ab", sample_rate="0")], "sample_rate: must be a whole number"),
        ([binary(b"ab", format="pcm", channels="65")], "channels: must be a whole number from 1 to 64"),
        ([run(model="m"), run(model="m")], "action: run-task in the middle"),
        ([run(model="m"), binary(b"ab", model="n")], "metadata.model: cannot be set or changed"),
        ([binary(b"ab"), binary(b"ab", language="fr")], "metadata.language: cannot be set or changed"),
        (
            [binary(b"abcd" * 999, format="pcm"), binary(b"ab", format="mp3")],
            "metadata.format: cannot be set or changed",
        ),
        (
            [binary(b"abcd" * 999, format="pcm"), binary(b"ab", sample_rate="8000")],
            "metadata.sample_rate: cannot",
        ),
        (
            [binary(b"abcd" * 999, format="pcm"), ConversationMessage(b'{"action": "pause"}')],
            "action: 'pause' is unknown",
        ),
    ],
)
async def test_invalid_message_fails_the_task(speech: Speech, messages: list[ConversationMessage], said: str) -> None:
    assert (await failed(speech, InvalidRequestError, *messages)).startswith(said)


async def test_undecodable_audio_fails_the_task(speech: Speech) -> None:
    pytest.importorskip("av")
    message = await failed(speech, InvalidRequestError, binary(b"no ogg " * 9999, format="ogg"), FINISH)
    assert message.startswith("audio: ")
    assert decoders() == []


async def test_missing_model_fails_the_task(speech: Speech) -> None:
    assert "nowhere" in await failed(speech, ModelNotFoundError, run(model="nowhere"))


async def test_error_of_the_server_is_raised(speech: Speech, server: Server) -> None:
    server.refusal = (503, "the queue is full")
    assert "the queue is full" in await failed(speech, UnavailableError, *raw(SOUND), FINISH)


async def test_error_of_the_host_is_raised(speech: Speech) -> None:
    async def messages() -> AsyncIterator[ConversationMessage]:
        yield binary(SOUND, format="pcm")
        raise InvalidRequestError("message_type: must be text or binary")

    talk = Talk(speech)
    with pytest.raises(InvalidRequestError, match="message_type"):
        await talk.hold(messages())
    assert talk.kinds[-1] == "task-failed"


def decoders() -> list[int]:
    found = []
    for child in psutil.Process().children():
        try:
            if "engine_plugin.speech.decoder_program" in child.cmdline():
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("form", ["pcm", "mp3"])
async def test_leaving_the_conversation_releases_everything(speech: Speech, server: Server, form: str) -> None:
    """When the host hangs up, the engine's work is cancelled, the model released and the decoder killed."""
    server.gate.clear()
    sound = SOUND if form == "pcm" else encoded("mp3", "libmp3lame", SOUND)

    async def messages() -> AsyncGenerator[ConversationMessage, None]:
        yield run(model="m", format=form)
        for message in cut(sound):
            yield message
        await asyncio.Event().wait()

    talk = Talk(speech)
    sending = messages()
    task = asyncio.create_task(talk.hold(sending))
    async with asyncio.timeout(LIMIT), aclosing(sending):
        await server.asked.wait()
        assert talk.holding == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.cancelled.wait()
    assert talk.holding == 0
    assert decoders() == []
    left = [str(task.get_coro()) for task in asyncio.all_tasks()]
    assert [name for name in left if any(part in name for part in ("athrow", "aclose", "_Stream", "_feed"))] == []


async def test_two_streams_run_at_once(speech: Speech) -> None:
    one, two = await asyncio.gather(
        held(speech, run(model="a"), *raw(SOUND), FINISH),
        held(speech, run(model="b"), *raw(spoken(50, 8) + silence(1)), FINISH),
    )
    assert one.words == WORDS
    assert two.words == [f"word{number}" for number in range(50, 58)]


async def test_partial_sentences_arrive_during_speech(speech: Speech) -> None:
    """The host sends no more until an answer arrives."""
    told = asyncio.Event()

    async def messages() -> AsyncIterator[ConversationMessage]:
        yield run(model="m")
        yield binary(spoken(0, 8), format="pcm")
        await told.wait()
        yield binary(spoken(8, 2) + silence(1))

    talk = Talk(speech)
    async with asyncio.timeout(LIMIT), speech.converse(talk.use, "", messages()) as answers:
        async for answer in answers:
            event = json.loads(answer.data)
            talk.events.append(event)
            if event["header"]["event"] == "result-generated":
                assert told.is_set() or not event["payload"]["output"]["sentence"]["is_final"]
                told.set()
    assert talk.words == WORDS


async def test_raw_audio_needs_no_audio_package(server: Server, tmp_path: Any) -> None:
    from engine_plugin.errors import PreconditionError
    from engine_plugin.transport.http1 import Http1Client
    from tests.engines.openvino.speech.conftest import speech_on

    (tmp_path / "av.py").write_text("raise ModuleNotFoundError(name='av')")
    http = Http1Client(("127.0.0.1", server.port))
    async with speech_on(http, tmp_path / "output", site=tmp_path) as speech:
        assert (await held(speech, *raw(SOUND), FINISH)).words == WORDS
        assert "InstallEngine" in await failed(speech, PreconditionError, binary(wav(SOUND, 8000)), FINISH)
