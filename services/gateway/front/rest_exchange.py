"""One HTTP request and its answer: headers in, body in, reply out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from infermesh.errors import MeshError, Reason, invalid, unsupported
from infermesh.v1 import inference_pb2 as inf
from services.chassis.keys import Keys
from services.gateway.config import Limits
from services.gateway.entrance import Entrance
from services.gateway.front.callers import request_id, trace_context
from services.gateway.front.disconnect import ClientGone
from services.gateway.front.rest_errors import Headers, error_headers, error_json, header_value, rest_param
from services.gateway.upstream.calls import Call, Caller, Forward, Identity, Method, Reply, Watcher

JSON = (b"content-type", b"application/json")
# A client that is still writing when the connection closes may never see the answer, so this much is read and dropped.
DISCARD = 4
LARGE = 1 << 18  # bytes of a body
_DEGRADE = {"true": inf.DEGRADE_ALLOW, "1": inf.DEGRADE_ALLOW, "false": inf.DEGRADE_NEVER, "0": inf.DEGRADE_NEVER}


@dataclass(slots=True)
class Pending:
    """The last words of a reply under way, in case it fails: what an error looks like there."""

    prefix: bytes
    suffix: bytes


@dataclass(frozen=True, slots=True)
class Front:
    """What all requests share."""

    forward: Forward
    keys: Keys
    limits: Limits
    watcher: Watcher
    draining: Callable[[], bool]


class Exchange:
    """`names` translates the contract's field paths into the caller's; `ignored` are parameters without effect."""

    __slots__ = (
        "_closing", "_forward", "_limits", "_size", "arrived", "caller", "entrance", "failure", "headers", "ignored",
        "names", "opened", "receive", "request_id", "scope", "send", "started", "watcher",
    )  # fmt: skip

    def __init__(self, scope: Any, receive: Any, send: Any, front: Front, entrance: Entrance) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self._forward = front.forward
        self._limits = front.limits
        self.watcher = front.watcher
        self.entrance = entrance
        self._closing = front.draining()  # ask the client to come back on another connection
        self._size = 0
        self.arrived = asyncio.get_running_loop().time()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id(self.header("x-request-id") or self.header("x-client-request-id"))
        self.caller = Caller()
        self.names: Mapping[str, str] = {}
        self.ignored: list[str] = []
        self.opened = False  # the forwarder has it, and counts it
        self.started = False  # the status line is out
        self.failure: Pending | None = None

    def header(self, name: str) -> str | None:
        value = self.headers.get(name.encode())
        return value.decode("latin-1") if value is not None else None

    async def body(self) -> bytes:
        """Reads the body within the limit.

        Raises:
            MeshError: REQUEST_TOO_LARGE, UNSUPPORTED (content-encoding), INVALID_ARGUMENT (content-type).
            ClientGone: before the whole of it was here.
        """
        limit = self._limits.max_body_bytes
        declared = self.header("content-length") or ""
        large = declared.isdecimal() and int(declared) > limit
        fault = self._body_fault()
        if large and int(declared) > DISCARD * limit:
            raise self._too_large(limit)
        parts: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            more = message.get("more_body", False)
            if size > DISCARD * limit:
                raise self._too_large(limit)
            if size > limit:
                parts.clear()
            elif part:
                parts.append(part)
        if size > limit:
            raise self._too_large(limit)
        if fault is not None:
            raise fault
        self._size = size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def breathe(self) -> None:
        """Lets others run between two steps that each take milliseconds for a body of megabytes."""
        if self._size > LARGE:
            await asyncio.sleep(0)

    def _body_fault(self) -> MeshError | None:
        encoding = (self.header("content-encoding") or "identity").strip().lower()
        if encoding != "identity":
            return unsupported("content-encoding", f"{encoding[:32]!r} is not served; send the body as it is")
        # A web page can make a browser post anything to a gateway on loopback but a body of this type.
        kind = (self.header("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return invalid("content-type", "must be application/json")
        return None

    def _too_large(self, limit: int) -> MeshError:
        self._closing = True
        return MeshError(Reason.REQUEST_TOO_LARGE, f"the body is larger than {limit} bytes")

    def call(self, *, streamed: bool = False) -> Call:
        """The circumstances of the request.

        `x-stainless-timeout` (seconds) is how long an OpenAI client waits for the next byte, so it bounds a whole
        reply but not a stream.

        Raises:
            MeshError: INVALID_ARGUMENT.
        """
        deadline = None
        given = self.header("x-infermesh-timeout-ms")
        if given is not None:
            if not given.isdecimal() or not 1 <= int(given[:12]) <= 86_400_000:
                raise invalid("x-infermesh-timeout-ms", "must be 1 .. 86400000 milliseconds")
            deadline = self.arrived + int(given) / 1000
        elif not streamed and (seconds := self.header("x-stainless-timeout")):
            try:
                deadline = self.arrived + max(0.001, min(float(seconds), 86_400.0))
            except ValueError:  # SDKs also send words such as NOT_GIVEN
                deadline = None
        return Call(self.request_id, self.caller, deadline, self.trace, entrance=self.entrance)

    @property
    def trace(self) -> dict[str, str]:
        return trace_context(self.header("traceparent"), self.header("tracestate"))

    def without(self, error: MeshError | None) -> None:
        """Tells the watcher of a request that ended without the forwarder, well or not."""
        if self.opened:
            return
        call = Call(self.request_id, self.caller, trace=self.trace, entrance=self.entrance)
        took_s = asyncio.get_running_loop().time() - self.arrived
        if error is not None:
            self.watcher.refused(self.entrance.path or "unknown", error, call, took_s)
        elif (root := self.watcher.root(call)) is not None:
            root.ended("ok", took_s)

    def hint(self, hints: inf.Hints) -> None:
        """Writes the wishes that came as headers; they go before those in the body.

        Raises:
            MeshError: INVALID_ARGUMENT.
        """
        if (document := self.header("x-infermesh-document-id")) is not None:
            hints.document_id = document
        if (session := self.header("x-infermesh-session-id")) is not None:
            hints.session_id = session
        if (priority := self.header("x-infermesh-priority")) is not None:
            if not re.fullmatch(r"[+-]?\d{1,3}", priority):
                raise invalid("x-infermesh-priority", "must be -100 .. 100")
            hints.priority = int(priority)
        if (degrade := self.header("x-infermesh-allow-degrade")) is not None:
            if degrade.lower() not in _DEGRADE:
                raise invalid("x-infermesh-allow-degrade", "must be true or false")
            hints.degrade = _DEGRADE[degrade.lower()]

    def open(self, method: Method, request: Any, call: Call) -> AbstractAsyncContextManager[Reply]:
        self.opened = True
        return self._forward.open(method, request, call)

    def reply_headers(self, identity: Identity | None) -> Headers:
        elapsed = asyncio.get_running_loop().time() - self.arrived
        headers = [(b"x-request-id", self.request_id.encode()), (b"openai-processing-ms", b"%d" % (elapsed * 1000))]
        if identity is not None:
            names = (b"x-infermesh-instance-id", b"x-infermesh-model-id")
            headers += [(name, header_value(id)) for name, id in zip(names, identity.shown, strict=True) if id]
            headers.append((b"x-infermesh-attempts", b"%d" % identity.attempts))
            if identity.resumes:
                headers.append((b"x-infermesh-resumes", b"%d" % identity.resumes))
            if identity.degraded:
                headers.append((b"x-infermesh-degraded", header_value(identity.degraded)))
        if self.ignored:
            headers.append((b"x-infermesh-ignored", header_value(", ".join(self.ignored))))
        if self._closing:
            headers.append((b"connection", b"close"))
        return headers

    async def respond(
        self, body: bytes, identity: Identity | None = None, *, status: int = 200, headers: Headers | None = None
    ) -> None:
        """A whole reply; JSON unless `headers` name another content type."""
        length = (b"content-length", b"%d" % len(body))
        await self.start(status, [*(headers or [JSON]), length, *self.reply_headers(identity)])
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def fail(self, error: MeshError) -> None:
        """Tells the caller, in whatever way is still open."""
        body = error_json(error, rest_param(error.param, self.names))
        if not self.started:
            await self.respond(body, status=error.row.http, headers=[JSON, *error_headers(error), *_asked(error)])
        elif self.failure is not None:
            last = self.failure.prefix + body + self.failure.suffix
            await self.send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            raise error  # the server cuts the connection: a reply that has begun must not look whole


def _asked(error: MeshError) -> Headers:
    """Who was asked last, as far as the caller may know."""
    ids = ((b"x-infermesh-instance-id", error.instance_id), (b"x-infermesh-model-id", error.model_id))
    return [(name, header_value(id)) for name, id in ids if id]
