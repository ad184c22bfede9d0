"""Direct mode over real processes, everybody with keys: no answer passes the gateway, and nothing leaks."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from infermesh.client import AsyncDirectClient, DirectClient, MeshError, Reason
from infermesh.errors import from_rpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1 import worker_pb2 as wk
from infermesh.v1 import worker_pb2_grpc
from infermesh.v1.inference_pb2 import Relay
from tests.kit.mesh import TestMesh, running_mesh, until


def who(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


@asynccontextmanager
async def keyed(folder: Path, **instances: tuple[str, ...]) -> AsyncIterator[TestMesh]:
    def line(secret: str, more: str) -> str:
        return f"  - {{sha256: {hashlib.sha256(secret.encode()).hexdigest()}, {more}}}"

    keys, operator = folder / "keys.yaml", folder / "operator.key"
    at_instances = folder / "instances.yaml"  # callers have no key of their own there
    root = line("root", "tenant: o, role: operator")
    keys.write_text("\n".join(["version: 1", "keys:", line("alice", "tenant: a"), line("bob", "tenant: b"), root]))
    at_instances.write_text("\n".join(["version: 1", "keys:", root]))
    operator.write_text("root\n")
    flags = ("--keys", str(at_instances), "--operator-key-file", str(operator))
    async with running_mesh(folder, {}, keys=keys, operator_key_file=operator) as mesh:
        await asyncio.gather(*(mesh.start(id, *flags, *more) for id, more in instances.items()))
        await until(lambda: healthy(mesh, *instances), 30)
        yield mesh


async def listed(mesh: TestMesh) -> dict[str, ms.Instance]:
    reply = await mesh.mesh.ListInstances(ms.ListInstancesRequest(), metadata=who("root"))
    return {one.id: one for one in reply.instances}


async def healthy(mesh: TestMesh, *ids: str) -> bool:
    found = await listed(mesh)
    return all(id in found and found[id].state == "healthy" for id in ids)


async def idle(mesh: TestMesh) -> bool:
    return all(not one.in_flight for one in (await listed(mesh)).values())


def chat(relay: Relay | None = None) -> lm.ChatRequest:
    message = lm.Message(role=lm.ROLE_USER, content="hello")
    return lm.ChatRequest(model="chat", messages=[message], sampling=lm.Sampling(max_tokens=4), relay=relay)


async def refused(call: Any) -> tuple[Reason, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return from_rpc(caught.value).reason, str(caught.value.details())


async def test_a_lease_opens_one_call_of_one_instance_and_nothing_else(tmp_path: Path) -> None:
    async with keyed(tmp_path, a=(), b=()) as mesh:
        wish = ms.PickRequest(model="chat", prompt_tokens=5, max_tokens=4)
        never = await mesh.mesh.Pick(wish, metadata=who("bob"), timeout=1)  # nobody reports this one
        assert 10_000 < never.expires_ms < 12_000  # deadlines travel rounded
        picked = await mesh.mesh.Pick(wish, metadata=who("alice"), timeout=60)
        assert picked.address == mesh.instances[picked.instance_id].address and picked.model == "chat"
        assert picked.relay.tenant == "a" and not picked.tls
        lent = tuple(picked.metadata.items())
        mine, other = await mesh.direct(picked.instance_id), await mesh.direct({"a": "b", "b": "a"}[picked.instance_id])
        worker = worker_pb2_grpc.WorkerServiceStub(await mesh.dial(picked.address))
        changed = Relay()
        changed.CopyFrom(picked.relay)
        changed.cache_salt = b"another tenant's"
        for reason, words, call in (
            (Reason.UNAUTHENTICATED, "another address", other.Chat(chat(picked.relay), metadata=lent)),
            (Reason.UNAUTHENTICATED, "API key", mine.Chat(chat(picked.relay))),
            (Reason.UNAUTHENTICATED, "", worker.Drain(wk.DrainRequest(), metadata=lent)),
        ):
            found, said = await refused(call)
            assert found is reason and words in said
        events = [event async for event in mine.Chat(chat(picked.relay), metadata=lent)]
        assert sum(len(delta.content.split()) for event in events for delta in event.deltas) == 4
        found, said = await refused(mine.Chat(chat(picked.relay), metadata=lent))
        assert found is Reason.UNAUTHENTICATED and "has been used" in said
        for relay in (changed, None):
            again = await mesh.mesh.Pick(wish, metadata=who("alice"), timeout=60)
            line = await mesh.direct(again.instance_id)
            found, said = await refused(line.Chat(chat(relay), metadata=tuple(again.metadata.items())))
            assert found is Reason.INVALID_ARGUMENT and "the one of the Pick" in said
            await mesh.mesh.Report(
                ms.ReportRequest(lease_id=again.lease_id, outcome=found.value), metadata=who("alice")
            )

        report = ms.ReportRequest(lease_id=picked.lease_id, outcome="ok", completion_tokens=4)
        assert (await refused(mesh.mesh.Report(report, metadata=who("bob"))))[0] is Reason.NOT_FOUND
        wrong = ms.ReportRequest(lease_id=picked.lease_id, outcome="fine")
        assert (await refused(mesh.mesh.Report(wrong, metadata=who("alice"))))[0] is Reason.INVALID_ARGUMENT
        await mesh.mesh.Report(report, metadata=who("alice"))
        assert (await refused(mesh.mesh.Report(report, metadata=who("alice"))))[0] is Reason.NOT_FOUND
        past = ms.ExplainRequest(request_id=picked.metadata["x-request-id"])
        assert '"chosen": "' in (await mesh.mesh.Explain(past, metadata=who("alice"))).decision_json
        assert sum(one.in_flight for one in (await listed(mesh)).values()) == 1
        await until(lambda: idle(mesh), 30)
        late = ms.ReportRequest(lease_id=never.lease_id, outcome="ok")
        assert (await refused(mesh.mesh.Report(late, metadata=who("bob"))))[0] is Reason.NOT_FOUND


async def test_clients_go_elsewhere_when_an_instance_dies_or_drains(tmp_path: Path) -> None:
    async with keyed(tmp_path, a=("--step-ms", "5"), b=("--step-ms", "5")) as mesh:
        async with AsyncDirectClient(mesh.address, api_key="alice", timeout=60) as client:

            async def ask() -> Any:
                return await client.chat("hello", model="chat", max_tokens=40)

            answers = await asyncio.gather(*(ask() for _ in range(16)))
            assert {answer.served.instance_id for answer in answers} == {"a", "b"}
            assert all(answer.text.split() == [f"w{i}" for i in range(40)] for answer in answers)
            await until(lambda: idle(mesh), 30)

            left = client.chat_stream("hello", model="chat", max_tokens=2000)
            async for _ in left:
                break
            await left.aclose()  # type: ignore[attr-defined]
            await until(lambda: idle(mesh), 30)

            with pytest.raises(MeshError) as caught:
                await client.chat("hello", model="none", max_tokens=4)
            assert caught.value.reason is Reason.MODEL_NOT_FOUND

            victim = mesh.instances["a"]
            under_way = client.chat_stream("hello", model="chat", max_tokens=2000)
            first = await anext(under_way)
            name = first.so_far.served.instance_id
            victim, other = mesh.instances[name], {"a": "b", "b": "a"}[name]
            wholes = [asyncio.create_task(client.chat("hello", model="chat", max_tokens=400)) for _ in range(6)]

            async def spread() -> bool:
                return all(one.in_flight >= 2 for one in (await listed(mesh)).values())

            await until(spread, 30)
            victim.popen.kill()
            with pytest.raises(MeshError) as caught:
                async for _ in under_way:
                    pass
            assert caught.value.reason is Reason.STREAM_LOST and name in str(caught.value)
            answers = await asyncio.gather(*wholes)  # nobody had seen any of them
            assert {len(answer.text.split()) for answer in answers} == {400}
            assert {answer.served.instance_id for answer in answers if answer.served.attempts > 1} == {other}
            answers = await asyncio.gather(*(ask() for _ in range(8)))
            assert {answer.served.instance_id for answer in answers} == {other}
            await until(lambda: idle(mesh), 30)

        def sync() -> list[str]:
            with DirectClient(mesh.address, api_key="bob", timeout=60) as client:
                whole = client.chat("hello", model="chat", max_tokens=4)
                parts = [chunk.text for chunk in client.chat_stream("hello", model="chat", max_tokens=4)]
                assert "".join(parts) == whole.text
                return [whole.served.instance_id, *(one.id for one in client.instances())]

        assert (await asyncio.to_thread(sync))[0] == other
        await until(lambda: idle(mesh), 30)
        await mesh.mesh.DrainInstance(ms.DrainInstanceRequest(instance_id=other), metadata=who("root"))

        async def none_is_picked() -> bool:
            """The gateway hears of the drain over the Link, a moment after it was asked for it."""
            try:
                picked = await mesh.mesh.Pick(ms.PickRequest(model="chat"), metadata=who("alice"), timeout=1)
            except grpc.aio.AioRpcError as error:
                return from_rpc(error).reason in (Reason.NO_INSTANCE, Reason.DEADLINE_EXCEEDED)
            ended = ms.ReportRequest(lease_id=picked.lease_id, outcome="draining")
            await mesh.mesh.Report(ended, metadata=who("alice"))
            return False

        await until(none_is_picked, 20)
