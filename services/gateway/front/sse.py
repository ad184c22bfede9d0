"""Server-sent events: one ASGI message an event, a comment while there is nothing to say."""

from __future__ import annotations

import asyncio

import orjson

from services.gateway.front.rest_exchange import Exchange, Pending
from services.gateway.upstream.calls import Identity

PING_S = 15.0  # proxies cut connections that are silent for 30 or 60 seconds
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def trailer(identity: Identity) -> bytes:
    """What the headers could not know yet, as a comment, which every client skips: the stream went on elsewhere."""
    if not identity.resumes:
        return b""
    said = {
        **({"x-infermesh-instance-id": identity.shown[0]} if identity.shown[0] else {}),
        "x-infermesh-attempts": identity.attempts,
        "x-infermesh-resumes": identity.resumes,
        "x-infermesh-resume-exact": identity.exact,
    }
    return b": " + orjson.dumps(said) + b"\n\n"


class EventStream:
    """The reply of one exchange as a stream of events. `stop` must follow `start`, whatever happens."""

    __slots__ = ("_busy", "_exchange", "_last", "_loop", "_ping", "_send", "_timer", "ping_s")

    def __init__(self, exchange: Exchange, ping_s: float = PING_S) -> None:
        self._exchange = exchange
        self._send = exchange.send
        self._loop = asyncio.get_running_loop()
        self._busy = False
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._ping: asyncio.Task[None] | None = None
        self.ping_s = ping_s

    async def start(self, identity: Identity) -> None:
        exchange = self._exchange
        exchange.failure = Pending(b"data: ", b"\n\n")
        await exchange.start(200, [*HEADERS, *exchange.reply_headers(identity)])
        self._last = self._loop.time()
        self._timer = self._loop.call_later(self.ping_s, self._tick)

    async def write(self, data: bytes) -> None:
        """Waits while the client reads slower than we write; the connection's guard bounds that wait."""
        self._busy = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._busy = False
        self._last = self._loop.time()

    async def end(self, data: bytes) -> None:
        """The last bytes. Call it outside `Attended`."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()

    def _tick(self) -> None:
        quiet = self._loop.time() - self._last
        if quiet >= self.ping_s and not self._busy:
            self._ping = self._loop.create_task(self.write(b": ping\n\n"))
            quiet = 0.0
        self._timer = self._loop.call_later(max(0.05, self.ping_s - quiet), self._tick)
