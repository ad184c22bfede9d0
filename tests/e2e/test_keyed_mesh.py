"""A mesh in which everybody has keys: what the gateway may do at instances, and what its callers may not."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from infermesh.errors import Reason, from_rpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import mesh_pb2 as ms
from infermesh.v1 import worker_pb2 as wk
from infermesh.v1 import worker_pb2_grpc
from infermesh.v1.inference_pb2 import Relay
from registry.address import open_registry
from services.chassis.passes import Passes
from tests.kit.fake_instance import FakeInstance, fake_instance, three_words
from tests.kit.mesh import running_mesh, until


def who(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def chat(**more: object) -> lm.ChatRequest:
    message = lm.Message(role=lm.ROLE_USER, content="hello")
    return lm.ChatRequest(model="chat", messages=[message], sampling=lm.Sampling(max_tokens=4), **more)  # type: ignore[arg-type]


async def refused(call: object) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:  # type: ignore[attr-defined]
            pass
    return from_rpc(caught.value).reason


async def test_the_gateways_key_opens_instances_and_a_clients_does_not_act_as_one(tmp_path: Path) -> None:
    def line(secret: str, more: str) -> str:
        return f"  - {{sha256: {hashlib.sha256(secret.encode()).hexdigest()}, {more}}}"

    keys, operator = tmp_path / "keys.yaml", tmp_path / "operator.key"
    keys.write_text(
        "\n".join(["version: 1", "keys:", line("alice", "tenant: a"), line("root", "tenant: o, role: operator")])
    )
    operator.write_text("root\n")
    flags = ("--keys", str(keys), "--operator-key-file", str(operator))
    async with running_mesh(tmp_path, {}, keys=keys, operator_key_file=operator) as mesh:
        await mesh.start("a", *flags)

        async def there() -> bool:
            listed = await mesh.mesh.ListInstances(ms.ListInstancesRequest(), metadata=who("root"))
            return [i.state for i in listed.instances] == ["healthy"]

        await until(there, 30)
        events = [event async for event in mesh.llm.Chat(chat(), metadata=who("alice"))]
        assert sum(len(delta.token_ids) for event in events for delta in event.deltas) == 4

        direct = await mesh.direct("a")
        assert await refused(direct.Chat(chat())) is Reason.UNAUTHENTICATED
        relayed = chat(relay=Relay(gateway_id="me", tenant="o"))
        assert await refused(direct.Chat(relayed, metadata=who("alice"))) is Reason.INVALID_ARGUMENT
        assert await refused(mesh.llm.Chat(relayed, metadata=who("root"))) is Reason.INVALID_ARGUMENT
        assert [event async for event in direct.Chat(chat(), metadata=who("alice"))]
        worker = worker_pb2_grpc.WorkerServiceStub(await mesh.dial(mesh.instances["a"].address))
        for metadata, reason in ((None, Reason.UNAUTHENTICATED), (who("alice"), Reason.PERMISSION_DENIED)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await worker.Drain(wk.DrainRequest(), metadata=metadata)
            assert from_rpc(caught.value).reason is reason
            assert await refused(worker.Link(metadata=metadata)) is reason
        drain = ms.DrainInstanceRequest(instance_id="a")
        await mesh.mesh.DrainInstance(drain, metadata=who("root"))
        assert await asyncio.to_thread(mesh.instances["a"].popen.wait, 10) == 0


async def test_who_registers_falsely_learns_nothing_that_opens_another_instance(tmp_path: Path) -> None:
    """The registry of this mesh takes anybody in, as an open Consul does."""
    keys, operator = tmp_path / "keys.yaml", tmp_path / "operator.key"
    sum = hashlib.sha256(b"root").hexdigest()
    keys.write_text(f"version: 1\nkeys: [{{sha256: {sum}, tenant: o, role: operator}}]")
    operator.write_text("root")
    shown: list[str] = []
    async with running_mesh(tmp_path, {}, keys=keys, operator_key_file=operator) as mesh:
        await mesh.start("a", "--keys", str(keys), "--operator-key-file", str(operator))

        async def listens(self: FakeInstance, request: object, context: Any) -> None:
            shown.append(dict(context.invocation_metadata()).get("authorization", ""))
            await three_words(self, request, context)

        async with fake_instance("rogue", listens) as rogue:
            registry = open_registry(mesh.registry)
            await registry.register(replace(rogue.endpoint, model="bait"))
            bait = lm.ChatRequest(model="bait", messages=chat().messages)

            async def caught() -> bool:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in mesh.llm.Chat(bait, metadata=who("root")):
                        pass
                return bool(shown)

            await until(caught)
            await registry.close()
        assert shown[0].startswith("mesh ") and "root" not in shown[0]
        relayed = chat(relay=Relay(gateway_id="me", tenant="o"))
        direct = await mesh.direct("a")
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            async for _ in direct.Chat(relayed, metadata=(("authorization", shown[0]),)):
                pass
        assert from_rpc(refusal.value).reason is Reason.UNAUTHENTICATED
        assert "another address" in str(refusal.value.details())
        mine = (("authorization", Passes("root").show(mesh.instances["a"].address)),)
        assert [event async for event in direct.Chat(relayed, metadata=mine)]
