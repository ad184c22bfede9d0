"""Work in flight on one instance: our own to the token, foreign work as the instance reports it.

Load = the foreign part of the last report + our own ledger, never both. All sums are integers (tokens, microseconds),
so that what was added is taken away exactly. An engine computes prompts one after the other, small ones several in a
step; between two reports the first step of that line is taken to progress with the clock, never beyond its own end.
Where shorter prompts overtake longer ones (chassis/preemption.py), ours stand in the order in which they are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.chassis.fairness import Holdings, Size
from services.chassis.granting import STEP_TOKENS
from services.chassis.preemption import overtaken, spent
from services.gateway.routing.facts import LoadReport
from services.gateway.routing.pulse import Pulse

US = 1_000_000


@dataclass(slots=True)
class Entry:
    """One attempt. `prompt` (uncached tokens) and `work` (their microseconds) shrink as it is computed, and are 0 once
    the first token is out; `whole` is all of the work.

    `total`: tokens of prompt, cached ones included. `thought`: seconds of its prefill as predicted, 0 where others were
    queued before it. `step`: seconds of a decode step, as predicted. `arrivals`: how many had been sent here when its
    first token came. `due`: seconds to its first token, as predicted. `abandoned`: its call was cut.
    `patience`: microseconds that others who overtake it may still take before it; `rank`: it overtakes none of a lower
    one.
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
    patience: int = 0
    rank: int = 0
    whole: int = 0
    tenant: str = ""
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def size(self) -> Size:
        return Size(self.slots, self.total + self.output)


@dataclass(slots=True)
class Ledger:
    """`since`: when the head of the line of prompts began to be computed. `fresh`: resident tokens of requests that
    started since the last report, which does not know them. `preempts`: shorter prompts overtake longer ones there."""

    entries: dict[int, Entry] = field(default_factory=dict)
    pending: dict[int, Entry] = field(default_factory=dict)  # those without a first token, as they are computed
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
    preempts: bool = False

    def reserve(self, seq: int, entry: Entry, now: float) -> None:
        if not self.own_work and not self.foreign_work:
            self.since = now
        self.arrivals += 1
        entry.whole = entry.work
        self.entries[seq] = entry
        if entry.work or entry.prompt:
            self._join(seq, entry, now)
        self.own_prompt += entry.prompt
        self.own_work += entry.work
        self.own_output += entry.output
        self.own_slots += entry.slots
        self.own_resident += entry.total + entry.output
        self.holdings.take(entry.tenant, entry.size, now)

    def _join(self, seq: int, entry: Entry, now: float) -> None:
        """Into the line, before those whom it overtakes."""
        behind = self.overtaken(entry.work, entry.rank, now)
        if not behind:
            self.pending[seq] = entry
            return
        if len(behind) == len(self.pending) and not self.foreign_work:
            first = behind[-1]
            self._compute(first, first.prompt * self._done_us(now) // max(1, first.work))
            self.since = now
        others = list(self.pending.items())
        ahead = len(others) - len(behind)
        self.pending = dict([*others[:ahead], (seq, entry), *others[ahead:]])
        for other in behind:
            other.patience -= spent(entry.work)

    def overtaken(self, work: int, rank: int, now: float) -> list[Entry]:
        """Our prompts that a newcomer goes before, the last first. Of others' nobody knows how long each is."""
        if not self.preempts or not self.pending:
            return []
        head = None if self.foreign_work else next(iter(self.pending.values()))
        found = overtaken(self.pending.values(), work, rank, head, self._done_us(now) if head is not None else 0)
        count = self._step()[1] if found else 0
        return found[: len(self.pending) - count] if count > 1 else found  # several end with the step that runs

    def _compute(self, entry: Entry, tokens: int) -> None:
        """So many of its prompt are computed."""
        if tokens:
            work = entry.work * tokens // entry.prompt
            entry.prompt -= tokens
            entry.work -= work
            self.own_prompt -= tokens
            self.own_work -= work

    def started(self, seq: int, now: float) -> Entry | None:
        """The first token is out. None when that is known, or nobody knows the request."""
        entry = self.entries.get(seq)
        if entry is None or entry.started_at:
            return None
        entry.started_at = now
        entry.arrivals = self.arrivals
        self.fresh += entry.total
        self._done(seq, entry, now, computed=True)
        return entry

    def release(self, seq: int, now: float) -> Entry | None:
        """The entry, the first time."""
        entry = self.entries.pop(seq, None)
        if entry is None:
            return None
        self._done(seq, entry, now, computed=False)
        self.own_output -= entry.output
        self.own_slots -= entry.slots
        self.own_resident -= entry.total + entry.output
        self.holdings.give(entry.tenant, entry.size)
        return entry

    def _done(self, seq: int, entry: Entry, now: float, *, computed: bool) -> None:
        first = next(iter(self.pending), None)
        if self.pending.pop(seq, None) is None:
            return
        self.own_prompt -= entry.prompt
        self.own_work -= entry.work
        entry.prompt = entry.work = 0
        if computed or seq == first:
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
        arrived = [(seq, entry) for seq, entry in self.pending.items() if seq <= report.seen_seq]
        excess = sum(entry.prompt for _, entry in arrived) - report.own_queued_tokens
        for seq, entry in arrived:  # in the order in which an engine computes them
            if excess <= 0:
                break
            done = min(excess, entry.prompt)
            if done:
                self._compute(entry, done)
                excess -= done
                self.since = now
            if not entry.prompt and not entry.work:
                del self.pending[seq]  # nobody need tell us of its first token

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

    def wait_s(self, now: float, behind: Sequence[Entry] = ()) -> float:
        """Seconds of prompts queued, less what the first step of the line has done since it began. `behind`: not
        counting these, whom a newcomer overtakes."""
        left = self.own_work + self.foreign_work
        if not left:
            return 0.0
        if behind:
            left -= sum(entry.work for entry in behind)
            if len(behind) == len(self.pending) and not self.foreign_work:
                return 0.0
        return max(0, left - self._done_us(now)) / US

    def _done_us(self, now: float) -> int:
        """What the first step of the line has done since it began, as far as anybody can tell."""
        return min(max(0, round((now - self.since) * US)), self._step()[0])

    def _step(self) -> tuple[int, int]:
        """Work of the first step, others' included, and how many of our prompts end with it."""
        head, room, count = self.foreign_work, STEP_TOKENS, 0
        for entry in self.pending.values():
            if entry.prompt > room and room < STEP_TOKENS:
                break
            head += entry.work
            room -= entry.prompt
            count += 1
        return head, count

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
