"""`--auto-pull`: a missing model is pulled before the call that names it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Workplace

SERVICES = "".join(
    f"  - service_name: {name}\n    config_ref: openvino:{name}\n    default_model: standard\n"
    "    capabilities: {support_bidirectional: true}\n"
    for name in ("embed", "rerank", "text-to-image", "speech-to-text", "speech-to-text-ws", "text-to-speech")
)


@pytest.fixture
def place(managed: Workplace) -> Workplace:
    """A workplace whose plugin has the services that these commands call; their default model is not here."""
    manifest = managed.plugin / "plugin.yaml"
    manifest.write_text(manifest.read_text().replace("services:\n", f"services:\n{SERVICES}"))
    return managed


def named(place: Workplace) -> str:
    """The model of the last request that has reached the engine."""
    asked = [json.loads(line.partition(" {")[2].join("{ ").strip()) for line in place.journal if " {" in line]
    model: str = asked[-1].get("model") or asked[-1]["default"]
    return model


def test_auto_pull_pulls_a_missing_model_first(place: Workplace) -> None:
    done = place.run("embed", "a", "--model", "new", "--auto-pull")
    assert (done.returncode, done.stdout) == (0, "[1, 0.5]\n")
    assert done.stderr.splitlines()[:2] == ["model new is missing; pulling it", "downloading"]
    assert named(place) == "new"
    done = place.run("embed", "a", "--model", "new", "--auto-pull", "--json")
    assert (json.loads(done.stdout)["data"], done.stderr) == ([{"embedding": [1, 0.5]}], "")


def test_auto_pull_pulls_the_default_model(place: Workplace) -> None:
    with place.serving():
        assert "model standard is missing; pulling it" in place.run("rerank", "q", "a", "--auto-pull").stderr
        assert named(place) == "standard"
        assert place.run("embed", "a", "--model", "owner/big.bin", "--auto-pull").returncode == 0
        assert named(place) == "big"
        done = place.run("embed", "a", "--model", "tagged", "--auto-pull")  # tagged:latest is here
        assert (done.returncode, done.stderr) == (0, "")
        assert named(place) == "tagged"


@pytest.mark.parametrize(
    "arguments",
    [
        ["image", "a cat", "-o", "FILE.png"],
        ["speak", "Hello", "-o", "FILE.wav"],
        ["transcribe", "SOUND"],
        ["transcribe", "SOUND", "--live"],
    ],
)
def test_every_model_command_has_auto_pull(place: Workplace, tmp_path: Path, arguments: list[str]) -> None:
    sound = tmp_path / "sound.wav"
    sound.write_bytes(b"RIFF")
    files = {"FILE.png": str(tmp_path / "a.png"), "FILE.wav": str(tmp_path / "a.wav"), "SOUND": str(sound)}
    done = place.run(*[files.get(argument, argument) for argument in arguments], "--auto-pull")
    assert done.returncode == 0, done.stderr
    assert "model standard is missing; pulling it" in done.stderr
    assert named(place) == "standard"


def test_missing_model_is_an_error_without_auto_pull(place: Workplace) -> None:
    assert place.run("embed", "a", "--model", "new").stderr == ""
    assert not (place.data / "models" / "new").exists()
    manifest = place.plugin / "plugin.yaml"
    manifest.write_text(manifest.read_text() + "auto_pull: true\n")
    assert "model new is missing; pulling it" in place.run("embed", "a", "--model", "new").stderr


def test_auto_pull_of_an_unknown_model_fails(place: Workplace) -> None:
    with place.serving():
        assert "no source has 'nowhere'" in place.bad(3, "embed", "a", "--model", "nowhere", "--auto-pull")
        done = place.run("embed", "a", "--model", "another's", "--auto-pull")  # who knows: it may answer all the same
        assert done.returncode == 0
        assert done.stderr.splitlines()[-1] == "the models of this server are its owner's"
        done = place.run("embed", "a", "--model", "big:cloud", "--auto-pull")
        assert (done.returncode, done.stderr) == (0, "")
