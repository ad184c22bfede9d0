"""What is served, and whether: models, health, metrics, version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson

import infermesh
from infermesh.errors import MeshError, Reason
from services.gateway.front.rest_exchange import Exchange
from services.gateway.upstream.calls import DirectoryView, ModelView, Watcher

Handler = Callable[[Exchange], Awaitable[None]]


class Fleet:
    def __init__(self, directory: DirectoryView, watcher: Watcher, draining: Callable[[], bool]) -> None:
        self._directory = directory
        self._watcher = watcher
        self._draining = draining

    async def models(self, exchange: Exchange) -> None:
        """Every model id of the fleet that the caller may use; an alias is an entry of its own."""
        views = self._directory.models()
        data = [entry for view in views for entry in _entries(view, exchange.caller.models)]
        await exchange.respond(orjson.dumps({"object": "list", "data": data}))

    async def model(self, exchange: Exchange) -> None:
        wanted = exchange.scope["path_params"]["model"]
        for view in self._directory.models():
            for entry in _entries(view, exchange.caller.models):
                if entry["id"] == wanted:
                    await exchange.respond(orjson.dumps(entry))
                    return
        raise MeshError(
            Reason.MODEL_NOT_FOUND, f"no model {wanted[:256]!r} here; GET /v1/models lists them", param="model"
        )

    async def live(self, exchange: Exchange) -> None:
        await exchange.respond(b'{"status":"ok"}')

    async def ready(self, exchange: Exchange) -> None:
        """Ready means: send requests here. Draining, or with nothing behind, it is not."""
        if self._draining():
            raise MeshError(Reason.DRAINING, "draining")
        healthy = self._directory.healthy
        if not healthy:
            raise MeshError(Reason.NO_INSTANCE, "no healthy instance yet")
        status = {"status": "ready", "instances": healthy, "registry_stale": self._directory.stale}
        await exchange.respond(orjson.dumps(status))

    async def metrics(self, exchange: Exchange) -> None:
        body, kind = self._watcher.exposition(exchange.header("accept") or "")
        await exchange.respond(body, headers=[(b"content-type", kind.encode())])

    async def version(self, exchange: Exchange) -> None:
        await exchange.respond(orjson.dumps({"version": infermesh.__version__}))


def _entries(view: ModelView, allowed: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The entries of a model that a key for the names `allowed` (empty = all) may see; what stands behind an alias is
    told only to those who may name it."""

    def may(name: str) -> bool:
        return not allowed or name in allowed

    entry: dict[str, Any] = {
        "id": view.id,
        "object": "model",
        "created": view.created,
        "owned_by": "infermesh",
        "kind": view.kind,
    }
    if view.context_max:
        entry["max_model_len"] = view.context_max
    if view.variants and all(may(model) for model, _ in view.variants):
        entry["variants"] = [{"model": model, "weight": weight} for model, weight in view.variants]
    if may(view.id):
        yield entry
    root = {"root": view.id} if may(view.id) else {}
    for alias in view.aliases:
        if may(alias):
            yield {**entry, "id": alias, **root}
