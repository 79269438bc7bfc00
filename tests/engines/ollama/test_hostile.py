"""Ollama servers that violate the API, byte by byte over real sockets."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.engines.ollama import answers, models
from engine_plugin.engines.ollama.address import ServerAddress, configured_address
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from engine_plugin.models.request import PullRequest
from engine_plugin.plugin import Plugin
from tests.examples import FEW
from tests.patience import LIMIT, pace, within

from .attached.engine import plugin_in
from .hostile import DONE, Hostile, entry, lines, text_line, until_end, whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.download.events import PullEvent

KEY = "sk-only-for-this-test"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
HUGE = 10**400
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b1m\u202e"
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([HUGE, -HUGE, 1e300, float("nan"), float("inf"), "\ud800", ESCAPES, "2026-01-01T00:00:00Z"])
    | st.floats()
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
async def hostile() -> AsyncIterator[Hostile]:
    async with Hostile().serving() as server:
        yield server


@pytest.fixture(params=[False, True], ids=["openai", "native"])
async def plugin(hostile: Hostile, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Plugin]:
    async with plugin_in(tmp_path, native=request.param, engine_host=hostile.url, probe_timeout=pace(1.0)) as found:
        yield found


@pytest.fixture
async def openai(hostile: Hostile, tmp_path: Path) -> AsyncIterator[Plugin]:
    """The plugin with OpenAI's format, for tests that do not depend on the format."""
    async with plugin_in(tmp_path, engine_host=hostile.url, probe_timeout=pace(1.0)) as found:
        yield found


def is_native(plugin: Plugin) -> bool:
    return plugin.manifest.service("chat").config_ref.startswith("ollama")


async def call(plugin: Plugin, service: str = "chat", /, **request: Any) -> dict[str, Any]:
    async with asyncio.timeout(LIMIT):
        answer = await plugin.invoke(service, json.dumps(request or HELLO).encode())
    shape: dict[str, Any] = strict(answer)
    return shape


def strict(text: bytes) -> Any:
    """Parse strict JSON (RFC 8259)."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text.decode(), parse_constant=refuse)


async def raw(plugin: Plugin, service: str = "chat", /, **request: Any) -> bytes:
    async with asyncio.timeout(LIMIT), plugin.stream(service, json.dumps(request or HELLO).encode()) as chunks:
        return b"".join([chunk async for chunk in chunks])


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """Parse each event separately, as a host does."""
    blocks = [block for block in stream.split(b"\n\n") if block]
    assert all(block.startswith(b"data: ") and b"\n" not in block and b"\r" not in block for block in blocks)
    return [strict(block[6:]) for block in blocks if block != b"data: [DONE]"]


def text_of(plugin: Plugin, stream: bytes) -> str:
    if is_native(plugin):
        return "".join(event["message"]["content"] for event in events_of(stream))
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events_of(stream))


async def pulled(plugin: Plugin, name: str = "m") -> list[PullEvent]:
    async with asyncio.timeout(LIMIT), plugin.pull_model(PullRequest(name)) as events:
        return [event async for event in events]


def told_well(error: EnginePluginError) -> None:
    """Require a short message without control characters."""
    assert str(error).isprintable()
    assert len(str(error)) < 2000


# Heads and bodies


@pytest.mark.parametrize(
    ("begin", "endless", "words"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 1000, "a head of over"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 8000, "a head of over"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500, "a head of over|closed the connection"),
        (b"", b"SSH-2.0-OpenSSH_9.6\r\n" * 500, "does not answer in HTTP"),
        (until_end()[0], b'{"x": ' * 5000, "a line of over"),
    ],
)
async def test_endless_heads_and_lines_are_cut(
    hostile: Hostile, plugin: Plugin, begin: bytes, endless: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_plugin.transport.ndjson._MAX_LINE", 1 << 20)
    await plugin.list_models()
    hostile.answers["/api/chat"], hostile.endless, hostile.endless_at = begin, endless, "/api/chat"
    for invoke in (call, raw):
        with pytest.raises(BadGatewayError, match=words):
            await invoke(plugin)
    assert hostile.sent < 64 << 20, "the plugin closes an endless answer"


async def test_endless_answer_is_cut(hostile: Hostile, plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "ANSWER_LIMIT", 1 << 20)
    hostile.answers["/api/chat"] = until_end()
    hostile.endless, hostile.endless_at = lines(text_line("")) * 50, "/api/chat"
    with pytest.raises(BadGatewayError, match="longer than"):
        await call(plugin)


async def test_endless_list_is_cut(hostile: Hostile, openai: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_plugin.engines.ollama.client.LARGEST_JSON", 1 << 20)
    hostile.answers["/api/tags"] = until_end(b'{"models": [')
    hostile.endless, hostile.endless_at = b'{"name": "m"},' * 1000, "/api/tags"
    with pytest.raises(BadGatewayError, match="longer than"):
        await call(openai)
    assert json.loads(await openai.manifest_json())["services"]


async def test_unrequested_compression_is_rejected(hostile: Hostile, plugin: Plugin) -> None:
    await plugin.list_models()
    for path, invoke in (("/api/chat", call), ("/api/tags", lambda plugin: plugin.list_models())):
        hostile.answers[path] = whole(gzip.compress(b"{}"), "content-encoding: gzip")
        with pytest.raises(BadGatewayError, match="compressed"):
            await invoke(plugin)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
async def test_key_is_not_sent_to_a_redirect(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", KEY)
    monkeypatch.setattr(ServerAddress, "is_loopback", False)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    async with (
        Hostile().serving() as elsewhere,
        plugin_in(tmp_path, engine_host=hostile.url, allow_plain_http=True) as plugin,
    ):
        await plugin.list_models()
        blob = f"/api/blobs/sha256:{'a' * 64}"
        monkeypatch.setattr("engine_plugin.engines.ollama.pulls.sha256_of", _some_digest)
        for path in ("/api/chat", "/api/tags", "/api/pull", blob):
            hostile.answers[path] = whole(b"", f"location: {elsewhere.url}{path}", status)
        invoke = (call, Plugin.list_models, pulled, lambda plugin: pulled(plugin, str(file)))
        for failing in invoke:
            with pytest.raises(EnginePluginError, match="redirects are not followed") as caught:
                await failing(plugin)
            assert KEY not in str(caught.value)
        assert hostile.count(blob) == 1
        assert all(KEY.encode() in head for head in hostile.heads if b" /api/chat " in head or b" /api/blobs" in head)
        assert elsewhere.heads == []


async def _some_digest(_path: Path) -> str:
    return f"sha256:{'a' * 64}"


async def test_answer_cut_at_any_byte_raises(hostile: Hostile, plugin: Plugin) -> None:
    await plugin.list_models()
    answer = b"".join(until_end(lines(text_line("a"), DONE)))
    answer = answer.replace(b"\r\n\r\n", b"\r\ncontent-length: 999\r\n\r\n")
    done = answer.index(b'"done":true')
    for end in range(0, done, 23):
        hostile.answers["/api/chat"] = answer[:end]
        for invoke in (call, raw):
            with pytest.raises(BadGatewayError):
                await invoke(plugin)


# Lines


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b" \r\n\r\n"])
async def test_line_ends_of_every_kind(hostile: Hostile, plugin: Plugin, end: bytes) -> None:
    stream = lines(text_line("é"), text_line("🎉"), DONE, end=end)
    hostile.answers["/api/chat"] = until_end(*[stream[at : at + 7] for at in range(0, len(stream), 7)])
    assert text_of(plugin, await raw(plugin)) == "é🎉"
    assert "é🎉" in json.dumps(await call(plugin), ensure_ascii=False)


async def test_characters_cut_between_packets_are_joined(hostile: Hostile, plugin: Plugin) -> None:
    stream = json.dumps(text_line("é🎉"), ensure_ascii=False).encode() + b"\n" + lines(DONE)
    hostile.answers["/api/chat"] = until_end(*[stream[at : at + 1] for at in range(len(stream))])
    async with asyncio.timeout(LIMIT), plugin.stream("chat", json.dumps(HELLO).encode()) as blocks:
        chunks = [chunk async for chunk in blocks]
    assert all(chunk.decode() for chunk in chunks), "each chunk is valid UTF-8"
    assert text_of(plugin, b"".join(chunks)) == "é🎉"


async def test_white_space_in_json_does_not_end_an_event(hostile: Hostile, plugin: Plugin) -> None:
    line = b'{"message":\r\r{"content":"x"},\r"done":\tfalse}\n'
    hostile.answers["/api/chat"] = until_end(line + lines(DONE))
    assert text_of(plugin, await raw(plugin)) == "x"


@pytest.mark.parametrize("broken", [b"\n", b"\\q", b"\x01", b"\xff", b"\\u12g4", b'"'])
async def test_invalid_json_texts_are_rejected(hostile: Hostile, openai: Plugin, broken: bytes) -> None:
    """This includes lines in Ollama's usual form, which are not parsed."""
    stream = lines(text_line("first"), text_line("a$b"), text_line("after"), DONE).replace(b"$", broken)
    hostile.answers["/api/chat"] = until_end(stream)
    received = b""
    with pytest.raises(BadGatewayError, match="not a JSON object"):  # noqa: PT012  # what came before counts
        async with asyncio.timeout(LIMIT), openai.stream("chat", json.dumps(HELLO).encode()) as blocks:
            async for chunk in blocks:
                received += chunk
    assert text_of(openai, received) == "first"
    with pytest.raises(BadGatewayError, match="not a JSON object"):
        await call(openai)


async def test_lone_surrogate_does_not_break_the_stream(hostile: Hostile, plugin: Plugin) -> None:
    hostile.answers["/api/chat"] = until_end(lines(text_line("zz"), text_line("a\ud800b"), DONE))
    assert text_of(plugin, await raw(plugin)).startswith("zza")
    assert "zza" in json.dumps(await call(plugin))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lines({"error": "it broke"}), "it broke"),
        (lines({"error": "it broke"})[:-1], "it broke"),
        (lines({"error": {"message": "it broke", "code": 500}}), "it broke"),
        (lines({"error": {"message": {"a": [1]}}}), "without a message"),
        (lines({"error": ["it broke"]}), "without a message"),
        (lines({"error": '{"error":{"code":500,"message":"it broke","type":"x"}}'}), "answered 500: it broke$"),
        (lines({"model": "m", "done": False, "error": "it broke"}), "it broke"),
        (lines({**DONE, "error": "it broke"}), "it broke"),
        (lines({"error": "it broke", "status": -5, "status_code": True}), "answered 500: it broke"),
        (lines({"error": ESCAPES + "it broke" + "x" * 100_000}), "it broke"),
        (b"Internal Server Error\n", "not a JSON object"),
        (b"[]\n", "object|not understood"),
        (b"", "before it was done"),
        (lines(text_line("two"))[:-9], "inside a line|broke off"),
        (lines(text_line("two"))[:-1] + lines(DONE), "not a JSON object"),
    ],
)
async def test_malformed_errors_and_ends_are_reported(
    hostile: Hostile, plugin: Plugin, error: bytes, words: str
) -> None:
    hostile.answers["/api/chat"] = until_end(lines(text_line("one")), error)
    received = b""
    with pytest.raises(BadGatewayError, match=words) as caught:  # noqa: PT012  # what came before counts
        async with asyncio.timeout(LIMIT), plugin.stream("chat", json.dumps(HELLO).encode()) as blocks:
            async for chunk in blocks:
                received += chunk
    assert text_of(plugin, received) == "one"
    told_well(caught.value)
    with pytest.raises(BadGatewayError, match=words) as caught:
        await call(plugin)
    told_well(caught.value)


@pytest.mark.parametrize("empty", [None, ""])
async def test_empty_error_is_ignored(hostile: Hostile, plugin: Plugin, empty: Any) -> None:
    hostile.answers["/api/chat"] = until_end(lines({**text_line("one"), "error": empty}, {**DONE, "error": empty}))
    assert text_of(plugin, await raw(plugin)) == "one"
    assert "one" in json.dumps(await call(plugin))


async def test_lines_after_done_are_dropped(hostile: Hostile, plugin: Plugin) -> None:
    hostile.answers["/api/chat"] = until_end(
        lines(text_line("one"), DONE, DONE, text_line("two"), {"error": "three"})
    )
    assert text_of(plugin, await raw(plugin)) == "one"
    assert "two" not in json.dumps(await call(plugin))


async def test_content_like_done_or_error_is_content(hostile: Hostile, plugin: Plugin) -> None:
    words = '{"error": "no"}\n\ndata: [DONE]\n\n"done": true, "error":'
    arguments = {"error": "no", "done": True, "text": words}
    tool = {
        **text_line(""),
        "message": {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
    }
    hostile.answers["/api/chat"] = until_end(lines(text_line(words), tool, DONE))
    assert text_of(plugin, await raw(plugin)) == words
    assert json.dumps(words)[1:-1] in json.dumps(await call(plugin))


async def test_stream_ends_at_done_on_an_open_connection(hostile: Hostile, plugin: Plugin) -> None:
    hostile.stays = True
    hostile.answers["/api/chat"] = until_end(lines(text_line("one"), DONE))
    assert text_of(plugin, await within(raw(plugin))) == "one"


async def test_many_partial_tags_take_linear_time(hostile: Hostile, openai: Plugin) -> None:
    """Quadratic time would block the event loop."""
    hostile.answers["/api/chat"] = until_end(lines({**DONE, "message": {"content": "<" * 500_000}}))
    async with asyncio.timeout(LIMIT):
        assert len((await call(openai))["choices"][0]["message"]["content"]) == 500_000


@pytest.mark.parametrize("value", [1e999, float("nan"), HUGE, -5, "7", [], True, {}], ids=str)
@pytest.mark.parametrize("field", ["eval_count", "eval_duration", "prompt_eval_count", "total_duration"])
async def test_invalid_counts_are_rejected(hostile: Hostile, openai: Plugin, field: str, value: Any) -> None:
    last = {**DONE, "eval_count": 1, "eval_duration": 1, field: value}
    hostile.answers["/api/chat"] = until_end(lines(last))
    hostile.answers["/api/embed"] = whole({"embeddings": [[1]], field: value})
    for invoke in (call(openai), call(openai, "embed", model="m", input="a")):
        try:
            usage = (await invoke)["usage"]
        except BadGatewayError as error:
            told_well(error)
        else:
            assert all(count >= 0 for count in usage.values())
    with_none = [event for event in events_of(await raw_or_nothing(openai)) if event.get("timings")]
    assert all(number >= 0 for event in with_none for number in event["timings"].values())


async def raw_or_nothing(plugin: Plugin) -> bytes:
    try:
        return await raw(plugin)
    except BadGatewayError:
        return b""


@pytest.mark.parametrize(
    "call_shape",
    [
        {"function": {"name": {"a": 1}, "arguments": {}}},
        {"function": {"name": "f", "arguments": {"x": float("nan")}}},
        {"function": 7},
        {},
    ],
    ids=str,
)
async def test_malformed_tool_calls_are_rejected(hostile: Hostile, openai: Plugin, call_shape: Any) -> None:
    line = {**text_line(""), "message": {"content": "", "tool_calls": [call_shape]}}
    hostile.answers["/api/chat"] = until_end(lines(line, DONE))
    for invoke in (call, raw):
        with pytest.raises(BadGatewayError):
            await invoke(openai)


async def test_tool_call_ids_are_texts(hostile: Hostile, openai: Plugin) -> None:
    call_shape = {"id": {"a": 1}, "function": {"name": "f", "arguments": None}}
    hostile.answers["/api/chat"] = until_end(
        lines({**text_line(""), "message": {"content": "", "tool_calls": [call_shape]}}, DONE)
    )
    [tool_call] = (await call(openai))["choices"][0]["message"]["tool_calls"]
    assert tool_call["id"].startswith("call_")
    assert tool_call["function"]["arguments"] == "{}"


@pytest.mark.parametrize("depth", range(900, 1000, 20))
async def test_deep_answer_is_rejected(hostile: Hostile, plugin: Plugin, depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    last = lines({**DONE, "context": "$", "logprobs": [{"token": "a", "x": "$"}]}).replace(b'"$"', deep)
    hostile.answers["/api/chat"] = until_end(last)
    for answer in (plugin.invoke("chat", json.dumps(HELLO).encode()), raw(plugin)):
        try:
            assert b"done" in await answer or not is_native(plugin)
        except BadGatewayError as error:
            told_well(error)


EMBEDDINGS = [
    b"[]",
    b"<html>",
    b"7",
    b"",
    b"{}",
    b'{"embeddings": 7}',
    b'{"embeddings": [7]}',
    b'{"embeddings": [[NaN]]}',
    b'{"embeddings": [[null, 1]]}',
    b'{"embeddings": [["a"]]}',
    b'{"embeddings": [[1,,2]]}',
    b'{"embeddings": [[1..2]]}',
    b'{"embeddings": [[01]]}',
    b'{"embeddings": [[1], 7]}',
    b'{"embeddings": [[1], [2]]}',
    b'{"embeddings": [[[1]]]}',
    b'{"embeddings": [[1]',
    b'{"embeddings": [[1]]}}',
    b'{"error": "no"}',
]


@pytest.mark.parametrize("body", EMBEDDINGS)
async def test_malformed_embeddings_are_rejected(hostile: Hostile, plugin: Plugin, body: bytes) -> None:
    hostile.answers["/api/embed"] = whole(body)
    for more in ({}, {"encoding_format": "base64"}):
        with pytest.raises(BadGatewayError):
            await call(plugin, "embed", model="m", input="a", **more)


FIELDS = ("message", "content", "thinking", "tool_calls", "response", "done", "logprobs", "done_reason", "error", "x")
COUNTS = ("eval_count", "eval_duration", "prompt_eval_count", "prompt_eval_duration", "total_duration", "status")
SHAPES = st.dictionaries(st.sampled_from([*FIELDS, *COUNTS]), JSON, max_size=5)
LINES = st.lists(
    SHAPES
    | st.builds(lambda shape: {**DONE, **shape}, SHAPES)
    | st.builds(lambda shape: {**text_line("x"), "message": {"role": "assistant", "content": "x", **shape}}, SHAPES)
    | JSON,
    max_size=4,
)


@FEW
@given(shapes=LINES, service=st.sampled_from(["chat", "generate"]), ending=st.sampled_from([b"", lines(DONE)]))
async def test_any_lines_give_events_or_an_error(
    hostile: Hostile, plugin: Plugin, shapes: list[Any], service: str, ending: bytes
) -> None:
    request = HELLO if service == "chat" else {"model": "m", "prompt": "a"}
    hostile.answers[f"/api/{service}"] = until_end(lines(*shapes) + ending)
    try:
        assert await call(plugin, service, **request)
    except EnginePluginError as error:
        told_well(error)
    try:
        stream = await raw(plugin, service, **request)
        if not is_native(plugin):  # native lines are passed through
            assert events_of(stream)
    except EnginePluginError as error:
        told_well(error)


@FEW
@given(
    path=st.sampled_from(["/api/tags", "/api/ps", "/api/show", "/api/version", "/api/embed"]),
    shape=st.dictionaries(
        st.sampled_from(["models", "version", "capabilities", "model_info", "embeddings", "error"]), JSON
    )
    | JSON,
    status=st.sampled_from(["200 OK", "200 OK", "400 Bad", "401 X", "403 X", "404 X", "499 X", "500 X", "503 X"]),
)
async def test_any_answer_gives_a_result_or_an_error(
    hostile: Hostile, openai: Plugin, path: str, shape: Any, status: str
) -> None:
    good = dict(hostile.answers)
    hostile.answers["/api/tags"] = whole({"models": [entry(capabilities=None)]})
    hostile.answers[path] = whole(shape, status=status)
    for invoke in (
        openai.health(),
        openai.list_models(),
        openai.running_models(),
        openai.version(),
        openai.manifest_json(),
        call(openai),
        call(openai, "embed", model="m", input="a"),
        call(openai, "embed", input="a"),
    ):
        try:
            async with asyncio.timeout(LIMIT):
                assert await invoke is not None
        except EnginePluginError as error:
            told_well(error)
    hostile.answers = good


@FEW
@given(
    shapes=st.lists(
        st.dictionaries(
            st.sampled_from(["status", "digest", "total", "completed", "error"]),
            JSON | st.sampled_from(["success", "pulling x", "sha256:a", 5, 10]),
        )
        | JSON,
        max_size=5,
    ),
    ending=st.sampled_from([b"", lines({"status": "success"})]),
)
async def test_any_pull_stream_gives_a_result_or_an_error(
    hostile: Hostile, openai: Plugin, shapes: list[Any], ending: bytes
) -> None:
    hostile.answers["/api/pull"] = until_end(lines(*shapes) + ending)
    try:
        for event in await pulled(openai):
            check_progress(event)
    except EnginePluginError as error:
        told_well(error)


def check_progress(event: Any) -> None:
    words = [value for value in (getattr(event, "text", ""), getattr(event, "digest", "")) if value]
    assert all(word.isprintable() and len(word) < 500 for word in words)
    if hasattr(event, "completed"):
        assert 0 <= event.completed <= event.total < 1 << 63


# Models


@pytest.mark.parametrize("name", ["a\x00b", "a\nb", f"a{ESCAPES}", "x" * 1_000_000, "", "\ud800", "\u202egnp.exe"])
async def test_unprintable_names_are_dropped(hostile: Hostile, openai: Plugin, name: str) -> None:
    hostile.answers["/api/tags"] = whole({"models": [entry(name), entry()]})
    hostile.answers["/api/ps"] = whole({"models": [entry(name), entry()]})
    assert [model.name for model in await openai.list_models()] == ["m:latest"]
    assert [model.name for model in await openai.running_models()] == ["m:latest"]


async def test_model_name_is_not_used_as_a_path(hostile: Hostile, openai: Plugin, tmp_path: Path) -> None:
    before = await asyncio.to_thread(files_in, tmp_path)
    name = "../../../../etc/passwd"
    hostile.answers["/api/tags"] = whole({"models": [entry(name)]})
    assert [model.name for model in await openai.list_models()] == [name]
    assert (await call(openai, model=name, messages=HELLO["messages"]))["choices"]
    assert await asyncio.to_thread(files_in, tmp_path) == before


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


async def test_unreadable_details_are_dropped(hostile: Hostile, openai: Plugin) -> None:
    odd = {"family": ESCAPES, "families": ["x" * 10_000, *["y"] * 10_000], "parameter_size": "9" * 5000 + "B"}
    listed = entry(
        details=odd, size=HUGE, digest="no digest", remote_host=[[]], capabilities=[ESCAPES, 7, "tools", "x" * 9999]
    )
    hostile.answers["/api/tags"] = whole({"models": [listed]})
    [model] = await openai.list_models()
    wire = json.dumps(model.to_wire(), ensure_ascii=False)
    assert wire.isprintable()
    assert len(wire) < 3000
    assert (model.digest, model.size) == ("", 0)


async def test_list_is_limited(hostile: Hostile, openai: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries above the limit are dropped."""
    monkeypatch.setattr(models, "SHOW_TIMEOUT", 0.2)
    names = [f"m{number}" for number in range(2 * models.MAX_MODELS)]
    hostile.answers["/api/tags"] = whole({"models": [{**entry(), "name": name, "details": {}} for name in names]})
    hostile.hangs.add("/api/show")
    async with asyncio.timeout(LIMIT):
        assert len(await openai.list_models()) == models.MAX_MODELS
    with pytest.raises(ModelNotFoundError) as caught:
        await call(openai, model="another", messages=HELLO["messages"])
    told_well(caught.value)


async def test_silent_show_does_not_delay_the_list(
    hostile: Hostile, openai: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "SHOW_TIMEOUT", 0.3)
    hostile.answers["/api/tags"] = whole({"models": [entry(f"m{number}", capabilities=None) for number in range(50)]})
    hostile.hangs.add("/api/show")
    async with asyncio.timeout(LIMIT):
        assert len(await openai.list_models()) == 50
        assert (await call(openai, model="m7", messages=HELLO["messages"]))["choices"]


@pytest.mark.parametrize(
    "version", ["1" * 6000, ESCAPES, "x" * 100_000, 7, None, {}, "²", ""], ids=lambda v: str(v)[:9]
)
async def test_invalid_versions_are_replaced(hostile: Hostile, openai: Plugin, version: Any) -> None:
    hostile.answers["/api/version"] = whole({"version": version})
    assert "attached" in (await openai.health()).detail
    assert await openai.version() == "0.0.0"


# Errors


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ('option "num_predict" must be of type integer', "options.num_predict: "),
        ('invalid format: "7"; expected "json" or a valid JSON Schema object', "format: "),
        ("illegal base64 data at input byte 0", "images: "),
        ("json: cannot unmarshal number into Go struct field ChatRequest.messages.thinking of type string",
         "messages.thinking: "),
        ('template: :1: unexpected "}" in if', "template: "),
        ('time: invalid duration "xx"', "keep_alive: "),
        ('{"error":{"code":400,"message":"JSON schema error","type":"invalid_request_error"}}', "request_data: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error"])
async def test_server_error_about_a_field_is_a_400(
    hostile: Hostile, plugin: Plugin, words: str, field: str, status: str
) -> None:
    """Ollama reports some of these with status 500."""
    hostile.answers["/api/chat"] = whole({"error": words}, status=status)
    with pytest.raises(InvalidRequestError) as caught:
        await call(plugin)
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize("status", ["400 Bad", "401 No", "403 No", "404 No", "499 X", "500 Z", "503 W", "999 V"])
@pytest.mark.parametrize("shape", ["text", "error", "message", "signin"])
async def test_control_characters_in_errors_are_removed(
    hostile: Hostile, plugin: Plugin, status: str, shape: str
) -> None:
    await plugin.list_models()
    words = ESCAPES + "x" * 10_000
    error = {"text": words, "error": {"error": words}, "message": {"error": {"message": words}}}
    hostile.answers["/api/chat"] = whole(error.get(shape, {"error": "no", "signin_url": words}), status=status)
    with pytest.raises(EnginePluginError) as caught:
        await call(plugin)
    told_well(caught.value)


# Addresses

NONSENSE = [
    "http:localhost:11434", "a..b", "a" * 300, "[", "]", "[foo]", "[::1", "ho[st", "a:b:c", "http://", "://", "ftp://x",
    "x:0", "x:99999", "x:00000199999999", "x:" + "0" * 5000 + "1" * 5000, "x:-1", "u:p@x", "x?y", "x#y", "\\\\x", " ",
    "a b", "\x7f", "é", "\udc80", "http://http://x", "-", "%", "x%00y", "[::1%\\]", ".",
]  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: ascii(text)[:20])
async def test_invalid_ollama_host_does_not_prevent_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("os.environ", {"OLLAMA_HOST": text, "ENGINE_PLUGIN_PROBE_TIMEOUT": "nan"})
    async with plugin_in(tmp_path, probe_timeout=0.2) as plugin, asyncio.timeout(LIMIT):
        assert json.loads(await plugin.manifest_json())["services"]
        try:
            await call(plugin)
        except (UnavailableError, ModelNotFoundError) as error:
            told_well(error)


ADDRESS = r"(https?://)?(\[[0-9a-f:%]*\]|[a-z.:-]*)(:[0-9]*)?(/[a-z?#]*)?"


@given(st.text(max_size=40) | st.from_regex(ADDRESS, fullmatch=True))
def test_any_ollama_host_is_parsed_or_ignored(text: str) -> None:
    found = configured_address("", "", {"OLLAMA_HOST": text})
    assert ServerAddress.parse(found.url).url == found.url
    assert 0 < found.port < 65536


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("1.2.3.4", "http://1.2.3.4:11434"),
        ("example.com", "http://example.com:11434"),
        ("example.com:56789", "http://example.com:56789"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com/", "https://example.com:443"),
        ("https://example.com/ollama/v1/", "https://example.com:443/ollama"),
        (":1234", "http://127.0.0.1:1234"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("[::]:11435", "http://[::1]:11435"),
        ("::1", "http://[::1]:11434"),
        ("[fe80::1%eth0]", "http://[fe80::1%eth0]:11434"),
        ("\"'10.0.0.1'\"", "http://10.0.0.1:11434"),
        (" localhost ", "http://localhost:11434"),
        ("x:00080", "http://x:80"),
        ("my_host", "http://my_host:11434"),
        ("", "http://127.0.0.1:11434"),
    ],
)
def test_ollama_host_is_parsed_as_by_ollama(text: str, url: str) -> None:
    assert configured_address("", "", {"OLLAMA_HOST": text}).url == url
