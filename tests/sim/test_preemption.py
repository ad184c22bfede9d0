"""Chat beside documents of 60,000 tokens: nobody waits half a minute any more, and the documents are served, too."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import mean

import pytest

from deploy.fleet import parse_fleet
from services.gateway.simulator.arrivals import generate, parse_spec
from services.gateway.simulator.fleet import site_of
from services.gateway.simulator.policies import policy
from services.gateway.simulator.world import Conditions, simulate

SPEED = "speed: {prefill_tps: 4000, prefill_doubling_ctx: 55000, step_ms: 10, kv_us_per_ktoken: 12}"
ONE = (
    "version: 1\nmodels: [{id: m, kind: llm}]\ninstances:\n"
    f"  - {{id: e, model: m, engine: scripted, kv_tokens: 900000, max_running: 256, {SPEED}}}\n"
)
DOCUMENT_S = 60_000 / 4000 * (1 + 30_000 / 55_000)


@pytest.mark.parametrize("gateways", [1, 3])
def test_chat_does_not_wait_for_documents(gateways: int) -> None:
    site = site_of(parse_fleet(ONE, "one.yaml"))
    chat = generate(parse_spec("rps=2,requests=800,prompt=700,output=100,spread=0.8"), Random(3))
    documents = generate(parse_spec("rps=0.012,requests=5,prompt=60000,output=200,spread=0"), Random(4))
    requests = sorted((*chat.requests, *documents.requests), key=lambda request: request.arrival)
    trace = replace(chat, requests=tuple(replace(request, index=i) for i, request in enumerate(requests)))
    waited: dict[str, tuple[float, float]] = {}
    for name in ("infermesh", "round_robin"):
        run = simulate(trace, site, policy(name), Conditions(gateways=gateways), Random(0))
        took = [(job.first - job.request.arrival, job.request.prompt) for job in run.jobs if not job.shed]
        assert len(took) == len(requests), "nobody was lost"
        waited[name] = (
            mean(seconds for seconds, prompt in took if prompt < 16_000),
            max(seconds for seconds, prompt in took if prompt > 16_000),
        )
        if name == "infermesh":
            moved = [job for job in run.jobs if job.moved]
            assert moved and all(job.request.prompt > 6000 and job.cached < 6000 for job in moved)
    assert waited["infermesh"][0] < 1.0 and waited["infermesh"][0] < waited["round_robin"][0] / 3
    overlap = 2.5  # they wait for each other, and every step of theirs carries the answers of others
    assert waited["infermesh"][1] < overlap * max(DOCUMENT_S, waited["round_robin"][1])
