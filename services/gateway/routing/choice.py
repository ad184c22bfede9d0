"""One request against the instances of its model: who could take it, who is cheapest, who could begin now.

Changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest

from infermesh.errors import Reason
from services.chassis.fairness import SHALLOW
from services.chassis.granting import STEP_TOKENS, US
from services.gateway.routing import cost, filters, rendezvous
from services.gateway.routing.decision import Candidate, Record
from services.gateway.routing.estimate import Estimate
from services.gateway.routing.facts import Facts
from services.gateway.routing.fleet import Instance
from services.gateway.routing.line import rank_of

TIE = 1e-9  # relative; costs closer than this are equal
COLD_TIE = 0.1  # of the prompt's seconds: cold prompts with a chain treat costs this close as equal
EXAMINED = 48  # instances of a large pool that are looked at closely, beside those that hold the prompt's prefix
HOLDERS = 16
SAMPLE_TOKENS = 2000  # a prompt that tells fast instances from slow ones when a large pool is thinned out

_candidate = tuple.__new__  # takes a third of the time of the named tuple's own


@dataclass(frozen=True, slots=True)
class Choice:
    """`instance` is the cheapest one, which takes the request now if `ready`; or `refusal` is set with its message; or
    neither: then it may wait, for anybody or (`settling`) for an instance that is still being linked.

    `work`: seconds of its prompt there. `long`: only the long-context tier could take it. `asks`: it is thought to be
    too long for everybody, and the instance is asked for the exact count. `wait`: seconds until it would begin;
    `pressure`: the same if those who are late already went before it, which tells how full the model's tier is.
    """

    record: Record
    instance: Instance | None = None
    ready: bool = False
    work: float = 0.0
    step: float = 0.0
    cached: int = 0
    wait: float = 0.0
    long: bool = False
    asks: bool = False
    pressure: float = 0.0
    refusal: Reason | None = None
    message: str = ""
    settling: bool = False


def tokens(facts: Facts, estimate: Estimate) -> tuple[int, int]:
    """Tokens of prompt and of answer that the request is thought to need."""
    prompt = facts.prompt_tokens or (estimate.prompt_tokens(facts.prompt_bytes) if facts.slots else 0)
    output = estimate.output_tokens(facts.max_tokens, facts.choices) if facts.kind == "llm" and facts.slots else 0
    return prompt, output


def cached_tokens(share: float, prompt: int) -> int:
    """Of the prompt, where so much of it is held. The last token is always computed."""
    return max(0, min(prompt - 1, round(share * prompt)))


def choose(
    pool: Sequence[Instance],
    facts: Facts,
    estimate: Estimate,
    held: Mapping[str, float],
    now: float,
    draw: float,
    granted: str = "",
) -> Choice:
    """`held`: instance -> part of the prompt in its cache. `draw`, 0 <= draw < 1, decides among equals. `granted`: the
    instance that has just granted room, and knows better than any estimate that it has some."""
    prompt, output = tokens(facts, estimate)
    examined = pool if len(pool) <= EXAMINED + HOLDERS else _thinned(pool, held)
    passed, rejected = filters.eligible(examined, facts, prompt)
    if not passed and len(examined) < len(pool):
        examined = pool
        passed, rejected = filters.eligible(pool, facts, prompt)
    if not passed:
        return _nobody(facts, rejected, prompt, output)
    llm = facts.kind == "llm" and facts.slots > 0
    long = llm and all(instance.endpoint.tier == "long-context" for instance in passed)
    over = llm and filters.context_word(passed[0].endpoint.capacity, prompt, facts.max_tokens, facts.counted)
    asks = over == "context_over"  # too long for all of them: whoever is asked refuses at once, with the exact count
    loads: list[tuple[float, float, float]] = []  # wait, gateways' crowd, seconds of the line
    backlog = 0.0
    for instance in passed:
        ledger, standing = instance.ledger, instance.line
        wait = ledger.wait_s(now) if ledger.own_work or ledger.foreign_work else 0.0
        if instance.grants and instance.contended:  # what it computes makes room for others
            wait = max((ledger.own_work + ledger.foreign_work) * 1e-6, instance.rates.depth_s)
        crowd = instance.crowd() if ledger.foreign_running else 1.0
        behind = standing.all_s * crowd if standing.count or standing.others_count else 0.0
        backlog += wait + behind
        loads.append((wait, crowd, behind))
    mean_backlog = backlog / len(passed)
    slots, tenant, rank = facts.slots, facts.tenant, rank_of(facts)
    candidates: list[Candidate] = []
    details: list[tuple[float, float]] = []
    full: list[tuple[str, str]] = []
    for instance, (wait, crowd, behind) in zip(passed, loads, strict=True):  # a hot loop
        endpoint, ledger, rates = instance.endpoint, instance.ledger, instance.rates
        share = held.get(endpoint.id, 0.0) if held else 0.0
        cached = cached_tokens(share, prompt) if share else 0
        line = room = preempt = reserve = decode = step = 0.0
        asked = endpoint.id == granted
        if asked:
            wait = min(wait, rates.depth_s / (SHALLOW if tenant in instance.beyond(now) else 1))
        slot = asked or not slots or instance.has_slot(now, tenant)
        if not slot:
            full.append((endpoint.id, "no_room"))
        work = rates.prefill(prompt - cached, cached)
        running = ledger.own_slots + ledger.foreign_running
        step_left = 0.0
        if llm:
            step = rates.step(ledger.resident_tokens() + prompt)
            decode = output * step
            if running:
                work *= rates.interference(step)
                growth = rates.kv_s * (prompt + output / 2) * output
                decode += cost.delayed_s(running - len(ledger.pending), work, growth)
            decode *= cost.DECODE_SHARE
            if ledger.preempts and ledger.pending and not asked:
                wait, step_left, preempt = _overtaking(instance, work, rank, wait, now, output)
            wide = endpoint.tier == "long-context" and not long
            if (running or not slot) and not asked:
                kept = instance.reserve.kv_tokens(now, endpoint.capacity.kv_tokens) if wide else 0
                kept += instance.kept(now, tenant).tokens
                need = (prompt - cached + output) * crowd + kept
                room = _room(instance, slot, need, crowd, cost.slot_wait_s(estimate.output, step, running), now)
            if wide:
                reserve = cost.reserve_s(work, instance.reserve.load(now))
        elif not slot:
            room = max(instance.full_until - now, wait / max(1, running))
        if behind and not asked:
            line = instance.line.ahead_s(work) * crowd
        load = wait + behind
        priced = work * cost.price(load if load < mean_backlog else mean_backlog) if mean_backlog else work
        opens = asks or (not room and instance.is_open(wait, crowd, now, tenant))
        wait += step_left
        ready = asked or (slot and opens)
        weight = rates.weight * instance.share * instance.pace.share
        total = (wait + line + room + priced + reserve + decode + preempt) / weight
        seconds = (wait, line, room, priced, reserve, decode, preempt)
        candidates.append(_candidate(Candidate, (endpoint.id, total, seconds, weight, cached, ready)))
        details.append((work, step))
    index, reason = _cheapest(candidates, details, facts, held, draw)
    chosen, (work, step) = candidates[index], details[index]
    ready = chosen.ready
    wait = chosen.seconds[0] + chosen.seconds[1] + chosen.seconds[2]
    record = Record(
        kind=facts.kind,
        model=facts.model,
        chosen=chosen.id if ready else "",
        reason=reason if ready else ("no_room" if len(full) == len(passed) else "backlog"),
        candidates=tuple(candidates),
        rejected=tuple(sorted((*rejected, *full))) if full else rejected,
        prompt_tokens=prompt,
        output_tokens=output,
        estimate_s=chosen.cost_s,
        waited_s=max(0.0, now - facts.since) if facts.since else 0.0,
        cached_tokens=chosen.cached_tokens,
        predicted_ttft_s=wait + work + step,
        unexamined=len(pool) - len(examined),
    )
    instance = passed[index]
    pressure = wait + instance.line.late_s(work) * loads[index][1] if instance.line.count else wait
    return Choice(record, instance, ready, work, step, chosen.cached_tokens, wait, long, asks, pressure)


def _overtaking(
    instance: Instance, work: float, rank: int, wait: float, now: float, output: int
) -> tuple[float, float, float]:
    """For a newcomer: seconds of the prompts that it does not overtake; of the step that runs, if it overtakes all;
    and what it costs to overtake the others: them, and its own answer, which is made beside them."""
    ledger = instance.ledger
    behind = ledger.overtaken(round(work * US), rank, now)
    if not behind:
        return wait, 0.0, 0.0
    left = sum(entry.work for entry in behind) / US
    step = instance.rates.prefill(STEP_TOKENS, max(0, behind[-1].total - STEP_TOKENS))
    all_of_them = len(behind) == len(ledger.pending) and not ledger.foreign_work
    if instance.grants and instance.contended:
        wait = max(wait - left, instance.rates.depth_s)
    else:
        wait = ledger.wait_s(now, behind)
    lost = cost.preempt_s(work, len(behind)) + cost.beside_s(left, output, step)
    return wait, step / 2 if all_of_them else 0.0, lost


def _room(instance: Instance, slot: bool, need: float, crowd: float, free_slot: float, now: float) -> float:
    """Seconds until a slot and `need` tokens of KV room are free. `free_slot`: until one of those running ends."""
    ledger, kv_tokens = instance.ledger, instance.endpoint.capacity.kv_tokens
    running = ledger.own_slots + ledger.foreign_running
    room = 0.0
    queue = 1 + instance.line.all_count * crowd  # those who wait for the same room
    if not slot:
        room = max(instance.full_until - now, free_slot * queue)
    if kv_tokens and running:
        used = ledger.kv_used(kv_tokens)
        missing = used + round(need) - kv_tokens
        if missing > 0:
            room = max(room, cost.kv_wait_s(missing, used, running, free_slot) + free_slot * queue)
    return room


def _cheapest(
    candidates: Sequence[Candidate],
    details: Sequence[tuple[float, float]],
    facts: Facts,
    held: Mapping[str, float],
    draw: float,
) -> tuple[int, str]:
    """Index of the one that gets it, and why. A cold prompt with a chain falls, among near-equals, to whom its first
    unknown block points (weighted rendezvous), so that gateways that share nothing send it to the same instance."""
    if len(candidates) == 1:
        return 0, "only_candidate"
    costs = [candidate.cost_s for candidate in candidates]
    lowest = min(costs)
    equal = lowest * (1 + TIE)
    best = [i for i, each in enumerate(costs) if each <= equal]
    if facts.chain:
        limit = lowest + COLD_TIE * min(details[i][0] for i in best)
        close = [i for i, each in enumerate(costs) if each <= limit and candidates[i].ready]
        if len(close) > 1:
            known = round(max(held.values(), default=0.0) / facts.chain_share) if facts.chain_share else 0
            key = rendezvous.cold_key(facts.chain, known)
            return max(
                close, key=lambda i: rendezvous.score(key, candidates[i].id, 1 / max(details[i][0], 1e-9))
            ), "tie"
    return best[int(draw * len(best))], "tie" if len(best) > 1 else "least_cost"


def _thinned(pool: Sequence[Instance], held: Mapping[str, float]) -> list[Instance]:
    """The part of a large pool that can matter: those that would finish an uncached prompt first, and holders of this
    one's prefix. Sorted by id, like the pool."""
    holders = nsmallest(HOLDERS, held, key=lambda id: (-held[id], id)) if held else ()
    free = [
        (i.ledger.own_work + i.ledger.foreign_work) * 1e-6 + i.line.all_s + i.rates.sample_s  # inline: a hot loop
        for i in pool
    ]
    chosen = set(sorted(range(len(pool)), key=free.__getitem__)[:EXAMINED])
    for id in holders:
        place = bisect_left(pool, id, key=_id)
        if place < len(pool) and pool[place].id == id:
            chosen.add(place)
    return [pool[i] for i in sorted(chosen)]


def _id(instance: Instance) -> str:
    return instance.endpoint.id


def _nobody(facts: Facts, rejected: filters.Rejected, prompt: int, output: int) -> Choice:
    words = {word for _, word in rejected} - {"excluded"}
    usable = words - {"lost", "draining", "banned"}  # what speaks of the request, not of the fleet's health
    features = sorted(word.removeprefix("feature:") for word in usable if word.startswith("feature:"))
    message = f"no instance of {facts.model} is healthy"
    refusal: Reason | None = Reason.NO_INSTANCE
    settling = "starting" in words
    if settling:
        refusal, message = None, f"every instance of {facts.model} is still being reached"
    elif features and len(features) == len(usable):
        refusal, message = Reason.UNSUPPORTED, f"no instance of {facts.model} serves {', '.join(features)}"
    elif facts.alike is not None:
        message = f"no instance of {facts.model} is left with the same weights, tokenizer and template"
    elif "context_under" in words:
        message = f"no instance of {facts.model} takes prompts as short as {prompt} tokens"
    elif words == {"context_over"}:
        refusal = Reason.CONTEXT_LENGTH_EXCEEDED
        message = f"the prompt has {prompt} tokens, and no instance of {facts.model} takes so many"
    elif not words:
        message = f"no other instance of {facts.model}"
    word = refusal.value if refusal else "starting"
    record = Record(facts.kind, facts.model, "", word, (), rejected, prompt, output)
    return Choice(record, refusal=refusal, message=message, settling=settling)
