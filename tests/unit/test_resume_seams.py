"""Streams killed at random places, by the thousand: the real forwarder, router and scripted answers, no socket and no
clock. Every answer must be the one that nothing had happened to."""

from __future__ import annotations

import asyncio
import logging
import random
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2

from infermesh.errors import MeshError, Reason
from infermesh.v1 import language_model_pb2 as lm
from registry.endpoint import Endpoint
from services.gateway import observe
from services.gateway.observe import Observe
from services.gateway.routing import failover
from services.gateway.routing.facts import Member
from services.gateway.routing.router import Router
from services.gateway.upstream import carrier
from services.gateway.upstream.calls import Call, Method
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.forward import Forwarder
from services.llm.delivery import merge
from services.llm.engine import Event
from services.llm.engines.scripted_answer import Answer, replay

SEAMS = 10_000
PROMPT = [7] * 11


class Stream:
    """A grpc call of a scripted instance that says a few words an event, and dies when its time has come."""

    def __init__(self, host: Hosts, endpoint: Endpoint, request: lm.ChatRequest) -> None:
        self._host, self._endpoint, self._request = host, endpoint, request
        self._answer = Answer(list(PROMPT), request.sampling, request.sampling.max_tokens, lm.FINISH_LENGTH)
        replay(self._answer, request.relay.resume.token_ids)
        self._left = host.life()
        self._over = False

    async def read(self) -> Any:
        if self._over:
            return grpc.aio.EOF
        if self._left == 0:
            self._host.seams += 1
            raise MeshError(Reason.INSTANCE_LOST, "killed")
        self._left -= 1
        first = not self._answer.started
        event = self._words()
        while event.usage is None and self._host.dice.random() < 0.2:
            merge(event, self._words())
        message = lm.ChatResponse(deltas=event.deltas)
        if event.usage is not None:
            message.usage.CopyFrom(event.usage)
            self._over = True
        if first:
            resume = self._request.relay.resume
            name = resume.response_id or f"of-{self._endpoint.id}"
            message.started.CopyFrom(lm.Started(id=name, prompt_tokens=len(PROMPT)))
        return message.SerializeToString()

    def _words(self) -> Event:
        return self._answer.event(self._host.dice.choice((1, 1, 1, 2, 3)), 0)

    async def initial_metadata(self) -> dict[str, str]:
        return {"x-infermesh-instance-id": self._endpoint.id, "x-infermesh-model-id": self._endpoint.model}

    def done(self) -> bool:
        return self._over

    def cancel(self) -> None:
        self._over = True


class Hosts:
    """Stands where `Channels` does."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.seams = 0
        self.lives: list[int] = []  # events until each attempt of the next answer dies; then it may live

    def life(self) -> int:
        return self.lives.pop() if self.lives else -1

    def open(self, endpoint: Endpoint) -> Any:
        def dial(request: bytes, **_: Any) -> Stream:
            return Stream(self, endpoint, lm.ChatRequest.FromString(request))

        async def check(*_: Any, **__: Any) -> Any:
            return SimpleNamespace(status=health_pb2.HealthCheckResponse.SERVING)

        return SimpleNamespace(calls={Method.CHAT: dial}, health=SimpleNamespace(Check=check))


def forwarder(hosts: Hosts) -> Forwarder:
    router, now = Router(-60.0), 100.0
    same = {"weights_version": "1", "tokenizer_digest": "1", "template_digest": "1", "engine": "scripted"}
    fleet = [
        Endpoint(id, "llm", "127.0.0.1", 1, "m", 1, features=frozenset({"resume", "logprobs"}), **same) for id in "abcd"
    ]
    router.update([Member(endpoint) for endpoint in fleet], now)
    for endpoint in fleet:
        router.linked(endpoint.id, 1, now)
    made = Carrier(router, hosts, Observe(), lambda: now)  # type: ignore[arg-type]
    return Forwarder(made, made._observe, "gw", draw=hosts.dice)


def asked(dice: random.Random) -> lm.ChatRequest:
    sampling = lm.Sampling(max_tokens=dice.randint(1, 40), include_stop=dice.random() < 0.3)
    text = "".join(f" w{number}" for number in range(40))
    for _ in range(dice.choice((0, 1, 2))):
        at = dice.randrange(len(text) - 1)
        sampling.stop.append(text[at : at + dice.randint(1, 12)])
    if dice.random() < 0.3:
        sampling.stop_token_ids.append(dice.randrange(40))
    if dice.random() < 0.4:
        sampling.min_tokens = dice.randint(0, sampling.max_tokens)
    if dice.random() < 0.2:
        sampling.logprobs = 2
    return lm.ChatRequest(model="m", messages=[lm.Message(role=lm.ROLE_USER, content="x")], sampling=sampling)


async def heard(forward: Forwarder, request: lm.ChatRequest, *, collected: bool) -> tuple[dict[str, Any], Any]:
    seen: dict[str, Any] = {"text": "", "ids": [], "ends": [], "usages": [], "names": 0, "logprobs": []}
    async with forward.open(Method.CHAT, request, Call("r", collected=collected)) as reply:
        async for event in reply:
            assert event.message == lm.ChatResponse.FromString(event.raw)
            seen["names"] += event.message.HasField("started")
            for delta in event.message.deltas:
                seen["text"] += delta.content
                seen["ids"] += delta.token_ids
                seen["logprobs"] += [line.token_id for line in delta.logprobs]
                if delta.finish:
                    seen["ends"].append((delta.finish, delta.stop_text, delta.stop_token))
            if event.message.HasField("usage"):
                usage = event.message.usage
                seen["usages"].append((usage.prompt_tokens, usage.completion_tokens))
        return seen, reply.identity


async def test_ten_thousand_deaths_and_nobody_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    monkeypatch.setattr(observe, "log", quiet)
    monkeypatch.setattr(carrier, "log", quiet)
    dice = random.Random(20)
    hosts = Hosts(dice)
    forward = forwarder(hosts)
    resumes = 0
    while hosts.seams < SEAMS:
        request = asked(dice)
        calm = lm.ChatRequest.FromString(request.SerializeToString())
        hosts.lives = []
        whole, _ = await heard(forward, calm, collected=False)
        assert whole["names"] == len(whole["ends"]) == len(whole["usages"]) == 1
        assert whole["usages"] == [(len(PROMPT), len(whole["ids"]))]
        before = hosts.seams
        # A first life of no event at all is a retry; every later one may be as short as that, within the bounds.
        hosts.lives = [dice.randint(0, 12) for _ in range(dice.randint(1, failover.MAX_EXTRA_ATTEMPTS))]
        broken, identity = await heard(forward, request, collected=dice.random() < 0.3)
        assert broken == whole, (before, request)
        resumes += identity.resumes
        await asyncio.sleep(0)
    assert resumes > SEAMS / 2
    ledgers = [instance.ledger for instance in forward.carrier.router.fleet.instances.values()]
    assert all(not ledger.entries for ledger in ledgers) and forward.budget.live == forward.budget.retrying == 0
