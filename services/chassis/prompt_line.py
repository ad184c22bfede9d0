"""The prompts in one instance that have no first token yet, in the order in which its engine computes them. Pure.

Engines serve whom they have first come, first served. So whoever is overtaken is taken out of the engine, and put in
again when its turn comes: those in the engine are always the first of the line. Work is in microseconds, so that what
was added is taken away exactly; times are seconds on one clock, chosen by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from services.chassis.preemption import AGAIN_US, overtaken, spent

US = 1_000_000


@dataclass(slots=True, eq=False)
class Pending:
    """One prompt; `work`, `tokens` (to be computed) and `patience` shrink. `aside`: it is not in the engine."""

    number: int
    gateway: str
    work: int
    patience: int = 0
    rank: int = 0
    tokens: int = 0
    aside: bool = False


class Orders(NamedTuple):
    """Prompts by number: `aside` are to be taken out of the engine, and `again` then put in, in this order."""

    aside: list[int]
    again: list[int]


NONE = Orders([], [])


class PromptLine:
    """`preempts`: the engine keeps what it has computed of a prompt that is taken out. `step_us`: of prompts, that it
    computes together."""

    def __init__(self) -> None:
        self.preempts = False
        self.step_us = 0
        self.work = 0  # of all, as of `since`
        self.since = 0.0  # when the first one began to be computed, or the last step that the engine told of ended
        self._line: dict[int, Pending] = {}
        self.told = False  # the engine tells of its steps
        self._left: Pending | None = None  # was computed, and is not the first any more: the step that runs is its
        self._asides = 0
        self._out: list[int] = []  # overtaken since the last orders

    def __len__(self) -> int:
        return len(self._line)

    def add(self, prompt: Pending, now: float) -> None:
        """It goes before those who let it, and into the engine at once, unless `aside` is set after this."""
        behind = self._overtaken(prompt.work, prompt.rank, now)
        if len(behind) == len(self._line):
            if behind:
                self._leave(behind[-1])
                if not self.told:
                    done = self.done(now)
                    behind[-1].work -= done
                    self.work -= done
            self.since = now
        for other in behind:
            del self._line[other.number]
        if self._asides and any(other.aside for other in self._line.values()):  # its turn comes after theirs
            prompt.aside = True
            self._asides += 1
            self._out.append(prompt.number)
        self._line[prompt.number] = prompt
        self.work += prompt.work
        for other in reversed(behind):
            self._line[other.number] = other
            other.patience -= spent(prompt.work)
            if not other.aside:
                other.aside = True
                self._asides += 1
                self._out.append(other.number)

    def remove(self, number: int, now: float, *, computed: bool) -> bool:
        """It is computed, or given up; False where it is not here."""
        first = self.first
        prompt = self._line.pop(number, None)
        if prompt is None:
            return False
        self.work -= prompt.work
        self._asides -= prompt.aside
        if computed or prompt is first:
            self.since = now
        if prompt is first and not computed:
            self._leave(prompt)
        return True

    def compute(self, tokens: int, now: float) -> None:
        """The engine has ended a step with so many tokens of those who are in it, the first ones first; or of the one
        that was overtaken or given up while the step ran."""
        self.told, self.since = True, now
        if self._left is not None:
            prompt, self._left = self._left, None
            if prompt.number in self._line:
                self._advance(prompt, tokens)
            return
        for prompt in self._line.values():
            if prompt.aside or not (done := self._advance(prompt, tokens)):
                break
            tokens -= done

    def _advance(self, prompt: Pending, tokens: int) -> int:
        """How many of these were still to be computed of it."""
        done = min(tokens, prompt.tokens)
        if done:
            work = prompt.work * done // prompt.tokens
            prompt.tokens -= done
            prompt.work -= work
            self.work -= work
        return done

    def _leave(self, first: Pending) -> None:
        """It is no longer the first, which it was until now."""
        if self.told and first.tokens and not first.aside:
            self._left = first

    def left(self, now: float, work: int = 0, rank: int = 0) -> int:
        """Still to be computed; where `work` is given, before such a newcomer."""
        behind = self._overtaken(work, rank, now)
        if behind and len(behind) == len(self._line):
            return 0
        return max(0, self.work - self.done(now) - sum(other.work for other in behind))

    def done(self, now: float) -> int:
        """What has been computed since `since`, as far as anybody can tell."""
        return min(max(0, round((now - self.since) * US)), self.head())

    def head(self) -> int:
        """Work of the first ones that fit into one step: they progress together, and end together."""
        return self._step()[0]

    def _step(self) -> tuple[int, int]:
        """Work of the first step, and how many prompts end with it."""
        head = count = 0
        for prompt in self._line.values():
            if prompt.aside or (count and head + prompt.work > self.step_us):
                break
            head += prompt.work
            count += 1
        return head, count

    def aside(self, number: int) -> bool:
        """Whether it is here, and not in the engine."""
        prompt = self._line.get(number)
        return prompt is not None and prompt.aside

    def of(self, gateway: str) -> int:
        """Work of this gateway's prompts, as of `since`."""
        return sum(prompt.work for prompt in self._line.values() if prompt.gateway == gateway)

    def tokens_of(self, gateway: str | None = None) -> int:
        """To be computed, of this gateway's prompts; None: of all."""
        return sum(prompt.tokens for prompt in self._line.values() if gateway is None or prompt.gateway == gateway)

    @property
    def first(self) -> Pending | None:
        return next(iter(self._line.values()), None)

    def orders(self, now: float, depth: int, granted: int) -> Orders:
        """Whom to take out, and whose turn it is again: what is in the engine, and granted, is no more than `depth`."""
        if not self._asides and not self._out:
            return NONE
        out = [number for number in self._out if number in self._line]
        self._out.clear()
        again: list[int] = []
        ahead = granted - self.done(now)
        for prompt in self._line.values():
            if prompt.aside:
                if ahead > depth:
                    break
                if prompt is self.first:
                    self.since = now + AGAIN_US / US
                prompt.aside = False
                self._asides -= 1
                again.append(prompt.number)
            ahead += prompt.work
        return Orders(out, again)

    def due(self, depth: int, granted: int) -> float | None:
        """When time alone gives somebody who was put aside his turn; None: nobody, or only an event can."""
        ahead = granted
        if not self._asides:
            return None
        for prompt in self._line.values():
            if prompt.aside:
                return self.since + (ahead - depth + 1) / US if 0 < ahead - depth <= self.head() else None
            ahead += prompt.work
        return None

    def _overtaken(self, work: int, rank: int, now: float) -> list[Pending]:
        if not work or not self.preempts or not self._line:
            return []
        found = overtaken(self._line.values(), work, rank, self.first, self.done(now))
        count = self._step()[1] if found else 0
        return found[: len(self._line) - count] if count > 1 else found  # several end with the step that runs
