"""What each service asks of a request, before any engine sees it.

`SERVICES` holds one `Service` a name; `Plugin` calls it, engines never do. The shapes are OpenAI's, which is the
flavour that the host expects of `config_ref: openai:*`; fields that are not checked here pass through untouched.
"""

from __future__ import annotations

from engine_plugin.services.base import Service, parse_request
from engine_plugin.services.chat import Chat
from engine_plugin.services.embed import Embed
from engine_plugin.services.generate import Generate
from engine_plugin.services.rerank import Rerank

__all__ = ["SERVICES", "Service", "parse_request"]

SERVICES: dict[str, Service] = {service.name: service for service in (Chat(), Generate(), Embed(), Rerank())}
