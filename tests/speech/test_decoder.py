"""Decoding of each format, in real processes."""

from __future__ import annotations

import asyncio
import io
import math
import os
import sys
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    PreconditionError,
    UnavailableError,
)
from engine_plugin.process.python import module_environ
from engine_plugin.speech import decoder as decoder_module
from engine_plugin.speech.decoder import FORMATS, Decoder
from engine_plugin.speech.options import AudioLimits
from tests.patience import LIMIT
from tests.speech.sounds import encoded, silence, speech, tone, wav

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

av = pytest.importorskip("av")

FILES = {
    "wav": ("wav", "pcm_f32le", 48_000, "5.1"),
    "mp3": ("mp3", "libmp3lame", 44_100, "stereo"),
    "flac": ("flac", "flac", 8_000, "mono"),
    "ogg": ("ogg", "vorbis", 44_100, "stereo"),
    "opus": ("ogg", "libopus", 48_000, "mono"),
    "webm": ("webm", "libopus", 48_000, "stereo"),
    "m4a": ("ipod", "aac", 22_050, "stereo"),
    "aac": ("adts", "aac", 22_050, "stereo"),
    "aiff": ("aiff", "pcm_s16be", 44_100, "mono"),
    "caf": ("caf", "pcm_s16be", 44_100, "mono"),
    "au": ("au", "pcm_s16be", 8_000, "mono"),
}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Two seconds of a tone in each format."""
    return {
        name: encoded(form, codec, tone(2, rate=rate), rate=rate, layout=layout)
        for name, (form, codec, rate, layout) in FILES.items()
    }


def decoders() -> list[psutil.Process]:
    """The running decoder processes."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "engine_plugin.speech.decoder_program" in child.cmdline():
                found.append(child)
    return found


@pytest.fixture
async def decoder() -> AsyncIterator[Decoder]:
    """A decoder; afterwards no decoder process may run."""
    yield Decoder(None, os.environ)
    assert decoders() == []


async def decode(decoder: Decoder, audio: bytes) -> bytes:
    async with asyncio.timeout(LIMIT):
        return (await decoder.decode(audio)).samples


async def complaint(decoder: Decoder, audio: bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        await decode(decoder, audio)
    message = caught.value.message
    assert message.startswith("audio: ")
    assert "\n" not in message
    return message


def is_the_tone(samples: bytes) -> bool:
    """Whether the samples are a pure 440 Hz tone, no louder than the original (mixing channels attenuates it)."""
    middle = array("h", samples)[len(samples) // 8 : -len(samples) // 8]
    step = 2 * math.pi * 440 / 16_000
    real = sum(value * math.cos(step * n) for n, value in enumerate(middle))
    imaginary = sum(value * math.sin(step * n) for n, value in enumerate(middle))
    amplitude = 2 * math.hypot(real, imaginary) / len(middle) / 32768
    power = sum(value * value for value in middle) / len(middle) / 32768**2
    return 0.08 < amplitude < 0.34 and power < amplitude**2 * 0.55


@pytest.mark.parametrize("name", FILES)
async def test_each_format_is_decoded_to_16_khz_mono(decoder: Decoder, files: dict[str, bytes], name: str) -> None:
    samples = await decode(decoder, files[name])
    assert len(samples) / 32_000 == pytest.approx(2, abs=0.1)
    assert is_the_tone(samples)


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"m4a"}))
async def test_each_format_is_decoded_as_it_arrives(decoder: Decoder, files: dict[str, bytes], name: str) -> None:
    heard: list[bytes] = []
    data = files[name]
    async with asyncio.timeout(LIMIT), decoder.stream(name, 0, 0) as stream:

        async def listen() -> None:
            heard.extend([piece async for piece in stream])

        listening = asyncio.create_task(listen())
        for place in range(0, len(data), 1000):
            await stream.write(data[place : place + 1000])
        stream.end()
        await listening
    assert len(b"".join(heard)) / 32_000 == pytest.approx(2, abs=0.1)
    assert is_the_tone(b"".join(heard))


async def test_stream_with_its_index_at_the_end_is_rejected(decoder: Decoder) -> None:
    """It is longer than what ffmpeg keeps of a stream: within that, the start can still be read after the index."""
    form, codec, rate, layout = FILES["m4a"]
    sound = encoded(form, codec, tone(60, rate=rate), rate=rate, layout=layout)
    assert len(sound) > 256 << 10
    async with asyncio.timeout(LIMIT), decoder.stream("m4a", 0, 0) as stream:
        await stream.write(sound)
        stream.end()
        with pytest.raises(InvalidRequestError, match="streamed because its index is at the end"):
            await anext(aiter(stream))


async def test_live_stream_is_decoded_before_it_ends(decoder: Decoder) -> None:
    sound = encoded("mp3", "libmp3lame", tone(4, rate=44_100), rate=44_100)
    async with asyncio.timeout(LIMIT), decoder.stream("mp3", 0, 0) as stream:
        await stream.write(sound[: len(sound) // 2])
        pieces = aiter(stream)
        heard = 0
        while heard < 32_000:
            heard += len(await anext(pieces))
        stream.end()
        assert heard + sum([len(piece) async for piece in pieces]) > 60_000


async def test_raw_samples_of_each_rate_are_resampled(decoder: Decoder) -> None:
    mono = array("h", tone(2, rate=44_100))
    stereo = array("h", [value for sample in mono for value in (sample, sample)])
    async with asyncio.timeout(LIMIT), decoder.stream("pcm", 44_100, 2) as stream:
        feeding = asyncio.create_task(stream.write(stereo.tobytes() + b"\x07"))
        feeding.add_done_callback(lambda _done: stream.end())
        samples = b"".join([piece async for piece in stream])
        await feeding
    assert len(samples) / 32_000 == pytest.approx(2, abs=0.01)
    assert is_the_tone(samples)


async def test_wav_in_the_native_format_needs_no_process() -> None:
    samples = speech(0.2)
    nowhere = Decoder(None, {})
    assert await nowhere.decode(wav(samples)) == (samples, False)


def movie() -> bytes:
    """A video of two frames without audio."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        (b"", "empty"),
        (b"x", "unsupported format"),
        (bytes(range(256)) * 40, "unsupported format"),
        (b"hello world\n" * 100, "unsupported format"),
        (b"RIFF\xff\xff\xff\xffWAVE", "unsupported format"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n", "unsupported format"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "unsupported format"),
        (wav(b""), "length is zero"),
        (movie(), "video but no audio"),
    ],
    ids=["empty", "byte", "garbage", "text", "head", "playlist", "concat", "zero", "video"],
)
async def test_undecodable_recording_is_rejected(decoder: Decoder, audio: bytes, said: str) -> None:
    assert said in await complaint(decoder, audio)


def fragmented(samples: bytes) -> bytes:
    """A fragmented MP4, as Safari's recorder sends it."""
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "200000"}
    return encoded("mp4", "aac", samples, rate=44_100, options=flags)


@pytest.mark.promise("S13")
@pytest.mark.parametrize("rate", [8_000, 44_100])
async def test_flac_that_ends_slightly_early_is_marked_as_truncated(decoder: Decoder, rate: int) -> None:
    data = encoded("flac", "flac", tone(3, rate=rate), rate=rate)
    assert not (await decoder.decode(data)).is_cut_off
    assert (await decoder.decode(data[: len(data) * 97 // 100])).is_cut_off


@pytest.mark.promise("S13")
@pytest.mark.parametrize("name", sorted(FILES.keys() - {"m4a"}))
async def test_truncated_recording_is_decoded_and_marked(decoder: Decoder, name: str) -> None:
    form, codec, rate, layout = FILES[name]
    data = encoded(form, codec, tone(6, rate=rate), rate=rate, layout=layout)
    async with asyncio.timeout(LIMIT):
        whole = await decoder.decode(data)
        part = await decoder.decode(data[: len(data) * 4 // 5])
    assert not whole.is_cut_off
    assert part.is_cut_off
    assert 1 < len(part.samples) / 32_000 < 5.9


@pytest.mark.promise("S13")
async def test_truncated_mp4_is_decoded_if_its_index_comes_first(decoder: Decoder, files: dict[str, bytes]) -> None:
    data = fragmented(tone(2, rate=44_100))
    async with asyncio.timeout(LIMIT):
        assert not (await decoder.decode(data)).is_cut_off
        assert (await decoder.decode(data[: len(data) * 3 // 4])).is_cut_off
    message = await complaint(decoder, files["m4a"][: len(files["m4a"]) // 2])
    assert "truncated" in message


@pytest.mark.promise("S13")
@pytest.mark.parametrize(
    ("form", "codec", "rate"),
    [("wav", "g722", 16_000), ("ogg", "libspeex", 16_000), ("wav", "libgsm_ms", 8_000), ("matroska", "ac3", 44_100)],
)
async def test_unlisted_codec_is_rejected(decoder: Decoder, form: str, codec: str, rate: int) -> None:
    try:
        sound = encoded(form, codec, tone(1, rate=rate), rate=rate)
    except (ValueError, av.FFmpegError) as error:
        pytest.skip(f"this PyAV cannot write {codec}: {error}")
    assert "has an unsupported codec" in await complaint(decoder, sound)


@pytest.mark.promise("S9")
async def test_fragmented_mp4_is_decoded_as_it_arrives(decoder: Decoder) -> None:
    data, heard = fragmented(tone(2, rate=44_100)), b""
    async with asyncio.timeout(LIMIT), decoder.stream("m4a", 0, 0) as stream:
        feeding = asyncio.create_task(stream.write(data))
        feeding.add_done_callback(lambda _done: stream.end())
        heard = b"".join([piece async for piece in stream])
        await feeding
    assert is_the_tone(heard)


@pytest.mark.promise("X12")
async def test_live_stream_beyond_the_limit_is_rejected(decoder: Decoder) -> None:
    few = Decoder(None, os.environ, AudioLimits(max_live=2))
    async with asyncio.timeout(LIMIT), few.stream("mp3", 0, 0):
        async with few.stream("ogg", 0, 0):
            with pytest.raises(UnavailableError, match=r"2 live streams are being decoded.*max_live"):
                async with few.stream("mp3", 0, 0):
                    pass
            assert len(decoders()) == 2
        async with few.stream("mp3", 0, 0):
            pass


@pytest.mark.promise("S13")
@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
async def test_wav_with_an_unknown_length_is_decoded(decoder: Decoder, size: int) -> None:
    """A program that writes WAV to a pipe does not know the length."""
    sound = bytearray(wav(tone(1, rate=8000), rate=8000))
    sound[40:44] = size.to_bytes(4, "little")
    heard = await decoder.decode(bytes(sound))
    assert not heard.is_cut_off
    assert len(heard.samples) == pytest.approx(32_000, abs=400)
    plain = bytearray(wav(speech(1)))
    plain[40:44] = size.to_bytes(4, "little")
    assert await Decoder(None, {}).decode(bytes(plain)) == (speech(1), False)
    assert await Decoder(None, {}).decode(wav(speech(1))[:-2000]) == (speech(1)[:-2000], True)


async def test_damaged_frames_are_skipped(decoder: Decoder, files: dict[str, bytes]) -> None:
    data = files["mp3"]
    middle = len(data) // 2
    samples = await decode(decoder, data[:middle] + bytes(700) + data[middle:])
    assert len(samples) / 32_000 == pytest.approx(2, abs=0.2)


async def test_too_long_recording_is_rejected(files: dict[str, bytes]) -> None:
    for name in ("flac", "aac"):  # one says so itself, the other is found out
        with pytest.raises(InvalidRequestError, match=r"audio: is longer than 0\.9 s"):
            await decode(Decoder(None, os.environ, AudioLimits(longest=0.9)), files[name])
    with pytest.raises(InvalidRequestError, match=r"longer than 0\.1 s"):
        await Decoder(None, {}, AudioLimits(longest=0.1)).decode(wav(speech(1.2)))


@pytest.mark.promise("S10")
async def test_recording_up_to_a_second_above_the_limit_is_decoded(files: dict[str, bytes]) -> None:
    """Encoders pad: an M4A of one hour has an hour and a few milliseconds."""
    for name in ("m4a", "aac"):
        assert await decode(Decoder(None, os.environ, AudioLimits(longest=1.9)), files[name])
    assert await Decoder(None, {}, AudioLimits(longest=1)).decode(wav(silence(2)))


async def test_decoding_beyond_the_timeout_is_rejected(files: dict[str, bytes]) -> None:
    with pytest.raises(InvalidRequestError, match=r"longer than 0\.01 s to decode"):
        await decode(Decoder(None, os.environ, AudioLimits(timeout=0.01)), files["mp3"])
    assert decoders() == []


def test_common_formats_have_names() -> None:
    assert {"pcm", "wav", "mp3", "flac", "ogg", "webm", "m4a"} <= FORMATS.keys()


async def test_undecodable_stream_is_rejected(decoder: Decoder) -> None:
    async with asyncio.timeout(LIMIT), decoder.stream("ogg", 0, 0) as stream:
        await stream.write(b"no ogg at all " * 5000)
        stream.end()
        with pytest.raises(InvalidRequestError, match="audio: "):
            _ = [piece async for piece in stream]


async def test_empty_stream_decodes_to_nothing(decoder: Decoder) -> None:
    async with asyncio.timeout(LIMIT), decoder.stream("webm", 0, 0) as stream:
        stream.end()
        assert [piece async for piece in stream] == []


async def test_unread_stream_blocks_its_writer(decoder: Decoder) -> None:
    """The audio waits in pipes rather than in the plugin's memory, and none is lost."""
    sent = silence(300)
    async with asyncio.timeout(LIMIT), decoder.stream("pcm", 16_000, 1) as stream:
        writing = asyncio.create_task(stream.write(sent))
        done, _ = await asyncio.wait({writing}, timeout=1)
        assert not done
        writing.add_done_callback(lambda _done: stream.end())
        assert sum([len(piece) async for piece in stream]) == len(sent)
        await writing


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
async def test_unread_stream_keeps_little_in_memory(decoder: Decoder) -> None:
    async with asyncio.timeout(LIMIT), decoder.stream("pcm", 16_000, 1) as stream:
        writing = asyncio.create_task(stream.write(silence(300)))
        await asyncio.wait({writing}, timeout=1)
        [process] = decoders()
        process.kill()
        left = 0
        with pytest.raises(BadGatewayError, match="SIGKILL"):  # noqa: PT012  # what came before counts
            async for piece in stream:
                left += len(piece)
        assert 0 < left < 2 << 20
        await writing


async def test_cancelled_call_ends_its_process(decoder: Decoder) -> None:
    sound = encoded("flac", "flac", silence(600))
    task = asyncio.create_task(decoder.decode(sound))
    async with asyncio.timeout(LIMIT):
        while not decoders():  # noqa: ASYNC110  # nobody announces it
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert decoders() == []


async def with_av(folder: Path, code: str, audio: bytes) -> EnginePluginError:
    """The error if the package `av` consists of `code`."""
    (folder / "av.py").write_text(code)
    with pytest.raises(EnginePluginError) as caught:
        await decode(Decoder(folder, os.environ), audio)
    return caught.value


async def test_missing_audio_package_names_install_engine(tmp_path: Path) -> None:
    error = await with_av(tmp_path, "raise ModuleNotFoundError('av', name='av')", b"RIFF")
    assert isinstance(error, PreconditionError)
    assert "av, which decodes audio, is not installed. Call InstallEngine" in error.message


async def test_missing_audio_package_without_install_names_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "av.py").write_text("raise ModuleNotFoundError('av', name='av')")
    lacking = module_environ(os.environ, tmp_path)
    monkeypatch.setattr(decoder_module, "module_environ", lambda _environ, site: lacking if site is None else {})
    with pytest.raises(PreconditionError) as caught:
        await decode(Decoder(None, os.environ), b"RIFF")
    assert "av, which decodes audio, is not installed beside engine-plugin" in caught.value.message
    assert "pip install 'av" in caught.value.message
    assert "InstallEngine" not in caught.value.message


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
async def test_killed_decoder_is_reported_with_its_last_output(tmp_path: Path) -> None:
    code = "import os, sys; print('boom', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    error = await with_av(tmp_path, code, b"RIFF" + bytes(1 << 20))
    assert isinstance(error, BadGatewayError)
    assert error.message == "audio: the decoder exited with SIGKILL: boom"


async def test_output_of_libraries_is_not_decoded_audio(tmp_path: Path) -> None:
    code = "print('aaaaaaaaaaaaaa', flush=True); raise ModuleNotFoundError(name='numpy')"
    assert "the Python package numpy" in (await with_av(tmp_path, code, b"RIFF")).message


async def test_many_recordings_are_decoded_at_once(decoder: Decoder, files: dict[str, bytes]) -> None:
    answers = await asyncio.gather(*(decode(decoder, files["flac"]) for _ in range(6)))
    assert len(set(answers)) == 1
