"""A shorter prompt goes before a longer one that has begun: who overtakes whom, and how often. Pure.

Prompts are computed one after the other, and one of 100,000 tokens takes a minute; shortest remaining first (SRPT:
Schrage, Operations Research 16, 1968) serves everybody but the longest sooner. What those may lose is bounded: each has
patience, which is spent by those who overtake it. Work and patience are in microseconds.
"""

from __future__ import annotations

from collections.abc import Reversible
from typing import Protocol, TypeVar

FEATURE = "preempt"  # in an instance's hello: a prompt put aside goes on where it was, from the prefix cache
TIMES = 2  # what is left of the longer one is so many times the shorter one
LEAST_US = 2_000_000  # and more than it by so much: what is put aside is rendered and begun again
AGAIN_US = 200_000  # what being overtaken costs a prompt at least: it is rendered and begun again
PATIENCE = 1.0  # of its own work, for one that is late in any case
MARGIN = 0.5  # of the time that one who is not late has left


class Prompt(Protocol):
    """`work`: left to be computed; `patience`: what others may still take before it. Those of a lower `rank` are not
    overtaken by those of a higher one."""

    work: int
    patience: int
    rank: int


Line = TypeVar("Line", bound=Prompt)


def patience(work: int, slack_s: float) -> int:
    """Of a prompt that is sent with so many seconds to spare before its target; 0 for one that nobody needs to
    overtake. Never more than its own work: what overtakes a prompt makes it last twice as long at most."""
    if work <= LEAST_US:
        return 0
    own = round(PATIENCE * work)
    return min(own, round(MARGIN * slack_s * 1_000_000)) if slack_s > 0 else own


def spent(work: int) -> int:
    """Of a prompt's patience, by one that overtakes it."""
    return max(work, AGAIN_US)


def overtaken(line: Reversible[Line], work: int, rank: int, head: Line | None, done: int) -> list[Line]:
    """Those at the end of the line that a newcomer goes before, the last first. `done`: of `head`, since it began."""
    found: list[Line] = []
    for prompt in reversed(line):
        left = prompt.work - (done if prompt is head else 0)
        if not work or left <= TIMES * work + LEAST_US or prompt.patience < spent(work) or prompt.rank < rank:
            break
        found.append(prompt)
    return found
