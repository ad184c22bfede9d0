"""Work in flight on one instance: our own to the token, foreign work as the instance reports it.

Load = the foreign part of the last report + our own ledger, never both. All sums are integers (tokens, microseconds),
so that what was added is taken away exactly. An engine computes prompts one after the other, small ones several in a
step; between two reports the first step of that line is taken to progress with the clock, never beyond its own end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.chassis.fairness import Holdings, Size
from services.chassis.granting import STEP_TOKENS
from services.gateway.routing.facts import LoadReport
from services.gateway.routing.pulse import Pulse

US = 1_000_000


@dataclass(slots=True)
class Entry:
    """One attempt. `prompt` (uncached tokens) and `work` (their microseconds) become 0 once the first token is out.

    `total`: tokens of prompt, cached ones included. `thought`: seconds of its prefill as predicted, 0 where others were
    queued before it. `step`: seconds of a decode step, as predicted. `arrivals`: how many had been sent here when its
    first token came. `due`: seconds to its first token, as predicted. `abandoned`: its call was cut.
    """

    prompt: int
    work: int
    output: int
    slots: int
    total: int = 0
    cached: int = 0
    thought: float = 0.0
    step: float = 0.0
    at: float = 0.0
    started_at: float = 0.0
    arrivals: int = 0
    due: float = 0.0
    abandoned: bool = False
    tenant: str = ""
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def size(self) -> Size:
        return Size(self.slots, self.total + self.output)


@dataclass(slots=True)
class Ledger:
    """`since`: when the head of the line of prompts began to be computed. `fresh`: resident tokens of requests that
    started since the last report, which does not know them."""

    entries: dict[int, Entry] = field(default_factory=dict)
    pending: dict[int, Entry] = field(default_factory=dict)  # those without a first token, oldest first
    own_prompt: int = 0
    own_work: int = 0
    own_output: int = 0
    own_slots: int = 0
    own_resident: int = 0
    foreign_prompt: int = 0
    foreign_work: int = 0
    foreign_running: int = 0
    fresh: int = 0
    since: float = 0.0
    arrivals: int = 0
    report: LoadReport | None = None
    holdings: Holdings = field(default_factory=Holdings)

    def reserve(self, seq: int, entry: Entry, now: float) -> None:
        if not self.own_work and not self.foreign_work:
            self.since = now
        self.arrivals += 1
        self.entries[seq] = entry
        if entry.work or entry.prompt:
            self.pending[seq] = entry
        self.own_prompt += entry.prompt
        self.own_work += entry.work
        self.own_output += entry.output
        self.own_slots += entry.slots
        self.own_resident += entry.total + entry.output
        self.holdings.take(entry.tenant, entry.size, now)

    def started(self, seq: int, now: float) -> Entry | None:
        """The first token is out. None when that is known, or nobody knows the request."""
        entry = self.entries.get(seq)
        if entry is None or entry.started_at:
            return None
        entry.started_at = now
        entry.arrivals = self.arrivals
        self.fresh += entry.total
        self._done(seq, entry, now)
        return entry

    def release(self, seq: int, now: float) -> Entry | None:
        """The entry, the first time."""
        entry = self.entries.pop(seq, None)
        if entry is None:
            return None
        self._done(seq, entry, now)
        self.own_output -= entry.output
        self.own_slots -= entry.slots
        self.own_resident -= entry.total + entry.output
        self.holdings.give(entry.tenant, entry.size)
        return entry

    def _done(self, seq: int, entry: Entry, now: float) -> None:
        if self.pending.pop(seq, None) is None:
            return
        self.own_prompt -= entry.prompt
        self.own_work -= entry.work
        entry.prompt = entry.work = 0
        self.since = now

    def reconcile(self, report: LoadReport, now: float, tps: float) -> None:
        """Takes a load frame in. Attempts up to `seen_seq` have arrived, and the instance says how much of their
        prompts is still to be computed; later ones are on the wire, and count in full. `tps` turns foreign tokens into
        work."""
        self.report = report
        self.fresh = 0
        if report.running is not None:
            total = report.running + (report.waiting or 0)
            self.foreign_running = max(0, total - report.own_running)
        if report.queued_tokens is None:
            return
        foreign = max(0, report.queued_tokens - report.own_queued_tokens)
        work = round(foreign * US / tps) if report.foreign_work_us is None else report.foreign_work_us
        if work < self.foreign_work or not (self.own_work or self.foreign_work):
            self.since = now
        self.foreign_prompt = foreign
        self.foreign_work = work
        arrived = [entry for seq, entry in self.pending.items() if seq <= report.seen_seq]
        excess = sum(entry.prompt for entry in arrived) - report.own_queued_tokens
        for entry in arrived:  # oldest first, as an engine computes them
            if excess <= 0:
                break
            done = min(excess, entry.prompt)
            if done:
                work = entry.work * done // entry.prompt
                entry.prompt -= done
                entry.work -= work
                self.own_prompt -= done
                self.own_work -= work
                excess -= done
                self.since = now

    def refused(self, queued_s: float, now: float) -> None:
        """The instance says that so much is queued there, more than could be seen from here."""
        missing = round(queued_s * US) - self.own_work - self.foreign_work
        if missing > 0:
            if not self.own_work and not self.foreign_work:
                self.since = now
            self.foreign_work += missing

    def forget_report(self) -> None:
        """The Link is gone: what others have there is unknown."""
        self.report = None
        self.foreign_prompt = self.foreign_work = self.foreign_running = self.fresh = 0

    def wait_s(self, now: float) -> float:
        """Seconds of prompts queued, less what the first step of the line has done since it began."""
        left = self.own_work + self.foreign_work
        if not left:
            return 0.0
        head, room = self.foreign_work, STEP_TOKENS
        for entry in self.pending.values():
            if entry.prompt > room and room < STEP_TOKENS:
                break
            head += entry.work
            room -= entry.prompt
        done = (now - self.since) * US
        return max(0.0, (left - min(done, head) if done > 0 else left) / US)

    def prompt_tokens(self) -> int:
        return self.own_prompt + self.foreign_prompt

    def running(self) -> int:
        return self.own_slots + self.foreign_running

    def resident_tokens(self) -> int:
        """Tokens that decoding requests attend to; a prefix that several share counts for each of them."""
        report = self.report
        if report is not None and report.resident_tokens is not None:
            return report.resident_tokens + self.fresh
        return self.own_resident

    def kv_used(self, kv_tokens: int) -> int:
        """Tokens of KV room that running requests and those about to start take; a shared prefix counts once."""
        report = self.report
        if report is None or (report.kv_used_ratio is None and report.resident_tokens is None):
            return self.own_resident
        queued = self.own_prompt + self.foreign_prompt
        if report.kv_used_ratio is None:
            return report.resident_tokens + self.fresh + queued  # type: ignore[operator]
        return round(report.kv_used_ratio * kv_tokens) + queued
