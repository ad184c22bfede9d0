"""Streams under a fault: what every caller saw, token by token."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from infermesh.client import AsyncClient, MeshError
from infermesh.client.results import Served

MODEL = "chat"
TIMEOUT_S = 30.0


@dataclass(slots=True)
class Told:
    """One request. Times are monotonic seconds; `at` holds one for each event; `error` is empty for a whole answer."""

    wanted: int
    began: float
    at: list[float] = field(default_factory=list)
    ended: float = 0.0
    text: str = ""
    error: str = ""
    retry_after_s: float | None = None
    served: Served = field(default_factory=Served)
    completion_tokens: int = 0

    @property
    def ok(self) -> bool:
        return bool(self.ended) and not self.error

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def ttft_s(self) -> float:
        return self.at[0] - self.began if self.at else math.inf

    @property
    def pause_s(self) -> float:
        """The longest time between two events."""
        return max((b - a for a, b in zip(self.at, self.at[1:], strict=False)), default=0.0)

    def under_way(self, moment: float) -> bool:
        return self.began < moment and (not self.ended or self.ended > moment)

    def next_after(self, moment: float) -> float:
        """Seconds from a moment to the next token, or to a good end where all had come; infinite if neither did."""
        good_end = [self.ended] if self.ok else []
        return next((at - moment for at in [*self.at, *good_end] if at > moment), math.inf)


@dataclass
class Load:
    """Everything that was asked, in the order of asking, what still runs included."""

    all: list[Told] = field(default_factory=list)

    @property
    def done(self) -> list[Told]:
        return [told for told in self.all if told.ended]

    @property
    def failures(self) -> list[str]:
        return [told.error for told in self.done if told.error]

    def on(self, instance: str, moment: float) -> list[Told]:
        """Who was being served there at that moment."""
        return [told for told in self.all if told.under_way(moment) and told.served.instance_id == instance]

    def between(self, start: float, end: float) -> list[Told]:
        """What began then and is over."""
        return [told for told in self.done if start <= told.began < end]

    def __str__(self) -> str:
        return f"{len(self.failures)} of {len(self.done)} failed{listed(self.failures)}"


def listed(errors: Iterable[str]) -> str:
    """Every error with how often it came; numbers and names of instances are left out, or each would be its own."""
    kinds = Counter(re.sub(r"\d+", "N", re.sub(r"from \w+", "from X", error))[:100] for error in errors)
    return "".join(f"; {count} x {error}" for error, count in sorted(kinds.items()))


def quantile(values: Iterable[float], share: float) -> float:
    """Nearest rank; nan for nothing."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


async def ask(client: AsyncClient, told: Told, prompt: str = "hello there", **options: Any) -> Told:
    """One stream to its end, whatever that is. The scripted engine counts, so a lost or doubled token shows."""
    try:
        stream = client.chat_stream(prompt, model=MODEL, max_tokens=told.wanted, **{"timeout": TIMEOUT_S, **options})
        async for chunk in stream:
            told.at.append(time.monotonic())
            told.text += chunk.text
            if not told.served.instance_id:
                told.served = chunk.so_far.served
            told.completion_tokens = chunk.so_far.usage.completion_tokens
        wanted = "".join(f" w{number}" for number in range(told.wanted))
        if told.text != wanted:
            told.error = f"wrong text: {told.text!r}"
        elif told.completion_tokens != told.wanted:
            told.error = f"usage says {told.completion_tokens} of {told.wanted} tokens"
    except MeshError as error:
        told.error = f"{error.reason.value}: {error}"
        told.retry_after_s = error.retry_after_s
    finally:
        told.ended = time.monotonic()
    return told


@asynccontextmanager
async def streams(
    client: AsyncClient, count: int, *, tokens: int = 60, prompt: str = "hello there", pause_s: float = 0.0
) -> AsyncIterator[Load]:
    """`count` callers, each asking again as soon as it has been answered, until the end of the block."""
    load, over = Load(), asyncio.Event()

    async def caller() -> None:
        while not over.is_set():
            told = Told(tokens, time.monotonic())
            load.all.append(told)
            await ask(client, told, prompt)
            await asyncio.sleep(max(pause_s, 0.2 if told.error else 0.0))

    callers = [asyncio.create_task(caller()) for _ in range(count)]
    try:
        yield load
    finally:
        over.set()
        await asyncio.gather(*callers)
