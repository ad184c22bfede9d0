"""A client of one LLM instance, for tests: whole answers, typed refusals, the engine's own counters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc.aio
import pytest

from infermesh.errors import MeshError, from_rpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc, worker_pb2_grpc
from infermesh.v1.inference_pb2 import Relay, Usage
from infermesh.v1.worker_pb2 import DescribeRequest, Load

MODEL = "tiny"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


class Answer:
    """A stream, read to its end."""

    def __init__(self, events: Iterable[Any]) -> None:
        self.events = list(events)
        self.deltas = [delta for event in self.events for delta in event.deltas]
        self.usage: Usage = self.events[-1].usage
        self.started: lm.Started = self.events[0].started

    def ids(self, choice: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.choice == choice for token in delta.token_ids]

    def text(self, choice: int = 0) -> str:
        return "".join(delta.content for delta in self.deltas if delta.choice == choice)

    def reasoning(self) -> str:
        return "".join(delta.reasoning for delta in self.deltas)

    def finish(self, choice: int = 0) -> lm.Finish:
        (finish,) = [delta.finish for delta in self.deltas if delta.choice == choice and delta.finish]
        return finish

    def calls(self) -> dict[int, tuple[str, str]]:
        found: dict[int, tuple[str, str]] = {}
        for call in (call for delta in self.deltas for call in delta.tool_calls):
            name, arguments = found.get(call.index, ("", ""))
            found[call.index] = (name + call.name, arguments + call.arguments_json)
        return found


class Client:
    def __init__(self, channel: Any) -> None:
        self.stub = language_model_pb2_grpc.LanguageModelServiceStub(channel)
        self.worker = worker_pb2_grpc.WorkerServiceStub(channel)

    async def complete(self, text: str = "", **fields: Any) -> Answer:
        request = lm.CompleteRequest(model=MODEL, text=text or None, relay=fields.pop("relay", Relay()), **fields)
        return Answer([event async for event in self.stub.Complete(request)])

    async def chat(self, text: str = "Hi", **fields: Any) -> Answer:
        messages = fields.pop("messages", None) or [lm.Message(role=lm.ROLE_USER, content=text)]
        request = lm.ChatRequest(model=MODEL, messages=messages, relay=fields.pop("relay", Relay()), **fields)
        return Answer([event async for event in self.stub.Chat(request)])

    async def refused(self, call: Any) -> MeshError:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        return from_rpc(refused.value)

    async def load(self) -> Load:
        return (await self.worker.Describe(DescribeRequest())).load
