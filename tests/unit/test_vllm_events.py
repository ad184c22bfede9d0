"""What vLLM's KV events mean; the events are as its 0.32 sends them."""

from __future__ import annotations

from typing import Any

from services.chassis.held_prefixes import HeldPrefixes
from services.llm.engines.vllm_events import Follower, block_keys

IDS = list(range(1000, 1100))
SALT = "ab12"


def stored(names: list[int], parent: int | None, ids: list[int], size: int = 16, **more: Any) -> dict[str, Any]:
    extra = [[SALT] if parent is None else None, *[None] * (len(names) - 1)]
    event = {"type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": ids}
    return {**event, "block_size": size, "medium": "GPU", "extra_keys": extra, "group_idx": 0, **more}


def removed(*names: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(names), "medium": "GPU", "group_idx": 0}


def tied() -> tuple[HeldPrefixes, Follower]:
    held = HeldPrefixes()
    held.live = True
    keys = block_keys(IDS, 16, SALT)
    assert len(keys) == 6
    held.tie([1, 2, 3, 4, 5, 6], 16 / 100, 100, keys, 16)
    return held, Follower(held)


def test_blocks_are_known_by_their_tokens_salt_and_parents() -> None:
    held, follower = tied()
    follower.apply(stored([70, 71], None, IDS[:32]))
    assert held.held == [1, 2]
    follower.apply(stored([72], 71, IDS[32:48]))
    assert held.held == [1, 2, 3]
    follower.apply(removed(72, 71, 99))
    assert held.held == [1]


def test_another_salt_is_another_block() -> None:
    held, follower = tied()
    follower.apply(stored([70], None, IDS[:16], extra_keys=[["cd"]]))
    follower.apply(stored([71], None, IDS[:16], extra_keys=None))
    assert held.held == []


def test_what_does_not_concern_the_prefix_is_left_alone() -> None:
    held, follower = tied()
    follower.apply(stored([70], None, IDS[:16], group_idx=1))
    follower.apply(stored([71], None, IDS[:16], medium="CPU"))
    follower.apply(stored([72], None, IDS[:9]))  # a partial block
    follower.apply(stored([73], 5555, IDS[16:32]))  # continues what is not known
    follower.apply({"type": "SomethingLater"})
    assert held.held == []


def test_a_cleared_cache_holds_nothing() -> None:
    held, follower = tied()
    follower.apply(stored([70], None, IDS[:16]))
    follower.apply({"type": "AllBlocksCleared"})
    assert held.held == []
    follower.apply(stored([71], 70, IDS[16:32]))
    assert held._stored == set()
