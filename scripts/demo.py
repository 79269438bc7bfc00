"""The demo (`make demo`): a host discovers the plugin, starts it and calls all eight services.

python scripts/demo.py [PROMPT]

All files are below build/demo/: the plugins directory, the engine's software, the models, the picture and the sound.
No process is left running.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
import wave
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

from build import build_linked
from engine_plugin.errors import EnginePluginError
from engine_plugin.host import PluginRegistry, events
from pins import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from engine_plugin.host import BidiCall, PluginClient

PLACE = ROOT / "build" / "demo"
PLUGINS = PLACE / "plugins"
DATA = PLACE / "data"
PICTURE, SOUND = PLACE / "picture.png", PLACE / "speech.wav"
PLUGIN = "openvino-plugin"
PROMPT = "What is the capital of France?"
SENTENCE = "Hello."
PIECE_S, QUIET_S = 0.1, 1.0
SAMPLING = {"max_tokens": 64, "temperature": 0}

console = Console(highlight=False)


def say(what: str, result: str = "") -> None:
    """Print one line of the demo: the step and its result."""
    console.print(f"[bold green]✓[/] {what}" + (f"  [dim]{result}[/]" if result else ""), soft_wrap=True)


def shown(path: object) -> str:
    """A path relative to the checkout."""
    return os.path.relpath(str(path), ROOT)


@contextmanager
def step(what: str) -> Iterator[dict[str, str]]:
    """A step that may take a while: a spinner, then its line with the seconds it took."""
    began = time.monotonic()
    outcome: dict[str, str] = {}
    with console.status(f"{what} …"):
        yield outcome
    say(what, f"{outcome.get('result', '')} ({time.monotonic() - began:.1f} s)".strip())


async def prepare_engine(plugin: PluginClient) -> None:
    """CheckEngine, InstallEngine where needed, StartEngine."""
    check = await plugin.check_engine()
    say("CheckEngine", check.detail)
    if not check.installed:
        with step("InstallEngine (pip, about 140 MB the first time)") as outcome:
            outcome["result"] = (await plugin.install_engine()).partition(" in ")[0]
    await plugin.init_env()
    with step("StartEngine") as outcome:
        await plugin.start_engine()
        outcome["result"] = f"OpenVINO {await plugin.get_version()}, {await plugin.health_check()}"


async def pull(plugin: PluginClient, names: list[str]) -> None:
    """PullModelStream with a progress bar for each model, then ListModels."""
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        for name in names:
            bar = bars.add_task(name, total=None)
            async for event in plugin.pull_model_stream(name):
                if event.get("total"):
                    bars.update(bar, total=event["total"], completed=event.get("completed", 0))
    models = await plugin.list_models()
    say("PullModelStream, ListModels", ", ".join(f"{model['name']} {model['size'] >> 10} KiB" for model in models))


async def chat(plugin: PluginClient, prompt: str) -> None:
    """A streamed chat, printed as it comes, with its speed."""
    with step("LoadModel tiny-chat"):
        await plugin.load_model("tiny-chat")
    console.print("\n[bold]you:[/] ", end="")
    console.print(prompt, markup=False, soft_wrap=True)
    console.print("[bold]tiny-chat:[/] ", end="")
    began = time.monotonic()
    first = 0.0
    usage: dict[str, Any] = {}
    request = {
        "messages": [{"role": "user", "content": prompt}],
        "stream_options": {"include_usage": True},
        **SAMPLING,
    }
    async with plugin.stream("chat", request) as chunks:
        async for event in events(chunks):
            first = first or time.monotonic() - began
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                console.print(choice["delta"].get("content") or "", end="", markup=False)
    tokens, took = usage.get("completion_tokens", 0), time.monotonic() - began
    console.print()
    say("chat", f"{tokens} tokens, first after {first * 1000:.0f} ms, {tokens / took:.0f} tokens/s end to end")


async def texts(plugin: PluginClient) -> None:
    """One call each of generate, embed and rerank."""
    text = await plugin.invoke("generate", {"prompt": "one two three", **SAMPLING, "max_tokens": 12})
    say("generate", repr(text["choices"][0]["text"]))
    vectors = await plugin.invoke("embed", {"input": ["a cat", "a dog"]})
    first = vectors["data"][0]["embedding"]
    say("embed", f"{len(vectors['data'])} vectors of {len(first)} numbers: {first[0]:.3f}, {first[1]:.3f}, …")
    ranked = await plugin.invoke("rerank", {"query": "cat", "documents": ["a car", "a cat", "a cap"]})
    scores = ", ".join(f"#{hit['index']} {hit['relevance_score']:.3f}" for hit in ranked["results"])
    say("rerank", scores)


async def picture(plugin: PluginClient) -> None:
    """A streamed text-to-image with its steps, saved."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
    request = {"prompt": "a cat in the snow", "size": "64x64", "num_inference_steps": 8, "seed": 7, "stream": True}
    answer: dict[str, Any] = {}
    steps, began = 0, time.monotonic()
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("drawing", total=None)
        async with plugin.stream("text-to-image", request) as chunks:
            async for event in events(chunks):
                if "step" in event:
                    steps = event["step"]
                    bars.update(bar, completed=steps, total=event.get("total"))
                elif "data" in event:
                    answer = event
    PICTURE.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    took = time.monotonic() - began
    say("text-to-image", f"{steps} steps in {took:.1f} s, saved as {shown(PICTURE)}")


async def speech(plugin: PluginClient) -> None:
    """text-to-speech, saved; speech-to-text of the same sound; and again while it is spoken."""
    with step("text-to-speech") as outcome:
        answer = await plugin.invoke("text-to-speech", {"text": SENTENCE})
        SOUND.write_bytes(base64.b64decode(answer["audio"]))
        outcome["result"] = f"{answer['duration']:.1f} s of sound, saved as {shown(SOUND)}"
    with step("speech-to-text") as outcome:
        request = {"audio": base64.b64encode(SOUND.read_bytes()).decode()}
        heard = await plugin.invoke("speech-to-text", request)
        outcome["result"] = f"{len(heard['segments'])} segments, {len(heard['text'])} characters"
    with step("speech-to-text-ws") as outcome:
        seen: dict[str, int] = {}
        async for event in live(plugin):
            seen[event["header"]["event"]] = seen.get(event["header"]["event"], 0) + 1
        outcome["result"] = ", ".join(f"{count} × {name}" for name, count in seen.items())


async def live(plugin: PluginClient) -> AsyncIterator[dict[str, Any]]:
    """The events of a live transcription of the saved sound, which is sent as if it were spoken just now."""
    async with plugin.invoke_bidi("speech-to-text-ws") as conversation:
        sending = asyncio.create_task(send(conversation))
        try:
            async for message in conversation:
                event: dict[str, Any] = json.loads(message.data)
                yield event
                if event["header"]["event"] == "task-failed":
                    raise EnginePluginError(f"speech-to-text-ws: {event['header'].get('error_message')}")
                if event["header"]["event"] == "task-finished":
                    return
        finally:
            sending.cancel()
            await asyncio.wait({sending})


async def send(conversation: BidiCall) -> None:
    """The samples of the sound in pieces of a tenth of a second, between quiet ones, then the command to finish."""
    with wave.open(str(SOUND)) as sound:
        rate = sound.getframerate()
        metadata = {"format": "pcm", "sample_rate": str(rate)}
        quiet = bytes(int(rate * QUIET_S) * sound.getsampwidth())
        await conversation.send(quiet, metadata=metadata)
        while piece := sound.readframes(int(rate * PIECE_S)):
            await conversation.send(piece)
        await conversation.send(quiet)
    await conversation.send(json.dumps({"action": "finish-task"}))
    await conversation.done_sending()


def runs(process: psutil.Process) -> bool:
    """Whether it still does. One that has ended is listed until its parent, or init, takes note of it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def demonstrate(prompt: str) -> None:
    """The whole tour."""
    registry = PluginRegistry.discover(PLUGINS)
    say("discovered", f"{', '.join(registry.names)} in {shown(PLUGINS)}")
    with step("spawned by the go-plugin handshake") as outcome:
        plugin = await registry.launch(PLUGIN, env={"AOG_DATA_DIR": str(DATA)})
        outcome["result"] = f"pid {plugin.pid}, {plugin.address.partition(':')[0]} socket"
    family: list[psutil.Process] = []
    async with plugin:
        manifest = await plugin.get_manifest()
        say("GetManifest", "services: " + ", ".join(spec["service_name"] for spec in manifest["services"]))
        await prepare_engine(plugin)
        await pull(plugin, list(dict.fromkeys(spec["default_model"] for spec in manifest["services"])))
        await chat(plugin, prompt)
        await texts(plugin)
        await picture(plugin)
        await speech(plugin)
        running = await plugin.running_models()
        say("GetRunningModels", ", ".join(model["name"] for model in running))
        me = psutil.Process(plugin.pid)
        family = [me, *me.children(recursive=True)]
        engines = len(family) - 1
        with step("StopEngine"):
            await plugin.stop_engine()
    left = [process.pid for process in family if runs(process)]
    if left:
        raise EnginePluginError(f"still running: {left}")
    say("plugin killed", f"exit status {plugin.returncode}; the plugin and all {engines} engine processes have ended")


def main() -> None:
    prompt = " ".join(sys.argv[1:]).strip() or PROMPT
    # Progress is shown by the demo itself; of the plugin's log only warnings and errors are useful here.
    os.environ.setdefault("ENGINE_PLUGIN_LOG", "warn")
    build_linked(ROOT / "plugin.yaml", PLUGINS)  # a plugins directory whose launcher runs this checkout
    try:
        asyncio.run(demonstrate(prompt))
    except EnginePluginError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    console.print(
        "\nThe sample models are tiny and only show that each service works: the picture is noise, the speech a hum, "
        "the transcript meaningless. Pull a real model: "
        "[bold].venv/bin/engine-plugin models pull OpenVINO/Qwen3-0.6B-int8-ov[/]",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
