"""vLLM's own spans, where it is told to make some, are below ours; and a trace that is not kept has none of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc
from tests.kit.collector import collector
from tests.kit.llm import LlmProcess
from tests.kit.llm_client import MODEL
from tests.kit.mesh import until

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KEPT, DROPPED, CALLER = "0af7651916cd43dd8448eb211c80319c", "1" * 32, "b7ad6b7169203331"


async def test_the_engines_span_is_below_ours(tiny_model: Path, tmp_path: Path) -> None:
    async with collector() as sink:
        told = ("--instance-id", "one", "--otlp", sink.address, "--engine-arg", f"otlp_traces_endpoint={sink.address}")
        service = LlmProcess(tmp_path, tiny_model, *told)
        try:
            async with grpc.aio.insecure_channel(await asyncio.to_thread(service.wait_ready)) as channel:
                stub: language_model_pb2_grpc.LanguageModelServiceAsyncStub
                stub = language_model_pb2_grpc.LanguageModelServiceStub(channel)  # type: ignore[assignment]
                for trace, flag in ((DROPPED, "00"), (KEPT, "01")):
                    parent = f"00-{trace}-{CALLER}-{flag}"
                    request = lm.CompleteRequest(model=MODEL, text="once", sampling=lm.Sampling(max_tokens=4))
                    async for _ in stub.Complete(request, metadata=(("traceparent", parent),)):
                        pass
            (ours,) = await sink.until(1, f"text_completion {MODEL}")
            await until(lambda: sink.named("llm_request", KEPT), 20)
        finally:
            await asyncio.to_thread(service.close)
    (theirs,) = sink.named("llm_request", KEPT)
    assert (ours.trace, ours.parent) == (KEPT, CALLER) and (theirs.trace, theirs.parent) == (KEPT, ours.id)
    assert (ours.service, theirs.service) == ("infermesh-llm", "vllm")
    assert ours.process["service.instance.id"] == theirs.process["service.instance.id"] == "one"
    assert theirs.attributes["gen_ai.usage.completion_tokens"] == 4
    assert not [span for span in sink.spans if span.trace == DROPPED]
