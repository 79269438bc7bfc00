"""The real server with real workers and the sample models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import engine_plugin
from tests.openvino_server.serving.conftest import Config, parsed
from tests.openvino_server.serving.test_process import SERVER, available, client, running

pytestmark = pytest.mark.slow

SAMPLES = Path(engine_plugin.__file__).parent / "samples" / "openvino"
KINDS = {
    "tiny-chat": "chat",
    "tiny-embed": "embed",
    "tiny-rerank": "rerank",
    "tiny-image": "text-to-image",
    "tiny-transcribe": "speech-to-text",
    "tiny-speak": "text-to-speech",
}
COUNT: dict[str, Any] = {"model": "tiny-chat", "messages": [{"role": "user", "content": "count"}], "temperature": 0}


async def test_each_kind_of_model_answers(scratch: Path) -> None:
    config = Config(scratch)
    for name, kind in KINDS.items():
        config.add(name, kind, SAMPLES / name)
    config.write()
    async with running(config, SERVER) as (_, told), client(told["address"]) as session:
        await available(session)

        async def post(path: str, **body: Any) -> Any:
            async with session.post(path, json=body) as response:
                assert response.status == 200, await response.text()
                return await response.read()

        answer = json.loads(await post("/v3/chat/completions", **COUNT))
        assert answer["choices"][0]["message"]["content"].startswith("one two three")
        streams = await asyncio.gather(*(post("/v3/chat/completions", **COUNT, stream=True) for _ in range(8)))
        for stream in streams:
            *chunks, end = parsed(stream)
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            assert (text, end) == (answer["choices"][0]["message"]["content"], "[DONE]")
        vectors = json.loads(await post("/v3/embeddings", model="tiny-embed", input=["a", "b"]))
        assert len(vectors["data"]) == 2
        ranked = json.loads(await post("/v3/rerank", model="tiny-rerank", query="q", documents=list("abcde")))
        assert len(ranked["results"]) == 5
        picture = {"model": "tiny-image", "prompt": "p", "size": "64x64", "num_inference_steps": 2}
        *_, completed, end = parsed(await post("/v3/images/generations", **picture, stream=True))
        assert (len(completed["data"]), end) == (1, "[DONE]")
        spoken = await post("/v3/audio/speech", model="tiny-speak", input="hello")
        form = aiohttp.FormData({"model": "tiny-transcribe"})
        form.add_field("file", spoken, filename="a.wav")
        async with session.post("/v3/audio/transcriptions", data=form) as response:
            assert (await response.json())["duration"] > 0
