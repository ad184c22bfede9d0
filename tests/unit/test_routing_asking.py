"""Want and grant, a gateway's side: what it announces, what it does with a grant, and mixed versions."""

from __future__ import annotations

from infermesh.errors import Reason
from services.gateway.routing.decision import Decline, Dispatch, Wait
from services.gateway.routing.facts import End, LoadReport, Outcome
from services.gateway.routing.router import Router
from tests.kit.routing import OLD, endpoint, facts, pick, router


def shared(*ids: str, grants: bool = True, gateways: int = 2, foreign_us: int = 10_000_000) -> Router:
    """Instances with 10 s of another gateway's prompts."""
    made = router(*(endpoint(id) for id in ids))
    for id in ids:
        made.linked(id, 1, OLD, grants=grants)
        hear(made, id, gateways, foreign_us)
    return made


def hear(r: Router, id: str, gateways: int = 2, foreign_us: int = 0, **more: object) -> list[object]:
    load = LoadReport(1, 0, 0, gateways=gateways, foreign_work_us=foreign_us, **more)  # type: ignore[arg-type]
    return list(r.report(id, 1, load, OLD))


def waits(r: Router, now: float = OLD, **given: object) -> int:
    decision = r.pick(facts(**given), now)
    assert isinstance(decision, Wait), decision
    return decision.ticket


def test_the_best_is_asked_for_and_a_grant_sends_it() -> None:
    r = shared("a")
    long, short = waits(r, prompt_tokens=5000), waits(r, prompt_tokens=1000)
    (ask,) = r.asks(OLD)
    assert (ask.want.ticket, ask.want.waiting) == (short, 2)
    assert ask.want.work_us > 1_000_000 and sum(ask.want.line_ms) > 6000
    (sent,) = r.granted("a", 1, short, OLD)
    assert isinstance(sent, Dispatch) and (sent.ticket, sent.lease.grant) == (short, short)
    assert sent.lease.work_us >= 1_000_000
    assert [ask.want.ticket for ask in r.asks(OLD)] == [long]
    r.cancel(long, OLD)
    assert [ask.want.ticket for ask in r.asks(OLD + 1)] == [0], "nobody waits any more"
    assert r.granted("a", 1, long, OLD + 1) == [Decline("a", long)]


def test_granted_twice_one_is_declined() -> None:
    r = shared("a", "b")
    ticket = waits(r)
    (ask,) = r.asks(OLD)
    other = {"a": "b", "b": "a"}[ask.instance_id]
    assert r.granted(other, 1, ticket, OLD) == [Decline(other, ticket)], "it was not asked there"
    (sent,) = r.granted(ask.instance_id, 1, ticket, OLD)
    assert isinstance(sent, Dispatch)
    assert r.granted(ask.instance_id, 1, ticket, OLD) == [Decline(ask.instance_id, ticket)]


def test_an_ask_is_repeated_while_it_lasts_and_after_the_instance_has_restarted() -> None:
    r = shared("a")
    ticket, _ = waits(r, prompt_tokens=1000), waits(r, prompt_tokens=2000)
    assert len(r.asks(OLD)) == 1
    r.tick(OLD + 0.5)
    r.asks(OLD + 0.5)
    r.tick(OLD + 0.9)
    assert r.asks(OLD + 0.9) == []
    r.tick(OLD + 1.6)
    assert [ask.want.ticket for ask in r.asks(OLD + 1.6)] == [ticket]
    r.linked("a", 1, OLD + 1.7, grants=True)  # a Link made anew, before anybody noticed that the old one broke
    hear(r, "a", foreign_us=10_000_000)
    assert [ask.want.ticket for ask in r.asks(OLD + 1.7)] == [ticket], "it has forgotten who waits here"


def test_an_idle_instance_is_used_at_once_and_refuses_at_no_price() -> None:
    r = shared("a", foreign_us=0)
    sent = pick(r, prompt_tokens=5000)
    assert not sent.lease.grant and r.asks(OLD) == []
    full = Outcome(End.REFUSED, Reason.INSTANCE_FULL, queued_s=3.0)
    assert r.release(sent.lease, full, OLD) == []
    ticket = waits(r, prompt_tokens=5000)
    assert [ask.want.ticket for ask in r.asks(OLD)] == [ticket], "the next attempt asks"
    assert r.explain(facts(), OLD).candidates[0].seconds[0] > 2.9, "what it said is queued there is believed"
    hear(r, "a")
    assert r.granted("a", 1, ticket, OLD)


def test_who_waits_elsewhere_goes_before_a_newcomer() -> None:
    r = shared("a", foreign_us=0)
    hear(r, "a", foreign_line_ms=(0, 0, 30), foreign_waiting=4)
    assert waits(r) and r.explain(facts(), OLD).candidates[0].seconds[1] > 0


def test_instances_that_do_not_grant_or_have_one_gateway_are_served_as_ever() -> None:
    for r in (shared("a", grants=False), shared("a", gateways=1)):
        ticket = waits(r, prompt_tokens=5000)
        assert r.asks(OLD) == []
        (sent,) = hear(r, "a", 1)
        assert isinstance(sent, Dispatch) and sent.ticket == ticket and not sent.lease.grant


def test_a_prompt_that_another_gateway_had_computed_makes_those_who_wait_with_it_short_work() -> None:
    r = shared("a", "b", foreign_us=90_000_000)
    hear(r, "a", foreign_us=10_000_000)
    document = {"chain": (1, 2, 3, 4), "chain_share": 0.25}
    short, long = waits(r, prompt_tokens=3000), waits(r, prompt_tokens=4000, **document)
    (ask,) = r.asks(OLD)
    assert (ask.instance_id, ask.want.ticket) == ("a", short)
    r.cached("b", 1, (1, 2, 3, 4), ())
    assert r.asks(OLD + 1) == [], "it does not wait there"
    r.cached("a", 1, (1,), ())
    r.cached("a", 1, (7, 2, 3), ())
    (ask,) = r.asks(OLD + 1)
    assert (ask.instance_id, ask.want.ticket) == ("a", long)
    assert ask.want.work_us < 1_500_000, "a thousand tokens are left"
    for ticket in (short, long):
        r.cancel(ticket, OLD + 1)
    assert not r._desk.queue.lacking and not r._desk.queue.families
