"""The REST front: OpenAI's API (and Jina's, Cohere's and vLLM's where OpenAI has none) over the forwarder.

Every route is a plain ASGI application: middleware would cost each streamed token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from infermesh.errors import MeshError, Reason
from services.chassis.keys import Keys
from services.chassis.rpc import as_mesh_error
from services.gateway.config import Limits
from services.gateway.entrance import Entrance
from services.gateway.front.callers import caller
from services.gateway.front.console.live import Live
from services.gateway.front.console.pages import Pages
from services.gateway.front.disconnect import ClientGone
from services.gateway.front.rest_chat import chat
from services.gateway.front.rest_completions import completions
from services.gateway.front.rest_embeddings import embeddings
from services.gateway.front.rest_errors import error_headers, error_json
from services.gateway.front.rest_exchange import Exchange, Front
from services.gateway.front.rest_fleet import Fleet, Handler
from services.gateway.front.rest_rerank import rerank, score
from services.gateway.front.rest_tokens import detokenize, tokenize
from services.gateway.upstream.calls import DirectoryView, Forward, Watcher

QUIET = ("/metrics", "/console")  # asked for all day by machines; only refusals have a span


class _Endpoint:
    """One path: authenticates, runs the handler, turns whatever it raises into an answer."""

    def __init__(self, front: Front, path: str, method: str, handler: Handler, *, open_to_all: bool) -> None:
        self._front = front
        self._entrance = Entrance(path, method)
        self._quiet = open_to_all or path.startswith(QUIET)
        self._methods = ("GET", "HEAD") if method == "GET" else (method,)
        self._handler = handler
        self._open = open_to_all

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        front = self._front
        exchange = Exchange(scope, receive, send, front, self._entrance)
        try:
            if scope["method"] not in self._methods:
                raise MeshError(Reason.NOT_FOUND, f"{self._entrance.path} answers to {self._methods[0]}")
            if not self._open:
                exchange.caller = caller(front.keys, exchange.header("authorization"))
            await self._handler(exchange)
            if not self._quiet:
                exchange.without(None)
        except ClientGone:
            exchange.without(MeshError(Reason.CANCELLED, "the caller left before the request was whole"))
        except asyncio.CancelledError:
            # The server's shutdown ran out of patience. It would log a traceback and cut the connection, so the
            # caller is told here and the task ends as if it were done.
            await self._fail(exchange, MeshError(Reason.DRAINING, "the gateway is stopping"))
        except Exception as error:
            await self._fail(exchange, as_mesh_error(error))

    async def _fail(self, exchange: Exchange, error: MeshError) -> None:
        exchange.without(error)
        await exchange.fail(error)


def build_app(
    forward: Forward,
    directory: DirectoryView,
    keys: Keys,
    limits: Limits,
    observe: Watcher,
    draining: Callable[[], bool],
    live: Live,
) -> Starlette:
    """The ASGI application. It has no lifespan; whoever runs it owns all that is handed in."""
    front = Front(forward, keys, limits, observe, draining)
    fleet = Fleet(directory, observe, draining)
    console = Pages(live)

    def route(path: str, method: str, handler: Handler, *, open_to_all: bool = False) -> Route:
        return Route(path, _Endpoint(front, path, method, handler, open_to_all=open_to_all))

    return Starlette(
        routes=[
            route("/v1/chat/completions", "POST", chat),
            route("/v1/completions", "POST", completions),
            route("/v1/embeddings", "POST", embeddings),
            *(route(path, "POST", rerank) for path in ("/v1/rerank", "/v2/rerank", "/rerank")),
            *(route(path, "POST", score) for path in ("/v1/score", "/score")),
            route("/tokenize", "POST", tokenize),
            route("/detokenize", "POST", detokenize),
            route("/v1/models", "GET", fleet.models),
            route("/v1/models/{model:path}", "GET", fleet.model),
            *(route(path, "GET", fleet.live, open_to_all=True) for path in ("/healthz", "/livez", "/health")),
            route("/readyz", "GET", fleet.ready, open_to_all=True),
            route("/metrics", "GET", fleet.metrics),
            route("/version", "GET", fleet.version, open_to_all=True),
            route("/console/api/state", "GET", console.state),
            route("/console/api/events", "GET", console.events),
            route("/console/api/explain", "GET", console.explain),
            route("/console/api/requests/{id}", "GET", console.request),
            *(route(path, "GET", console.file, open_to_all=True) for path in ("/console", "/console/{rest:path}")),
        ],
        exception_handlers={HTTPException: _NoSuchPath(front)},
    )


class _NoSuchPath:
    def __init__(self, front: Front) -> None:
        self._front = front
        self._entrances = {method: Entrance("", method) for method in ("GET", "HEAD", "POST", "_OTHER")}

    async def __call__(self, request: Request, _: Exception) -> Response:
        entrance = self._entrances.get(request.method, self._entrances["_OTHER"])  # callers choose the method too
        exchange = Exchange(request.scope, None, None, self._front, entrance)
        path = request.url.path[:256]
        error = MeshError(Reason.NOT_FOUND, f"{request.method} {path} is not served")
        exchange.without(error)
        return Response(
            error_json(error, None),
            status_code=error.row.http,
            headers={key.decode(): value.decode() for key, value in error_headers(error)},
            media_type="application/json",
        )
