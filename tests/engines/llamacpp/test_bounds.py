"""Computation that a model file or a request causes in llama.cpp is limited and does not block other calls."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import gguf
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from engine_plugin.engines.llamacpp import abandoned_work, server
from engine_plugin.engines.llamacpp.grammars import check_grammars
from engine_plugin.errors import EnginePluginError, InvalidRequestError, PullError
from engine_plugin.models.store import PullRequest
from tests.patience import LIMIT, pace

from .running import HELLO, REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Serve
    from .running import RunningPlugin

pytestmark = pytest.mark.promise("X4")

SAMPLE = REPOSITORY / "engine_plugin/samples/gguf/tiny-chat.gguf"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
GROWING = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
BURN = {"messages": [{"role": "user", "content": "burn"}], "model": "hostile", "max_tokens": 4}


def model_with(template: str, path: Path) -> Path:
    """The sample with another chat template."""
    reader = gguf.GGUFReader(SAMPLE)
    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    writer = gguf.GGUFWriter(path, architecture.contents())
    template_key = gguf.Keys.Tokenizer.CHAT_TEMPLATE
    new = {template_key: MetadataDetails(gguf.GGUFValueType.STRING, template)}
    copy_with_new_metadata(reader, writer, new, [])
    return path


async def pull(running: RunningPlugin, path: Path) -> None:
    async for _ in running.engine.pull_model(PullRequest(model=str(path))):
        pass


def behind(hostile: str) -> str:
    """A template that is endless for some conversations only."""
    return f"{{% if messages[0]['content'] == 'burn' %}}{hostile}{{% endif %}}{{{{ messages[0]['content'] }}}}"


@pytest.mark.parametrize("hostile", [ENDLESS, GROWING], ids=["endless", "growing"])
async def test_endless_template_is_rejected_before_llama_cpp_renders_it(
    serve: Serve, scratch: Path, monkeypatch: pytest.MonkeyPatch, hostile: str
) -> None:
    monkeypatch.setattr(server, "WITHIN", 1.5)
    running = await serve()
    await pull(running, model_with(behind(hostile), scratch / "hostile.gguf"))
    assert (await running.client.invoke("chat", HELLO | {"model": "hostile", "max_tokens": 4}))["choices"]
    burning = asyncio.create_task(running.client.invoke("chat", BURN))
    assert (await running.client.invoke("generate", {"model": "hostile", "prompt": "a", "max_tokens": 1}))["choices"]
    with pytest.raises(
        InvalidRequestError, match=r"^messages: rendering with the model's chat template exceeds a limit: "
    ):
        await burning
    assert (await running.client.invoke("chat", HELLO | {"model": "hostile", "max_tokens": 4}))["choices"]


@pytest.mark.parametrize("hostile", [ENDLESS, GROWING], ids=["endless", "growing"])
async def test_endless_template_is_rejected_during_the_pull(serve: Serve, scratch: Path, hostile: str) -> None:
    running = await serve(start=False)
    with pytest.raises(PullError, match=r"its chat template takes more than (5 s|512 MiB) to render one word"):
        await pull(running, model_with(hostile, scratch / "hostile.gguf"))


async def test_server_that_continues_cancelled_calls_is_restarted(
    serve: Serve, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a template that passes the trial but does not end in llama.cpp."""
    monkeypatch.setattr(abandoned_work, "TIMEOUT", 1.0)
    running = await serve(health_interval=0.2, restart_backoff=0.01)
    await pull(running, model_with(behind(ENDLESS), scratch / "hostile.gguf"))
    await running.client.load_model("hostile")
    held = running.server("hostile")
    await held.set_templates(None)
    run = held.latest_run
    assert run is not None
    with pytest.raises(EnginePluginError):
        await running.client.invoke("chat", BURN, timeout=pace(1.0))
    await asyncio.wait_for(run.over.wait(), LIMIT)
    assert re.search(r"it has computed for \S+ s for disconnected callers", run.failure)
    assert (await running.client.invoke("chat", HELLO | {"model": "hostile", "max_tokens": 4}))["choices"]


def schema(shape: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": shape}}}


MANY = [f"v{number}" for number in range(100_000)]
TOO_MUCH = {
    "enum": (schema({"type": "string", "enum": MANY}), "response_format: "),
    "branches": (schema({"anyOf": [{"const": value} for value in MANY[:1001]]}), "response_format: 1001 values"),
    "object": ({"response_format": {"type": "json_object", "schema": {"enum": MANY[:1001]}}}, "response_format: "),
    "bare": ({"json_schema": {"enum": MANY[:1001]}}, "json_schema: "),
    "properties": (schema({"properties": {key: {} for key in MANY[:501]}}), "response_format: 501 properties"),
    "in parts": (schema({"items": [{"enum": MANY[:600]}, {"enum": MANY[:600]}]}), "response_format: 1200 values"),
    "pattern": (schema({"type": "string", "pattern": "^(a{0,1000}){0,1000}$"}), "response_format: pattern: "),
    "open pattern": (schema({"pattern": "((ab|c){300,}x){300}"}), "response_format: pattern: "),
    "references": (
        schema(
            {
                "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)},
                "$ref": "#/$defs/d0",
            }
        ),
        "response_format: 1073741824 alternatives",
    ),
    "rules": (
        {"grammar": "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1} | r{i + 1}" for i in range(30)), 'r30 ::= "a"'])},
        "grammar: 2147483648 expanded rules",
    ),
    "grammar": ({"grammar": "root ::= " + " | ".join(f'"{value}"' for value in MANY[:1001])}, "grammar: 1001 alter"),
    "loops": ({"grammar": 'root ::= (("a"{0,300}){0,300})'}, "grammar: "),
    "tool": (
        {"tools": [{}, {"type": "function", "function": {"name": "f", "parameters": {"enum": MANY[:1001]}}}]},
        "tools[1].function.parameters: 1001 values",
    ),
    "text": (schema({"description": "x" * 300_000}), "response_format: 3"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_grammar_that_would_block_other_calls_is_rejected_by_field(name: str) -> None:
    request, begin = TOO_MUCH[name]
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(begin)}.*the limit is "):
        check_grammars(request)


@pytest.mark.parametrize(
    ("request_", "begin"),
    [
        (schema({"pattern": "^a{5,3}$"}), "response_format: pattern: in {5,3} the minimum"),
        ({"grammar": 'root ::= "a"{5,3}'}, "grammar: in {5,3} the minimum"),
        (
            schema({"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(4000)}, "$ref": "#/$defs/d0"}),
            "response_format: references are nested too deeply",
        ),
        ({"grammar": "\n".join(f"r{i} ::= r{i + 1}" for i in range(4000))}, "grammar: rules are nested too deeply"),
        (schema({"minItems": 5, "maxItems": 3}), "response_format: minItems (5) exceeds maxItems (3)"),
        (
            schema({"properties": {"a": {"minLength": 2, "maxLength": 1}}}),
            "response_format: minLength (2) exceeds",
        ),
    ],
)
def test_grammar_that_would_crash_llama_cpp_is_rejected(request_: dict[str, Any], begin: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(begin)}"):
        check_grammars(request_)


NODE = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}


@pytest.mark.parametrize(
    "request_",
    [
        {},
        schema({"$defs": {"node": NODE}, "$ref": "#/$defs/node"}),
        schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        schema({"pattern": r"^[{5,3}]\{5,3\}$"}),
        schema({"$ref": "#/nowhere/at/all", "minLength": 2.5, "maxLength": "x"}),
        {"grammar": 'root ::= value\nvalue ::= "[" value ("," value)* "]" | "{5,3}" | [{5,3}] # {5,3}'},
        schema({"enum": MANY[:1000]}),
        schema({"type": "string", "pattern": r"^[a-z]{1,64}(\.[a-z]{1,64}){0,8}@\(x\){2}$"}),
        schema({"type": "array", "items": {"type": "string", "maxLength": 100_000}, "maxItems": 100_000}),
        {"grammar": 'root ::= "a"{0,1000} b{2}\nb ::= [a-z]+'},
        {"response_format": {"type": "text"}, "tools": [{"function": {"name": "f"}}], "json_schema": None},
        {"response_format": 5, "tools": 5, "grammar": 5, "json_schema": "x"},
        schema({"properties": 5, "enum": 5, "pattern": 5}),
        {"grammar": "{5}{{)(("},
    ],
)
def test_grammar_of_usual_size_is_accepted(request_: dict[str, Any]) -> None:
    check_grammars(request_)


async def test_enum_of_100_000_values_is_rejected_at_once(serve: Serve) -> None:
    running = await serve()
    with pytest.raises(InvalidRequestError, match=r"^response_format: .*the limit is "):
        await running.client.invoke("chat", HELLO | schema({"type": "string", "enum": MANY}))
    assert (await running.client.invoke("chat", HELLO | schema({"enum": ["blue"]})))["choices"]
