"""What arrives when: requests of a trace file, or of a generator (`arrivals`). Values only.

A trace is JSONL in Mooncake's form (FAST'25 release): `timestamp` [ms], `input_length` and `output_length` [tokens],
`hash_ids` of the prompt's blocks of 512 tokens, each id standing for its block and everything before it. Optional keys
beside them: `kind`, `model`, `tenant`, `class`, `priority`, `max_tokens`, `session_id`, `document_id`, `degrade`;
`block_tokens`, where blocks are of another size. What `infermesh record` measured: `outcome`, `instance`, `ttft_ms`,
`e2e_ms`, `cached_tokens`. Other keys are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

BLOCK_TOKENS = 512  # of Mooncake's traces
MAX_TOKENS = 1 << 24  # of one prompt or answer; more is a damaged line
_MASK = (1 << 64) - 1


class TraceError(ValueError):
    """A line that cannot be read, with its number and what is allowed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """How a recorded request went in reality. `outcome` is ok or the word of a reason; seconds, 0 = never came."""

    outcome: str
    instance: str
    ttft_s: float
    e2e_s: float
    cached: int = 0  # prompt tokens found in the instance's cache


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `arrival` [s]; `chain`: 64-bit hashes of the prompt's blocks, each over everything before it."""

    index: int
    arrival: float
    prompt: int
    output: int
    chain: tuple[int, ...] = ()
    kind: str = "llm"
    model: str = ""  # empty: the fleet's first model of the kind
    tenant: str = "default"
    klass: str = "standard"
    priority: int = 0
    max_tokens: int = 0
    session_id: str = ""
    document_id: str = ""
    degrade: bool | None = None  # None: as the class says
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[Request, ...]
    block_tokens: int = BLOCK_TOKENS

    def at_rate(self, rate: float) -> Trace:
        """The same requests, arriving `rate` times as fast."""
        if not rate > 0:
            raise TraceError(f"rate {rate:g} must be above 0")
        moved = tuple(replace(request, arrival=request.arrival / rate) for request in self.requests)
        return replace(self, requests=moved)

    def first(self, count: int) -> Trace:
        return replace(self, requests=self.requests[:count])


def mix(chain: int, block: int) -> int:
    """One link of a hash chain, 64 bits (the finaliser of splitmix64)."""
    value = (chain * 0x9E3779B97F4A7C15 + block + 0x632BE59BD9B4E019) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def chain_of(blocks: Iterable[int], tenant: str) -> tuple[int, ...]:
    """Block ids, salted by tenant, as the chain that the router and the engines see."""
    state = 0
    for character in tenant:
        state = mix(state, ord(character))
    links = []
    for block in blocks:
        state = mix(state, block)
        links.append(state)
    return tuple(links)


def parse_trace(lines: Iterable[str], name: str = "trace", block_tokens: int = BLOCK_TOKENS) -> Trace:
    """Reads JSONL. Arrivals are moved so that the first is at 0. `block_tokens` holds where the lines tell none; where
    they do, it is their mean: a recorded block is so many bytes, whose tokens differ from text to text.

    Raises:
        TraceError: the first line that is wrong, by its number.
    """
    read: list[Request] = []
    told: list[tuple[float, int]] = []  # tokens of a block, and how many blocks have that size
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            read.append(_request(fields, len(read)))
            if read[-1].chain:
                told.append((_number(fields, "block_tokens", 1, MAX_TOKENS, block_tokens), len(read[-1].chain)))
        except (KeyError, TypeError, ValueError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise TraceError(f"{name}: line {number}: {why}") from None
    if not read:
        raise TraceError(f"{name}: no request in it")
    read.sort(key=lambda request: (request.arrival, request.index))
    start = read[0].arrival
    ordered = (replace(request, index=i, arrival=request.arrival - start) for i, request in enumerate(read))
    blocks = sum(count for _, count in told)
    mean = sum(size * count for size, count in told) / blocks if blocks else block_tokens
    return Trace(name, tuple(ordered), max(1, round(mean)))


def _request(line: dict[str, object], index: int) -> Request:
    if not isinstance(line, dict):
        raise TypeError("must be an object")
    tenant = str(line.get("tenant", "default"))
    blocks = line.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
        raise TypeError("hash_ids must be a list of integers")
    kind = str(line.get("kind", "llm"))
    if kind not in ("llm", "embedding", "rerank"):
        raise ValueError(f"kind {kind!r} is not one of llm, embedding, rerank")
    return Request(
        index=index,
        arrival=_number(line, "timestamp", 0, 1e15) / 1000,
        prompt=int(_number(line, "input_length", 1, MAX_TOKENS)),
        output=int(_number(line, "output_length", 0 if kind != "llm" else 1, MAX_TOKENS, 1)),
        chain=chain_of(blocks, tenant),
        kind=kind,
        model=str(line.get("model", "")),
        tenant=tenant,
        klass=str(line.get("class", "standard")),
        priority=int(_number(line, "priority", -1000, 1000, 0)),
        max_tokens=int(_number(line, "max_tokens", 0, MAX_TOKENS, 0)),
        session_id=str(line.get("session_id", "")),
        document_id=str(line.get("document_id", "")),
        degrade=_flag(line, "degrade"),
        measured=_measured(line),
    )


def _measured(line: dict[str, object]) -> Measured | None:
    if "outcome" not in line:
        return None
    return Measured(
        outcome=str(line["outcome"]),
        instance=str(line.get("instance", "")),
        ttft_s=_number(line, "ttft_ms", 0, 1e12, 0) / 1000,
        e2e_s=_number(line, "e2e_ms", 0, 1e12, 0) / 1000,
        cached=int(_number(line, "cached_tokens", 0, MAX_TOKENS, 0)),
    )


def _flag(line: dict[str, object], key: str) -> bool | None:
    value = line.get(key)
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{key} {value!r} is not true or false")
    return value


def _number(line: dict[str, object], key: str, low: float, high: float, default: float | None = None) -> float:
    value = line[key] if default is None else line.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{key} {value!r} is not a number within {low:g} .. {high:g}")
    return value
