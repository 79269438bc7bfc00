"""Every plugin under a host that changes messages as the AOG server does: tests/conformance/host/aog.go."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import pytest

from build import build_linked
from engine_plugin.models.info import bundled_samples
from tests.conformance.gohost import executable_of
from tests.conformance.test_ollama import ollama_plugin
from tests.engines.ollama.contract.handle import ContractServer
from tests.engines.openai.contract import Contract
from tests.shipped import shipped, write_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.gohost import Check, GoHost

if shutil.which("go") is None:
    pytest.skip("Go is not installed: the Go host was not run", allow_module_level=True)

EVENTS = (
    b": a comment\r\n\r\n"
    b"event: message\r\n"
    b'data: {"id":"1","created":1796040000,"choices":[{"index":0,"delta":{"content":"1 2"}}]}\r\n\r\n'
    b'data:{"id":"1","created":1796040001,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\r\n\r\n'
    b"data: [DONE]\r\n\r\n"
)
"""A stream as some servers send it: comments, names of events, line ends of two bytes, no space after the colon."""


def under_aog(
    go_host: GoHost, executable: Path, scratch: Path, models: dict[str, str], pull: str = "", **environ: str
) -> list[Check]:
    named = ",".join(f"{service}={model}" for service, model in models.items())
    arguments = ["-models", named, *(["-pull", pull] if pull else [])]
    return go_host.run("aog", executable, scratch, *arguments, **environ)


@pytest.mark.promise("H1", "H2", "H3", "H4", "H5", "H6")
def test_openvino_plugin_answers_all_eight_services_under_aog(
    go_host: GoHost, eight_services: Path, scratch: Path
) -> None:
    pytest.importorskip("openvino_genai")
    samples = bundled_samples("openvino")
    speech = samples.default_for("speech-to-text")
    models = {"generate": samples.default_for("chat"), "speech-to-text-ws": speech}
    for kind in ("chat", "embed", "rerank", "text-to-image", "speech-to-text", "text-to-speech"):
        models[kind] = samples.default_for(kind)
    mine = samples.get(models["chat"])
    assert mine is not None
    shutil.copytree(mine.path, scratch / "mine")
    checks = under_aog(go_host, eight_services, scratch, models, str(scratch / "mine"))
    assert {"/v1 chat streamed", "/v1 generate", *models} - {"chat", "generate"} <= {check.name for check in checks}


@pytest.mark.promise("H2", "H3", "H4", "H5", "H6", "H9")
def test_llamacpp_plugin_works_under_aog(go_host: GoHost, plugin: Path, scratch: Path) -> None:
    samples = bundled_samples("gguf")
    models = {kind: samples.default_for(kind) for kind in ("chat", "embed", "rerank")}
    sample = samples.get(models["chat"])
    assert sample is not None
    shutil.copy(sample.path, scratch / "mine.gguf")
    under_aog(go_host, plugin, scratch, models | {"generate": models["chat"]}, str(scratch / "mine.gguf"))


@pytest.mark.promise("H2", "H4", "H5", "H6")
@pytest.mark.parametrize("native", [False, True], ids=["openai", "native"])
def test_ollama_plugin_works_under_aog(go_host: GoHost, scratch: Path, native: bool) -> None:
    models = {"chat": "fresh:latest", "generate": "fresh:latest"}
    (scratch / "mine.gguf").write_bytes(b"GGUF" + bytes(4096))
    server = ContractServer(scratch / "models")
    try:
        executable = ollama_plugin(scratch, native=native)
        under_aog(go_host, executable, scratch, models, str(scratch / "mine.gguf"), OLLAMA_HOST=server.address)
    finally:
        server.close()


@pytest.mark.promise("H2", "H4", "H5", "H6")
async def test_openai_plugin_works_under_aog(go_host: GoHost, scratch: Path) -> None:
    server = Contract("vllm")
    server.stream = EVENTS
    await server.start()
    try:
        shape = shipped("openai")
        shape["provider"]["engine_host"] = server.url
        write_manifest(scratch, shape)
        executable = executable_of(build_linked(scratch / "plugin.yaml", scratch / "plugins"))
        await asyncio.to_thread(under_aog, go_host, executable, scratch, {"chat": "qwen3-8b"})
    finally:
        await server.stop()
