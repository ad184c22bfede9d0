"""The REST front on a real socket, for tests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from services.chassis.keys import Keys
from services.gateway.config import Limits
from services.gateway.front.console.live import Live
from services.gateway.front.http_guard import Patience
from services.gateway.front.http_server import HttpServer, build_http_server
from services.gateway.front.rest import build_app
from tests.e2e.scripted_forward import ScriptedDirectory, ScriptedForward, ScriptedWatcher


@dataclass
class RestServer:
    forward: ScriptedForward
    watcher: ScriptedWatcher
    server: HttpServer
    draining: list[bool] = field(default_factory=lambda: [False])

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serve_rest(
    forward: ScriptedForward | None = None,
    *,
    keys: Keys | None = None,
    patience: Patience | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[RestServer]:
    forward = forward or ScriptedForward()
    watcher = ScriptedWatcher()
    draining = [False]
    bounds = limits or Limits()
    directory = ScriptedDirectory()
    live = Live(directory, {"id": "gateway-0"}, {}, time.time, dict)
    app = build_app(forward, directory, keys or Keys(), bounds, watcher, lambda: draining[0], live)
    server = build_http_server(app, "127.0.0.1", 0, bounds, patience=patience)
    task = asyncio.create_task(server.serve())
    await server.ready()
    try:
        yield RestServer(forward, watcher, server, draining)
    finally:
        server.stop(0)
        await asyncio.wait_for(task, 10)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found


class Connection:
    """HTTP/1.1 by hand, to send what no library would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        size = int(await self.reader.readline(), 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def answer(self) -> Answer:
        status, headers = await self.head()
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            parts = []
            while part := await self.chunk():
                parts.append(part)
            body = b"".join(parts)
        return Answer(status, headers, body)


@asynccontextmanager
async def connection(server: RestServer, **options: Any) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 26, **options)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


def raw_request(path: str, body: bytes | dict[str, Any] | None, method: str = "POST", **headers: str | None) -> bytes:
    """A whole request. A header given as None is left out."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
    fields: dict[str, str | None] = {"host": "test", "content-length": str(len(data))}
    if body is not None:
        fields["content-type"] = "application/json"
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


async def ask(
    server: RestServer, path: str, body: bytes | dict[str, Any] | None = None, method: str = "POST", **headers: Any
) -> Answer:
    async with connection(server) as client:
        await client.send(raw_request(path, body, method, **headers))
        return await asyncio.wait_for(client.answer(), 20)


def sse_events(answer: Answer) -> list[Any]:
    """The data of each event; [DONE] as the string it is."""
    blocks = [block for block in answer.body.decode().split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    return [data if (data := block[6:]) == "[DONE]" else json.loads(data) for block in blocks]
