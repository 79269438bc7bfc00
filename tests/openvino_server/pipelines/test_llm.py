"""The worker of a language model, in its process, with the tiny chat model."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.patience import LIMIT

from .running import SAMPLES, CallFailed, RunningWorker, WorkerFailed, worker

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.asyncio(loop_scope="module")

PROCESSES = Path("/proc")
COUNTED = "one two three four five six seven eight nine ten"
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"const": {"word": "blue"}}}}
HERMES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}<|im_start|>assistant\n"
)


async def test_ready_frame_has_the_facts_of_the_model(llm: RunningWorker) -> None:
    facts = dict(llm.facts)
    sources, _ = facts.pop("templates")
    assert "<|im_start|>" in sources["default"]
    assert facts == {"context_length": 1024, "capabilities": ["completion", "chat"]}


@pytest.mark.promise("U11")
@pytest.mark.skipif(sys.platform != "linux", reason="the descriptors of a process are files of /proc")
async def test_frames_arrive_while_standard_input_is_the_null_device(llm: RunningWorker) -> None:
    assert (PROCESSES / f"{llm.process.pid}/fd/0").readlink() == Path(os.devnull)  # not a disk
    assert (await llm.chat("count")).text() == COUNTED


async def test_answer_is_sent_in_parts_and_ends_with_usage(llm: RunningWorker) -> None:
    call = llm.begin("chat", messages=[{"role": "user", "content": "count"}], params={})
    usage = (await call.done())["usage"]
    assert call.text() == COUNTED
    assert call.finish() == "stop"
    assert usage["prompt_tokens"] == 15
    assert usage["completion_tokens"] == sum(part[2] for part in call.parts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_max_tokens_limits_the_answer(llm: RunningWorker) -> None:
    call = await llm.chat("count", max_tokens=50, max_completion_tokens=4)
    assert COUNTED.startswith(call.text())
    assert call.finish() == "length"
    assert (await call.done())["usage"]["completion_tokens"] == 4


@pytest.mark.promise("S13")
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_minus_one_is_no_limit(llm: RunningWorker, name: str) -> None:
    call = await llm.chat("count", **{name: -1}, logit_bias={}, suffix="")
    assert (call.text(), call.finish()) == (COUNTED, "stop")


async def test_ignore_eos_continues_after_the_end_token(llm: RunningWorker) -> None:
    call = await llm.chat("count", max_tokens=100, ignore_eos=True)
    assert (await call.done())["usage"]["completion_tokens"] == 100
    assert call.text().startswith(COUNTED)


@pytest.mark.parametrize(("stop", "text"), [("three", "one two "), (["x", " four"], "one two three")])
async def test_stop_string_ends_the_text_before_it(llm: RunningWorker, stop: Any, text: str) -> None:
    call = await llm.chat("count", stop=stop)
    assert (call.text(), call.finish()) == (text, "stop")


async def test_absent_stop_string_leaves_the_text_complete(llm: RunningWorker) -> None:
    assert (await llm.chat("count", stop="ten more")).text() == COUNTED


async def test_answers_repeat_with_a_seed_and_differ_without(llm: RunningWorker) -> None:
    wild = {"temperature": 3.0, "max_tokens": 16}
    same = [await llm.chat("zz", seed=5, **wild) for _ in range(2)]  # one by one: a batch's size changes its rounding
    free = await asyncio.gather(*(llm.chat("zz", **wild) for _ in range(3)))
    assert same[0].text() == same[1].text()
    assert len({call.text() for call in free}) > 1


async def test_n_answers_are_streams_of_their_own(llm: RunningWorker) -> None:
    call = await llm.chat("count", n=3)
    assert [call.text(index) for index in range(3)] == [COUNTED] * 3
    assert (await call.done())["usage"]["prompt_tokens"] == 15


async def test_best_of_returns_the_most_likely_answers(llm: RunningWorker) -> None:
    params = {"n": 1, "best_of": 6, "temperature": 2.0, "max_tokens": 12, "seed": 3}
    best = await llm.chat("zz", logprobs=True, **params)
    plain = await asyncio.gather(
        *(llm.chat("zz", logprobs=True, temperature=2.0, max_tokens=12, seed=3 + one) for one in range(6))
    )

    def likelihood(call: Any) -> float:
        told = [entry["logprob"] for part in call.parts for entry in part[3] or []]
        return float(sum(told) / len(told))

    assert likelihood(best) > sum(likelihood(call) for call in plain) / 6
    assert {part[0] for part in best.parts} == {0}


async def test_logprobs_name_each_token(llm: RunningWorker) -> None:
    call = await llm.chat("count", logprobs=True, top_logprobs=1, max_tokens=5)
    told = [entry for part in call.parts for entry in part[3] or []]
    assert "".join(entry["token"] for entry in told) == call.text()
    assert all(-0.1 < entry["logprob"] <= 0 for entry in told)
    assert bytes(told[0]["bytes"]).decode() == told[0]["token"] == told[0]["top_logprobs"][0]["token"]


async def test_sampling_parameters_are_accepted(llm: RunningWorker) -> None:
    params = {"frequency_penalty": 2.0, "presence_penalty": 1.0, "repetition_penalty": 1.5, "top_p": 0.9, "top_k": 5}
    call = await llm.chat("count", min_p=0.1, temperature=0.5, seed=1, max_tokens=30, **params)
    assert call.text() != COUNTED[: len(call.text())]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 21}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"stop": 5}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"top_logprobs": 1}, "top_logprobs"),
        pytest.param({"logprobs": True, "top_logprobs": 2}, "top_logprobs", marks=pytest.mark.promise("S13")),
        pytest.param({"logprobs": 2}, "logprobs", marks=pytest.mark.promise("S13")),
        pytest.param({"logit_bias": {"5": 1}}, "logit_bias", marks=pytest.mark.promise("S13")),
        pytest.param({"suffix": "x"}, "suffix", marks=pytest.mark.promise("S13")),
        ({"max_tokens": -2}, "max_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
async def test_invalid_parameter_is_named(llm: RunningWorker, params: dict[str, Any], field: str) -> None:
    with pytest.raises(CallFailed) as told:
        await llm.chat("count", **params)
    assert (told.value.status, told.value.kind) == (400, "invalid_request_error")
    assert told.value.message.startswith(field)


@pytest.mark.parametrize("messages", [None, [], ["hello"], [{"role": "user", "content": 5}]])
async def test_invalid_messages_are_rejected(llm: RunningWorker, messages: Any) -> None:
    with pytest.raises(CallFailed, match="messages"):
        await llm.do("chat", messages=messages, params={})


async def test_picture_is_rejected_by_a_model_without_vision(llm: RunningWorker) -> None:
    content = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]
    with pytest.raises(CallFailed, match=r"^400 .*messages\[0\].content\[1\]: .* cannot see images"):
        await llm.chat(content)


async def test_prompt_beyond_the_context_is_rejected_with_token_counts(llm: RunningWorker) -> None:
    with pytest.raises(CallFailed) as told:
        await llm.do("complete", prompt="hello " * 2000, params={})
    assert (told.value.status, told.value.kind) == (400, "exceed_context_size_error")
    assert "4000 tokens" in told.value.message
    assert "1024" in told.value.message


@pytest.mark.promise("X4")
@pytest.mark.parametrize("op", ["complete", "chat"])
async def test_prompt_of_many_megabytes_is_rejected_without_tokenizing(llm: RunningWorker, op: str) -> None:
    """Tokenizing would stop all calls for about a second per megabyte or two."""
    text = "hello " * (1 << 22)
    given = {"prompt": text} if op == "complete" else {"messages": [{"role": "user", "content": text}]}
    with pytest.raises(CallFailed) as told:
        await llm.do(op, params={}, **given)
    assert told.value.kind == "exceed_context_size_error"
    assert told.value.message.startswith("prompt: at least ")


async def test_answer_ends_at_the_end_of_the_context(llm: RunningWorker) -> None:
    call = llm.begin("complete", prompt="hello " * 500, params={"ignore_eos": True})
    usage = (await call.done())["usage"]
    assert (usage["total_tokens"], call.finish()) == (1024, "length")


async def test_completions_of_texts_and_tokens_with_echo(llm: RunningWorker) -> None:
    call = llm.begin("complete", prompt=["hello", "count"], echo=True, params={"max_tokens": 2, "n": 2})
    usage = (await call.done())["usage"]
    assert [call.text(index)[:5] for index in range(4)] == ["hello", "hello", "count", "count"]
    assert usage["completion_tokens"] == 8
    tokens = llm.begin("complete", prompt=[83, 82, 73], params={"max_tokens": 2})
    assert (await tokens.done())["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.mark.parametrize("prompt", ["", [], [[]], None, 5])
async def test_empty_prompt_is_rejected(llm: RunningWorker, prompt: Any) -> None:
    with pytest.raises(CallFailed, match="prompt"):
        await llm.do("complete", prompt=prompt, params={})


async def test_cancelling_one_call_does_not_affect_another(llm: RunningWorker) -> None:
    endless = {"ignore_eos": True, "max_tokens": 1000}
    cancelled = llm.begin("chat", messages=[{"role": "user", "content": "count"}], params=endless)
    neighbour = llm.begin(
        "chat", messages=[{"role": "user", "content": "count"}], params={**endless, "max_tokens": 600}
    )
    await asyncio.gather(cancelled.begun(), neighbour.begun())
    llm.cancel(cancelled)
    with pytest.raises(CallFailed) as told:
        await cancelled.done()
    assert told.value.status == 499
    assert (await neighbour.done())["usage"]["completion_tokens"] == 600
    assert sum(part[2] for part in cancelled.parts) < 1000


async def test_many_streams_share_frames(llm: RunningWorker) -> None:
    before = llm.frames
    calls = await asyncio.gather(*(llm.chat("count", max_tokens=200, ignore_eos=True) for _ in range(16)))
    assert all(call.text().startswith(COUNTED) for call in calls)
    assert llm.frames - before < 16 * 200 / 4


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": {"a": 1}}}}}, '{"a":1}'),
        ({"response_format": {"type": "regex", "pattern": "(ab){2}"}}, "abab"),
        ({"guided_choice": ["blue"]}, "blue"),
        ({"structured_outputs": {"grammar": 'root ::= "x" "y"'}}, "xy"),
    ],
)
async def test_answer_matches_the_grammar(llm: RunningWorker, params: dict[str, Any], text: str) -> None:
    assert (await llm.chat("count", **params)).text() == text


async def test_json_object_answer_begins_with_a_brace(llm: RunningWorker) -> None:
    call = await llm.chat("count", response_format={"type": "json_object"}, max_tokens=20)
    assert call.text().lstrip().startswith("{")


@pytest.mark.parametrize(
    "params",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nope"}}}},
        {"guided_regex": "[0-9"},
        {"grammar": "root ::= nope"},
    ],
)
async def test_invalid_grammar_fails_only_its_call(llm: RunningWorker, params: dict[str, Any]) -> None:
    neighbour = asyncio.ensure_future(llm.chat("count", max_tokens=400, ignore_eos=True))
    with pytest.raises(CallFailed, match="cannot be applied") as told:
        await llm.chat("count", **params)
    assert told.value.status == 400
    assert (await neighbour).text().startswith(COUNTED)


async def test_required_tools_are_called(model: Callable[..., Path]) -> None:
    folder = model("tiny-chat", chat_template__jinja=HERMES)
    async with worker("chat", folder) as running:
        assert "tools" in running.facts["capabilities"]
        call = await running.chat("count", tools=[TOOL], tool_choice="required")
        deltas = [part[1]["tool_calls"][0] for part in call.parts if isinstance(part[1], dict)]
        assert deltas[0]["function"]["name"] == "look_up"
        assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == {"word": "blue"}
        assert call.finish() == "tool_calls"
        assert (await running.chat("count", tools=[TOOL], tool_choice="none")).finish() == "stop"
        with pytest.raises(CallFailed, match="tool_choice"):
            await running.chat("count", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "no"}})


async def test_unloadable_model_is_reported(model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed):
        async with worker("chat", tmp_path / "nothing"):
            pass
    with pytest.raises(WorkerFailed, match="tool_parser"):
        async with worker("chat", SAMPLES / "tiny-chat", tool_parser="nope"):
            pass


async def test_end_of_stdin_ends_a_busy_worker() -> None:
    async with worker("chat", SAMPLES / "tiny-chat") as running:
        call = running.begin("chat", messages=[{"role": "user", "content": "count"}], params={"ignore_eos": True})
        await call.begun()
        assert running.process.stdin is not None
        running.process.stdin.close()
        assert await asyncio.wait_for(running.process.wait(), LIMIT) == 0
        with pytest.raises(EOFError):
            await call.done()
