"""The answers of a contract server, derived from the request so that tests can compare them.

- a prompt `count 5` is answered with `1 2 3 4 5`; `say WORDS` with the words; anything else with `You said: …`, and
  how many pictures came, when some did;
- `options.seed` rotates the words, so that the answer depends on the seed;
- `format: "json"` gives {"answer": …}; a schema gives a matching object;
- with `tools`, a model with tools calls the first one; after a tool message it answers with its content.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

__all__ = ["THOUGHTS", "answer", "made_of", "pieces", "tool_call", "vector"]

THOUGHTS = ("The", " user", " wants", " words.")

_COUNT = re.compile(r"count (\d+)", re.IGNORECASE)
_SAY = re.compile(r"say (.+)", re.IGNORECASE | re.DOTALL)


def answer(prompt: str, *, images: int = 0, seed: int | None = None, shape: Any = None) -> str:
    """The whole answer. `shape` is the request's `format`."""
    text = _plain(prompt.strip(), images)
    words = text.split(" ")
    if seed is not None and len(words) > 1:
        turn = seed % len(words)
        text = " ".join(words[turn:] + words[:turn])
    if shape == "json":
        return json.dumps({"answer": text})
    if isinstance(shape, dict):
        return json.dumps(made_of(shape, text))
    return text


def _plain(prompt: str, images: int) -> str:
    if counted := _COUNT.fullmatch(prompt):
        return " ".join(str(number) for number in range(1, int(counted[1]) + 1))
    if said := _SAY.fullmatch(prompt):
        return said[1]
    seen = f" ({images} image{'s' if images > 1 else ''})" if images else ""
    return f"You said: {prompt}{seen}"


def pieces(text: str) -> list[str]:
    """The tokens of a text: words with the preceding space."""
    return re.findall(r"\s*\S+\s*\Z|\s*\S+", text) or ([text] if text else [])


def made_of(schema: dict[str, Any], text: str) -> Any:
    """A value that matches a JSON schema, with `text` in text fields."""
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    match kind:
        case "object":
            return {key: made_of(part, text) for key, part in schema.get("properties", {}).items()}
        case "array":
            return [made_of(schema.get("items", {}), text)]
        case "integer":
            return 7
        case "number":
            return 7.5
        case "boolean":
            return True
        case "null":
            return None
    return text


def tool_call(tool: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A call of a tool, with an id derived from the prompt."""
    function = tool["function"]
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return {
        "id": f"call_{mark}",
        "function": {
            "index": 0,
            "name": function["name"],
            "arguments": made_of(function.get("parameters") or {"type": "object"}, prompt),
        },
    }


def vector(text: str, length: int) -> list[float]:
    """A unit vector, derived from the text."""
    seed = hashlib.sha256(text.encode()).digest()
    raw = [seed[index % len(seed)] / 127.5 - 1 + index * 1e-6 for index in range(length)]
    norm = math.sqrt(sum(value * value for value in raw)) or 1.0
    return [value / norm for value in raw]
