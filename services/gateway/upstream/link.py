"""The gateway's end of WorkerService.Link: one long stream to each instance, made again whenever it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import grpc.aio
import structlog

import infermesh
from infermesh.v1 import worker_pb2 as wk
from registry.endpoint import Endpoint
from services.chassis.granting import FEATURE as GRANT
from services.chassis.preemption import FEATURE as PREEMPT
from services.gateway.routing.facts import LoadReport
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.failures import we_were_cancelled

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 1.0
HELLO_TIMEOUT_S = 3.0
CACHE_FEATURE = "cache"  # asks for cache frames
LOAD_FEATURE = "load"  # promises load frames, at least every second
log = structlog.get_logger("link")


class WrongPeer(Exception):
    """Somebody else answers at the address of an instance."""


class Link:
    """Runs until cancelled, until the instance says goodbye, or until the router knows its life no more. `wrong` tells
    who answered instead, if anybody."""

    def __init__(self, carrier: Carrier, endpoint: Endpoint, gateway_id: str) -> None:
        self.address = endpoint.address
        self.wrong = ""
        self._carrier = carrier
        self._endpoint = endpoint
        self._gateway_id = gateway_id

    async def run(self) -> None:
        pause = FIRST_PAUSE_S
        carrier, id, incarnation = self._carrier, self._endpoint.id, self._endpoint.incarnation
        while carrier.router.fleet.life(id, incarnation) is not None:
            why = "the instance ended its Link"
            try:
                async with aclosing(self._frames()) as frames:
                    async for frame in frames:
                        pause = FIRST_PAUSE_S
                        if not self._hear(frame):
                            return
            except WrongPeer as error:
                self.wrong = why = str(error)
                pause = LONGEST_PAUSE_S
                log.warning("wrong instance", instance=id, why=why)
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name}: {error.details()}"
            except TimeoutError:
                why = f"no hello within {HELLO_TIMEOUT_S:g} s"
            except asyncio.CancelledError as error:
                if we_were_cancelled(error):
                    raise
                why = "the channel was closed"
            except Exception as error:
                why = f"unexpected: {type(error).__name__}"
                log.error("link failed", instance=id, exc_info=error)
            carrier.do(carrier.router.unlinked(id, incarnation, why, carrier.now()))
            carrier.touch()
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_S)

    async def _frames(self) -> AsyncGenerator[wk.LinkResponse, None]:
        """Frames after a hello that was right."""
        line = self._carrier.channels.open(self._endpoint)
        call: Any = line.worker.Link(metadata=self._carrier.credentials(self._endpoint))
        talking: asyncio.Task[None] | None = None
        try:
            hello = wk.GatewayHello(
                gateway_id=self._gateway_id, version=infermesh.__version__, features=[CACHE_FEATURE, GRANT]
            )
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await call.write(wk.LinkRequest(hello=hello))
                first = await call.read()
            if first is grpc.aio.EOF:
                return
            with self._carrier.speaking(self._endpoint.id) as said:
                talking = asyncio.create_task(_say(call, said), name=f"asks-{self._endpoint.id}")
                self._meet(first)
                while (frame := await call.read()) is not grpc.aio.EOF:
                    yield frame
        finally:
            if talking is not None:
                talking.cancel()
            call.cancel()

    def _meet(self, frame: wk.LinkResponse) -> None:
        hello = frame.hello
        mine = (self._endpoint.id, self._endpoint.incarnation)
        if (hello.instance_id, hello.incarnation) != mine:
            raise WrongPeer(
                f"{self.address} is answered by {hello.instance_id or 'somebody'} in life {hello.incarnation:016x}, "
                f"registered is {mine[0]} in life {mine[1]:016x}"
            )
        self.wrong = ""
        beats = LOAD_FEATURE in hello.features
        grants, preempts = GRANT in hello.features, PREEMPT in hello.features
        router, now = self._carrier.router, self._carrier.now()
        self._carrier.do(router.linked(*mine, now, beats=beats, grants=grants, preempts=preempts))
        self._carrier.touch()

    def _hear(self, frame: wk.LinkResponse) -> bool:
        """Takes a frame in. False after a goodbye. Frames of later versions are ignored."""
        carrier, id, incarnation = self._carrier, self._endpoint.id, self._endpoint.incarnation
        which = frame.WhichOneof("frame")
        if which == "load":
            carrier.do(carrier.router.report(id, incarnation, load_report(frame.load), carrier.now()))
        elif which == "cache":
            cache = frame.cache
            carrier.router.cached(
                id, incarnation, cache.added, cache.removed, snapshot=cache.snapshot, epoch=cache.epoch
            )
            carrier.ask()
        elif which == "grant":
            carrier.do(carrier.router.granted(id, incarnation, frame.grant.ticket, carrier.now()))
        elif which == "draining":
            carrier.do(carrier.router.draining(id, incarnation, carrier.now()))
        elif which == "goodbye":
            carrier.do(carrier.router.goodbye(id, incarnation, carrier.now()))
            return False
        return True


async def _say(call: Any, frames: asyncio.Queue[wk.LinkRequest]) -> None:
    """Frames of ours, until the Link ends; a broken one is noticed by whoever reads it."""
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await call.write(await frames.get())


def load_report(load: wk.Load) -> LoadReport:
    def known(name: str) -> int | None:
        return getattr(load, name) if load.HasField(name) else None  # type: ignore[arg-type]

    return LoadReport(
        running=known("running"),
        waiting=known("waiting"),
        queued_tokens=known("queued_tokens"),
        kv_used_ratio=known("kv_used_ratio"),
        resident_tokens=known("resident_tokens"),
        steps=known("steps"),
        seen_seq=load.seen_seq,
        own_running=load.own_running,
        own_queued_tokens=load.own_queued_tokens,
        gateways=load.gateways,
        foreign_work_us=known("foreign_work_us"),
        foreign_line_ms=tuple(load.foreign_line_ms),
        foreign_waiting=load.foreign_waiting,
        tenants_beyond=frozenset(load.tenants_beyond),
    )
