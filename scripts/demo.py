"""See the plugin at work (`make demo`): our host discovers it, spawns it and talks to it, as any host would.

python scripts/demo.py [PROMPT]

Everything happens below build/: the plugins directory, the engine's software and the models. Nothing is left
running.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from build import build_linked
from engine_plugin.errors import EnginePluginError
from engine_plugin.host import PluginRegistry, events
from pins import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine_plugin.host import PluginClient

PLUGINS = ROOT / "build" / "demo" / "plugins"
DATA = ROOT / "build" / "demo" / "data"
PLUGIN, MODEL = "llamacpp-plugin", "tiny-chat"
PROMPT = "Hello, who are you?"
SAMPLING = {"max_tokens": 64, "temperature": 0}

console = Console(highlight=False)


def say(what: str, result: str = "") -> None:
    """One line of the demo: what was done, and what came of it."""
    console.print(f"[bold green]✓[/] {what}" + (f"  [dim]{result}[/]" if result else ""), soft_wrap=True)


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
        with step("InstallEngine (pip, about 40 MB the first time)") as outcome:
            outcome["result"] = (await plugin.install_engine()).partition(" in ")[0]
    await plugin.init_env()
    with step("StartEngine") as outcome:
        await plugin.start_engine()
        outcome["result"] = f"llama.cpp {await plugin.get_version()}, {await plugin.health_check()}"


async def pull(plugin: PluginClient) -> None:
    """PullModelStream with a progress bar."""
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(MODEL, total=None)
        async for event in plugin.pull_model_stream(MODEL):
            if event.get("total"):
                bars.update(bar, total=event["total"], completed=event.get("completed", 0))
    say(f"PullModelStream {MODEL}")
    with step(f"LoadModel {MODEL}"):
        await plugin.load_model(MODEL)
    models = await plugin.list_models()
    say("ListModels", ", ".join(f"{model['name']} {model['size'] >> 10} KiB" for model in models))


async def chat(plugin: PluginClient, prompt: str) -> None:
    """A streamed chat, printed as it comes, with its speed."""
    console.print("\n[bold]you:[/] ", end="")
    console.print(prompt, markup=False, soft_wrap=True)
    console.print("[bold]tiny-chat:[/] ", end="")
    began = time.monotonic()
    first = 0.0
    timings: dict[str, Any] = {}
    request = {
        "messages": [{"role": "user", "content": prompt}],
        "stream_options": {"include_usage": True},
        **SAMPLING,
    }
    async with plugin.stream("chat", request) as chunks:
        async for event in events(chunks):
            first = first or time.monotonic() - began
            timings = event.get("timings") or timings
            for choice in event.get("choices", []):
                console.print(choice["delta"].get("content") or "", end="", markup=False)
    tokens, took = timings.get("predicted_n", 0), time.monotonic() - began
    console.print()
    say("chat", f"{tokens} tokens, first after {first * 1000:.0f} ms, {tokens / took:.0f} tokens/s end to end")


async def other_services(plugin: PluginClient) -> None:
    """One call each of generate, embed and rerank."""
    text = await plugin.invoke("generate", {"prompt": "Once upon a time", **SAMPLING})
    say("generate", repr(text["choices"][0]["text"]))
    vectors = await plugin.invoke("embed", {"input": ["a cat", "a dog"]})
    first = vectors["data"][0]["embedding"]
    say("embed", f"{len(vectors['data'])} vectors of {len(first)} numbers: {first[0]:.3f}, {first[1]:.3f}, …")
    ranked = await plugin.invoke("rerank", {"query": "cat", "documents": ["a car", "a cat", "a cap"]})
    scores = ", ".join(f"#{hit['index']} {hit['relevance_score']:.3f}" for hit in ranked["results"])
    say("rerank", scores)
    running = await plugin.running_models()
    say("GetRunningModels", ", ".join(model["name"] for model in running))


async def demonstrate(prompt: str) -> None:
    """The whole tour."""
    registry = PluginRegistry.discover(PLUGINS)
    say("discovered", f"{', '.join(registry.names)} in build/demo/plugins")
    with step("spawned by the go-plugin handshake") as outcome:
        plugin = await registry.launch(PLUGIN, env={"AOG_DATA_DIR": str(DATA)})
        outcome["result"] = f"pid {plugin.pid}, {plugin.address.partition(':')[0]} socket"
    family: list[psutil.Process] = []
    async with plugin:
        manifest = await plugin.get_manifest()
        say("GetManifest", "services: " + ", ".join(spec["service_name"] for spec in manifest["services"]))
        await prepare_engine(plugin)
        await pull(plugin)
        await chat(plugin, prompt)
        await other_services(plugin)
        me = psutil.Process(plugin.pid)
        family = [me, *me.children(recursive=True)]
        engines = len(family) - 1
        with step("StopEngine"):
            await plugin.stop_engine()
    left = [process.pid for process in family if process.is_running()]
    if left:
        raise EnginePluginError(f"still running: {left}")
    say(
        "plugin killed", f"exit status {plugin.returncode}; of {engines} engine processes and the plugin none is left"
    )


def main() -> None:
    prompt = " ".join(sys.argv[1:]).strip() or PROMPT
    # The plugin's log is for a host; here only what goes wrong is of interest.
    os.environ.setdefault("ENGINE_PLUGIN_LOG", "warn")
    build_linked(ROOT / "plugin.yaml", PLUGINS)  # a plugins directory whose launcher runs this checkout
    try:
        asyncio.run(demonstrate(prompt))
    except EnginePluginError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    console.print(
        "\nThe sample models are tiny: they prove the way, not what models can do. "
        "Pull a real one: [bold].venv/bin/engine-plugin models pull PATH-OR-URL.gguf[/]",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
