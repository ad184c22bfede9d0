"""What the gateway makes of a prompt's prefix: facts, relay, and what it learns from the answer."""

from __future__ import annotations

from typing import Any

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Usage
from services.chassis.prefix import prefix
from services.gateway.upstream.calls import Call, Caller, Method
from services.gateway.upstream.describe import describe
from tests.kit.fake_instance import FakeInstance, fake_instance
from tests.unit.test_gateway_forward import REQUEST_ID, upstream

LONG = "what is said again and again " * 100


def chat(text: str) -> lm.ChatRequest:
    message = lm.Message(role=lm.ROLE_USER, content=text)
    return lm.ChatRequest(model="m", messages=[message], sampling=lm.Sampling(max_tokens=10))


def test_facts_carry_the_chain_of_what_is_generated_from() -> None:
    request = chat(LONG)
    facts = describe(Method.CHAT, request, Caller(), 10.0, 1.0, b"salt", 86_400)
    assert (facts.chain, facts.chain_share) == (prefix(request, b"salt", 86_400).chain, 512 / (len(LONG) + 1))
    assert len(facts.chain) == 5
    tokenize = lm.TokenizeRequest(model="m", text=LONG)
    assert describe(Method.TOKENIZE, tokenize, Caller(), 10.0, 1.0, b"salt", 86_400).chain == ()


async def counts_cached(self: FakeInstance, request: Any, context: Any) -> None:
    await self.begin(context)
    await context.write(lm.ChatResponse(deltas=[lm.Delta(token_ids=[1])], started=lm.Started(prompt_tokens=700)))
    await context.write(lm.ChatResponse(usage=Usage(prompt_tokens=700, completion_tokens=1, cached_tokens=256)))


async def test_the_relay_tells_the_chain_and_the_router_hears_of_cached_tokens() -> None:
    async with fake_instance("a", chat=counts_cached) as a, upstream(a) as up:
        heard = []
        release = up.carrier.router.release

        def spy(lease: Any, outcome: Any, now: float) -> Any:
            heard.append((lease, outcome))
            return release(lease, outcome, now)

        up.carrier.router.release = spy  # type: ignore[method-assign]
        for tenant in ("one", "two"):
            call = Call(REQUEST_ID, Caller(tenant))
            async with up.forwarder.open(Method.CHAT, chat(LONG), call) as reply:
                assert [event async for event in reply]
        for request, (lease, outcome) in zip(a.requests, heard, strict=True):
            relay = request.relay
            assert (
                tuple(relay.prefix_chain)
                == lease.facts.chain
                == prefix(chat(LONG), relay.cache_salt, relay.rendered_at).chain
            )
            assert outcome.cached_tokens == 256
        assert a.requests[0].relay.prefix_chain[0] != a.requests[1].relay.prefix_chain[0], "tenants share no cache"
