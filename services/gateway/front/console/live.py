"""What the console shows beside the fleet as it is: how instances fared, and what was decided lately."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.gateway.past.decisions import Decisions, shown
from services.gateway.report import Report
from services.gateway.routing.decision import Record
from services.gateway.routing.facts import Facts
from services.gateway.routing.groups import GroupView
from services.gateway.upstream.calls import Caller, DirectoryView, InstanceView, ModelView

KEPT = 500  # requests
CHANGES = 20  # of one instance's state
GONE_S = 600.0  # how long one that left is still shown
GONE = "gone"
LOOK_S = 1.0


class FleetView(DirectoryView, Protocol):
    """The directory, as the console wants it."""

    async def changed(self) -> None:
        """Until the fleet looks different."""
        ...

    def groups(self) -> Sequence[GroupView]:
        """Those that are scaled, sorted by name."""
        ...

    def explain(self, facts: Facts) -> Record:
        """Where the request would go now. Reserves nothing."""
        ...


@dataclass(slots=True)
class _Life:
    """One instance's recent past: (unix seconds, state), newest last."""

    view: InstanceView
    changes: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=CHANGES))


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that ended. `number` counts them in this process; `at` is unix seconds."""

    number: int
    at: float
    report: Report


class Live:
    """One a gateway. `clock` tells unix seconds; `numbers` what the gateway has in hand right now."""

    def __init__(
        self,
        directory: FleetView,
        gateway: Mapping[str, Any],
        fallbacks: Mapping[str, str],
        clock: Callable[[], float],
        numbers: Callable[[], Mapping[str, Any]],
        decisions: Decisions | None = None,
    ) -> None:
        self.directory = directory
        self._gateway = dict(gateway)
        self._fallbacks = dict(fallbacks)
        self._clock = clock
        self._numbers = numbers
        self._decisions = decisions
        self._lives: dict[str, _Life] = {}
        self._seen: deque[Seen] = deque(maxlen=KEPT)
        self._count = 0

    # -- what happens -----------------------------------------------------------------------------------------------

    def finished(self, report: Report) -> None:
        """A request ended. On the hot path: it is kept as it is, and written out when somebody looks."""
        self._count += 1
        self._seen.append(Seen(self._count, self._clock(), report))

    async def run(self) -> None:
        """Follows the fleet for ever."""
        while True:
            self.look(self.directory.instances(), self._clock())
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.directory.changed()
            await asyncio.sleep(0.05)  # changes come in crowds

    def look(self, views: Iterable[InstanceView], now: float) -> None:
        """Notes the changes since the last look."""
        listed = set()
        for view in views:
            listed.add(view.id)
            self._note(view, view.state, now)
        for id in [id for id in self._lives if id not in listed]:
            life = self._lives[id]
            if life.changes[-1][1] != GONE:
                self._note(life.view, GONE, now)
            elif now - life.changes[-1][0] > GONE_S:
                del self._lives[id]

    def _note(self, view: InstanceView, state: str, now: float) -> None:
        life = self._lives.setdefault(view.id, _Life(view))
        life.view = view
        if not life.changes or life.changes[-1][1] != state:
            life.changes.append((now, state))

    # -- what is shown ----------------------------------------------------------------------------------------------

    def state(self, caller: Caller) -> dict[str, Any]:
        """The fleet as the caller may see it."""

        def may(view: InstanceView | ModelView, name: str) -> bool:
            return not caller.models or name in caller.models or any(alias in caller.models for alias in view.aliases)

        self.look(self.directory.instances(), self._clock())
        lives = sorted(self._lives.values(), key=lambda life: life.view.id)
        instances = [_instance(life) for life in lives if may(life.view, life.view.model)]
        models = [
            dataclasses.asdict(model) | {"fallback": self._fallbacks.get(model.id, "")}
            for model in self.directory.models()
            if may(model, model.id)
        ]
        known = {one["model"] for one in instances}
        groups = [_group(one) for one in self.directory.groups() if not caller.models or one.model in known]
        now = {"registry_stale": self.directory.stale, "requests": self._count, **self._numbers()}
        return {
            "now": self._clock(),
            "gateway": self._gateway | now,
            "models": models,
            "instances": instances,
            "groups": groups,
        }

    def since(self, number: int, caller: Caller) -> tuple[int, list[dict[str, Any]]]:
        """The last number, and the requests after `number` that the caller may see: operators all, others their own."""
        fresh = [one for one in self._seen if one.number > number and _may(one.report.tenant, caller)]
        return self._count, [summary(one) for one in fresh]

    async def request(self, id: str, caller: Caller) -> dict[str, Any] | None:
        """All that is known of a request that ended: every decision with its candidates. Older ones are on disk."""
        for one in reversed(self._seen):
            if one.report.request_id == id and _may(one.report.tenant, caller):
                tried = [{"outcome": tried.outcome, "record": shown(tried.record)} for tried in one.report.tried]
                return summary(one) | {"tried": tried}
        found = None
        if self._decisions is not None:
            found = await self._decisions.find(id, lambda tenant: _may(tenant, caller))
        if found is None:
            return None
        tried = [{"outcome": one["outcome"], "record": one} for one in found["decisions"]]
        return found["request"] | {"predicted_ttft_s": found["predicted_ttft_s"], "tried": tried}


def _may(tenant: str, caller: Caller) -> bool:
    return caller.operator or tenant == caller.tenant


def _instance(life: _Life) -> dict[str, Any]:
    view = life.view
    shown = dataclasses.asdict(view)
    state = life.changes[-1][1]
    if state == GONE:
        shown |= {"running": None, "waiting": None, "kv_used_ratio": None, "in_flight": 0}
    host = view.address.rpartition(":")[0].strip("[]")
    shown["incarnation"] = f"{view.incarnation:016x}"
    return shown | {"state": state, "host": host, "changes": [list(change) for change in life.changes]}


def _group(view: GroupView) -> dict[str, Any]:
    """Rounded as it is shown, so that a page hears of it when that changes."""
    return dataclasses.asdict(view) | {"use": round(view.use, 2), "backlog_s": round(view.backlog_s, 1)}


def summary(seen: Seen) -> dict[str, Any]:
    """A request in a line of a table."""
    report, record = seen.report, seen.report.record
    return {
        "number": seen.number,
        "at": seen.at,
        "request_id": report.request_id,
        "method": report.method,
        "tenant": report.tenant,
        "model": report.model,
        "served_model": report.served_model,
        "instance": report.instance,
        "outcome": report.outcome,
        "attempts": report.attempts,
        "ttft_s": report.ttft_s,
        "duration_s": report.duration_s,
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.completion_tokens,
        "cached_tokens": report.cached_tokens,
        "reason": record.reason if record else "",
        "waited_s": record.waited_s if record else 0.0,
        "predicted_ttft_s": record.predicted_ttft_s if record else 0.0,
        "degraded_from": record.degraded_from if record else "",
    }
