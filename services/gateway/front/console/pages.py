"""The console over HTTP: the page itself, open to all since it holds nothing; what it shows, behind the API's keys."""

from __future__ import annotations

import asyncio
import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any
from urllib.parse import parse_qsl

import orjson

from infermesh.errors import MeshError, Reason, invalid
from services.gateway.front.console.live import Live
from services.gateway.front.disconnect import Attended
from services.gateway.front.rest_exchange import Exchange
from services.gateway.front.sse import EventStream
from services.gateway.past.decisions import shown
from services.gateway.routing.facts import Facts
from services.gateway.upstream.calls import Identity

KINDS = ("llm", "embedding", "rerank")
WATCHERS = 32  # pages that follow at once
BEAT_S = 0.5
QUIET_S = 10.0  # the state is told again after this long, changed or not
_TYPES = {
    "html": b"text/html; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "svg": b"image/svg+xml",
}
_SAFE = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]
File = tuple[bytes, list[tuple[bytes, bytes]]]


class Pages:
    def __init__(self, live: Live) -> None:
        self._live = live
        self._files = _load(files("services.gateway.front.console") / "static")
        self._watchers = 0

    async def file(self, exchange: Exchange) -> None:
        path = exchange.scope["path"].removeprefix("/console").lstrip("/")
        if exchange.scope["path"] == "/console":  # the page names its files relative to itself
            await exchange.respond(b"", status=308, headers=[(b"location", b"/console/")])
            return
        found = self._files.get(path or "index.html")
        if found is None:
            raise MeshError(Reason.NOT_FOUND, f"the console has no {path[:128]!r}; begin at /console/")
        body, headers = found
        tag = dict(headers)[b"etag"].decode()
        if exchange.header("if-none-match") == tag:
            await exchange.respond(b"", status=304, headers=headers)
            return
        await exchange.respond(body, headers=headers)

    async def state(self, exchange: Exchange) -> None:
        await exchange.respond(orjson.dumps(self._live.state(exchange.caller)))

    async def request(self, exchange: Exchange) -> None:
        id = exchange.scope["path_params"]["id"]
        found = await self._live.request(id, exchange.caller)
        if found is None:
            raise MeshError(Reason.NOT_FOUND, f"no request {id[:128]!r} among the last ones of this gateway")
        await exchange.respond(orjson.dumps(found))

    async def explain(self, exchange: Exchange) -> None:
        """Where a request would go now: ?model=&kind=&prompt_tokens=&max_tokens="""
        given = _query(exchange)
        model, kind = given.get("model", ""), given.get("kind", "llm")
        if not model:
            raise invalid("model", "must name a model")
        if kind not in KINDS:
            raise invalid("kind", f"must be one of {', '.join(KINDS)}")
        if exchange.caller.models and model not in exchange.caller.models:
            raise MeshError(Reason.PERMISSION_DENIED, f"this API key is not for the model {model!r}", param="model")
        prompt = _count(given, "prompt_tokens", 100)
        facts = Facts(kind, model, prompt_tokens=prompt, counted=True, max_tokens=_count(given, "max_tokens", 0))
        await exchange.respond(orjson.dumps(shown(self._live.directory.explain(facts))))

    async def events(self, exchange: Exchange) -> None:
        """Server-sent events: `state` when it changed, `requests` as they end."""
        if self._watchers >= WATCHERS:
            raise MeshError(Reason.QUEUE_FULL, f"{WATCHERS} pages follow this gateway already", retry_after_s=10)
        self._watchers += 1
        events = EventStream(exchange)
        try:
            with Attended(exchange.receive):
                await events.start(Identity("", ""))
                await self._follow(exchange, events)
        finally:
            self._watchers -= 1
            events.stop()

    async def _follow(self, exchange: Exchange, events: EventStream) -> None:
        clock = asyncio.get_running_loop().time
        shown, told, number = b"", 0.0, 0
        while True:
            state = self._live.state(exchange.caller)
            now = clock()
            digest = orjson.dumps({**state, "now": 0})
            if digest != shown or now - told >= QUIET_S:
                shown, told = digest, now
                await events.write(_event("state", state))
            number, requests = self._live.since(number, exchange.caller)
            if requests:
                await events.write(_event("requests", requests))
            await asyncio.sleep(BEAT_S)


def _event(name: str, data: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps(data))


def _load(folder: Traversable, prefix: str = "") -> dict[str, File]:
    found: dict[str, File] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _load(entry, f"{prefix}{entry.name}/")
        elif kind := _TYPES.get(entry.name.rpartition(".")[2]):
            body = entry.read_bytes()
            tag = b'"%s"' % hashlib.sha256(body).hexdigest()[:20].encode()
            found[prefix + entry.name] = (body, [(b"content-type", kind), (b"etag", tag), *_SAFE])
    return found


def _query(exchange: Exchange) -> dict[str, str]:
    return dict(parse_qsl(exchange.scope["query_string"].decode("latin-1")[:4096]))


def _count(given: dict[str, str], name: str, default: int) -> int:
    text = given.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise invalid(name, "must be a whole number")
    return int(text)
