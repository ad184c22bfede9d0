"""How far a simulation is from what was measured, where the trace was recorded from a real mesh. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Any

from services.gateway.simulator.metrics import quantile, rounded
from services.gateway.simulator.trace import Trace
from services.gateway.simulator.world import Run

TIMES = ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "e2e_p50_s", "e2e_p99_s")


def measured(trace: Trace) -> dict[str, Any] | None:
    """What the mesh did when the trace was recorded; None where it does not tell."""
    told = [(request, one) for request in trace.requests if (one := request.measured) is not None]
    if not told:
        return None
    done = [(request, one) for request, one in told if one.outcome == "ok" and one.ttft_s]
    prompt = sum(request.prompt for request, _ in done)
    places = Counter(one.instance for _, one in done)
    return {
        "requests": len(told),
        "completed": len(done),
        **_times([one.ttft_s for _, one in done], [one.e2e_s for _, one in done]),
        "cache_hit_ratio": rounded(sum(one.cached for _, one in done) / prompt if prompt else 0.0),
        "instances": dict(sorted(places.items())),
    }


def error(run: Run) -> dict[str, Any] | None:
    """Simulated against measured, over the requests that both completed: each time as simulated / measured - 1, and the
    mean over requests of |simulated - measured| TTFT in seconds. None where nothing was measured."""
    pairs = [
        (job, told)
        for job in run.jobs
        if (told := job.request.measured) is not None
        and told.outcome == "ok"
        and told.ttft_s
        and job.done >= 0
        and not job.shed
    ]
    if not pairs:
        return None
    here = _times([j.first - j.request.arrival for j, _ in pairs], [j.done - j.request.arrival for j, _ in pairs])
    there = _times([told.ttft_s for _, told in pairs], [told.e2e_s for _, told in pairs])
    apart = sum(abs(job.first - job.request.arrival - told.ttft_s) for job, told in pairs) / len(pairs)
    same = sum(job.instance == told.instance for job, told in pairs)
    return {
        "requests": len(pairs),
        **{name: rounded(here[name] / there[name] - 1) for name in TIMES},
        "ttft_apart_s": rounded(apart),
        "same_instance": rounded(same / len(pairs)),
    }


def _times(ttft: list[float], e2e: list[float]) -> dict[str, Any]:
    return {
        "ttft_mean_s": rounded(sum(ttft) / len(ttft) if ttft else None),
        "ttft_p50_s": rounded(quantile(ttft, 0.5)),
        "ttft_p99_s": rounded(quantile(ttft, 0.99)),
        "e2e_p50_s": rounded(quantile(e2e, 0.5)),
        "e2e_p99_s": rounded(quantile(e2e, 0.99)),
    }
