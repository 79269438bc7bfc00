"""Write docs/troubleshooting.md: every entry of engine_plugin/catalogue.py, with an example of what it says.

With `--check` it writes nothing and fails when the page is out of date. The examples are here: made of each entry's
own template, so that the page shows what a person sees.
"""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

from engine_plugin.catalogue import FAMILIES
from pages import write_page
from pins import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from engine_plugin.failures import Entry

__all__ = ["EXAMPLES", "PAGE", "main", "page"]

PAGE = ROOT / "docs" / "troubleshooting.md"

_WIDTH = 118
_SETTINGS = "Start in mode auto or cpu, or install the driver"

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "engine-not-running": {},
    "server-unreachable": {
        "server": "Ollama server",
        "address": "http://127.0.0.1:11434",
        "reason": "connection refused",
        "start": "`ollama serve`",
        "otherwise": "have the plugin run its own: call InstallEngine",
    },
    "engine-not-installed": {"found": "llama.cpp is not installed"},
    "own-software-unusable": {
        "found": "/opt/llama/llama-server is not there",
        "advice": "Correct engine.llama_server in plugin.yaml",
    },
    "software-too-old": {
        "software": "the Ollama at http://127.0.0.1:11434",
        "found": "0.4.2",
        "wanted": "0.5.0",
        "upgrade": "Upgrade it: https://ollama.com/download",
    },
    "device-missing": {
        "where": "mode",
        "asked": "gpu",
        "software": "llama.cpp",
        "device": "GPU",
        "devices": "AMD EPYC",
        "way": _SETTINGS,
    },
    "model-missing": {
        "model": "qwen3:7b",
        "hint": "Did you mean qwen3:8b? ",
        "way": "Pull it: PullModel qwen3:7b",
    },
    "default-model-missing": {
        "model": "qwen3:8b",
        "service": "chat",
        "place": "/home/me/.local/share/engine-plugin/engines/ollama/default-models-ollama.json",
        "way": ", or pull it: PullModel qwen3:8b",
    },
    "model-kind-mismatch": {"model": "bge-m3", "kind": "embed", "service": "chat", "wanted": "chat"},
    "disk-full": {
        "folder": "/home/ada/.local/share/engine-plugin/models",
        "free": "2.1 GiB",
        "free_bytes": 2254857830,
        "what": "the download",
        "needed": "4.9 GiB",
        "needed_bytes": 5261334938,
        "spare": "64 MiB",
    },
    "disk-filled": {
        "folder": "/home/ada/.local/share/engine-plugin/models",
        "reason": "No space left on device",
        "arrived": "3221225472 of 5261334938",
        "free": "0 bytes are free",
    },
    "disk-write-refused": {"place": "/srv/models/.partial/qwen3", "reason": "Permission denied"},
    "memory-insufficient": {
        "model": "qwen3-32b",
        "needed": "19 GiB",
        "limit": "engine.memory_limit in plugin.yaml allows 16 GiB",
    },
    "queue-full": {"waiting": "64 requests wait already (engine.max_queue in plugin.yaml)"},
    "context-exceeded": {"said": "the request has 9216 tokens, the model's context 8192"},
    "port-taken": {
        "port": 40213,
        "holder": "nginx (pid 812)",
        "fix": "Start again, which takes another port, or end that process",
    },
    "address-taken": {"address": "unix:/run/user/1000/plugin.sock", "holder": "address already in use"},
    "key-missing": {"server": "vLLM", "address": "https://gpu.example/v1", "variable": "OPENAI_API_KEY"},
    "key-refused": {
        "server": "vLLM",
        "address": "https://gpu.example/v1",
        "reason": "HTTP 401",
        "variable": "OPENAI_API_KEY",
    },
    "key-unsafe": {
        "address": "http://192.168.1.7:8000",
        "variable": "OPENAI_API_KEY",
        "option": "engine.allow_plain_http: true",
    },
    "sign-in-required": {
        "model": "gpt-oss:120b-cloud",
        "server": "ollama.com",
        "url": "https://ollama.com/connect?key=…",
    },
    "cloud-disabled": {
        "model": "gpt-oss:120b-cloud",
        "server": "the Ollama server",
        "said": "cloud is disabled",
        "option": "take OLLAMA_NO_CLOUD from its environment",
    },
    "hub-unreachable": {
        "source": "hf:OpenVINO/Qwen3-0.6B-int8-ov",
        "reason": "to https://huggingface.co: Name or service not known",
        "settings": "the network, HF_ENDPOINT, HTTPS_PROXY",
    },
    "hub-access-refused": {"said": "hf:meta-llama/Llama-3.2-1B: the hub refused access (HTTP 403)"},
    "checksum-mismatch": {
        "place": "https://example.org/m.gguf: the file",
        "found": "sha256:9f86d0…",
        "wanted": "sha256:2c26b4…",
        "fix": "What arrived was deleted; pull again, and correct the digest or the source if it stays so",
    },
    "service-unsupported": {
        "engine": "the engine llamacpp",
        "service": "text-to-image",
        "able": "chat, embed, generate, rerank",
    },
    "stream-unsupported": {"service": "embed", "engine": "llama.cpp"},
    "deadline-exceeded": {
        "what": "chat",
        "seconds": 60.0,
        "remedy": "Raise services[].timeout in plugin.yaml, or make it negative for no deadline",
    },
}

_HEAD = """\
# When something goes wrong

A failure that a person can mend says what it is and what to do, in one line, with the numbers of the moment. This
page lists all of them, each with an example as a host gets it and the code on the wire. The command line replaces the
name of an rpc by its own command: PullModel X becomes `engine-plugin models pull X`. `lint` finds what is wrong in a
plugin.yaml before anything is started; `status` shows what runs, where, and which models.

"""


def _wrapped(text: str, first: str = "", others: str = "") -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others or first,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _section(entry: Entry[Any]) -> Iterator[str]:
    yield f"### {entry.id}"
    yield _wrapped(entry.text(**EXAMPLES[entry.id]), "> ")
    yield _wrapped(f"Code {entry.raises.code}. {entry.cause}")
    yield _wrapped(f"**What to do:** {entry.remedy}")


def page() -> str:
    """The page as it should be. Raises KeyError or TypeError for an entry without an example that fits."""
    parts = [
        part
        for title, entries in FAMILIES.items()
        for part in (f"## {title}", *(text for entry in entries for text in _section(entry)))
    ]
    return _HEAD + "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    return write_page(PAGE, page(), "troubleshooting", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
