"""The HTTP server: uvicorn with httptools in the gateway's own loop, guarded, without signals, logs and lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Generator
from typing import Any

import uvicorn

from services.gateway.config import Limits
from services.gateway.front.http_guard import GuardedProtocol, Patience

KEEP_ALIVE_S = 75  # longer than the 60 s after which load balancers drop an idle connection: they must be first
BACKLOG = 1024
LAST_WORDS_S = 0.5  # for telling those whose requests are ended
CONNECTIONS_A_REQUEST = 2  # idle connections of pools stand beside the busy ones
# asyncio accepts up to `backlog` connections a turn, and where descriptors have run out it fails, logs and sets a timer
# as many times: with the whole of BACKLOG that alone keeps the loop busy for seconds.
ACCEPTS_A_TURN = 4


class HttpServer(uvicorn.Server):
    """`await serve()` until `should_exit`; `port` is known from the beginning."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self._listener = listener
        self._ready = asyncio.Event()
        self.port: int = listener.getsockname()[1]

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(sockets=sockets or [self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._listener.listen(BACKLOG)  # the kernel's queue, which has been given ACCEPTS_A_TURN
        self._ready.set()

    async def ready(self) -> None:
        """Returns when connections are accepted."""
        await self._ready.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the process's business: uvicorn would raise them a second time after a drain."""
        yield

    def stop(self, grace_s: float) -> None:
        """Closes the listener, lets requests under way finish for `grace_s`, then ends them."""
        self.should_exit = True
        loop = asyncio.get_running_loop()
        loop.call_later(grace_s, self._end_requests)
        loop.call_later(grace_s + LAST_WORDS_S, self._cut_connections)

    def _end_requests(self) -> None:
        for task in tuple(self.server_state.tasks):
            task.cancel()

    def _cut_connections(self) -> None:
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()

    def close(self) -> None:
        """For a server that was never served."""
        self._listener.close()


def build_http_server(
    app: Any,
    host: str,
    port: int,
    limits: Limits,
    *,
    tls: ssl.SSLContext | None = None,
    reuse_port: bool = False,
    patience: Patience | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> HttpServer:
    """Binds at once.

    Raises:
        OSError: the address cannot be bound; its text names the address.
    """
    # Half of the descriptors are for the other door, for instances and for the registry.
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
    guard = patience or Patience(connections=min(limits.max_concurrent * CONNECTIONS_A_REQUEST, descriptors))
    protocol = type("Protocol", (GuardedProtocol,), {"patience": guard})
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        log_level="error",  # a stranger's malformed request is no news
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]  # used as a delay, floats are fine
        backlog=ACCEPTS_A_TURN,
    )
    config.load()
    config.ssl = tls
    return HttpServer(config, _listen(host, port, reuse_port))


def _listen(host: str, port: int, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle off only then (else replies wait 40 ms for an ACK).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another address with --http") from None
    return listener
