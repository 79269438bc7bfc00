"""A model becomes the default of its services in the plugin's own manifest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .conftest import MANIFEST

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Workplace

GENERATE = """\
  # Continues a text.
  - service_name: generate      # as chat, without roles
    config_ref: openvino:generate
    support_models: [tiny]
  - service_name: embed
    config_ref: openvino:embed
"""


def manifest_of(place: Workplace) -> Path:
    """The plugin's manifest, with services more."""
    file = place.plugin / "plugin.yaml"
    file.write_text(MANIFEST.replace("platforms:\n", f"{GENERATE}platforms:\n"))
    return file


def test_use_sets_every_service_of_that_kind(managed: Workplace) -> None:
    file = manifest_of(managed)
    before = file.read_text()
    said = managed.good("models", "use", "tagged")
    assert said == f"tagged:latest is now the default model for chat, generate ({file})\n"
    assert file.read_text() == before.replace("default_model: tiny", "default_model: tagged:latest").replace(
        "# as chat, without roles\n", "# as chat, without roles\n    default_model: tagged:latest\n"
    ).replace("[tiny]", '[tiny, "tagged:latest"]')
    assert "already" in managed.good("models", "use", "tagged:latest", "--service", "generate")
    said = managed.good("models", "use", "tagged:latest", "--json")
    assert json.loads(said) == {
        "model": "tagged:latest",
        "file": str(file),
        "services": ["chat", "generate"],
        "changed": [],
        "restart": False,
    }


def test_use_for_one_service_and_a_server_that_runs(managed: Workplace) -> None:
    file = manifest_of(managed)
    before = file.read_text()
    managed.good("engine", "start")
    try:
        done = managed.run("models", "use", "guessed", "--service", "generate")
    finally:
        managed.good("engine", "stop")
    assert done.stdout == f"guessed is now the default model for generate ({file})\n"
    assert done.stderr == (
        "the running server keeps to the old one until a restart: "
        "engine-plugin engine stop && engine-plugin engine start\n"
    )
    assert file.read_text() == before.replace("[tiny]", "[tiny, guessed]").replace(
        "# as chat, without roles\n", "# as chat, without roles\n    default_model: guessed\n"
    )


def test_use_says_why_not(managed: Workplace) -> None:
    file = manifest_of(managed)
    before = file.read_text()
    said = managed.bad(3, "models", "use", "embeder")
    assert "no model is called 'embeder'. Did you mean embedder? Others must be pulled first: by letter" in said
    said = managed.bad(1, "models", "use", "embedder", "--service", "chat")
    assert "embedder is a model for embed; chat needs one for chat" in said
    said = managed.bad(4, "models", "use", "painter")
    assert f"painter is a model for text-to-image, and {file} declares no service that needs one" in said
    said = managed.bad(4, "models", "use", "nobody-knows")
    assert "nobody knows what nobody-knows is for. Say it: --service" in said
    assert "has no service 'chatt'" in managed.bad(3, "models", "use", "guessed", "--service", "chatt")
    file.chmod(0o444)
    try:
        said = managed.bad(4, "models", "use", "embedder")
    finally:
        file.chmod(0o644)
    assert said == (
        f"engine-plugin: {file} was not changed: it may not be written (allow it: chmod u+w {file}). "
        "Write it there yourself: default_model: embedder for embed.\n"
    )
    assert file.read_text() == before


def test_a_model_of_another_kind_that_can_serve_it_too(managed: Workplace) -> None:
    (managed.data / "models" / "listener").write_bytes(b"x")
    file = manifest_of(managed)
    hearing = "  - service_name: speech-to-text\n    config_ref: openvino:speech-to-text\n"
    file.write_text(file.read_text().replace("platforms:\n", f"{hearing}platforms:\n"))
    said = managed.good("models", "use", "listener", "--service", "speech-to-text")
    assert said == f"listener is now the default model for speech-to-text ({file})\n"
    assert "is a model for chat" in managed.bad(1, "models", "use", "tagged", "--service", "speech-to-text")
    assert "for chat, generate (" in managed.good("models", "use", "listener")
