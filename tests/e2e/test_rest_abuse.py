"""Callers who misbehave: slow, vanishing, malformed, mute. Everybody else is served meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest

from services.gateway.front import sse
from services.gateway.front.http_guard import Patience
from tests.e2e.rest_server import ask, connection, raw_request, serve_rest, sse_events
from tests.e2e.scripted_forward import ScriptedForward
from tests.kit.mesh import until

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}


HASTY = Patience(headers_s=0.3, body_s=0.3, stalled_s=0.4, connections=8)


async def closed_after(client, seconds: float) -> tuple[float, bytes]:
    begun = time.monotonic()
    rest = await asyncio.wait_for(client.reader.read(), seconds)
    return time.monotonic() - begun, rest


async def test_slow_headers_and_bodies_are_cut_off_while_others_are_served():
    async with serve_rest(patience=HASTY) as server:
        async with connection(server) as silent, connection(server) as loris, connection(server) as dripping:
            await loris.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nx-a: ")
            await dripping.send(raw_request("/v1/chat/completions", b"{", content_length="5000"))

            async def drip() -> None:
                while True:
                    await loris.send(b"a")
                    await dripping.send(b" ")
                    await asyncio.sleep(0.05)

            task = asyncio.create_task(drip())
            assert (await ask(server, "/v1/chat/completions", CHAT)).status == 200
            for client, status in ((silent, b""), (loris, b"HTTP/1.1 408"), (dripping, b"HTTP/1.1 408")):
                _, rest = await closed_after(client, 10)
                assert rest.startswith(status)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not server.server.server_state.tasks)


async def test_a_later_request_on_a_kept_connection_is_guarded_too():
    async with serve_rest(patience=HASTY) as server:
        async with connection(server) as client:
            for _ in range(2):
                await client.send(raw_request("/v1/chat/completions", CHAT))
                assert (await client.answer()).status == 200
                await asyncio.sleep(0.4)  # idle is allowed for longer than slow headers are
            await client.send(b"POST /v1/chat/compl")
            took, rest = await closed_after(client, 10)
            assert took > 0.2 and rest.startswith(b"HTTP/1.1 408")


async def test_a_slow_but_steady_body_and_a_slow_answer_are_fine():
    patience = Patience(headers_s=1.0, body_s=1.0, body_bytes=100, stalled_s=1.0)
    async with serve_rest(ScriptedForward(first_s=1.5), patience=patience) as server:
        async with connection(server) as client:
            raw = raw_request("/v1/chat/completions", CHAT | {"user": "x" * 900})
            for start in range(0, len(raw), 100):
                await client.send(raw[start : start + 100])
                await asyncio.sleep(0.15)
            assert (await client.answer()).status == 200


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nhost: t\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", b"431"),
        (b"GET /healthz HTTP/1.1\r\nhost: t\r\n" + b"x: aaaaaaaaaaaaaaaaaaaa\r\n" * 1000 + b"\r\n", b"431"),
        (b"GET /" + b"a" * 40_000, b"431"),
        (b"POST /healthz HTTP/1.1\r\nhost: t\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", b"400"),
        (b"POST /healthz HTTP/1.1\r\nhost: t\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\nhost: t\n\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nhost: t\r\nx: a\r\n b\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
    ],
)
async def test_malformed_http(raw, status):
    async with serve_rest() as server:
        async with connection(server) as client:
            await client.send(raw)
            first = await asyncio.wait_for(client.reader.read(), 20)
            assert first.split(b" ")[1] == status
            assert json.loads(first.split(b"\r\n\r\n", 1)[1])["error"]["code"]
        assert (await ask(server, "/healthz", method="GET")).status == 200


async def test_connections_are_capped():
    async with serve_rest(patience=Patience(connections=2)) as server:
        async with connection(server), connection(server), connection(server) as third:
            answer = await third.answer()
            assert answer.status == 503 and answer.error["code"] == "queue_full"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before the first token", "later"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_client_that_leaves_cancels_its_work(stream, when, path):
    forward = ScriptedForward(tokens=10_000, step_s=0.01, first_s=0.0 if when == "later" else 60)
    body = CHAT if "chat" in path else {"model": "chat", "prompt": ["a", "b"], "max_tokens": 10_000}
    async with serve_rest(forward) as server:
        async with connection(server) as client:
            await client.send(raw_request(path, body | {"stream": stream}))
            await until(lambda: forward.running)
            if stream and when == "later":
                await client.head()
                await client.chunk()
            client.writer.transport.abort()
            await until(lambda: forward.running == 0)
        assert forward.cancelled
        await until(lambda: not server.server.server_state.tasks)


async def test_a_hundred_clients_vanish():
    forward = ScriptedForward(tokens=100_000, step_s=0.005)
    async with serve_rest(forward) as server:
        writers = []
        for number in range(100):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(raw_request("/v1/chat/completions", CHAT | {"stream": number % 2 == 0}))
            writers.append(writer)
        await until(lambda: forward.running == 100)
        for writer in writers:
            writer.transport.abort()
        await until(lambda: forward.running == 0)
        assert (await ask(server, "/healthz", method="GET")).status == 200


async def test_a_reader_that_does_not_read_is_cut_off():
    forward = ScriptedForward(tokens=10_000_000)
    async with serve_rest(forward, patience=HASTY) as server:
        mute = socket.socket()
        mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        mute.setblocking(False)
        await asyncio.get_running_loop().sock_connect(mute, ("127.0.0.1", server.port))
        await asyncio.get_running_loop().sock_sendall(
            mute, raw_request("/v1/chat/completions", CHAT | {"stream": True, "max_tokens": 10_000_000})
        )
        await until(lambda: forward.running)
        await until(lambda: forward.running == 0)
        assert forward.cancelled == 1
        mute.close()


async def test_a_quiet_stream_is_kept_alive_by_comments(monkeypatch):
    monkeypatch.setattr(sse.EventStream.__init__, "__defaults__", (0.05,))
    async with serve_rest(ScriptedForward(tokens=2, step_s=0.8)) as server:
        answer = await ask(server, "/v1/chat/completions", CHAT | {"stream": True})
        assert answer.body.count(b": ping\n\n") >= 3
        assert sse_events(answer)[-1] == "[DONE]"


async def test_keep_alive_and_pipelining():
    async with serve_rest() as server:
        async with connection(server) as client:
            request = raw_request("/v1/chat/completions", CHAT)
            await client.send(request * 3)
            for _ in range(3):
                assert (await client.answer()).status == 200


async def test_stopping_tells_those_who_wait():
    forward = ScriptedForward(first_s=60)
    async with serve_rest(forward) as server:
        async with connection(server) as client:
            await client.send(raw_request("/v1/chat/completions", CHAT))
            await until(lambda: forward.running)
            server.server.stop(0)
            answer = await asyncio.wait_for(client.answer(), 20)
            assert answer.status == 503 and answer.error["code"] == "draining"
    assert forward.running == 0
