"""`engine-plugin status`: stopped, running and attached engines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from .showing import use_engine

if TYPE_CHECKING:
    from .conftest import Workplace

pytestmark = pytest.mark.slow


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A workplace with models, whose engine is installed."""
    use_engine(workplace, "showing:ShownEngine")
    (workplace.data / "models").mkdir(parents=True)
    for name in ("guessed", "embedder", "tagged:latest"):
        (workplace.data / "models" / name).write_bytes(b"x" * 2000)
    workplace.install()
    return workplace


def shown(place: Workplace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place.good("status", "--json"))
    return found


AVAILABLE = [
    "AVAILABLE      SIZE   CONTEXT  CAPABILITIES",
    "embedder       2 KiB  512      embedding",
    "guessed        2 KiB  ~8192    completion",
    "tagged:latest  2 KiB  40960    completion, tools",
]


def test_status_of_a_stopped_engine(place: Workplace) -> None:
    """Without a server, from a plugin that lives as long as the command."""
    done = place.run("status")
    assert (done.returncode, done.stderr) == (0, "start it: engine-plugin engine start\n")
    head = ["engine:  fake 1.0 (managed)", "state:   stopped", "plugin:  fake-plugin", ""]
    assert done.stdout.splitlines() == head + AVAILABLE
    found = shown(place)
    assert (found["running"], found["pid"], found["loaded"]) == (False, None, [])
    (place.data / "installed").unlink()
    assert "engine install" in place.run("status").stderr


def test_status_of_a_running_engine(place: Workplace) -> None:
    with place.serving():
        lines = place.good("status").splitlines()
        found = shown(place)
    assert lines[:2] == ["engine:  fake 1.0 (managed)", "state:   ready: as the test wants it"]
    assert lines[2].startswith("plugin:  fake-plugin at unix:")
    assert lines[3].startswith("log:     ")
    assert lines[4:] == [
        "",
        "LOADED    MEMORY   VRAM     IDLE",
        "guessed   1.9 GiB  1.4 GiB  5 min left",
        "embedder  488 KiB  0 bytes  12 s",
        "",
        *AVAILABLE,
    ]
    assert found["running"] is True
    assert found["pid"] > 1
    assert [entry["name"] for entry in found["loaded"]] == ["guessed", "embedder"]


def test_status_of_an_attached_server(place: Workplace) -> None:
    (place.data / "address").write_text("127.0.0.1:11434")
    lines = place.good("status").splitlines()
    assert lines[:3] == [
        "engine:  fake 1.0 (attached)",
        "state:   ready: as the test wants it",
        "address: https://127.0.0.1:11434",
    ]
    (place.data / "down").touch()
    done = place.run("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "engine:  fake 1.0",
        "state:   down: no server answers. Start it: fake serve",
        "address: https://127.0.0.1:11434",
        "plugin:  fake-plugin",
    ]
    found = shown(place)
    assert (found["server"], found["available"]) == ("", None)


def test_status_without_software_and_models(place: Workplace) -> None:
    (place.data / "address").write_text("127.0.0.1:11434")
    for file in (place.data / "models").iterdir():
        file.unlink()
    assert place.good("status").splitlines()[-3:] == [
        "no models in memory",
        "",
        "no models found. Pull one: engine-plugin models pull MODEL",
    ]
