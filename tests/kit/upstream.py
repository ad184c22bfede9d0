"""The forwarder with everything below it, in the test's own loop, and instances that misbehave as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from registry.port import Entry, Snapshot
from services.chassis.rpc import abort
from services.gateway.observe import Observe
from services.gateway.routing.admission import Bounds
from services.gateway.routing.facts import End, Outcome
from services.gateway.routing.router import Router
from services.gateway.upstream.calls import Call, Caller, Method
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.channels import Channels
from services.gateway.upstream.directory import Directory
from services.gateway.upstream.forward import Forwarder
from tests.kit.fake_instance import FakeInstance, three_words
from tests.kit.mesh import until

REQUEST_ID = "test-1"
LEFT = Outcome(End.CANCELLED)


@dataclass
class Upstream:
    forwarder: Forwarder
    carrier: Carrier
    directory: Directory

    def state(self, id: str) -> str:
        instance = self.carrier.router.fleet.instances.get(id)
        return instance.state.value if instance else "gone"

    def nothing_left(self) -> bool:
        fleet = self.carrier.router.fleet
        ledgers = [instance.ledger for instance in fleet.instances.values()]
        zero = all((x.entries, x.own_prompt, x.own_output, x.own_slots) == ({}, 0, 0, 0) for x in ledgers)
        budget = self.forwarder.budget
        return zero and not fleet.leaving and not self.carrier.router.waiting and budget.live == budget.retrying == 0

    async def chat(self, deadline_s: float | None = None, caller: Caller = Caller()) -> tuple[str, Any]:  # noqa: B008
        deadline = None if deadline_s is None else self.carrier.now() + deadline_s
        async with self.forwarder.open(Method.CHAT, request(), Call(REQUEST_ID, caller, deadline)) as reply:
            text = ""
            async for event in reply:
                assert event.message == lm.ChatResponse.FromString(event.raw)
                text += "".join(delta.content for delta in event.message.deltas)
            return text, reply.identity


def request(max_tokens: int = 10) -> lm.ChatRequest:
    message = lm.Message(role=lm.ROLE_USER, content="hello")
    return lm.ChatRequest(model="m", messages=[message], sampling=lm.Sampling(max_tokens=max_tokens))


@asynccontextmanager
async def upstream(*instances: FakeInstance, bounds: Bounds | None = None) -> AsyncIterator[Upstream]:
    clock = asyncio.get_running_loop().time
    carrier = Carrier(Router(clock() - 60, bounds), Channels(), Observe(), clock)
    directory = Directory(carrier, "gw-test")
    forwarder = Forwarder(carrier, carrier._observe, "gw-test")
    tasks = [asyncio.create_task(carrier.run()), asyncio.create_task(directory.run())]
    made = Upstream(forwarder, carrier, directory)
    directory.apply(Snapshot(tuple(Entry(instance.endpoint) for instance in instances)))
    try:
        await until(lambda: all(made.state(i.endpoint.id) == "healthy" for i in instances if not i.hello_id), 20)
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await directory.close()
        await carrier.channels.close_all()


def refusing(reason: Reason, message: str = "no", times: int = 1_000_000) -> Any:
    left = [times]

    async def chat(self: FakeInstance, request: Any, context: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            await abort(context, MeshError(reason, message))
        await three_words(self, request, context)

    return chat


async def silent(self: FakeInstance, request: Any, context: Any) -> None:
    await asyncio.sleep(60)


async def breaks_after_two(self: FakeInstance, request: Any, context: Any) -> None:
    await self.begin(context)
    for i in range(2):
        await context.write(lm.ChatResponse(deltas=[lm.Delta(token_ids=[i], content=f" w{i}")]))
    await abort(context, MeshError(Reason.ENGINE_FAILED, "the engine died"))
