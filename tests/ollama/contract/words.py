"""What a contract server answers: words made of what it was asked, so that a test can tell.

- a prompt `count 5` is answered with `1 2 3 4 5`; `say WORDS` with the words; anything else with `You said: …`, and
  how many pictures came, when some did;
- `options.seed` turns the order of the words round, so that another seed is another answer and the same the same;
- `format: "json"` gives {"answer": …}; a schema gives an object that keeps it;
- with `tools`, a model that can calls the first one; after a tool's message it answers with what the tool said.
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
    """The text as tokens: words with the space before them."""
    return re.findall(r"\s*\S+\s*\Z|\s*\S+", text) or ([text] if text else [])


def made_of(schema: dict[str, Any], text: str) -> Any:
    """Something that keeps a JSON schema, with `text` where text may be."""
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
    """A call of this tool, its id made of the prompt."""
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
    """An embedding of length 1, the same for the same text."""
    seed = hashlib.sha256(text.encode()).digest()
    raw = [seed[index % len(seed)] / 127.5 - 1 + index * 1e-6 for index in range(length)]
    norm = math.sqrt(sum(value * value for value in raw)) or 1.0
    return [value / norm for value in raw]
