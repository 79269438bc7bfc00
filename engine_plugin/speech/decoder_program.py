"""Decodes audio of any common format to 16 kHz mono s16le, in a process of its own.

`python -m engine_plugin.speech.decoder_program` keeps media libraries that parse untrusted files out of the plugin's
process, and bounds their memory. It imports only the standard library, the guard and PyAV.

stdin: one line of JSON, {"live": bool, "format": ffmpeg's name or "", "rate", "channels": of raw samples, "longest":
seconds}, then the audio to the end. A file is read completely before it is decoded, since some formats have their
index at the end; a live stream is decoded as it arrives.

stdout: frames of one letter, a 4-byte big-endian length and the payload. "a" is audio. The last frame is "d" (done;
the payload is `CUT_OFF` for a truncated recording), "e" (an error in the audio, as the predicate of a sentence) or
"m" (the name of a missing package).
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from engine_plugin.process import guard
from engine_plugin.process.entry import own_stdin
from engine_plugin.speech.containers import HEAD, UNKNOWN_LENGTH, container_of, is_cut_off

if TYPE_CHECKING:
    from collections.abc import Iterator

    import av
    from av.audio.frame import AudioFrame
    from av.container import InputContainer

__all__ = ["CUT_OFF", "LENGTH_TOLERANCE", "RATE", "main", "too_long_message"]

RATE = 16_000
_WIDTH = 2
_BATCH = 64 * 1024  # bytes of audio in a frame, for files
_LIVE_BATCH = 640  # for live streams: 20 ms
_MEMORY = 1 << 30
_LIVE_MEMORY = 256 << 20
_MISSING_TOLERANCE = 0.25  # seconds by which a complete file may be shorter than it declares
_EXACT_TOLERANCE = 0.02  # for a file that counts its samples; resampling rounds

CUT_OFF = b"cut off"

LENGTH_TOLERANCE = 1.0
"""Seconds by which a recording may exceed `longest`, because encoders pad."""

# The demuxers that may open a file, by ffmpeg's names. Playlists are excluded, because they name other files.
_FORMATS = "wav,w64,mp3,flac,ogg,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,aac,aiff,au,amr,caf,s16le"
_CODECS = (
    "pcm_s16le,pcm_s16be,pcm_s8,pcm_u8,pcm_s24le,pcm_s24be,pcm_s32le,pcm_s32be,pcm_f32le,pcm_f32be,pcm_f64le,pcm_f64be,"
    "pcm_alaw,pcm_mulaw,adpcm_ms,adpcm_ima_wav,adpcm_ima_qt,mp3float,mp3,mp2,mp2float,mp1,mp1float,flac,vorbis,libvorbis,"
    "opus,libopus,aac,aac_latm,alac,amrnb,amrwb,amr_nb,amr_wb"
)
_NO_FORMAT = "is damaged or in an unsupported format; supported are WAV, MP3, FLAC, OGG, WebM and M4A"

_UNSTREAMED = "is an M4A file that is truncated, or that cannot be streamed because its index is at the end"


class _BadAudioError(Exception):
    """The audio cannot be decoded. The message is the predicate of a sentence about it."""


class _LiveInput:
    """stdin as a stream that cannot seek and returns data as soon as it arrives."""

    def __init__(self, stdin: io.BufferedReader) -> None:
        self._stdin = stdin
        self.empty = True

    def read(self, size: int) -> bytes:
        data = self._stdin.read1(size)
        self.empty = self.empty and not data
        return data


class _FrameWriter:
    """Writes frames to the pipe that was stdout."""

    def __init__(self, descriptor: int, batch: int) -> None:
        self._descriptor = descriptor
        self._batch = batch
        self._buffer = bytearray()
        self.samples = 0

    def audio(self, data: bytes) -> None:
        self.samples += len(data) // _WIDTH
        self._buffer += data
        if len(self._buffer) >= self._batch:
            self.flush()

    def flush(self) -> None:
        if self._buffer:
            self.frame(b"a", bytes(self._buffer))
            self._buffer.clear()

    def frame(self, kind: bytes, payload: bytes = b"") -> None:
        rest = memoryview(kind + len(payload).to_bytes(4, "big") + payload)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def main() -> int:
    """Decode stdin. Returns the exit status, 0 if a last frame was written."""
    guard.arm()
    out = os.dup(1)
    os.dup2(2, 1)  # keeps the output of libraries out of the frames
    stdin = open(own_stdin(), "rb")  # noqa: SIM115, PTH123  # open until the process ends
    settings = json.loads(stdin.readline())
    frames = _FrameWriter(out, _LIVE_BATCH if settings["live"] else _BATCH)
    _limit_memory(_LIVE_MEMORY if settings["live"] else _MEMORY)
    try:
        import av  # noqa: F401
    except ImportError as error:
        frames.frame(b"m", (error.name or "av").encode())
        return 0
    try:
        cut_off = _decode(settings, stdin, frames)
        frames.flush()
    except _BadAudioError as error:
        frames.flush()
        frames.frame(b"e", str(error).encode())
    except MemoryError:
        frames.frame(b"e", b"takes too much memory to decode")
    else:
        frames.frame(b"d", CUT_OFF if cut_off else b"")
    return 0


def _limit_memory(most: int) -> None:
    """Limit the memory of the process, since a header can make a decoder allocate any amount."""
    if sys.platform == "linux":
        import resource

        _soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _decode(settings: dict[str, Any], stdin: io.BufferedReader, out: _FrameWriter) -> bool:
    """Write the decoded audio to `out`; return whether a recording is truncated. Raises _BadAudioError."""
    import av

    live = settings["live"]
    source: Any = _LiveInput(stdin) if live else io.BytesIO(stdin.read())
    options = {"format_whitelist": _FORMATS, "codec_whitelist": _CODECS, "protocol_whitelist": ""}
    if live:
        options |= {"probesize": "32768", "analyzeduration": "100000"}
    if settings["format"] == "s16le":
        options |= {"sample_rate": str(settings["rate"]), "ch_layout": f"{settings['channels']}c"}
    try:
        container = av.open(source, "r", format=settings["format"] or None, options=options)
    except av.FFmpegError as error:
        if live and source.empty:
            return False  # a stream without data is silent, not damaged
        raise _BadAudioError(_reason(error, source)) from None
    with container:
        is_short = _decode_container(container, settings, out)
    return not live and (is_short or is_cut_off(source.getvalue()))


def _reason(error: av.FFmpegError, source: Any) -> str:
    """Why ffmpeg cannot open the audio."""
    if isinstance(source, io.BytesIO):
        data = source.getvalue()
        if not data:
            return "is empty"
        if container_of(data[:HEAD]) == "m4a" and is_cut_off(data):
            return "is an M4A file that is truncated before its index, without which nothing can be decoded"
    if "moov" in str(error).lower():
        return _UNSTREAMED
    return _NO_FORMAT


def _decode_container(container: InputContainer, settings: dict[str, Any], out: _FrameWriter) -> bool:
    """Resample the first audio stream; return whether it is shorter than declared. Raises _BadAudioError."""
    import av

    if not container.streams.audio:
        raise _BadAudioError("contains video but no audio" if container.streams.video else "contains no audio")
    _check_codec(container.streams.audio[0].codec_context)
    declared = _declared_length(container)
    longest = settings["longest"]
    if not settings["live"] and declared > longest + LENGTH_TOLERANCE:
        raise _BadAudioError(too_long_message(longest))
    resampler: av.AudioResampler | None = None
    shape: tuple[object, ...] = ()
    for frame in _frames(container):
        now = (frame.format.name, frame.layout.name, frame.sample_rate)
        if now != shape:  # a file may contain several streams in sequence
            _resample(resampler, None, out)
            resampler, shape = av.AudioResampler(format="s16", layout="mono", rate=RATE), now
        _resample(resampler, frame, out)
        if longest and out.samples > (longest + LENGTH_TOLERANCE) * RATE:
            raise _BadAudioError(too_long_message(longest))
    _resample(resampler, None, out)
    if not out.samples and not settings["live"]:
        raise _BadAudioError("contains no audio: its length is zero")
    return out.samples / RATE < declared - (
        _EXACT_TOLERANCE if container.format.name == "flac" else _MISSING_TOLERANCE
    )


def _check_codec(context: Any) -> None:
    """Reject codecs that are not listed: ffmpeg applies its own whitelist only while it opens a file."""
    codec = context.codec.name if context is not None else "unknown"
    if codec not in _CODECS.split(","):
        raise _BadAudioError(f"has an unsupported codec ({codec}). Send WAV, MP3, FLAC, Opus or AAC")


def too_long_message(longest: float) -> str:
    """The error for a recording of more than `longest` seconds, as the predicate of a sentence."""
    return f"is longer than {longest:g} s, the limit of engine.audio.longest in plugin.yaml; send it in parts"


def _frames(container: InputContainer) -> Iterator[AudioFrame]:
    """Yield each frame that can be decoded. Damaged packets are skipped unless they outnumber the frames."""
    import av

    stream = container.streams.audio[0]
    stream.codec_context.thread_count = 1
    bad = good = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            decoded = packet.decode()
        except av.FFmpegError:
            bad += 1
            if bad > 10 + good:
                break
            continue
        good += len(decoded)
        yield from decoded
    if bad > good:
        streamed = "mov" in container.format.name and not good
        raise _BadAudioError(_UNSTREAMED if streamed else "is damaged: most of it cannot be decoded")


def _declared_length(container: InputContainer) -> float:
    """The duration that the file declares, in seconds; 0 if it is unknown or an estimate."""
    stream = container.streams.audio[0]
    if container.format.name in ("mp3", "aac", "amr") or stream.duration is None or stream.time_base is None:
        return 0.0
    seconds = float(stream.duration * stream.time_base)
    context = stream.codec_context
    size = seconds * (context.rate or 0) * context.channels * max(1, context.format.bytes if context.format else 1)
    return 0.0 if container.format.name == "wav" and size >= UNKNOWN_LENGTH else seconds


def _resample(resampler: av.AudioResampler | None, frame: AudioFrame | None, out: _FrameWriter) -> None:
    """Write the frame, or with None what the resampler still holds."""
    for done in resampler.resample(frame) if resampler is not None else ():
        out.audio(bytes(done.planes[0])[: done.samples * _WIDTH])  # the end of a plane may be padding


if __name__ == "__main__":
    try:
        code = main()
    except (BrokenPipeError, KeyboardInterrupt):
        code = 1  # the plugin closed the pipe
    os._exit(code)
