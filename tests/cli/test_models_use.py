"""A model becomes the user's default for its services."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from .conftest import MANIFEST

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Workplace

pytestmark = pytest.mark.slow

GENERATE = """\
  # Continues a text.
  - service_name: generate      # as chat, without roles
    config_ref: openvino:generate
    support_models: [tiny]
  - service_name: embed
    config_ref: openvino:embed
"""


def manifest_of(place: Workplace) -> Path:
    """The plugin's manifest, with more services."""
    file = place.plugin / "plugin.yaml"
    file.write_text(MANIFEST.replace("platforms:\n", f"{GENERATE}platforms:\n"))
    return file


def defaults_of(place: Workplace) -> dict[str, str]:
    """What the user has chosen."""
    models: dict[str, str] = json.loads((place.data / "default-models-fake.json").read_text())
    return models


@pytest.mark.promise("T4")
def test_use_sets_the_default_of_every_service_of_the_kind(managed: Workplace) -> None:
    file = manifest_of(managed)
    before = file.read_text()
    with managed.serving():
        said = managed.good("models", "use", "tagged")
        assert said == "tagged:latest is now the default model for chat, generate\n"
        assert defaults_of(managed) == {"chat": "tagged:latest", "generate": "tagged:latest"}
        assert "default for:   chat, generate\n" in managed.good("models", "show", "tagged")
        said = managed.good("models", "use", "guessed", "--service", "generate", "--json")
        assert json.loads(said) == {
            "model": "guessed",
            "services": ["generate"],
            "file": str(managed.data / "default-models-fake.json"),
        }
        assert defaults_of(managed) == {"chat": "tagged:latest", "generate": "guessed"}
        assert file.read_text() == before
        said = managed.good("models", "use", "--reset", "--service", "chat")
        assert said == "restored the default model of plugin.yaml for chat\n"
        assert defaults_of(managed) == {"generate": "guessed"}
        managed.good("models", "use", "--reset")
        assert not (managed.data / "default-models-fake.json").exists()


@pytest.mark.promise("T4")
def test_running_server_uses_the_new_default_for_its_next_call(managed: Workplace) -> None:
    manifest_of(managed)
    with managed.serving():
        assert "is now the default" in managed.good("models", "use", "guessed")
        managed.good("chat", "Hello")
        managed.good("models", "use", "tagged", "--service", "chat")
        managed.good("chat", "Hello")
        managed.good("models", "rm", "-y", "tagged:latest")
        said = managed.bad(3, "chat", "Hello")
    called = [line for line in managed.journal if line.startswith("chat ")]
    assert called == ["chat guessed", "chat tagged:latest", "chat tagged:latest"]
    assert said == (
        "engine-plugin: model: 'tagged:latest', the default model for chat, is not on this machine; "
        f"{managed.data / 'default-models-fake.json'} names it. "
        "Choose another default\n"
        "engine-plugin: To choose another default, run engine-plugin models use NAME\n"
    )


@pytest.mark.promise("T4")
def test_rejected_use_names_the_reason(managed: Workplace) -> None:
    file = manifest_of(managed)
    with managed.serving():
        said = managed.bad(3, "models", "use", "embeder")
        assert "no model is called 'embeder'. Did you mean embedder? Others must be pulled first: by letter" in said
        said = managed.bad(1, "models", "use", "embedder", "--service", "chat")
        assert "embedder is a model for embed; chat needs one for chat" in said
        said = managed.bad(4, "models", "use", "painter")
        assert f"painter is a model for text-to-image, and {file} declares no such service" in said
        said = managed.bad(4, "models", "use", "nobody-knows")
        assert "the kind of nobody-knows is unknown. Name a service: --service" in said
        assert "has no service 'chatt'" in managed.bad(3, "models", "use", "guessed", "--service", "chatt")
        assert "give either a model or --reset" in managed.bad(2, "models", "use", "guessed", "--reset")
        assert "give either a model or --reset" in managed.bad(2, "models", "use")
    assert not (managed.data / "default-models-fake.json").exists()


@pytest.mark.promise("T4")
@pytest.mark.parametrize("content", ["{", "[]", '{"chat": 1}', ""])
def test_damaged_file_of_defaults_is_named_in_the_error(managed: Workplace, content: str) -> None:
    file = managed.data / "default-models-fake.json"
    file.write_text(content)
    for command in (["models", "use", "guessed"], ["chat", "Hello"]):
        assert f"{file} is damaged" in managed.bad(4, *command)
    assert file.read_text() == content


def test_use_accepts_a_model_of_another_kind_that_serves_the_service(managed: Workplace) -> None:
    (managed.data / "models" / "listener").write_bytes(b"x")
    file = manifest_of(managed)
    hearing = "  - service_name: speech-to-text\n    config_ref: openvino:speech-to-text\n"
    file.write_text(file.read_text().replace("platforms:\n", f"{hearing}platforms:\n"))
    with managed.serving():
        said = managed.good("models", "use", "listener", "--service", "speech-to-text")
        assert said == "listener is now the default model for speech-to-text\n"
        assert "is a model for chat" in managed.bad(1, "models", "use", "tagged", "--service", "speech-to-text")
        assert "for chat, generate\n" in managed.good("models", "use", "listener")
