"""What a run amounts to, under the names of `sim --json` (DESIGN §9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.simulator.fleet import Site
from services.gateway.simulator.world import Run


def summary(run: Run, site: Site) -> dict[str, Any]:
    """Times of completed requests, as their gateway saw them. Goodput counts those that met the objective, and its
    share is of all requests, shed ones included. A time without any request is null."""
    done = [job for job in run.jobs if job.done >= 0 and not job.shed]
    first = run.jobs[0].request.arrival if run.jobs else 0.0
    span = max((job.done for job in done), default=first) - first
    ttft = [job.first - job.request.arrival for job in done]
    tpot = [1000 * (job.done - job.first) / (job.output - 1) if job.output > 1 else 0.0 for job in done]
    e2e = [job.done - job.request.arrival for job in done]
    good = sum(1 for t, p in zip(ttft, tpot, strict=True) if t <= site.ttft_s and p <= site.tpot_ms)
    paced = [p for p, job in zip(tpot, done, strict=True) if job.output > 1]
    prompt = sum(job.request.prompt for job in done)
    instances: dict[str, Any] = {}
    for engine in run.engines:
        here = [job for job in done if job.instance == engine.id]
        tokens = sum(job.request.prompt for job in here)
        instances[engine.id] = {
            "requests": len(here),
            "busy_ratio": rounded(engine.busy_s / span if span > 0 else 0.0),
            "cache_hit_ratio": rounded(sum(job.cached for job in here) / tokens if tokens else 0.0),
        }
    return {
        "requests": len(run.jobs),
        "completed": len(done),
        "shed": sum(1 for job in run.jobs if job.shed),
        "degraded": sum(1 for job in done if job.degraded),
        **latencies(ttft, paced, e2e),
        "goodput_rps": rounded(good / span if span > 0 else 0.0),
        "goodput_share": rounded(good / len(run.jobs) if run.jobs else 0.0),
        "cache_hit_ratio": rounded(sum(job.cached for job in done) / prompt if prompt else 0.0),
        "instances": instances,
    }


def latencies(ttft: Sequence[float], tpot: Sequence[float], e2e: Sequence[float]) -> dict[str, Any]:
    """Of completed requests: `ttft` and `e2e` [s], `tpot` [ms]; None where there was none."""
    return {
        "ttft_mean_s": rounded(sum(ttft) / len(ttft) if ttft else None),
        "ttft_p50_s": rounded(quantile(ttft, 0.5)),
        "ttft_p99_s": rounded(quantile(ttft, 0.99)),
        "tpot_p50_ms": rounded(quantile(tpot, 0.5)),
        "tpot_p99_ms": rounded(quantile(tpot, 0.99)),
        "e2e_p50_s": rounded(quantile(e2e, 0.5)),
        "e2e_p99_s": rounded(quantile(e2e, 0.99)),
    }


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear between the two nearest ranks."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def rounded(value: float | None) -> float | None:
    """To a microsecond, or a millionth: what a run tells has no more."""
    return None if value is None else round(value, 6)
