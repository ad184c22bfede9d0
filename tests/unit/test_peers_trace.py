"""The trace that goes over sockets and the one that `sim` gets are the same requests."""

from __future__ import annotations

import json
from itertools import takewhile

from services.llm.engines.scripted_cache import BLOCK, extend_chain
from services.llm.engines.scripted_text import Words
from tests.bench.peers_trace import SCALE, WORD_BYTES, Ask, as_trace, slice_of


def shared(one: tuple[int, ...] | list[int], other: tuple[int, ...] | list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def engine_chain(ask: Ask) -> list[int]:
    chain: list[int] = []
    extend_chain(chain, list(Words().encode(ask.text)), b"")
    return chain


def test_sim_shares_the_blocks_that_the_engine_shares() -> None:
    first = Ask(0.0, (1, 2, 3, 4, 5), 5 * 512 // SCALE, 3)
    longer = Ask(1.0, (1, 2, 3, 4, 6, 7), 6 * 512 // SCALE, 3)
    for other in (longer, Ask(2.0, (1, 9), 40, 1), Ask(3.0, (8, 2, 3), 60, 1), first):
        expected = shared(engine_chain(first), engine_chain(other))
        assert shared(first.chain(), other.chain()) == expected
        assert expected == min(first.prompt, other.prompt, (25.6 * shared(first.blocks, other.blocks)) // 1) // BLOCK
    assert len(first.text) == WORD_BYTES * first.prompt
    assert len(list(Words().encode(first.text))) == first.prompt


def test_whole_conversations_are_kept_at_their_own_times() -> None:
    rows = [
        {"timestamp": 1000 * at, "input_length": 2000, "output_length": 5, "hash_ids": [root, 100 + at]}
        for at, root in enumerate((1, 2, 3, 1, 2, 4))
    ]
    asks = slice_of(map(json.dumps, rows), every=2, rate=10.0)
    assert [(ask.at, ask.blocks[0], ask.prompt, ask.output) for ask in asks] == [
        (0.0, 1, 100, 1),
        (0.2, 3, 100, 1),
        (0.3, 1, 100, 1),
    ]
    trace = as_trace(asks, "t")
    assert trace.block_tokens == BLOCK and [request.prompt for request in trace.requests] == [100, 100, 100]
