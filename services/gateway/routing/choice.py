"""One request against the instances of its model: who could take it, who has room, who is cheapest. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infermesh.errors import Reason
from services.gateway.routing import filters
from services.gateway.routing.cost import TERMS, work_seconds
from services.gateway.routing.decision import Candidate, Record
from services.gateway.routing.estimate import Estimate
from services.gateway.routing.facts import Facts
from services.gateway.routing.fleet import Instance

TIE = 1e-9  # relative; costs closer than this are equal


@dataclass(frozen=True, slots=True)
class Choice:
    """`instance` is set, or `refusal` with its message, or neither: then it may wait, for room or (`settling`) for an
    instance that is still being linked."""

    record: Record
    instance: Instance | None = None
    refusal: Reason | None = None
    message: str = ""
    settling: bool = False


def choose(pool: Sequence[Instance], facts: Facts, estimate: Estimate, now: float, draw: float) -> Choice:
    """`draw`, 0 <= draw < 1, decides among equals."""
    prompt = facts.prompt_tokens or (estimate.prompt_tokens(facts.prompt_bytes) if facts.slots else 0)
    output = estimate.output_tokens(facts.max_tokens, facts.choices) if facts.kind == "llm" and facts.slots else 0
    passed, rejected = filters.eligible(pool, facts, prompt)
    if not passed:
        return _nobody(facts, rejected, prompt, output)
    mean = max(1, round(estimate.output)) if facts.kind == "llm" else 0
    candidates: list[Candidate] = []
    best: list[Instance] = []
    lowest = 0.0
    full: list[tuple[str, str]] = []
    for instance in passed:
        if not instance.has_room(facts.slots, now):
            full.append((instance.id, "no_room"))
            continue
        ledger, rates = instance.ledger, instance.rates
        seconds = work_seconds(rates, ledger.prompt_tokens(), ledger.output_tokens(mean), prompt, output)
        cost = sum(seconds) / rates.weight
        candidates.append(Candidate(instance.id, cost, tuple(zip(TERMS, seconds, strict=True)), rates.weight))
        if not best or cost < lowest * (1 - TIE):
            best, lowest = [instance], cost
        elif cost <= lowest * (1 + TIE):
            best.append(instance)
    if full:
        rejected = tuple(sorted((*rejected, *full)))
    chosen = best[int(draw * len(best))] if best else None
    record = Record(
        kind=facts.kind,
        model=facts.model,
        chosen=chosen.id if chosen else "",
        reason=_reason(len(candidates), len(best)),
        candidates=tuple(candidates),
        rejected=rejected,
        prompt_tokens=prompt,
        output_tokens=output,
        estimate_s=lowest,
        waited_s=max(0.0, now - facts.since) if facts.since else 0.0,
    )
    return Choice(record, chosen)


def _reason(candidates: int, best: int) -> str:
    if not candidates:
        return "no_room"
    if candidates == 1:
        return "only_candidate"
    return "tie" if best > 1 else "least_cost"


def _nobody(facts: Facts, rejected: filters.Rejected, prompt: int, output: int) -> Choice:
    words = {word for _, word in rejected} - {"excluded"}
    usable = words - {"lost", "draining"}  # what speaks of the request, not of the fleet's health
    features = sorted(word.removeprefix("feature:") for word in usable if word.startswith("feature:"))
    message = f"no instance of {facts.model} is healthy"
    refusal: Reason | None = Reason.NO_INSTANCE
    settling = "starting" in words
    if settling:
        refusal, message = None, f"every instance of {facts.model} is still being reached"
    elif features and len(features) == len(usable):
        refusal, message = Reason.UNSUPPORTED, f"no instance of {facts.model} serves {', '.join(features)}"
    elif "context_under" in words:
        message = f"no instance of {facts.model} takes prompts as short as {prompt} tokens"
    elif not words:
        message = f"no other instance of {facts.model}"
    word = refusal.value if refusal else "starting"
    record = Record(facts.kind, facts.model, "", word, (), rejected, prompt, output)
    return Choice(record, None, refusal, message, settling)
