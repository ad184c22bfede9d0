"""Our encoder and the SDK's say the same of any span."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.chassis import telemetry_encode as encode

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
INTEGER = st.integers(-(2**63), 2**63 - 1)
ONE = st.one_of(TEXT, INTEGER, st.booleans(), st.floats(allow_nan=False))
VALUE = st.one_of(ONE, st.lists(TEXT, max_size=3), st.lists(INTEGER, max_size=3), st.lists(st.floats(allow_nan=False)))
ATTRIBUTES = st.dictionaries(st.text("abc._", min_size=1, max_size=140), VALUE, max_size=6)
TIME = st.integers(1, 2**63)


@st.composite
def spans(draw: Any) -> Any:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState
    from opentelemetry.trace.status import Status, StatusCode

    trace, flags = draw(st.integers(1, 2**128 - 1)), TraceFlags(1)
    state = TraceState([("vendor", "x")]) if draw(st.booleans()) else None
    parent = SpanContext(trace, draw(st.integers(1, 2**64 - 1)), draw(st.booleans()), flags)
    failed = draw(st.booleans())
    return ReadableSpan(
        draw(TEXT),
        SpanContext(trace, draw(st.integers(1, 2**64 - 1)), False, flags, state),
        draw(st.sampled_from([parent, None])),
        Resource({"service.name": "s", "n": 2}, "https://schema"),
        draw(ATTRIBUTES),
        [Event(draw(TEXT), draw(ATTRIBUTES), draw(TIME)) for _ in range(draw(st.integers(0, 2)))],
        kind=draw(st.sampled_from(SpanKind)),
        status=Status(StatusCode.ERROR, draw(TEXT)) if failed else Status(StatusCode.UNSET),
        start_time=draw(TIME),
        end_time=draw(TIME),
        instrumentation_scope=InstrumentationScope("scope", "1", "https://schema"),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(spans(), min_size=1, max_size=3))
def test_it_says_what_the_sdk_says(made: list[Any]) -> None:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    whose = encode.origin({"service.name": "s", "n": 2}, "scope", "1", "https://schema")
    ours = ExportTraceServiceRequest.FromString(encode.request(whose, [encode.span(one) for one in made]))
    theirs = encode_spans(made)
    for span in theirs.resource_spans[0].scope_spans[0].spans:
        span.flags |= 1  # bits 0-7 are the W3C flags: theirs leaves "sampled" out
        if not span.status.code:
            span.ClearField("status")  # unset is what is not there
    assert ours == theirs


def test_a_lone_surrogate_breaks_no_span() -> None:
    assert encode._text(b"\x0a", "\ud800") == b"\x0a\x01?"
