"""Calls any rpc by its name with JSON, based on the descriptor of the service."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from engine_plugin.errors import InvalidRequestError
from engine_plugin.host.link import SERVICE
from engine_plugin.host.streams import DuplexCall, StreamedCall

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from google.protobuf.descriptor import Descriptor, MethodDescriptor
    from google.protobuf.message import Message

    from engine_plugin.host.link import Link

__all__ = ["call_json"]


async def call_json(
    link: Link, name: str, request: Mapping[str, Any] | Sequence[Mapping[str, Any]], timeout: float | None
) -> AsyncGenerator[dict[str, Any], None]:
    """Call an rpc and yield each message of its answer. See `PluginClient.call_json`."""
    rpc = _rpc(name)
    parts = [request] if isinstance(request, Mapping) else request
    if len(parts) != 1 and not rpc.client_streaming:
        raise InvalidRequestError(f"{rpc.name} takes one JSON object")
    messages = [_message(rpc.input_type, part) for part in parts]
    if not rpc.server_streaming:
        yield _shape(await link.answer(link.open(rpc.name, *messages, timeout=timeout)))
        return
    kind, begun_with = (DuplexCall, []) if rpc.client_streaming else (StreamedCall, messages)
    async with kind(link, rpc.name, timeout, *begun_with, checked=False) as call:
        if isinstance(call, DuplexCall):
            for message in messages:
                await call.write(message)
            await call.done_sending()
        async for answer in call:
            yield _shape(answer)


def _rpc(name: str) -> MethodDescriptor:
    wanted = name.replace("_", "").lower()
    for rpc in SERVICE.methods:
        if rpc.name.lower() == wanted:
            return rpc
    raise InvalidRequestError(
        f"no rpc is called {name!r}; the rpcs are: {', '.join(rpc.name for rpc in SERVICE.methods)}"
    )


def _message(descriptor: Descriptor, values: Mapping[str, Any]) -> Message:
    fields = descriptor.fields_by_name
    if "request_json" in fields and "request_json" not in values:
        values = {"request_json": values}
    for key in values:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise InvalidRequestError.at(key, f"{descriptor.name} has no such field; its fields: {known}")
    encoded = {key: _encode(fields[key], value) for key, value in values.items()}
    try:
        return GetMessageClass(descriptor)(**encoded)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequestError(f"not a valid {descriptor.name}: {error}") from error


def _encode(field: Any, value: Any) -> Any:
    if field.type != FieldDescriptor.TYPE_BYTES:
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def _shape(message: Message) -> dict[str, Any]:
    return {field.name: _decode(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _decode(field: Any, value: Any) -> Any:
    if isinstance(value, bytes):
        for read in (json.loads, bytes.decode):
            with suppress(ValueError):
                return read(value)
        return {"base64": base64.b64encode(value).decode()}
    return dict(value) if field.message_type is not None and field.message_type.GetOptions().map_entry else value
