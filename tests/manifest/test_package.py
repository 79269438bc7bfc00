"""GetManifest's JSON, the default plugin.yaml, and what importing the package costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_plugin import manifest as package
from engine_plugin.manifest import PLATFORM_KEYS, SERVICE_NAMES, lint, load_manifest
from tests.manifest.conftest import GOOD, HERE, WITH_PROGRAM, changed
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
ROOT_MANIFEST = ROOT / "plugin.yaml"
CHAT = "  - service_name: chat\n"


def test_to_json_matches_what_a_go_host_decodes(write: Callable[..., Path], environ: dict[str, str]) -> None:
    extra = "    timeout: 90\n    support_models: [m]\n    auth_fields: [key]\n"
    secret = "  api_key: very-secret\n"
    program = WITH_PROGRAM.removeprefix(GOOD)
    manifest = load_manifest(write(changed(CHAT, CHAT + extra) + secret + program), environ)
    raw = manifest.to_json()
    assert b"very-secret" not in raw
    body = json.loads(raw)
    assert list(body) == ["version", "provider", "services", "platforms", "resources"]
    assert body["provider"]["name"] == "sample-plugin"
    assert all(isinstance(value, str) for value in body["provider"].values())
    (service,) = body["services"]
    kinds: dict[str, type] = {"auth_fields": list, "support_models": list, "timeout": int, "capabilities": dict}
    assert {key: type(value) for key, value in service.items()} == {key: kinds.get(key, str) for key in SERVICE_KEYS}
    assert service["timeout"] == 90
    assert service["capabilities"] == {"support_streaming": False, "support_bidirectional": False}
    assert body["platforms"] == {HERE: {"executable": "bin/here/plugin", "dependencies": []}}
    assert body["resources"] == {"data_dir": str(manifest.data_dir)}


SERVICE_KEYS = (
    "service_name",
    "task_type",
    "protocol",
    "expose_protocol",
    "endpoint",
    "auth_type",
    "auth_fields",
    "default_model",
    "support_models",
    "config_ref",
    "timeout",
    "capabilities",
)


def test_manifest_survives_a_round_trip_through_json(write: Callable[..., Path], environ: dict[str, str]) -> None:
    manifest = load_manifest(write(ROOT_MANIFEST.read_bytes()), environ)
    body = json.loads(manifest.to_json())
    body["engine"] = {"name": manifest.engine_name, **manifest.engine_options}
    again = load_manifest(write(json.dumps(body, indent="\t"), "plugin.json"), environ)
    for name in ("plugin_dir", "version", "provider", "services", "platforms", "data_dir", "engine_name"):
        assert getattr(again, name) == getattr(manifest, name)
    assert again.engine_options == manifest.engine_options
    assert again.resources == manifest.resources


def test_default_manifest_is_valid(environ: dict[str, str]) -> None:
    assert lint(ROOT_MANIFEST, environ=environ) == []
    manifest = load_manifest(ROOT_MANIFEST, environ)
    services = manifest.services.values()
    assert tuple(manifest.services) == SERVICE_NAMES
    streaming = {service.service_name for service in services if service.capabilities.support_streaming}
    assert streaming == {"chat", "generate", "text-to-image"}
    both_ways = {service.service_name for service in services if service.capabilities.support_bidirectional}
    assert both_ways == {"speech-to-text-ws"}
    timeouts = {service.service_name: service.timeout for service in services if service.timeout}
    assert timeouts == {"text-to-image": -1, "speech-to-text": -1, "speech-to-text-ws": -1}
    assert set(manifest.platforms) == set(PLATFORM_KEYS)
    assert (manifest.provider.name, manifest.engine_name) == ("openvino-plugin", "openvino")
    assert manifest.data_dir == Path(environ["AOG_DATA_DIR"], "engines", "openvino")


OTHERS = {
    "llamacpp": ["chat", "generate", "embed", "rerank"],
    "ollama": ["chat", "generate", "embed", "speech-to-text", "speech-to-text-ws"],
    "openai": list(SERVICE_NAMES),
}


@pytest.mark.promise("S10")
@pytest.mark.parametrize("name", OTHERS)
def test_manifests_of_other_engines_are_valid(name: str, environ: dict[str, str]) -> None:
    path = ROOT / "plugins" / name / "plugin.yaml"
    assert lint(path, environ=environ) == []
    manifest = load_manifest(path, environ)
    assert list(manifest.services) == OTHERS[name]
    if "speech-to-text" in manifest.services:
        assert manifest.service("speech-to-text").timeout == -1
    assert set(manifest.platforms) == set(PLATFORM_KEYS)
    assert (manifest.provider.name, manifest.engine_name) == (f"{name}-plugin", name)
    assert manifest.data_dir == Path(environ["AOG_DATA_DIR"], "engines", name)


def test_every_manifest_of_the_repository_is_tested() -> None:
    assert {path.parent.name for path in ROOT.glob("plugins/*/plugin.yaml")} == set(OTHERS)


def test_all_lists_the_exported_names() -> None:
    offered = {name for name in vars(package) if not name.startswith("_")}
    modules = {"document", "load", "model", "paths", "schema", "sections", "variables"}
    assert set(package.__all__) == offered - modules


def test_loading_imports_nothing_heavy(write: Callable[..., Path], environ: dict[str, str]) -> None:
    code = (
        "import sys; from pathlib import Path; from engine_plugin.manifest import load_manifest\n"
        f"load_manifest(Path({str(write())!r}))\n"
        "heavy = {'asyncio', 'difflib', 'grpc', 'httpx', 'json', 'platformdirs', 'typing_extensions', 'google'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
    paths = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**inherited, **environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (child.returncode, child.stdout.strip()) == (0, "[]"), child.stderr
