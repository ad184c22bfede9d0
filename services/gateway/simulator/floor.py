"""What no router can beat: every request alone on the instance that suits it best, with everything cached. Pure."""

from __future__ import annotations

from services.gateway.simulator.engine import LlmEngine
from services.gateway.simulator.fleet import Site, engine_of
from services.gateway.simulator.job import Job
from services.gateway.simulator.trace import Trace
from services.gateway.simulator.world import facts_of


def mean_ttft_floor_s(trace: Trace, site: Site) -> float | None:
    """Mean seconds to the first token if nobody ever waited, and every block that any earlier request brought were in
    every cache; at any rate. None if nobody could be served."""
    engines = {endpoint.id: engine_of(endpoint, trace.block_tokens) for endpoint in site.endpoints}
    seen: set[int] = set()
    seconds = []
    for request in trace.requests:
        matched = 0
        for link in request.chain:
            if link not in seen:
                break
            matched += 1
        seen.update(request.chain)
        cached = min(matched * trace.block_tokens, request.prompt - 1)
        job = Job(request, 0, facts_of(request, trace, site, 1.0))
        times = []
        for endpoint in site.endpoints:
            engine = engines[endpoint.id]
            if endpoint.kind != request.kind or not endpoint.serves(job.facts.model) or engine.refuses(job):
                continue
            if isinstance(engine, LlmEngine):
                times.append(engine.pace.prefill_s(request.prompt - cached, cached))
            else:
                times.append(engine.service_s(request.prompt))
        if times:
            seconds.append(min(times))
    return sum(seconds) / len(seconds) if seconds else None
