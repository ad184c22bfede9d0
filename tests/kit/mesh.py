"""A mesh for tests: embedded registry and gateway in the test's own loop, scripted instances as real processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from infermesh.transport import channel_options, server_options
from infermesh.v1 import language_model_pb2_grpc as lm_grpc
from infermesh.v1 import mesh_pb2_grpc, registry_pb2_grpc
from infermesh.v1.mesh_pb2 import ListInstancesRequest
from registry.host import EmbeddedRegistry
from services.chassis.signals import Stop
from services.gateway.app import run
from services.gateway.config import gateway_settings
from tests.kit.children import Child, infermesh


@dataclass
class TestMesh:
    __test__ = False

    folder: Path
    registry: str
    stack: AsyncExitStack
    address: str = ""
    http: str = ""
    channel: Any = None
    stop: Stop = field(default_factory=Stop)
    task: asyncio.Task[int] | None = None
    instances: dict[str, Child] = field(default_factory=dict)

    @property
    def llm(self) -> lm_grpc.LanguageModelServiceAsyncStub:
        return lm_grpc.LanguageModelServiceStub(self.channel)  # type: ignore[return-value]

    @property
    def mesh(self) -> mesh_pb2_grpc.MeshServiceAsyncStub:
        return mesh_pb2_grpc.MeshServiceStub(self.channel)  # type: ignore[return-value]

    async def dial(self, address: str) -> Any:
        return await self.stack.enter_async_context(grpc.aio.insecure_channel(address, channel_options()))

    async def direct(self, id: str) -> lm_grpc.LanguageModelServiceAsyncStub:
        return lm_grpc.LanguageModelServiceStub(await self.dial(self.instances[id].address))  # type: ignore[return-value]

    async def start(self, id: str, *flags: str, model: str = "chat", wait: bool = True) -> Child:
        """A scripted LLM service in a process of its own."""
        words = (
            *("llm", "--engine", "scripted", "--model", model, "--instance-id", id, "--listen", "127.0.0.1:0"),
            *("--registry", self.registry, "--grace-s", "5", *flags),
        )
        child = self.instances[id] = Child(self.folder, id, infermesh(*words))
        self.stack.callback(child.destroy)
        if wait:
            await until(lambda: child.serves, 60)
        return child

    async def states(self) -> dict[str, str]:
        listed = await self.mesh.ListInstances(ListInstancesRequest())
        return {instance.id: instance.state for instance in listed.instances}

    async def healthy(self, *ids: str) -> None:
        async def check() -> bool:
            states = await self.states()
            return all(states.get(id) == "healthy" for id in ids)

        await until(check, 30)


async def until(check: Callable[[], Any], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            found = check()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running_mesh(
    folder: Path, instances: dict[str, tuple[str, ...]], model: str = "chat", **settings: Any
) -> AsyncIterator[TestMesh]:
    """`instances`: id -> further flags of `infermesh llm`. All are healthy when the body begins."""
    async with AsyncExitStack() as stack:
        server = grpc.aio.server(options=server_options())
        registry = await stack.enter_async_context(EmbeddedRegistry())
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, 0)
        mesh = TestMesh(folder, f"mesh://127.0.0.1:{port}", stack)
        ready = folder / "gateway.json"
        made = gateway_settings(
            **{
                "grpc": "127.0.0.1:0",
                "http": "",
                "registry": mesh.registry,
                "ready_file": ready,
                "grace_s": 5,
                "log_level": "warning",
                "explain_dir": folder / "explain",
                **settings,
            }
        )
        mesh.task = asyncio.create_task(run(made, mesh.stop))

        async def leave() -> None:
            mesh.stop.ask()
            assert mesh.task is not None
            await asyncio.wait_for(mesh.task, 30)

        stack.push_async_callback(leave)
        await asyncio.gather(*(mesh.start(id, *flags, model=model) for id, flags in instances.items()))
        await until(lambda: ready.exists() or mesh.task.done(), 30)  # type: ignore[union-attr]
        told = json.loads(ready.read_text())
        mesh.address, mesh.http = told["grpc"], told["http"]
        mesh.channel = await mesh.dial(mesh.address)
        if instances:
            await mesh.healthy(*instances)
        yield mesh
