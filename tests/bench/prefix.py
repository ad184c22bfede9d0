"""What prefix affinity costs: microseconds to hash, match and insert a 16k-token prompt, bytes a tracked block, and the
longest pause of the garbage collector, with 300,000 blocks on 10 and on 1,000 instances.

    python -m tests.bench.prefix [--json]
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

from infermesh.v1 import language_model_pb2 as lm
from services.chassis.prefix import BLOCK_BYTES, BLOCK_TOKENS, prefix
from services.gateway.routing.affinity import PrefixIndex

BLOCKS = 300_000
PROMPT_BYTES = 65_536  # 16k tokens
LENGTH = PROMPT_BYTES // BLOCK_BYTES
HEAD = 8  # blocks that all prompts share: instructions
ROUNDS = 3000


def main() -> int:
    rng = random.Random(7)
    found = {"hash": hashing(rng)}
    for instances in (10, 1000):
        found[f"index_{instances}"] = indexing(instances, rng)
    if "--json" in sys.argv:
        print(json.dumps(found))
        return 0
    for name, numbers in found.items():
        print(name, *(f"{key}={value:.1f}" for key, value in numbers.items()))
    return 0


def hashing(rng: random.Random) -> dict[str, float]:
    """One message of 64 KiB, and the same in 64 turns."""
    text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz     ", k=PROMPT_BYTES))
    one = lm.ChatRequest(messages=[lm.Message(role=lm.ROLE_USER, content=text)])
    turns = [lm.Message(role=lm.ROLE_USER, content=text[at : at + 1024]) for at in range(0, PROMPT_BYTES, 1024)]
    many = lm.ChatRequest(messages=turns)
    return {
        **spread("one_us", lambda _: prefix(one, b"salt", 1), range(ROUNDS)),
        **spread("turns_us", lambda _: prefix(many, b"salt", 1), range(ROUNDS)),
    }


def indexing(instances: int, rng: random.Random) -> dict[str, float]:
    head = chain(rng, HEAD)
    names = [f"instance-{number}" for number in range(instances)]
    gc.collect()
    gc.freeze()  # as every process of the mesh does before it serves
    objects = len(gc.get_objects())
    tracemalloc.start()
    index = PrefixIndex(max_entries=BLOCKS)
    for name in names:
        index.track(name, BLOCK_TOKENS * max(256, BLOCKS // instances))
    recent: list[tuple[int, ...]] = []
    at = 0
    while len(index) < BLOCKS - LENGTH:
        prompt = (*head, *chain(rng, LENGTH - HEAD))
        index.insert(names[at % instances], prompt)
        recent = [*recent[-199:], prompt]
        at += 1
        del prompt
    kept = sum(sys.getsizeof(prompt) for prompt in recent)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    bytes_each = (taken - kept) / len(index)
    objects = len(gc.get_objects()) - objects  # what a collection has to walk

    popular = [rng.choice(recent[: 1 + rng.randrange(len(recent))]) for _ in range(ROUNDS)]
    warm = spread("warm_match_us", index.match, popular)
    warm |= spread("warm_insert_us", lambda prompt: index.insert(index.match(prompt)[0][0], prompt), popular)
    fresh = [chain(rng, LENGTH) for _ in range(ROUNDS)]
    cold = spread("cold_match_us", index.match, fresh)
    cold |= spread("cold_insert_us", lambda prompt: index.insert(rng.choice(names), prompt), fresh)
    return {
        "entries": len(index),
        "bytes_each": bytes_each,
        "gc_objects": objects,
        "gc_ms": longest_collection(),
        **warm,
        **cold,
    }


def chain(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.getrandbits(60) for _ in range(length))


def longest_collection() -> float:
    """The worst of five full collections [ms of this thread]."""
    worst = 0.0
    for _ in range(5):
        began = time.thread_time()
        gc.collect()
        worst = max(worst, time.thread_time() - began)
    return worst * 1000


def spread(name: str, call: Callable[[Any], object], arguments: Iterable[Any]) -> dict[str, float]:
    taken = []
    for argument in arguments:
        began = time.thread_time()
        call(argument)
        taken.append(time.thread_time() - began)
    taken.sort()
    return {f"{name}_p50": taken[len(taken) // 2] * 1e6, f"{name}_p99": taken[len(taken) * 99 // 100] * 1e6}


if __name__ == "__main__":
    sys.exit(main())
