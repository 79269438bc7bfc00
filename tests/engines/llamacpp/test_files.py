"""Model files in parts, damaged or malicious."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import EnginePluginError, NotFoundError, PreconditionError
from tests.models.fakes import SAMPLES
from tests.models.splitting import split
from tests.patience import LIMIT

from .running import HELLO

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Serve

pytestmark = pytest.mark.asyncio

GREEDY = {**HELLO, "temperature": 0, "max_tokens": 12}


@pytest.mark.promise("S8")
async def test_model_in_parts_answers_like_the_whole_one(serve: Serve, tmp_path: Path) -> None:
    running = await serve()
    parts = split(SAMPLES / "tiny-chat.gguf", tmp_path, 2, stem="halves")
    await running.client.pull_model(str(parts[0]))
    answers = [await running.client.invoke("chat", {**GREEDY, "model": model}) for model in ("halves", "tiny-chat")]
    assert answers[0]["choices"] == answers[1]["choices"]
    await running.client.delete_model("halves")
    with pytest.raises(NotFoundError):
        await running.client.delete_model("halves")


@pytest.mark.promise("X7")
async def test_invalid_model_files_block_no_list_and_can_be_deleted(serve: Serve, tmp_path: Path) -> None:
    running = await serve()
    part = split(SAMPLES / "tiny-chat.gguf", tmp_path, 2)[1].read_bytes()
    tokens = struct.pack("<Q", 6) + b"tokens" + struct.pack("<IIQ", 9, 8, 1 << 40)
    whole = (SAMPLES / "tiny-chat.gguf").read_bytes()
    bad = {
        "count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + tokens).ljust(94, b"\0"),
        "part": part,
        "short": whole[:-5000],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    }
    models = running.plugin.manifest.data_dir / "models"
    for name, content in bad.items():
        (models / f"{name}.gguf").write_bytes(content)
    async with asyncio.timeout(LIMIT):
        assert not {model["name"] for model in await running.client.list_models()} & set(bad)
        reasons = {"count": "claims", "part": "part 2 of 2", "short": "truncated", "pointer": "git lfs pull"}
        for name, reason in reasons.items():
            with pytest.raises(PreconditionError, match=reason):
                await running.client.invoke("chat", {**GREEDY, "model": name})
            with pytest.raises(EnginePluginError, match=reason):
                await running.client.pull_model("other", source=str(models / f"{name}.gguf"))
            await running.client.delete_model(name)
            assert not (models / f"{name}.gguf").exists()
