"""What vLLM really holds reaches gateways: KV events inside the instance, cache frames outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest

from infermesh.transport import channel_options
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay
from services.chassis.prefix import prefix
from tests.kit.cache_listener import CacheListener
from tests.kit.llm import BLOCK, LlmProcess
from tests.kit.llm_client import MODEL, Client
from tests.kit.mesh import until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]
BLOCKS = 160  # of the KV cache: little more than the longest context, so that a few prompts fill it


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ("--engine-arg", f"num_gpu_blocks_override={BLOCKS}")
    service = LlmProcess(tmp_path_factory.mktemp("small"), tiny_model, *flags)
    try:
        yield service.wait_ready()
    finally:
        service.close()


@pytest.fixture
async def client(small: str) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(small, channel_options()) as channel:
        yield Client(channel)


def ask(topic: str, salt: bytes = b"one") -> lm.CompleteRequest:
    """Some 1,800 tokens."""
    words = " ".join(f"{topic} {number}" for number in range(300))
    request = lm.CompleteRequest(model=MODEL, text=words, sampling=lm.Sampling(max_tokens=1))
    request.relay.CopyFrom(Relay(gateway_id="g", cache_salt=salt, prefix_chain=prefix(request, salt, 0).chain))
    return request


async def send(client: Client, request: lm.CompleteRequest) -> lm.Started:
    events = [event async for event in client.stub.Complete(request)]
    return events[0].started


async def test_gateways_hear_what_vllm_stores_and_evicts(client: Client) -> None:
    listener = CacheListener(client.worker, "listener")
    async with listener:
        first = ask("alpha")
        chain = list(first.relay.prefix_chain)
        share = prefix(first, b"one", 0).share
        await send(client, first)
        await until(lambda: set(chain) <= listener.known)
        assert listener.frames[0].snapshot

        foreign = ask("alpha", b"two")
        assert (await send(client, foreign)).cached_tokens == 0
        await until(lambda: set(foreign.relay.prefix_chain) <= listener.known)

        other = ask("another")
        await send(client, other)
        await until(lambda: set(other.relay.prefix_chain) <= listener.known)
        left = next((at for at, hash in enumerate(chain) if hash not in listener.known), len(chain))
        assert left < len(chain), "three such prompts do not fit"
        assert not set(chain[left:]) & listener.known, "a prefix is evicted from its end"

        again = await send(client, first)
        block = share * again.prompt_tokens
        assert left * block - BLOCK <= again.cached_tokens <= (left + 1) * block, "what was told is what it found"
        await until(lambda: set(chain) <= listener.known)

    late = CacheListener(client.worker, "late")
    async with late:
        await until(lambda: set(chain) <= late.known)
        assert late.frames[0].snapshot
