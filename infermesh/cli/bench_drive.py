"""Sends a trace's requests to a gateway, each at its own time, and notes what comes back when."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
import grpc.aio

from infermesh.cli import Failure
from infermesh.cli.bench_report import Answer, Run
from infermesh.client.addresses import metadata, split
from infermesh.errors import from_rpc
from infermesh.transport import Trust, channel_options, open_aio_channel
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.language_model_pb2_grpc import LanguageModelServiceStub
from services.gateway.simulator.trace import Request

WORDS = ("the", "mesh", "answers", "each", "question", "with", "a", "cache", "of", "its", "own", "and", "tells", "why")
TOKENS_A_WORD = 1.25  # of common English words; what they really were is what the reply's usage says
LEAD_S = 0.2  # until the first request


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway, or one instance. `block_tokens`: of the trace's blocks."""

    address: str
    rest: bool
    model: str
    api_key: str
    timeout_s: float
    block_tokens: int
    seed: int


def prompt_of(request: Request, block_tokens: int, seed: int) -> str:
    """A text of about the request's length, in which equal beginnings of chains are equal beginnings of the text."""
    words: list[str] = []
    left = max(1, round(request.prompt / TOKENS_A_WORD))
    each = max(1, round(block_tokens / TOKENS_A_WORD))
    for link in request.chain or (seed << 32 | request.index,):
        random = Random(link)
        take = min(left, each) if request.chain else left
        words += (f"{random.choice(WORDS)}" for _ in range(take))
        left -= take
        if not left:
            break
    if left > 0:
        words += Random(seed << 32 | request.index).choices(WORDS, k=left)
    return " ".join(words)


async def drive(requests: Sequence[Request], target: Target, *, callers: int, bound: int) -> Run:
    """`callers` > 0: a closed loop of so many; else each request at its arrival, at most `bound` on the way."""
    async with AsyncExitStack() as stack:
        ask = await (_rest(target, stack) if target.rest else _grpc(target, stack))
        prompts = [prompt_of(request, target.block_tokens, target.seed) for request in requests]  # no work on the way
        if callers:
            return await _closed(requests, prompts, ask, callers)
        return await _open(requests, prompts, ask, bound)


Ask = Callable[[Request, str, Answer], Any]


async def _open(requests: Sequence[Request], prompts: Sequence[str], ask: Ask, bound: int) -> Run:
    run = Run()
    begun = time.perf_counter() + LEAD_S
    going: set[asyncio.Task[None]] = set()
    for request, prompt in zip(requests, prompts, strict=True):
        answer = Answer(due=begun + request.arrival)
        run.answers.append(answer)
        await asyncio.sleep(max(0.0, answer.due - time.perf_counter()))
        if len(going) >= bound:
            answer.failed = "not_sent"
            continue
        task = asyncio.create_task(ask(request, prompt, answer))
        going.add(task)
        task.add_done_callback(going.discard)
    await asyncio.gather(*going)
    return run


async def _closed(requests: Sequence[Request], prompts: Sequence[str], ask: Ask, callers: int) -> Run:
    run = Run()
    left = iter(zip(requests, prompts, strict=True))

    async def caller() -> None:
        for request, prompt in left:
            answer = Answer(due=time.perf_counter())
            run.answers.append(answer)
            await ask(request, prompt, answer)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return run


async def _grpc(target: Target, stack: AsyncExitStack) -> Ask:
    (address, *_), secure = split(target.address)
    channel = await stack.enter_async_context(open_aio_channel(address, channel_options(), Trust() if secure else None))
    await _reached(channel, address)
    stub: Any = LanguageModelServiceStub(channel)
    pairs = metadata(target.api_key)

    async def ask(request: Request, prompt: str, answer: Answer) -> None:
        message = lm.CompleteRequest(model=request.model or target.model, text=prompt)
        message.sampling.MergeFrom(lm.Sampling(max_tokens=request.output, ignore_eos=True))
        message.hints.session_id, message.hints.document_id = request.session_id, request.document_id
        message.hints.priority = max(-100, min(100, request.priority))
        answer.sent = time.perf_counter()
        try:
            async for event in stub.Complete(message, metadata=pairs, timeout=target.timeout_s):
                answer.last = time.perf_counter()
                if answer.first < 0:
                    answer.first, answer.instance = answer.last, event.started.instance_id
                if event.HasField("usage"):
                    usage = event.usage
                    answer.prompt, answer.cached = usage.prompt_tokens, usage.cached_tokens
                    answer.output = usage.completion_tokens
        except grpc.RpcError as error:
            answer.failed = from_rpc(error).reason.value

    return ask


async def _reached(channel: grpc.aio.Channel, address: str) -> None:
    """Raises Failure: nobody is there. A run of nothing but refused connections would say nothing of a load."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise Failure(f"--target: nobody answers at {address}; `infermesh up` starts a mesh with a gateway")
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


async def _rest(target: Target, stack: AsyncExitStack) -> Ask:
    import aiohttp

    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    session = await stack.enter_async_context(
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=target.timeout_s),
            headers=headers,
        )
    )

    try:
        async with session.get(f"{target.address}/healthz"):
            pass  # whatever it says: somebody is there
    except (aiohttp.ClientConnectionError, TimeoutError) as error:
        raise Failure(f"--target: nobody answers at {target.address}: {error or 'timed out'}") from None

    async def ask(request: Request, prompt: str, answer: Answer) -> None:
        body = {
            "model": request.model or target.model,
            "prompt": prompt,
            "max_tokens": request.output,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer.sent = time.perf_counter()
        try:
            async with session.post(f"{target.address}/v1/completions", json=body) as reply:
                if reply.status != 200:
                    answer.failed = _reason(await reply.text(), reply.status)
                    return
                answer.instance = reply.headers.get("x-infermesh-instance-id", "")
                async for line in reply.content:
                    if line.startswith(b"data: {"):
                        _note(json.loads(line[6:]), answer)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            answer.failed = "deadline_exceeded" if isinstance(error, TimeoutError) else "stream_lost"

    return ask


def _note(event: dict[str, Any], answer: Answer) -> None:
    now = time.perf_counter()
    if "error" in event:
        answer.failed = str(event["error"].get("code") or "stream_lost")
        return
    if event.get("choices"):
        answer.last = now
        if answer.first < 0:
            answer.first = now
    if usage := event.get("usage"):
        answer.prompt, answer.output = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


def _reason(text: str, status: int) -> str:
    try:
        return str(json.loads(text)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"
