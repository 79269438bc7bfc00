"""A model's chat templates cannot stop the model or exhaust the machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from openvino_server import model, watch
from tests.patience import LIMIT

if TYPE_CHECKING:
    from tests.openvino_server.serving.conftest import Front, Serve

pytestmark = pytest.mark.promise("X4")

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loop": f"{ENDLESS}{{% endfor %}}",
    "power": "{{ 9 ** (9 ** (9 * (messages | length))) }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "text": "{{ 'x' * 10 ** 12 }}",
    "format": "{{ '%099999999999d' | format(1) }}",
    "list": "{% for a in [0] * 10 ** 10 %}{% endfor %}",
    "join": "{{ (messages[0].content * 10 ** 7) | list | join(messages[0].content * 10 ** 7) }}",
}


def behind(hostile: str) -> str:
    """A template that is hostile to some conversations only."""
    return f"{{% if messages[0].content == 'burn' %}}{hostile}{{% endif %}}{{{{ messages[0].content }}}}"


async def asked(front: Front, content: str, **more: Any) -> tuple[int, Any]:
    return await front.chat(messages=[{"role": "user", "content": content}], **more)


async def test_template_that_compiles_too_long_is_rejected(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "WITHIN", 0.5)
    front = await serve(empty=True)
    front.config.add("m", template="{{ 9 ** (9 ** 9) }}")
    assert await front.reload() == 201
    status, answer = await asked(front, "x")
    assert (status, "more than 0.5 s" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize("name", HOSTILE)
async def test_endless_template_is_rejected_and_affects_no_other_call(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(model, "WITHIN", 1.5)
    front = await serve(empty=True)
    front.config.add("m", template=behind(HOSTILE[name]))
    front.config.add("other")
    assert await front.reload() == 201
    assert (await asked(front, "well"))[0] == 200
    burning = asyncio.create_task(asked(front, "burn"))
    for other in (
        front.post("/v3/completions", {"model": "m", "prompt": "x"}),
        asked(front, "x", model="other"),
    ):
        status, _ = await other
        assert status == 200
    status, answer = await burning
    assert status == 400
    assert answer["error"]["message"].startswith("messages: the model's chat template refuses them: ")
    assert (await asked(front, "well"))[0] == 200


async def test_cancelling_an_endless_template_returns_at_once(serve: Serve) -> None:
    front = await serve(empty=True)
    front.config.add("m", template=behind(HOSTILE["loop"]))
    assert await front.reload() == 201
    assert (await asked(front, "well"))[0] == 200
    burning = [asyncio.create_task(asked(front, "burn")) for _ in range(2)]
    await asyncio.wait(burning, timeout=0.2)
    for call in burning:
        call.cancel()
    await asyncio.wait(burning)
    unloaded = asyncio.create_task(front.registry.models["m"].retire())
    await asyncio.wait_for(unloaded, LIMIT)  # which waits until all calls have left


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ + 1 }}", "{{ messages.append(1) }}", "{{ 1 / x }}"],
)
async def test_template_that_fails_affects_only_its_call(serve: Serve, template: str) -> None:
    front = await serve(empty=True)
    front.config.add("m", template=behind(template))
    assert await front.reload() == 201
    status, answer = await asked(front, "burn")
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["message"].startswith("messages: the model's chat template refuses them: ")
    assert (await asked(front, "well"))[0] == 200


@pytest.mark.parametrize("template", ["{% if %}", "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}"], ids=["if", "deep"])
async def test_template_that_does_not_compile_is_reported(serve: Serve, template: str) -> None:
    front = await serve(empty=True)
    front.config.add("m", template=template)
    assert await front.reload() == 201
    status, answer = await asked(front, "x")
    assert status == 400
    assert answer["error"]["message"].startswith("messages: the model's chat template is broken: ")


@pytest.mark.parametrize("extra", [[], "x", 5])
async def test_template_variables_must_be_an_object(serve: Serve, extra: Any) -> None:
    front = await serve()
    status, answer = await asked(front, "x", chat_template_kwargs=extra)
    assert status == 400
    assert answer["error"]["message"].startswith("chat_template_kwargs: must be an object, not ")


async def test_worker_that_continues_a_cancelled_call_is_killed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that computes for waiting callers is not killed, however long it takes."""
    monkeypatch.setattr(watch, "ABANDONED", 0.8)
    front = await serve(restart_backoff=0.01)
    worker = front.registry.models["m"].worker
    assert worker is not None
    status, _ = await front.chat(script={"then": "compute", "seconds": 2})
    assert (status, worker.over.is_set()) == (200, False)
    call = asyncio.create_task(front.chat(script={"parts": [], "then": "compute", "seconds": 600}))
    await asyncio.wait({call}, timeout=0.2)
    call.cancel()
    await asyncio.wait_for(worker.over.wait(), LIMIT)
    assert worker.ended_because.startswith("it did not end a cancelled call in 0.8 s")
    assert (await front.chat())[0] == 200
