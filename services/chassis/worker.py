"""The instance's end of WorkerService: Describe, Link, Drain, Calibrate."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, nullcontext
from functools import partial

import structlog

import infermesh
from infermesh.errors import MeshError, Reason, invalid
from infermesh.v1 import worker_pb2 as wk
from infermesh.v1 import worker_pb2_grpc
from registry.endpoint import Endpoint, to_metadata
from services.chassis.arrivals import Arrivals
from services.chassis.calibrate import Step
from services.chassis.granting import FEATURE as GRANT
from services.chassis.held_prefixes import HeldPrefixes
from services.chassis.identity import metadata_value
from services.chassis.keys import Keys
from services.chassis.preemption import FEATURE as PREEMPT
from services.chassis.room import Outbox
from services.chassis.rpc import Context, stream, unary

HEARTBEAT_S = 1.0
MIN_INTERVAL_S = 0.02
FEATURES = ("load", "cache", GRANT)  # "cache" in a gateway's hello asks for cache frames
Measure = Callable[[bool, str], AsyncGenerator[Step, None]]  # (quick, the caller's authorization)
Adopt = Callable[[Mapping[str, float]], Awaitable[str]]  # a measured speed; returns why it is not taken, or nothing
log = structlog.get_logger("worker")


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    """`drain` is called with the grace in seconds, or None for the instance's own setting; `undo` takes that back, and
    tells whether it can be."""

    def __init__(
        self,
        endpoint: Callable[[], Endpoint],
        load: Callable[[], wk.Load],
        arrivals: Arrivals,
        keys: Keys,
        drain: Callable[[float | None], None],
        held: HeldPrefixes | None = None,
        undo: Callable[[], bool] = lambda: False,
        measure: Measure | None = None,
        adopt: Adopt | None = None,
        preempts: Callable[[], bool] = lambda: False,
    ) -> None:
        self._endpoint = endpoint
        self._load = load
        self._arrivals = arrivals
        self._keys = keys
        self._drain = drain
        self._held = held or HeldPrefixes()
        self._undo = undo
        self._measure = measure
        self._adopt = adopt
        self._preempts = preempts
        self._draining = False
        self._grace_s = 0.0
        self._leaving = ""
        self._news = asyncio.Event()  # replaced each time

    def announce_drain(self, grace_s: float) -> None:
        """Tells every linked gateway."""
        self._grace_s = grace_s
        self._draining = True
        self._tell()

    def retract_drain(self) -> None:
        """It serves on. Links that have told of the drain end, and the next ones do not tell of it."""
        self._draining = False
        self._tell()

    def announce_goodbye(self, why: str) -> None:
        """Tells every linked gateway that this life is over, and ends their Links."""
        self._leaving = why
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    @unary
    async def Describe(self, request: wk.DescribeRequest, context: Context) -> wk.DescribeResponse:
        endpoint = self._endpoint()
        return wk.DescribeResponse(
            instance_id=endpoint.id,
            incarnation=endpoint.incarnation,
            metadata=to_metadata(endpoint),
            version=infermesh.__version__,
            load=self._load(),
            draining=self._draining,
            engine_version=endpoint.engine_version,
        )

    @unary
    async def Drain(self, request: wk.DrainRequest, context: Context) -> wk.DrainResponse:
        self._keys.operator(metadata_value(context, "authorization"))
        mine = self._endpoint().id
        if request.instance_id not in ("", mine):
            raise invalid("instance_id", f"this is {mine}")
        if request.undo:
            if not self._undo():
                raise MeshError(Reason.FAILED_PRECONDITION, f"{mine} is under no drain that could be taken back")
            log.info("drain taken back", reason=request.reason)
            return wk.DrainResponse(running=self._arrivals.running)
        log.info("drain asked", reason=request.reason)
        self._drain(request.grace_ms / 1000 if request.HasField("grace_ms") else None)
        return wk.DrainResponse(running=self._arrivals.running)

    @stream
    async def Calibrate(self, request: wk.CalibrateRequest, context: Context) -> AsyncIterator[wk.CalibrateResponse]:
        authorization = metadata_value(context, "authorization")
        self._keys.operator(authorization)
        if self._measure is None or self._adopt is None:
            raise MeshError(Reason.UNIMPLEMENTED, "this process cannot measure itself")
        async with aclosing(self._measure(request.quick, authorization or "")) as steps:
            async for step in steps:
                reply = wk.CalibrateResponse(progress=step.progress, step=step.text)
                if step.found is not None:
                    values = step.found.fit.values
                    refused = await self._adopt(values)
                    log.info("calibrated", **values, refused=refused)
                    reply.speed.update({name: f"{value:.6g}" for name, value in values.items()})
                    reply.report_json = json.dumps({**step.found.report(), "not_adopted": refused})
                yield reply

    @stream
    async def Link(self, frames: AsyncIterator[wk.LinkRequest], context: Context) -> AsyncIterator[wk.LinkResponse]:
        self._keys.operator(metadata_value(context, "authorization"))
        hello = await anext(aiter(frames), None)
        if hello is None or hello.WhichOneof("frame") != "hello":
            raise invalid("frame", "the first frame must be hello")
        gateway_id = hello.hello.gateway_id
        with_cache = "cache" in hello.hello.features
        interval_s = min(max(MIN_INTERVAL_S, (hello.hello.load_interval_ms or 100) / 1000), HEARTBEAT_S)
        endpoint = self._endpoint()
        yield wk.LinkResponse(
            hello=wk.WorkerHello(
                instance_id=endpoint.id,
                incarnation=endpoint.incarnation,
                version=infermesh.__version__,
                features=(*FEATURES, PREEMPT) if self._preempts() else FEATURES,
            )
        )
        asks = GRANT in hello.hello.features
        room = self._arrivals.room
        hear = partial(room.hear, gateway_id) if asks else None
        gone = asyncio.create_task(_until_goodbye(frames, hear))
        try:
            with self._arrivals.linked(gateway_id), room.linked(gateway_id) if asks else nullcontext() as outbox:
                async for frame in self._reports(gateway_id, interval_s, gone, with_cache, outbox):
                    yield frame
        finally:
            gone.cancel()

    async def _reports(
        self, gateway_id: str, interval_s: float, gone: asyncio.Task[None], with_cache: bool, outbox: Outbox | None
    ) -> AsyncIterator[wk.LinkResponse]:
        """Load when it changed, at least every second; the drain once; until the gateway or this instance leaves."""
        last: wk.Load | None = None
        last_at = looked_at = 0.0
        seen: int | None = None
        told = False
        while not gone.done():
            news = self._news
            if self._leaving:
                yield wk.LinkResponse(goodbye=wk.WorkerGoodbye(why=self._leaving))
                return
            if told and not self._draining:
                return
            if self._draining and not told:
                told = True
                yield wk.LinkResponse(draining=wk.Draining(grace_ms=round(self._grace_s * 1000)))
            now = time.monotonic()
            if outbox is not None:
                outbox.news.clear()
                while outbox.frames:
                    yield outbox.frames.popleft()
            if now - looked_at < interval_s and not self._draining:  # woken for a grant
                await self._pause(gone, news, interval_s - (now - looked_at), outbox)
                continue
            looked_at = now
            load = self._frame(gateway_id, asks=outbox is not None)
            if load != last or now - last_at >= HEARTBEAT_S:
                last, last_at = load, now
                stamped = wk.Load()
                stamped.CopyFrom(load)
                stamped.taken_at_ms = round(now * 1000)
                yield wk.LinkResponse(load=stamped)
            if with_cache:
                changes, seen = self._held.frames(seen)
                for cache in changes:
                    yield wk.LinkResponse(cache=cache)
            await self._pause(gone, news, interval_s, outbox)

    async def _pause(
        self, gone: asyncio.Task[None], news: asyncio.Event, timeout_s: float, outbox: Outbox | None
    ) -> None:
        """Until there is something to tell, at most so long."""
        events = [news] if outbox is None else [news, outbox.news]
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        await asyncio.wait({gone, *waits}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _frame(self, gateway_id: str, *, asks: bool) -> wk.Load:
        share = self._arrivals.share(gateway_id)
        load = self._load()
        load.seen_seq = share.seen_seq
        load.own_running = share.running
        room = self._arrivals.room
        load.own_queued_tokens = room.arbiter.queued_tokens(gateway_id)
        if room.arbiter.hears:  # engines count a prompt in full until its first token
            load.queued_tokens = room.arbiter.queued_tokens()
        if asks:
            room.tell(gateway_id, load)
        return load


async def _until_goodbye(frames: AsyncIterator[wk.LinkRequest], hear: Callable[[wk.LinkRequest], None] | None) -> None:
    """Ends when the gateway says goodbye or its half of the stream is over. `hear`: takes its other frames in."""
    async for frame in frames:
        if frame.WhichOneof("frame") == "goodbye":
            return
        if hear is not None:
            hear(frame)
