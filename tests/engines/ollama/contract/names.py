"""Model names as Ollama parses them: `[host/][namespace/]model[:tag]`, in any case."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["ModelName"]

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A name with its default parts."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ModelName | None:
        """Parse a name; None if it is invalid in Ollama."""
        rest, _, tag = text.rpartition(":") if ":" in text.rpartition("/")[2] else (text, "", "latest")
        parts = rest.split("/")
        if len(parts) > 3:
            return None
        host, namespace, model = ["registry.ollama.ai", "library"][: 3 - len(parts)] + parts
        fits = _HOST.fullmatch(host) and all(_PART.fullmatch(part) for part in (namespace, model, tag))
        return cls(host, namespace, model, tag) if fits else None

    @property
    def shortest(self) -> str:
        """The short form, without default parts."""
        if self.host != "registry.ollama.ai":
            return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"
        short = f"{self.model}:{self.tag}"
        return short if self.namespace == "library" else f"{self.namespace}/{short}"

    @property
    def full(self) -> str:
        """The form in some errors."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def cloud(self) -> bool:
        """Whether the name is that of a cloud model."""
        return self.tag == "cloud" or self.tag.endswith("-cloud")
