"""A failed load, a crash and an upgrade with ovms as the server."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.errors import BadGatewayError, PreconditionError
from engine_plugin.install.software import LocalSoftware
from engine_plugin.models.store import PullRequest
from tests.engines.openvino.spoiling import spoil
from tests.patience import LIMIT

from .calls import HELLO, SAMPLES, call

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engines.openvino.fake_ovms.archives import Mirror

    from .conftest import Make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line"),
]


@pytest.mark.promise("S12")
async def test_failed_load_is_reported_and_other_models_answer(make: Make, scratch: Path) -> None:
    """ovms leaves such a model in the state LOADING and writes the reason to its log only."""
    engine = await make()
    async for _ in engine.pull_model(PullRequest("broken", source=str(SAMPLES / "tiny-chat"))):
        pass
    spoil(scratch / "data" / "models" / "broken" / "openvino_model.xml")
    await engine.load_model("tiny-chat")
    with pytest.raises(PreconditionError, match=r"broken cannot be loaded"):
        async with asyncio.timeout(LIMIT):
            await engine.load_model("broken")
    assert (await call(engine, "chat", **HELLO))["choices"]
    assert [model.name for model in await engine.running_models()] == ["tiny-chat"]


async def test_unloaded_model_can_be_loaded_again(make: Make) -> None:
    engine = await make()
    for _ in range(2):
        assert (await call(engine, "embed", model="tiny-embed", input="a"))["data"]
        await engine.unload_model("tiny-embed")
        assert "tiny-embed" not in [model.name for model in await engine.running_models()]


async def test_restarted_server_has_its_models(make: Make) -> None:
    engine = await make(restart_backoff=0.05)
    await call(engine, "chat", **HELLO)
    server = psutil.Process().children(recursive=True)
    [ovms] = [process for process in server if process.cmdline()[1:2] and process.cmdline()[1].endswith("/bin/ovms")]
    ovms.kill()
    async with asyncio.timeout(LIMIT):
        while True:
            try:
                assert (await call(engine, "chat", **HELLO))["choices"]
                break
            except (BadGatewayError, PreconditionError):
                await asyncio.sleep(0.05)  # until it is back, a call may say that it died


async def test_release_is_installed_upgraded_and_rolled_back(
    make: Make, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release must answer with a sample before the running engine changes to it with its models."""

    async def no_packages(*_arguments: Any, **_options: Any) -> None:
        """The packages are already beside engine-plugin."""

    monkeypatch.setattr(LocalSoftware, "install_packages", no_packages)
    told: list[object] = []
    mirror.publish("2026.3")
    release = {"backend": "release", "ovms": "", "mirror": mirror.url}
    engine = await make(start=False, **release)
    assert (await engine.install(told.append, cover=False)).endswith("version 2026.3.0")
    await engine.aclose()
    mirror.publish("2026.4")
    engine = await make(version="2026.4", **release)
    await call(engine, "chat", **HELLO)
    assert (await engine.upgrade(told.append)).endswith("version 2026.4.0")
    assert [model.name for model in await engine.running_models()] == ["tiny-chat"]
    assert (await call(engine, "chat", **HELLO))["choices"]
    assert await engine.version() == "2026.4.0"
