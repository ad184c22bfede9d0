"""Work in flight on one instance, in tokens: our own to the token, foreign work as the instance reports it.

Load = the foreign part of the last report + our own ledger, never both. All numbers are integers, so that what was
added is taken away exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.gateway.routing.facts import LoadReport


@dataclass(slots=True)
class Entry:
    """One attempt. `prompt` becomes 0 once the first token is out: it is computed."""

    prompt: int
    output: int
    slots: int


@dataclass(slots=True)
class Ledger:
    """`mean_output` tokens stand for each foreign request, whose length nobody tells us."""

    entries: dict[int, Entry] = field(default_factory=dict)
    own_prompt: int = 0
    own_output: int = 0
    own_slots: int = 0
    foreign_prompt: int = 0
    foreign_running: int = 0
    report: LoadReport | None = None

    def reserve(self, seq: int, prompt: int, output: int, slots: int) -> None:
        self.entries[seq] = Entry(prompt, output, slots)
        self.own_prompt += prompt
        self.own_output += output
        self.own_slots += slots

    def started(self, seq: int) -> None:
        """The first token is out."""
        entry = self.entries.get(seq)
        if entry is not None:
            self.own_prompt -= entry.prompt
            entry.prompt = 0

    def release(self, seq: int) -> bool:
        """True the first time."""
        entry = self.entries.pop(seq, None)
        if entry is None:
            return False
        self.own_prompt -= entry.prompt
        self.own_output -= entry.output
        self.own_slots -= entry.slots
        return True

    def reconcile(self, report: LoadReport) -> None:
        """Takes a load frame in. Attempts up to `seen_seq` have arrived, and the instance says how much of their
        prompts is still to be computed; later ones are on the wire, and count in full."""
        self.report = report
        if report.running is not None:
            total = report.running + (report.waiting or 0)
            self.foreign_running = max(0, total - report.own_running)
        if report.queued_tokens is None:
            return
        self.foreign_prompt = max(0, report.queued_tokens - report.own_queued_tokens)
        arrived = [entry for seq, entry in self.entries.items() if seq <= report.seen_seq and entry.prompt]
        excess = sum(entry.prompt for entry in arrived) - report.own_queued_tokens
        for entry in arrived:  # oldest first, as an engine computes them
            if excess <= 0:
                break
            done = min(excess, entry.prompt)
            entry.prompt -= done
            self.own_prompt -= done
            excess -= done

    def forget_report(self) -> None:
        """The Link is gone: what others have there is unknown."""
        self.report = None
        self.foreign_prompt = self.foreign_running = 0

    def prompt_tokens(self) -> int:
        return self.own_prompt + self.foreign_prompt

    def output_tokens(self, mean_output: int) -> int:
        return self.own_output + self.foreign_running * mean_output

    def running(self) -> int:
        return self.own_slots + self.foreign_running
