"""What each service requires of a request, checked before an engine sees it.

`VALIDATORS` has a validator for each service with requests, `CONVERSATION_VALIDATORS` for those with messages.
`Plugin` calls them; engines do not. The shapes are OpenAI's where OpenAI has them, which hosts send for
`config_ref: openai:*` and `openvino:*`. Fields that are not checked here pass through unchanged. docs/services.md
describes each service to its callers.
"""

from __future__ import annotations

from engine_plugin.services.base import RequestValidator, parse_request
from engine_plugin.services.chat import Chat
from engine_plugin.services.embed import Embed
from engine_plugin.services.generate import Generate
from engine_plugin.services.live import LiveTranscription
from engine_plugin.services.rerank import Rerank
from engine_plugin.services.speech_to_text import SpeechToText
from engine_plugin.services.text_to_image import TextToImage
from engine_plugin.services.text_to_speech import TextToSpeech

__all__ = ["CONVERSATION_VALIDATORS", "VALIDATORS", "RequestValidator", "parse_request"]

VALIDATORS: dict[str, RequestValidator] = {
    service.name: service
    for service in (Chat(), Generate(), Embed(), Rerank(), TextToImage(), SpeechToText(), TextToSpeech())
}

CONVERSATION_VALIDATORS = {LiveTranscription.name: LiveTranscription()}
