"""What each service requires of a request, checked before an engine sees it.

`VALIDATORS` has a validator for each service with requests, `CONVERSATION_VALIDATORS` for those with messages.
`Plugin` calls them; engines do not. The shapes are OpenAI's where OpenAI has them, which hosts send for
`config_ref: openai:*` and `openvino:*`. Fields that are not checked here pass through unchanged. docs/services.md
describes each service to its callers.
"""

from __future__ import annotations

from engine_plugin.services.base import RequestValidator, parse_request
from engine_plugin.services.validators import CONVERSATION_VALIDATORS, VALIDATORS

__all__ = ["CONVERSATION_VALIDATORS", "VALIDATORS", "RequestValidator", "parse_request"]
