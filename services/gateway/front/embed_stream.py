"""EmbedStream: bulk indexing in order, with a bounded number of batches in flight."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from infermesh.errors import MeshError, Reason
from infermesh.v1 import embedding_pb2 as em
from services.chassis.rpc import Context, abort, as_mesh_error
from services.gateway.entrance import Entrance
from services.gateway.front.rooted import rooted
from services.gateway.front.rpc import EMBEDDING, Door, identity, parse
from services.gateway.upstream.calls import Call, Method, Reply

IN_FLIGHT = 8
_ENTRANCE = Entrance(f"{EMBEDDING}/EmbedStream")
_KEPT = ("model", "truncation", "normalize", "dimensions", "task", "prefix", "hints", "max_tokens")
_BATCH_TAG = b"\x0a"  # field 1 of EmbedStreamResponse, length-delimited


class EmbedStream:
    def __init__(self, door: Door) -> None:
        self._door = door

    async def __call__(self, requests: Any, context: Context) -> None:
        tasks: set[asyncio.Task[Any]] = set()
        try:
            with rooted(self._door.watcher, self._door.call("embed_stream", _ENTRANCE, context)) as call:
                await self._run(call, context, tasks)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort(context, as_mesh_error(error))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, call: Call, context: Context, tasks: set[asyncio.Task[Any]]) -> None:
        """One task reads, up to `IN_FLIGHT` embed, this one writes in order. A reader that is ahead waits for the
        writer, which waits for the caller: that is what bounds memory."""
        lane: asyncio.Queue[asyncio.Task[tuple[Reply, bytes]] | None] = asyncio.Queue()
        room = asyncio.Semaphore(IN_FLIGHT)
        reader = asyncio.create_task(self._read(call, context, lane, room, tasks))
        tasks.add(reader)
        begun = False
        while True:
            coming = await lane.get()
            if coming is None:
                await reader  # raises what ended it
                return
            reply, raw = await coming
            if not begun:
                begun = True
                await context.send_initial_metadata(identity(reply, call))
            await context.write(raw)
            tasks.discard(coming)
            room.release()

    async def _read(
        self, call: Call, context: Context, lane: asyncio.Queue[Any], room: asyncio.Semaphore, tasks: set[Any]
    ) -> None:
        first: em.EmbedRequest | None = None
        number = 0
        try:
            while True:
                await room.acquire()
                raw = await context.read()
                if raw is grpc.aio.EOF:
                    return
                message = parse(em.EmbedStreamRequest, raw)
                batch = message.batch
                if first is None:
                    first = em.EmbedRequest()
                    first.CopyFrom(batch)
                    del first.texts[:], first.token_ids[:]
                else:
                    inherit(batch, first)
                number += 1
                mine = Call(f"{call.request_id}.{number}", call.caller, call.deadline, call.trace)
                task = asyncio.create_task(self._embed(batch, message.tag, mine))
                tasks.add(task)
                lane.put_nowait(task)
        finally:
            lane.put_nowait(None)

    async def _embed(self, batch: em.EmbedRequest, tag: int, call: Call) -> tuple[Reply, bytes]:
        async with self._door.forward.open(Method.EMBED, batch, call) as reply:
            async for event in reply:
                return reply, frame(event.raw, tag)
        raise MeshError(Reason.INTERNAL, "the instance gave no answer")


def inherit(batch: Any, first: Any) -> None:
    """Options of the first batch hold for later ones that leave them empty."""
    for name in _KEPT:
        if name in ("task", "prefix") and (batch.task or batch.prefix):
            continue
        field = batch.DESCRIPTOR.fields_by_name[name]
        if field.has_presence:
            if first.HasField(name) and not batch.HasField(name):
                if field.message_type is not None:
                    getattr(batch, name).CopyFrom(getattr(first, name))
                else:
                    setattr(batch, name, getattr(first, name))
        elif not getattr(batch, name):
            setattr(batch, name, getattr(first, name))


def frame(raw: bytes, tag: int) -> bytes:
    """An EmbedStreamResponse around an encoded EmbedResponse, without decoding it."""
    size, length = len(raw), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"".join((_BATCH_TAG, bytes(length), raw, em.EmbedStreamResponse(tag=tag).SerializeToString()))
