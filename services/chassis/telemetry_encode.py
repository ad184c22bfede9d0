"""Spans as OTLP protobuf (opentelemetry-proto 1.x, trace/v1/trace.proto), written straight into bytes. Pure.

The SDK's own encoder builds a message object for each attribute: ten times as long (docs/decisions/0037-lean-spans.md).
tests/unit/test_telemetry_encode.py holds this one against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

_SPAN_ATTRIBUTE, _SPAN_EVENT, _SPAN_STATUS = b"\x4a", b"\x5a", b"\x7a"  # fields 9, 11, 15 of Span
_EVENT_ATTRIBUTE, _OTHER_ATTRIBUTE = b"\x1a", b"\x0a"  # field 3 of Event; field 1 of Resource
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200  # of Span.flags
_double, _times, _fixed32 = Struct("<d").pack, Struct("<cQcQ").pack, Struct("<I").pack
_OFTEN = 64  # characters of a value that is worth keeping
_BYTES = [bytes((n,)) for n in range(128)]


def span(one: ReadableSpan) -> bytes:
    """A finished span as an entry of ScopeSpans.spans."""
    context, parent, status = one.context, one.parent, one.status
    assert context is not None
    parts = [b"\x0a\x10", context.trace_id.to_bytes(16, "big"), b"\x12\x08", context.span_id.to_bytes(8, "big")]
    if context.trace_state:
        parts.append(_text(b"\x1a", context.trace_state.to_header()))
    flags = context.trace_flags | _HAS_IS_REMOTE
    if parent is not None:
        parts += b"\x22\x08", parent.span_id.to_bytes(8, "big")
        if parent.is_remote:
            flags |= _IS_REMOTE
    parts += (
        _text(b"\x2a", one.name),
        b"\x30",
        _BYTES[one.kind.value + 1],
        _times(b"\x39", one.start_time, b"\x41", one.end_time),
        _attributes(_SPAN_ATTRIBUTE, one.attributes or {}),
    )
    for event in one.events:
        fields = b"\x09" + event.timestamp.to_bytes(8, "little") + _text(b"\x12", event.name)
        parts.append(_sized(_SPAN_EVENT, fields + _attributes(_EVENT_ATTRIBUTE, event.attributes or {})))
    if status.status_code.value:
        told = _text(b"\x12", status.description) if status.description else b""
        parts.append(_sized(_SPAN_STATUS, told + b"\x18" + _BYTES[status.status_code.value]))
    parts += b"\x85\x01", _fixed32(flags)
    return _sized(b"\x12", b"".join(parts))


def origin(resource: Mapping[str, Any], scope: str, version: str, schema: str) -> tuple[bytes, bytes, bytes]:
    """What is the same for all spans of a process: its resource, and what comes before and after its spans."""
    fields = _attributes(_OTHER_ATTRIBUTE, resource)
    return (
        _sized(b"\x0a", fields),
        _sized(b"\x0a", _text(b"\x0a", scope) + _text(b"\x12", version)),
        _text(b"\x1a", schema),
    )


def request(whose: tuple[bytes, bytes, bytes], spans: Iterable[bytes]) -> bytes:
    """An ExportTraceServiceRequest."""
    resource, scope, schema = whose
    return _sized(b"\x0a", resource + _sized(b"\x12", b"".join((scope, *spans, schema))) + schema)


def _attributes(tag: bytes, attributes: Mapping[str, Any]) -> bytes:
    parts: list[bytes] = []
    for name, value in attributes.items():
        kind = type(value)
        if kind is float:
            parts += _before_double(tag, name), _double(value)
        elif kind is bool or (kind is str and len(value) <= _OFTEN):
            parts.append(_again(tag, name, value))
        else:
            parts.append(_sized(tag, _key(name) + _sized(b"\x12", _value(value))))
    return b"".join(parts)


def _value(value: Any) -> bytes:
    """The fields of an AnyValue."""
    if isinstance(value, str):
        return _text(b"\x0a", value)
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(value & 0xFFFFFFFFFFFFFFFF)
    if isinstance(value, float):
        return b"\x21" + _double(value)
    if isinstance(value, Sequence):
        return _sized(b"\x2a", b"".join(_sized(b"\x0a", _value(one)) for one in value))
    raise TypeError(f"{type(value).__name__} is no value of a span's attribute")


@lru_cache(256)  # names are ours, and few
def _key(name: str) -> bytes:
    return _text(b"\x0a", name)


@lru_cache(256)
def _before_double(tag: bytes, name: str) -> bytes:
    return _sized(tag, _key(name) + b"\x12\x09\x21" + bytes(8))[:-8]


@lru_cache(2048)  # instances, models, words: mostly said before
def _again(tag: bytes, name: str, value: str | bool) -> bytes:
    return _sized(tag, _key(name) + _sized(b"\x12", _value(value)))


def _text(tag: bytes, text: str) -> bytes:
    raw = text.encode(errors="replace")
    return b"%b%b%b" % (tag, _varint(len(raw)), raw)


def _sized(tag: bytes, raw: bytes) -> bytes:
    return b"%b%b%b" % (tag, _varint(len(raw)), raw)


def _varint(number: int) -> bytes:
    if number < 128:
        return _BYTES[number]
    if number < 16384:
        return bytes((number & 0x7F | 0x80, number >> 7))
    parts = bytearray()
    while number > 127:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)
