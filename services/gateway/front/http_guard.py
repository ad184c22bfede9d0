"""What uvicorn does not guard against: slow headers, large headers, slow bodies, readers that do not read.

Timers run only while the client owes us something (headers, a body) or does not take what it asked for. A request that
arrives in one piece, and the work on it, cost none.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from infermesh.errors import MeshError, Reason
from services.gateway.front.rest_errors import error_json

log = structlog.get_logger("http")


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds and bytes that one connection may cost."""

    headers_s: float = 10.0  # from connecting, or from the first byte of a later request, to the end of its headers
    header_bytes: int = 16 << 10  # request line and headers together
    body_s: float = 10.0  # in each such time, at least `body_bytes` of a body must arrive
    body_bytes: int = 16 << 10
    stalled_s: float = 30.0  # a reader that leaves our buffer full for so long is cut off
    connections: int = 4096


class _HeadersTooLarge(Exception):
    pass


class _Corked:
    """A cycle's transport that holds the status line back until there is a body: one system call instead of two."""

    __slots__ = ("_cycle", "_head", "_transport")

    def __init__(self, cycle: Any) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            self._cycle.transport = self._transport
            self._transport.write(self._head + data)
        elif self._cycle.response_started:
            self._head = data
        else:  # 100 Continue
            self._transport.write(data)

    def close(self) -> None:
        if self._head:
            self._transport.write(self._head)
        self._transport.close()

    def is_closing(self) -> bool:
        closing: bool = self._transport.is_closing()
        return closing


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol (strict: it refuses two lengths, two framings and bare line feeds) with patience."""

    patience = Patience()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._in_headers = True  # or between two requests
        self._begun = False  # the first byte of a request is here, the end of its headers is not
        self._header_bytes = 0
        self._body_bytes = 0
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.patience.connections:
            error = MeshError(Reason.QUEUE_FULL, "too many connections", retry_after_s=1)
            self._refuse(b"503 Service Unavailable", error)
            return
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_headers:
            self._header_bytes += len(data)
        else:
            self._body_bytes += len(data)
        super().data_received(data)
        if self._refused:
            return
        if not self._in_headers:
            if self._timer is None:
                self._timer = self.loop.call_later(self.patience.body_s, self._body_is_slow)
        elif self._header_bytes > self.patience.header_bytes:
            # What the parser has not handed out yet counts too: a single header may be endless.
            self._refuse_headers()
        elif self._begun and self._timer is None:
            self._wait_for_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._begun = True

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.patience.header_bytes:
            self._refuse_headers()
            raise _HeadersTooLarge
        self._in_headers = False
        self._begun = False
        self._header_bytes = 0
        self._body_bytes = 0
        self._cancel_timer()
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":  # its answer has no body to wait for
            self.cycle.transport = _Corked(self.cycle)  # type: ignore[assignment]

    def on_message_complete(self) -> None:
        self._cancel_timer()
        self._in_headers = True
        self._header_bytes = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.patience.stalled_s, self._reader_is_gone)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """Instead of uvicorn's plain text. Also where our own refusal inside the parser ends up."""
        if not self._refused:
            self._refuse(b"400 Bad Request", MeshError(Reason.INVALID_ARGUMENT, "this is not an HTTP/1.1 request"))

    def _wait_for_headers(self) -> None:
        self._timer = self.loop.call_later(self.patience.headers_s, self._headers_are_slow)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _headers_are_slow(self) -> None:
        if self._begun:
            error = MeshError(Reason.DEADLINE_EXCEEDED, "the request's headers did not arrive in time")
            self._refuse(b"408 Request Timeout", error)
        else:
            self._refused = True
            self.transport.close()

    def _body_is_slow(self) -> None:
        self._timer = None
        if self._body_bytes >= self.patience.body_bytes or self.flow.read_paused:
            self._body_bytes = 0
            self._timer = self.loop.call_later(self.patience.body_s, self._body_is_slow)
            return
        cycle = self.cycle
        if cycle is None or cycle.response_started:
            self.transport.close()
            return
        error = MeshError(Reason.DEADLINE_EXCEEDED, "the request's body did not arrive in time")
        cycle.disconnected = True  # the handler that waits for the rest ends quietly
        cycle.message_event.set()
        self._refuse(b"408 Request Timeout", error)

    def _reader_is_gone(self) -> None:
        log.warning("client does not read its reply; connection cut", after_s=self.patience.stalled_s)
        self.transport.abort()

    def _refuse_headers(self) -> None:
        error = MeshError(
            Reason.REQUEST_TOO_LARGE, f"the request's headers are larger than {self.patience.header_bytes} bytes"
        )
        self._refuse(b"431 Request Header Fields Too Large", error)

    def _refuse(self, status: bytes, error: MeshError) -> None:
        """Answers below HTTP's semantics, where no application has seen the request yet, and hangs up."""
        self._refused = True
        self._cancel_timer()
        if self.transport.is_closing():
            return
        body = error_json(error, None)
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()
