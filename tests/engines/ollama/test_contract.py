"""Ollama's API on the wire, tested on the contract server and on the server at OLLAMA_TEST_HOST."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.patience import LIMIT, patience

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Ollama
    from .contract.handle import ContractServer

HELLO = [{"role": "user", "content": "Tell me of rivers and of hills, please."}]
JSON, LINES, TEXT = "application/json", "application/x-ndjson", "text/plain"


@pytest.fixture
def client(any_ollama: Ollama) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=any_ollama.url, timeout=patience(60), trust_env=False) as client:
        yield client


@pytest.fixture
def contract(contract_server: ContractServer) -> Iterator[httpx.Client]:
    """A client of the contract server, for tests that would damage a real server."""
    with httpx.Client(base_url=contract_server.url, timeout=LIMIT, trust_env=False) as client:
        yield client


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith(LINES)
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


def complaint(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith(JSON)
    error = answer.json()["error"]
    assert isinstance(error, str)
    return error


def test_greeting(client: httpx.Client) -> None:
    answer = client.get("/")
    assert (answer.status_code, answer.text) == (200, "Ollama is running")
    assert answer.headers["content-type"].startswith(TEXT)
    assert client.head("/").status_code == 200
    version = client.get("/api/version")
    assert version.json().keys() == {"version"}
    assert version.headers["content-type"] == f"{JSON}; charset=utf-8"
    assert client.get("/api/nothing").status_code == 404
    assert client.get("/api/chat").status_code == 405


def test_model_in_lists(client: httpx.Client, any_ollama: Ollama) -> None:
    listed = {model["name"]: model for model in client.get("/api/tags").json()["models"]}
    entry = listed[any_ollama.model]
    assert entry["model"] == any_ollama.model
    assert len(entry["digest"]) == 64
    assert entry["size"] > 0
    assert {"family", "parameter_size", "quantization_level", "format"} <= entry["details"].keys()
    shown = client.post("/api/show", json={"model": any_ollama.model}).json()
    architecture = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{architecture}.context_length"] > 0
    assert "completion" in shown["capabilities"]


def test_streamed_chat_lines(client: httpx.Client, any_ollama: Ollama) -> None:
    request = {"model": any_ollama.model, "messages": HELLO, "options": {"num_predict": 8, "seed": 1}}
    *parts, last = lines(client.post("/api/chat", json=request))
    assert len(parts) >= 2
    assert all(part["done"] is False and part["message"]["role"] == "assistant" for part in parts)
    assert (last["done"], last["done_reason"] in ("stop", "length")) == (True, True)
    assert last["eval_count"] > 0
    assert last["total_duration"] >= last["eval_duration"] > 0
    assert last["prompt_eval_count"] > 0


def test_unstreamed_chat(client: httpx.Client, any_ollama: Ollama) -> None:
    request = {"model": any_ollama.model, "messages": HELLO, "stream": False, "options": {"num_predict": 2}}
    answer = client.post("/api/chat", json=request)
    assert answer.headers["content-type"] == f"{JSON}; charset=utf-8"
    assert answer.json()["message"]["content"]
    assert (answer.json()["done"], answer.json()["done_reason"]) == (True, "length")


def test_generate(client: httpx.Client, any_ollama: Ollama) -> None:
    request = {"model": any_ollama.model, "prompt": "Tell me of rivers.", "options": {"num_predict": 4, "seed": 1}}
    *parts, last = lines(client.post("/api/generate", json=request))
    assert "".join(part["response"] for part in parts)
    assert all(isinstance(token, int) for token in last["context"])


def test_json_follows_the_schema(client: httpx.Client, any_ollama: Ollama) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    request = {"model": any_ollama.model, "messages": HELLO, "stream": False, "format": schema}
    answer = client.post("/api/chat", json=request).json()
    assert isinstance(json.loads(answer["message"]["content"])["age"], int)


def test_load_and_unload(client: httpx.Client, any_ollama: Ollama) -> None:
    load = {"model": any_ollama.model, "messages": [], "keep_alive": "10m"}
    answer = client.post("/api/chat", json=load)
    assert answer.headers["content-type"].startswith(JSON)  # no stream, although `stream` is not false
    assert (answer.json()["done"], answer.json()["done_reason"]) == (True, "load")
    running = {model["name"]: model for model in client.get("/api/ps").json()["models"]}
    entry = running[any_ollama.model]
    assert entry["size"] >= entry["size_vram"] >= 0
    assert entry["context_length"] > 0
    assert entry["expires_at"].startswith("20")
    assert client.post("/api/chat", json=load | {"keep_alive": 0}).json()["done_reason"] == "unload"


def test_invalid_requests_are_rejected(client: httpx.Client, any_ollama: Ollama) -> None:
    assert complaint(client.post("/api/chat"), 400) == "missing request body"
    assert "invalid character" in complaint(client.post("/api/chat", content=b"{nonsense"), 400)
    missing = {"model": "none-of-that-name", "messages": HELLO}
    assert complaint(client.post("/api/chat", json=missing), 404) == "model 'none-of-that-name' not found"
    assert "not found" in complaint(client.post("/api/embed", json={"model": "none-of-that-name"}), 404)
    assert "not found" in complaint(client.post("/api/show", json={"model": "none-of-that-name"}), 404)
    assert "not found" in complaint(client.request("DELETE", "/api/delete", json={"model": "none-of-that-name"}), 404)
    images = [{"role": "user", "content": "x", "images": ["data:image/png;base64,AAAA"]}]
    request = {"model": any_ollama.model, "messages": images}
    assert "illegal base64 data" in complaint(client.post("/api/chat", json=request), 400)
    wrong = {"model": any_ollama.model, "input": 7}
    assert complaint(client.post("/api/embed", json=wrong), 400) == "invalid input type"


def test_copy(client: httpx.Client, any_ollama: Ollama) -> None:
    copy = {"source": any_ollama.model, "destination": "engine-plugin-test-copy"}
    answer = client.post("/api/copy", json=copy)
    assert (answer.status_code, answer.content) == (200, b"")
    try:
        listed = {model["name"]: model["digest"] for model in client.get("/api/tags").json()["models"]}
        assert listed["engine-plugin-test-copy:latest"] == listed[any_ollama.model]
    finally:
        removed = client.request("DELETE", "/api/delete", json={"model": "engine-plugin-test-copy"})
    assert (removed.status_code, removed.content) == (200, b"")


def test_blobs(contract: httpx.Client) -> None:
    data = b"GGUF and so on"
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert contract.head(f"/api/blobs/{digest}").status_code == 404
    assert "digest mismatch" in complaint(contract.post(f"/api/blobs/{digest}", content=b"GGUF else"), 400)
    assert contract.post(f"/api/blobs/{digest}", content=data).status_code == 201
    assert contract.head(f"/api/blobs/{digest}").status_code == 200
    steps = lines(contract.post("/api/create", json={"model": "mine", "files": {"m.gguf": digest}}))
    assert [step["status"] for step in steps] == [
        "parsing GGUF",
        "verifying conversion",
        f"using existing layer {digest}",
        "writing manifest",
        "success",
    ]
    assert "unknown type" in complaint(_create_from(contract, b"no such thing"), 400)


def _create_from(contract: httpx.Client, data: bytes) -> httpx.Response:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    contract.post(f"/api/blobs/{digest}", content=data)
    return contract.post("/api/create", json={"model": "mine", "files": {"m.gguf": digest}})


def test_streamed_pull(contract: httpx.Client) -> None:
    steps = lines(contract.post("/api/pull", json={"model": "fresh"}))
    layers = {step["digest"]: step for step in steps if "digest" in step}
    assert [step["status"] for step in steps if "digest" not in step] == [
        "pulling manifest",
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    assert len(layers) == 4
    assert all(step["status"] == f"pulling {digest[7:19]}" for digest, step in layers.items())
    assert all(step["completed"] == step["total"] for step in layers.values())
    assert lines(contract.post("/api/pull", json={"model": "nonesuch"})) == [
        {"status": "pulling manifest"},
        {"error": "pull model manifest: file does not exist"},
    ]


def test_unstreamed_pull(contract: httpx.Client) -> None:
    assert contract.post("/api/pull", json={"model": "fresh", "stream": False}).json() == {"status": "success"}
    whole = {"model": "nonesuch", "stream": False}
    assert complaint(contract.post("/api/pull", json=whole), 500) == "pull model manifest: file does not exist"


def test_foreign_host_header_is_rejected(contract: httpx.Client) -> None:
    """This protects the server against DNS rebinding by web pages."""
    assert contract.get("/api/tags", headers={"host": "evil.example:80"}).status_code == 403
    assert contract.get("/api/tags", headers={"host": "localhost:80"}).status_code == 200
