"""A slice of a trace at 1/20 of its tokens, as prompts for real sockets and as the same requests for `sim`. Pure.

Whole conversations are kept or left out (by the block a prompt begins with), so that what is repeated stays repeated.
A token stands for `SCALE` of the trace's; its word has 20 bytes, as many as 20 tokens of ordinary text are a block's
quarter, so that the gateway's 512-byte blocks are about the trace's 512-token blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2s

from services.gateway.simulator.trace import BLOCK_TOKENS, Request, Trace, chain_of, mix
from services.llm.engines.scripted_cache import BLOCK

SCALE = 20
WORD_BYTES = 20  # one leading space included


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when [s], its prompt's blocks in the trace, and lengths in scaled tokens."""

    at: float
    blocks: tuple[int, ...]
    prompt: int
    output: int

    @property
    def text(self) -> str:
        """A word a token; a token's word is that of the block it stands in and of its place there."""
        return "".join(_word(self._block(token), token) for token in range(self.prompt))

    def _block(self, token: int) -> int:
        """The trace's block that the scaled token's last original one stands in; an id stands for all before it."""
        at = (token * SCALE + SCALE - 1) // BLOCK_TOKENS
        return self.blocks[min(at, len(self.blocks) - 1)] if self.blocks else -1

    def chain(self) -> tuple[int, ...]:
        """The engine's own blocks of 16 tokens, as `sim` knows them."""
        ends = range(BLOCK - 1, self.prompt, BLOCK)
        return chain_of([mix(self._block(end), end) for end in ends], "")


def _word(block: int, token: int) -> str:
    return " " + blake2s(f"{block} {token}".encode()).hexdigest()[: WORD_BYTES - 1]


def slice_of(lines: Iterable[str], every: int, rate: float, limit: int = 0) -> list[Ask]:
    """Every `every`-th conversation, arriving `rate` times as fast, the first at 0."""
    rows = [json.loads(line) for line in lines if line.strip()]
    roots = list(dict.fromkeys(row["hash_ids"][0] for row in rows))
    kept = set(roots[::every])
    chosen = sorted((row for row in rows if row["hash_ids"][0] in kept), key=lambda row: row["timestamp"])
    start = chosen[0]["timestamp"]
    asks = [
        Ask(
            (row["timestamp"] - start) / 1000 / rate,
            tuple(row["hash_ids"]),
            max(1, round(row["input_length"] / SCALE)),
            max(1, round(row["output_length"] / SCALE)),
        )
        for row in chosen
    ]
    return asks[:limit] if limit else asks


def as_trace(asks: Sequence[Ask], name: str) -> Trace:
    """The same requests for `sim`."""
    return Trace(
        name,
        tuple(
            Request(index, ask.at, ask.prompt, ask.output, ask.chain(), max_tokens=ask.output)
            for index, ask in enumerate(asks)
        ),
        BLOCK,
    )
