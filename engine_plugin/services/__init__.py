"""What each service asks of a request, before any engine sees it.

`SERVICES` holds one `Service` a name, `CONVERSATIONS` those that have no request but messages; `Plugin` calls them,
engines never do. The shapes are OpenAI's where OpenAI has them, which is the flavour that the host expects of
`config_ref: openai:*` and `openvino:*`; fields that are not checked here pass through untouched. docs/services.md
describes each service to its callers.
"""

from __future__ import annotations

from engine_plugin.services.base import Conversation, Service, parse_request
from engine_plugin.services.chat import Chat
from engine_plugin.services.embed import Embed
from engine_plugin.services.generate import Generate
from engine_plugin.services.live import LiveTranscription
from engine_plugin.services.rerank import Rerank
from engine_plugin.services.speech_to_text import SpeechToText
from engine_plugin.services.text_to_image import TextToImage
from engine_plugin.services.text_to_speech import TextToSpeech

__all__ = ["CONVERSATIONS", "SERVICES", "Conversation", "Service", "parse_request"]

SERVICES: dict[str, Service] = {
    service.name: service
    for service in (Chat(), Generate(), Embed(), Rerank(), TextToImage(), SpeechToText(), TextToSpeech())
}

CONVERSATIONS: dict[str, Conversation] = {service.name: service for service in (LiveTranscription(),)}
