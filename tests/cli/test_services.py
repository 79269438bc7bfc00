"""Calls of services from the command line: input, output and output files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.patience import LIMIT

from .conftest import COMMAND, new_workplace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Workplace

pytestmark = pytest.mark.slow

SERVICE = """\
  - service_name: {name}
    config_ref: openvino:{name}
    default_model: tiny
    capabilities:
      support_streaming: {streaming}
      support_bidirectional: {bidirectional}
"""
NAMES = ("embed", "rerank", "text-to-image", "speech-to-text", "speech-to-text-ws", "text-to-speech")


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A workplace whose plugin has every service that these commands call, and whose engine is installed."""
    return with_services(workplace)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """The same, with a server that runs, which all tests of this module share."""
    with new_workplace(tmp_path_factory.mktemp("served")) as workplace:
        place = with_services(workplace)
        with place.serving():
            yield place


@pytest.fixture
def served(server: Workplace) -> Workplace:
    """The workplace with that server, whose engine has been asked nothing yet by this test."""
    (server.data / "journal").unlink(missing_ok=True)
    return server


def with_services(workplace: Workplace) -> Workplace:
    services = "".join(
        SERVICE.format(name=name, streaming=_yaml(name == "text-to-image"), bidirectional=_yaml(name.endswith("-ws")))
        for name in NAMES
    )
    manifest = workplace.plugin / "plugin.yaml"
    manifest.write_text(manifest.read_text().replace("services:\n", f"services:\n{services}"))
    workplace.install()
    return workplace


def _yaml(value: bool) -> str:
    return str(value).lower()


def asked(place: Workplace, service: str) -> dict[str, Any]:
    """The last request for a service that has reached the engine."""
    said = [line.partition(" ")[2] for line in place.journal if line.startswith(f"{service} ")]
    request: dict[str, Any] = json.loads(said[-1])
    return request


def test_embed_prints_vectors(place: Workplace, tmp_path: Path) -> None:
    assert place.good("embed", "a", "bcd").splitlines() == ["[1, 0.5]", "[3, 0.5]"]
    assert asked(place, "embed") == {"input": ["a", "bcd"], "model": "tiny"}
    assert json.loads(place.good("embed", "a", "--json", "--model", "other"))["data"] == [{"embedding": [1, 0.5]}]
    assert asked(place, "embed")["model"] == "other"
    done = place.fed(b"one\n\nthree\n", "embed", "-", "x", "-o", str(tmp_path / "v.jsonl"))
    assert (done.returncode, done.stdout) == (0, b"")
    assert asked(place, "embed")["input"] == ["one", "three", "x"]
    assert [json.loads(line)[0] for line in (tmp_path / "v.jsonl").read_text().splitlines()] == [3, 5, 1]
    said = json.loads(place.run("embed", "a", "--json", "-o", str(tmp_path / "v.json")).stdout or "{}")
    assert said == {}
    assert json.loads((tmp_path / "v.json").read_text())["data"] == [{"embedding": [1, 0.5]}]
    done = place.fed(b"\xff\n", "embed", "-")
    assert (done.returncode, done.stderr) == (1, b"engine-plugin: standard input is not UTF-8 (byte 0)\n")


def test_rerank_prints_the_ranking(served: Workplace) -> None:
    lines = served.good("rerank", "q", "a", "longest", "mid", "--top", "2").splitlines()
    assert [line.split() for line in lines] == [
        ["SCORE", "INDEX", "DOCUMENT"],
        ["1.0000", "1", "longest"],
        ["0.5000", "2", "mid"],
    ]
    assert asked(served, "rerank") == {
        "query": "q",
        "documents": ["a", "longest", "mid"],
        "top_n": 2,
        "model": "tiny",
    }
    assert len(json.loads(served.good("rerank", "q", "a", "b", "--json"))["results"]) == 2


def test_image_is_written_to_a_file(served: Workplace, tmp_path: Path) -> None:
    file = str(tmp_path / "cat.png")
    done = served.run(
        "image", "a cat", "-o", file, "--size", "64x32", "--steps", "2", "--seed", "7", "--guidance", "0"
    )
    assert (done.returncode, done.stdout) == (0, f"wrote {file}\n")
    assert done.stderr.splitlines() == ["drawing: step 1 of 2", "drawing: step 2 of 2"]
    assert (tmp_path / "cat.png").read_bytes() == b"picture 0 of a cat"
    assert asked(served, "text-to-image") == {
        "prompt": "a cat",
        "size": "64x32",
        "num_inference_steps": 2,
        "seed": 7,
        "guidance_scale": 0.0,
        "response_format": "b64_json",
        "stream": True,
        "model": "tiny",
    }
    said = json.loads(served.good("image", "a", "-o", file, "-n", "2", "--negative", "b", "--json"))
    assert said == {"files": [str(tmp_path / "cat-1.png"), str(tmp_path / "cat-2.png")]}
    assert (tmp_path / "cat-2.png").read_bytes() == b"picture 1 of a"
    assert "stream" not in asked(served, "text-to-image")
    done_ = served.fed(b"a dog", "image", "-", "-o", "-")
    assert (done_.returncode, done_.stdout) == (0, b"picture 0 of a dog")


def test_progress_without_a_terminal_is_a_few_lines(served: Workplace, tmp_path: Path) -> None:
    done = served.run("image", "a cat", "-o", str(tmp_path / "cat.png"), "--steps", "40")
    assert done.stderr.splitlines() == [f"drawing: step {step} of 40" for step in range(4, 41, 4)]


def test_image_of_a_unary_service_is_written(place: Workplace, tmp_path: Path) -> None:
    manifest = place.plugin / "plugin.yaml"
    manifest.write_text(manifest.read_text().replace("support_streaming: true", "support_streaming: false"))
    assert place.good("image", "a", "-o", str(tmp_path / "a.png")).startswith("wrote ")
    assert "stream" not in asked(place, "text-to-image")


def test_speech_is_written_to_a_file(served: Workplace, tmp_path: Path) -> None:
    file = str(tmp_path / "hello.wav")
    assert served.good("speak", "Hello", "-o", file, "--speed", "1.5") == f"wrote {file} (1.2 s of speech)\n"
    assert (tmp_path / "hello.wav").read_bytes() == b"RIFF Hello"
    assert asked(served, "text-to-speech") == {"text": "Hello", "speed": 1.5, "model": "tiny"}
    said = json.loads(served.good("speak", "Hello", "-o", file, "--json", "--voice", "v", "--language", "de"))
    assert said["file"] == file
    assert said["duration"] == 1.25
    assert "audio" not in said
    done = served.fed(b"from a pipe", "speak", "-", "-o", "-")
    assert (done.returncode, done.stdout) == (0, b"RIFF from a pipe")


def test_transcript_of_a_file_is_printed(served: Workplace, tmp_path: Path) -> None:
    file = tmp_path / "talk.mp3"
    file.write_bytes(b"x" * 1000)
    assert served.good("transcribe", str(file)) == "text of 1000 bytes\n"
    assert served.good("transcribe", str(file), "--format", "srt", "--language", "en") == "srt of 1000 bytes\n"
    request = asked(served, "speech-to-text")
    assert (request["language"], request["model"], "task" in request) == ("en", "tiny", False)
    assert json.loads(served.good("transcribe", str(file), "--json", "--translate"))["text"] == "json of 1000 bytes\n"
    assert asked(served, "speech-to-text")["task"] == "translate"
    done = served.run("transcribe", str(file), "--format", "vtt", "-o", str(tmp_path / "talk.vtt"))
    assert (done.stdout, done.stderr) == ("", f"wrote the transcript to {tmp_path / 'talk.vtt'}\n")
    assert (tmp_path / "talk.vtt").read_text() == "vtt of 1000 bytes\n"
    assert served.fed(b"12345", "transcribe", "-").stdout == b"text of 5 bytes\n"


def test_live_transcript_is_printed(served: Workplace, tmp_path: Path) -> None:
    file = tmp_path / "talk.WAV"
    file.write_bytes(b"x" * 100_000)
    assert served.good("transcribe", str(file), "--live") == "100000 bytes\n"
    assert asked(served, "speech-to-text-ws") == {"format": "wav", "default": "tiny"}
    said = served.good("transcribe", str(file), "--live", "--format", "srt", "--language", "en", "--model", "m")
    assert said == "1\n00:00:00,500 --> 01:01:01,007\n100000 bytes\n\n"
    assert asked(served, "speech-to-text-ws") == {"model": "m", "language": "en", "format": "wav", "default": "tiny"}
    said = served.good("transcribe", str(file), "--live", "--format", "vtt")
    assert said == "WEBVTT\n\n00:00:00.500 --> 01:01:01.007\n100000 bytes\n\n"
    events = [
        json.loads(line)["header"]["event"]
        for line in served.good("transcribe", str(file), "--live", "--json").splitlines()
    ]
    assert (events[0], events[-1]) == ("task-started", "task-finished")
    done = served.fed(b"12345", "transcribe", "-", "--live", "--rate", "8000")
    assert (done.returncode, done.stdout) == (0, b"5 bytes\n")
    assert asked(served, "speech-to-text-ws") == {"sample_rate": "8000", "format": "pcm", "default": "tiny"}


@pytest.mark.promise("T5")
@pytest.mark.parametrize("form", ["text", "json"])
def test_live_transcription_reports_missing_speech(served: Workplace, form: str) -> None:
    done = served.fed(b"hush", "transcribe", "-", "--live", "--format", form)
    assert done.returncode == 0
    assert done.stderr.decode() == "no speech detected. Without --live, the model receives the whole file\n"


def test_failed_live_transcription_is_reported(served: Workplace) -> None:
    done = served.fed(b"noise", "transcribe", "-", "--live")
    assert (done.returncode, done.stderr) == (1, b"engine-plugin: audio: is damaged; send another\n")
    done = served.fed(b"", "transcribe", "-", "--live")
    assert (done.returncode, done.stderr) == (
        1,
        b"engine-plugin: standard input is empty. Send audio to transcribe\n",
    )
    done = served.fed(b"gone", "transcribe", "-", "--live")
    assert done.returncode == 1
    assert b"the plugin ended the transcription before the end of the audio" in done.stderr


def test_running_server_is_used_and_its_engine_started(place: Workplace) -> None:
    place.good("engine", "start", "--mode", "cpu")
    try:
        place.good("embed", "a")
        assert [line for line in place.journal if not line.startswith("embed")] == ["start cpu"]
    finally:
        place.good("engine", "stop")


def test_invalid_usage_is_rejected(served: Workplace, tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(b"a")
    assert "'/none.wav' does not exist" in served.bad(2, "transcribe", "/none.wav")
    assert "--live cannot be combined with --translate or -o" in served.bad(
        2, "transcribe", str(file), "--live", "--translate"
    )
    text = tmp_path / "a.txt"
    text.touch()
    assert "unknown audio file extension" in served.bad(2, "transcribe", str(text), "--live")
    assert "--rate needs --live" in served.bad(2, "transcribe", str(file), "--rate", "8000")
    assert "'--rate'" in served.bad(2, "transcribe", str(file), "--live", "--rate", "3")
    assert "--count above 1 needs a file name" in served.bad(2, "image", "a", "-o", "-", "-n", "2")
    assert "Missing option '-o'" in served.bad(2, "image", "a")
    assert served.journal == []


@pytest.mark.parametrize(
    "command",
    [("embed", "a"), ("image", "a"), ("speak", "a"), ("transcribe", "talk.wav")],
    ids=lambda command: command[0],
)
def test_unwritable_output_is_reported_before_the_call(
    served: Workplace, tmp_path: Path, command: tuple[str, str]
) -> None:
    """The check comes before the call."""
    (served.plugin / "talk.wav").write_bytes(b"a")
    assert "the directory does not exist" in served.bad(2, *command, "-o", str(tmp_path / "no" / "a"))
    for target in (str(tmp_path), f"{tmp_path / 'new'}/"):
        assert f"{target} is a directory. Name a file in it" in served.bad(2, *command, "-o", target)
    if os.name == "posix" and os.geteuid():
        kept = tmp_path / "kept"
        kept.touch(0o400)
        assert f"{kept}: permission denied" in served.bad(2, *command, "-o", str(kept))
    assert served.journal == []


def test_output_name_of_another_format_is_rejected(served: Workplace, tmp_path: Path) -> None:
    said = served.bad(2, "image", "a", "-o", str(tmp_path / "cat.JPG"))
    assert "cat.JPG: the output is PNG. Name it cat.png" in said
    assert "a.mp3: the output is WAV. Name it a.wav" in served.bad(2, "speak", "a", "-o", str(tmp_path / "a.mp3"))
    assert served.journal == []
    served.good("speak", "a", "-o", str(tmp_path / "take.2"))
    assert (tmp_path / "take.2").read_bytes() == b"RIFF a"


def test_unfinished_sentence_stays_on_one_line_of_the_terminal(served: Workplace) -> None:
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    terminal, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    try:
        with os.fdopen(its, "wb") as stderr:
            done = subprocess.run(
                [*COMMAND, "transcribe", "-", "--live"],
                env=served.env,
                cwd=served.plugin,
                input=b"talkative" + b"x" * 200,
                stdout=subprocess.PIPE,
                stderr=stderr,
                timeout=LIMIT,
            )
        shown = os.read(terminal, 65536).decode().replace("\x1b[K", "").split("\r")
    finally:
        os.close(terminal)
    assert done.returncode == 0
    partial = [line for line in shown if line.startswith("… ")]
    assert [line[-5:] for line in partial] == ["words"]
    assert all(len(line) + line.count("語") < 40 for line in partial)


def test_invalid_size_or_response_is_reported(served: Workplace, tmp_path: Path) -> None:
    said = served.bad(1, "image", "a", "-o", str(tmp_path / "a.png"), "--size", "big")
    assert said.startswith("engine-plugin: size: must be a width and a height in pixels")
    assert "is not a valid embed response" in served.bad(1, "embed", "a", "--model", "odd")
    assert "is not a valid rerank response" in served.bad(1, "rerank", "a", "b", "--model", "odd")
    assert "is not a valid text-to-speech response" in served.bad(
        1, "speak", "a", "-o", str(tmp_path / "a.wav"), "--model", "odd"
    )


def test_missing_engine_software_is_reported(place: Workplace) -> None:
    (place.data / "installed").unlink()
    assert "Install it with engine-plugin engine install" in place.bad(4, "embed", "a")


def test_undeclared_service_is_reported(workplace: Workplace, tmp_path: Path) -> None:
    said = workplace.bad(3, "speak", "a", "-o", str(tmp_path / "a.wav"))
    assert said == "engine-plugin: fake-plugin has no service 'text-to-speech'; it declares: chat\n"
