"""Reads config.json and graph.pbtxt as the model server does, as far as a plugin writes them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KINDS", "models_of", "read_graph"]

KINDS = {
    "HttpLLMCalculator": "chat",
    "EmbeddingsCalculatorOV": "embed",
    "RerankCalculatorOV": "rerank",
    "ImageGenCalculator": "text-to-image",
    "S2tCalculator": "speech-to-text",
    "T2sCalculator": "text-to-speech",
}
REPEATED = {"voices", "lora_adapters", "input_stream", "output_stream", "input_side_packet"}
TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\\n]|\\.)*"|'[^'"\\\n]*')|(?P<number>-?\d[\d.eE+-]*)"""
    r"""|(?P<name>[A-Za-z_]\w*|\[[^\]]*\])|(?P<sign>[{}:,])|(?P<end>\Z))"""
)


def models_of(config: Path) -> list[dict[str, Any]]:
    """What config.json serves, as the embedded server's own config.json lists it. Raises ValueError."""
    entries = json.loads(config.read_text(encoding="utf-8"))["mediapipe_config_list"]
    places = {entry["name"]: config.parent / entry["base_path"] / entry["graph_path"] for entry in entries}
    return [{"name": name, **read_graph(place.read_text(encoding="utf-8"))} for name, place in places.items()]


def read_graph(text: str) -> dict[str, Any]:
    """The kind, folder, device and options of a graph with one node. Raises ValueError."""
    node = _message(_tokens(text))["node"]
    [(message, options)] = node["node_options"].items()
    calculator = node["calculator"]
    if message != f"[type.googleapis.com / mediapipe.{calculator.removeprefix('Http')}Options]":
        raise ValueError(f"{calculator} has the options {message}")
    folder = options.pop("models_path")
    [device] = [options.pop(name) for name in ("device", "target_device") if name in options]
    return {"kind": KINDS[calculator], "folder": folder, "device": device, "options": options}


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kinds and texts of the tokens, the last one first."""
    found: list[tuple[str, str]] = []
    at = 0
    while not found or found[-1][0] != "end":
        token = TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"graph.pbtxt: {text[at : at + 20]!r}")
        found.append((str(token.lastgroup), token[str(token.lastgroup)]))
        at = token.end()
    return found[::-1]


def _message(tokens: list[tuple[str, str]]) -> dict[str, Any]:
    """The fields up to the end of the message. Raises ValueError."""
    found: dict[str, Any] = {}
    while (token := tokens.pop())[1] not in ("}", ""):
        if token[1] == ",":
            continue
        if token[0] != "name":
            raise ValueError(f"graph.pbtxt: a field, not {token[1]!r}")
        value = _value(tokens)
        if token[1] in REPEATED:
            found.setdefault(token[1], []).append(value)
        elif token[1] in found:
            raise ValueError(f"graph.pbtxt: {token[1]} stands there twice")
        else:
            found[token[1]] = value
    return found


def _value(tokens: list[tuple[str, str]]) -> Any:
    kind, text = tokens.pop()
    if text == ":":
        kind, text = tokens.pop()
    if text == "{":
        return _message(tokens)
    if kind == "text":
        return json.loads(text) if text[0] == '"' else text[1:-1]
    if kind == "number":
        return json.loads(text)
    if kind == "name":
        return {"true": True, "false": False}.get(text, text)
    raise ValueError(f"graph.pbtxt: a value, not {text!r}")
