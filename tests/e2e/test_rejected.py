"""Registrations that make no sense are shown as rejected, with the reason; the others go on serving."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from infermesh.client import AsyncClient
from infermesh.v1 import registry_pb2 as pb
from infermesh.v1 import registry_pb2_grpc as pb_grpc
from tests.kit.children import ask
from tests.kit.mesh import running_mesh, until

# What is wrong -> a word of the reason.
ABSURD = {
    "weight": ("0", "weight: 0 is not within 0.001 .. 1000"),
    "weight-": ("-1", "weight: -1 is not within"),
    "weight-nan": ("nan", "weight: nan is not within"),
    "prefill_tps": ("nan", "prefill_tps: nan is not within"),
    "prefill_tps-": ("-4000", "prefill_tps: -4000 is not within"),
    "prefill_tps-inf": ("inf", "prefill_tps: inf is not within"),
    "step_ms": ("0", "step_ms: 0 is not within"),
    "kv_us_per_ktoken": ("-1", "kv_us_per_ktoken: -1 is not within"),
    "kv_tokens": ("1e30", "kv_tokens: "),
    "max_running": ("99999999", "max_running: 99999999 is not within 0 .. 1048576"),
    "context_min": ("70000", "context_min: 70000 is not below context_max 32768"),
    "tier": ("gold", "tier: 'gold' is not one of"),
    "contract": ("infermesh.v9", "contract 'infermesh.v9', this gateway speaks"),
    "model": ("", "model: absent"),
}


async def test_absurd_registrations_are_shown_with_their_reason_and_take_no_traffic(tmp_path: Path) -> None:
    flags = ("--prefill-tps", "100000", "--step-ms", "1", "--context", "0-32768")
    async with running_mesh(tmp_path, {"good": flags}, explain_mib=0) as mesh:
        channel = await mesh.dial(mesh.registry.removeprefix("mesh://"))
        stub = pb_grpc.RegistryServiceStub(channel)
        async with AsyncClient(mesh.address, timeout=20) as client:
            good = next(one for one in await client.instances() if one.id == "good")
            host, _, port = mesh.instances["good"].address.rpartition(":")
            calls = []
            for key, (value, _) in ABSURD.items():
                meta = {**good.metadata, key.split("-")[0]: value}
                line = pb.Registration(
                    service="infermesh-llm", id=f"bad.{key}", host=host, port=int(port), metadata=meta
                )
                call = stub.Register()
                await call.write(pb.RegisterRequest(registration=line))
                reply = await call.read()
                assert reply.accepted, (key, reply)
                calls.append((call, line))

            async def renew() -> None:
                while True:
                    await asyncio.sleep(0.5)
                    for call, line in calls:
                        await call.write(pb.RegisterRequest(registration=line))

            renewing = asyncio.create_task(renew())

            async def all_listed() -> bool:
                return len(await client.instances()) == 1 + len(ABSURD)

            await until(all_listed, 10)
            rows = {row["id"]: row for row in json.loads(await asyncio.to_thread(listed, mesh.address, "--json"))}
            for key, (_, reason) in ABSURD.items():
                row = rows[f"bad.{key}"]
                assert row["state"] == "rejected" and reason in row["rejected_reason"], row
            assert rows["good"]["state"] == "healthy" and rows["good"]["rejected_reason"] == ""
            table = await asyncio.to_thread(listed, mesh.address)
            assert all(f"bad.{key}: {rows[f'bad.{key}']['rejected_reason']}" in table for key in ABSURD)
            for number in range(10):
                answer = await client.chat(f"hello {number}", model="chat", max_tokens=1)
                assert answer.served.instance_id == "good"
            assert not renewing.done()
            renewing.cancel()
            for call, _ in calls:
                call.cancel()


def listed(address: str, *more: str) -> str:
    return ask("instances", "--gateway", address, *more)
