"""The driver's tests of the services with ovms, except for features that it lacks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import InvalidRequestError
from engine_plugin.host import events
from tests.engines.openvino.driver import test_services as embedded
from tests.engines.openvino.driver.running import ONE_STEP
from tests.patience import LIMIT

if TYPE_CHECKING:
    from tests.engines.openvino.driver.running import RunningEngine

pytestmark = embedded.pytestmark

_DIFFERENT = {"test_picture_is_streamed_with_progress", "test_prompt_beyond_the_context_is_rejected"}
_TESTS = {name: test for name, test in vars(embedded).items() if name.startswith("test_")}
assert set(_TESTS) > _DIFFERENT
globals().update({name: test for name, test in _TESTS.items() if name not in _DIFFERENT})


async def test_picture_is_streamed_with_progress(shared: RunningEngine) -> None:
    """ovms sends no progress."""
    async with asyncio.timeout(LIMIT), shared.client.stream("text-to-image", ONE_STEP) as chunks:
        told = [event async for event in events(chunks)]
    assert [event["type"] for event in told] == ["image_generation.completed"]
    assert told[0]["data"][0]["b64_json"]


async def test_prompt_beyond_the_context_is_rejected(shared: RunningEngine) -> None:
    """The error of ovms has a message only, no type."""
    request = {"messages": [{"role": "user", "content": "count " * 3000}]}
    with pytest.raises(InvalidRequestError, match=r"\d+ tokens, but the model's context holds 1024"):
        await shared.client.invoke("chat", request)
