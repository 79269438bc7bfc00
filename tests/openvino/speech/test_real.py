"""The speech services on our own server with real models. Their weights are random: what they say means nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

import engine_plugin
from engine_plugin.engines.http.http1 import Http1Client
from engine_plugin.engines.processes import guard
from engine_plugin.engines.processes.python import module_command, module_environ
from engine_plugin.errors import InvalidRequestError
from tests.audio.sounds import silence, speech, wav
from tests.openvino.speech.conftest import speech_on
from tests.openvino.speech.test_live import ALL, FINISH, Talk, cut, run, sent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from engine_plugin.engines.audio.speech import Speech

pytest.importorskip("openvino_genai")

SAMPLES = Path(engine_plugin.__file__).parent / "samples" / "openvino"
KEY = "only-for-this-test"
START_LIMIT = 60.0
LIMIT = 60.0
CALCULATORS = {"tiny-transcribe": "S2tCalculator", "tiny-speak": "T2sCalculator"}


def served(folder: Path) -> Path:
    """A config.json of both models."""
    entries = []
    for name, calculator in CALCULATORS.items():
        options = f"mediapipe.{calculator}Options"
        graph = (
            f'node {{ calculator: "{calculator}" node_options: {{ [type.googleapis.com / {options}]: '
            f'{{ models_path: {json.dumps(str(SAMPLES / name))} target_device: "CPU" }} }} }}'
        )
        (folder / name).mkdir()
        (folder / name / "graph.pbtxt").write_text(graph)
        entries.append({"name": name, "base_path": str(folder / name), "graph_path": "graph.pbtxt"})
    config = folder / "config.json"
    config.write_text(json.dumps({"mediapipe_config_list": entries, "model_config_list": []}))
    return config


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The server, both models loaded."""
    folder = Path(tempfile.mkdtemp(prefix="eps-"))
    settings = {
        "host": "127.0.0.1",
        "port": 0,
        "key": KEY,
        "config": str(served(folder)),
        "grpc_port": None,
        "threads": 1,
        "max_queue": 64,
        "cache_dir": "",
        "memory_limit": 0,
    }
    argv = module_command("engine_plugin.engines.openvino.runner", "serve")
    environ = {**module_environ(os.environ), guard.PARENT_VARIABLE: str(os.getpid())}
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, env=environ, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
            address = json.loads(process.stdout.readline())["address"]
            number = int(address.rpartition(":")[2])
            wait_until_loaded(number)
            yield number
        finally:
            process.kill()
            shutil.rmtree(folder)


def wait_until_loaded(port: int) -> None:
    request = Request(f"http://127.0.0.1:{port}/v1/config", headers={"Authorization": f"Bearer {KEY}"})
    give_up = time.monotonic() + START_LIMIT
    states: dict[str, Any] = {}
    while time.monotonic() < give_up:
        with suppress(URLError, TimeoutError), urlopen(request, timeout=5) as response:  # noqa: S310  # loopback
            states = json.load(response)
            found = {name: shape["model_version_status"][0]["state"] for name, shape in states.items()}
            if found == dict.fromkeys(CALCULATORS, "AVAILABLE"):
                return
        time.sleep(0.05)
    pytest.fail(f"not loaded: {states}")


@pytest.fixture
async def real(port: int, tmp_path: Path) -> AsyncIterator[Speech]:
    http = Http1Client(("127.0.0.1", port), {"authorization": f"Bearer {KEY}"})
    async with asyncio.timeout(LIMIT), speech_on(http, tmp_path / "output") as made:
        yield made


async def test_a_recording(real: Speech) -> None:
    request = {"model": "tiny-transcribe", "audio": base64.b64encode(wav(speech(2.0))).decode()}
    answer = json.loads(await real.transcribe("tiny-transcribe", {**request, "response_format": "verbose_json"}))
    assert answer["duration"] == 2.0
    assert isinstance(answer["text"], str)
    for segment in answer["segments"]:
        assert 0 <= segment["start"] <= segment["end"] <= 2.0
    assert json.loads(await real.transcribe("tiny-transcribe", request))["text"] == answer["text"], "not by chance"


async def test_the_shortest_recording(real: Speech) -> None:
    request = {"model": "tiny-transcribe", "audio": base64.b64encode(wav(b"\0\0")).decode()}
    assert "text" in json.loads(await real.transcribe("tiny-transcribe", request))


async def test_a_language_that_is_none(real: Speech) -> None:
    request = {"model": "tiny-transcribe", "audio": base64.b64encode(wav(speech(0.5))).decode(), "language": "xx"}
    with pytest.raises(InvalidRequestError, match="language"):
        await real.transcribe("tiny-transcribe", request)


async def test_a_voice_is_a_recording_again(real: Speech) -> None:
    spoken = json.loads(await real.speak("tiny-speak", {"model": "tiny-speak", "text": "Hi."}))
    assert spoken["duration"] > 0
    request = {"model": "tiny-transcribe", "audio": spoken["audio"], "response_format": "srt"}
    assert isinstance(json.loads(await real.transcribe("tiny-transcribe", request))["text"], str)


async def test_a_live_conversation(real: Speech) -> None:
    talk = Talk(real, "{}")
    sound = silence(0.5) + speech(2) + silence(1.2) + speech(1.5) + silence(1)
    await talk.hold(sent([run(model="tiny-transcribe", language="en"), *cut(sound), FINISH]))
    assert talk.kinds in (ALL, ["task-started", "task-finished"])
    times = [(sentence["begin_time"], sentence["end_time"]) for sentence in talk.final]
    assert all(400 <= begin <= end <= 6200 for begin, end in times)
    assert times == sorted(times)


async def test_two_conversations_and_a_recording_at_once(real: Speech) -> None:
    talks = [Talk(real, "{}"), Talk(real, "{}")]
    messages = [run(model="tiny-transcribe"), *cut(speech(3) + silence(1)), FINISH]
    request = {"model": "tiny-transcribe", "audio": base64.b64encode(wav(speech(1.0))).decode()}
    recording = asyncio.create_task(real.transcribe("tiny-transcribe", request))
    await asyncio.gather(recording, *(talk.hold(sent(messages)) for talk in talks))
    assert [talk.kinds[-1] for talk in talks] == ["task-finished"] * 2
    times = [[(sentence["begin_time"], sentence["end_time"]) for sentence in talk.final] for talk in talks]
    assert times[0] == times[1]
    assert "segments" in json.loads(recording.result())
