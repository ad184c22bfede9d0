"""The mesh that faults happen to: registry, gateways and scripted instances, each a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
from prometheus_client.parser import text_string_to_metric_families

from infermesh.client import AsyncClient
from infermesh.transport import channel_options
from infermesh.v1 import worker_pb2_grpc
from infermesh.v1.worker_pb2 import DescribeRequest, Load
from tests.fault.load import MODEL
from tests.kit.children import ROOT, Child, Children, infermesh
from tests.kit.mesh import until

# Decoding slows with what is resident, or the router would have no reason to spread the load.
PACE = ("--prefill-tps", "100000", "--step-ms", "40", "--kv-us-per-ktoken", "4000", "--max-running", "64")
START_S = 40.0


class Fleet:
    """`host` is where all but the named strangers listen; `registry` an URL."""

    def __init__(self, folder: Path, children: Children, registry: str, host: str, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.children = children
        self.registry = registry
        self.host = host
        self.gateways: list[Child] = []
        self.llms: dict[str, Child] = {}
        self.api_key = ""
        self.client: AsyncClient
        self._stack = stack
        self._flags: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}
        self._workers: dict[str, Any] = {}

    # -- its processes

    def add_gateway(self, *flags: str, **how: Any) -> Child:
        name = f"gateway-{len(self.gateways)}"
        self._flags[name] = (flags, how)
        self.gateways.append(self._gateway(name, f"{self.host}:0", f"{self.host}:0"))
        return self.gateways[-1]

    def gateway_again(self, number: int) -> Child:
        """Another life of a gateway that has ended, behind the same doors."""
        told = self.gateways[number].told()
        self.gateways[number] = self._gateway(f"gateway-{number}", told["grpc"], told["http"])
        return self.gateways[number]

    def _gateway(self, name: str, grpc: str, http: str) -> Child:
        flags, how = self._flags[name]
        doors = ("--grpc", grpc, "--http", http, *self._open, "--grace-s", "5", "--log-level", "warning")
        words = infermesh("gateway", "--registry", self.registry, "--id", name, *doors, *flags)
        return self.children.run(name, _prefixed(words, how), **_without_prefix(how))

    def add_llm(self, id: str, *flags: str, faults: dict[str, Any] | None = None, host: str = "", **how: Any) -> Child:
        """`faults` makes it one that can be broken while it runs, see `tests.kit.faulty_llm`."""
        self._flags[id] = (flags, {"faults": faults, "host": host, **how})
        words = infermesh("llm", "--engine", "scripted", "--model", MODEL, "--instance-id", id)
        if faults is not None:
            self.broken(id, **faults)
            words = [sys.executable, "-P", "-m", "tests.kit.faulty_llm", str(self._file(id)), *words[4:]]
        words += ["--registry", self.registry, "--listen", f"{host or self.host}:0", *self._open]
        words += ["--grace-s", "5", "--log-level", "warning", *PACE, *flags]
        child = self.llms[id] = self.children.run(id, _prefixed(words, how), **_without_prefix(how))
        return child

    def again(self, id: str) -> Child:
        """Another life of one that has ended, as it was started."""
        flags, how = self._flags[id]
        return self.add_llm(id, *flags, **how)

    def broken(self, id: str, **faults: Any) -> None:
        """From now on it has these faults, and no others."""
        partial = self._file(id).with_suffix(".partial")
        partial.write_text(json.dumps(faults))
        partial.replace(self._file(id))

    def calls(self, id: str) -> int:
        """Requests that have reached a breakable one's engine, in all its lives."""
        path = self._file(id).with_name(self._file(id).name + ".calls")
        return path.stat().st_size if path.exists() else 0

    def _file(self, id: str) -> Path:
        return self.folder / f"{id}.faults.json"

    @property
    def _open(self) -> tuple[str, ...]:
        return () if self.host.startswith("127.") else ("--insecure",)

    async def started(self, *children: Child) -> None:
        """Until they serve."""
        await until(lambda: all(child.serves for child in children), START_S)

    # -- what can be seen of it

    @property
    def grpc(self) -> str:
        """Every gateway's address, as the client takes them."""
        return ",".join(str(child.told()["grpc"]) for child in self.gateways)

    def http(self, number: int = 0) -> str:
        return str(self.gateways[number].told()["http"])

    async def dial(self, *addresses: str) -> AsyncClient:
        """A client of its own, to these gateways or to all."""
        return await self._stack.enter_async_context(
            AsyncClient(list(addresses) or self.grpc, api_key=self.api_key, timeout=30)
        )

    async def states(self, client: AsyncClient | None = None) -> dict[str, str]:
        return {instance.id: instance.state for instance in await (client or self.client).instances(timeout=5)}

    async def until(self, holds: Callable[[dict[str, str]], bool], within_s: float, since: float = 0.0) -> float:
        """Seconds from `since` (or now) until the states fulfil the condition; infinite if they do not in time."""
        since = since or time.monotonic()

        async def held() -> bool:
            return holds(await self.states())

        try:
            await until(held, within_s)
        except TimeoutError:
            return float("inf")
        return time.monotonic() - since

    async def healthy(self, *ids: str, within_s: float = 20.0) -> None:
        wanted = ids or tuple(self.llms)
        took = await self.until(lambda states: all(states.get(id) == "healthy" for id in wanted), within_s)
        assert took <= within_s + 5, f"not healthy within {within_s} s: {await self.states()}"

    async def load(self, id: str) -> Load:
        """The engine's own counters, asked of the instance itself."""
        if id not in self._workers or self._workers[id][0] != self.llms[id].address:
            address = self.llms[id].address
            channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(address, channel_options()))
            self._workers[id] = (address, worker_pb2_grpc.WorkerServiceStub(channel))
        described = await self._workers[id][1].Describe(DescribeRequest(), timeout=5)
        return Load.FromString(described.load.SerializeToString())

    async def busy(self, *ids: str) -> int:
        """Requests that run or wait in the engines."""
        loads = await asyncio.gather(*(self.load(id) for id in ids or self.llms))
        return sum(load.running + load.waiting for load in loads)

    async def idle(self, within_s: float) -> float:
        """Seconds until no engine has anything to do; infinite if that is not in time."""
        begun = time.monotonic()
        while await self.busy():
            if time.monotonic() - begun > within_s:
                return float("inf")
            await asyncio.sleep(0.005)
        return time.monotonic() - begun

    async def metrics(self, number: int = 0) -> dict[str, float]:
        """A gateway's, each summed over its labels."""
        async with aiohttp.ClientSession(trust_env=False) as session:
            async with session.get(f"http://{self.http(number)}/metrics") as reply:
                text = await reply.text()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    async def leftovers(self) -> str:
        """What gateways and engines still count as under way; empty if nothing."""
        found = []
        for number, gateway in enumerate(self.gateways):
            if gateway.ended:
                continue
            metrics = await self.metrics(number)
            for name in ("infermesh_gateway_in_flight", "infermesh_gateway_waiting"):
                if metrics[name]:
                    found.append(f"gateway-{number} {name.rpartition('gateway_')[2]} {metrics[name]:g}")
        for instance in await self.client.instances():
            if instance.in_flight:
                found.append(f"lease book of {instance.id}: {instance.in_flight}")
        for id, child in self.llms.items():
            if not child.ended and ((load := await self.load(id)).running or load.waiting or load.kv_used_ratio):
                found.append(f"{id} running {load.running} waiting {load.waiting} kv {load.kv_used_ratio:g}")
        return ", ".join(found)


def _prefixed(words: list[str], how: dict[str, Any]) -> list[str]:
    return [*how.get("prefix", ()), *words]


def _without_prefix(how: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in how.items() if key != "prefix"}


@asynccontextmanager
async def fleet(
    folder: Path,
    *llms: str,
    flags: Sequence[str] = (),
    breakable: bool = False,
    gateways: int = 1,
    gateway_flags: Sequence[str] = (),
    registry: str = "",
    host: str = "127.0.0.1",
    api_key: str = "",
) -> AsyncIterator[Fleet]:
    """All of it healthy when the body begins. `flags`: of every instance, after `PACE`; `registry`: instead of the
    embedded one; `api_key`: the client's. Whoever lives at the end must leave well."""
    async with AsyncExitStack() as stack:
        children = stack.enter_context(Children(folder))
        if not registry:
            listen = ("--listen", f"{host}:0", *(() if host.startswith("127.") else ("--insecure",)))
            registry = f"mesh://{(await asyncio.to_thread(children.start, 'registry', *listen)).address}"
        made = Fleet(folder, children, registry, host, stack)
        made.api_key = api_key
        for _ in range(gateways):
            made.add_gateway(*gateway_flags)
        for id in llms:
            made.add_llm(id, *flags, faults={} if breakable else None)
        try:
            await made.started(*made.gateways, *made.llms.values())
            made.client = await made.dial()
            await made.healthy()
            yield made
        finally:
            for child in (*made.llms.values(), *made.gateways):
                if not child.ended:
                    child.thaw()
            for id in made.llms:
                if made._file(id).exists():
                    made.broken(id)


__all__ = ["PACE", "ROOT", "Fleet", "fleet"]
