"""The peers' policies that know prompts' prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from registry.endpoint import Endpoint
from services.gateway.routing.decision import Effect, Lease
from services.gateway.routing.facts import Facts, LoadReport
from services.gateway.simulator.fleet import Site
from services.gateway.simulator.peers import Peer

KV_UNKNOWN = 1 << 20  # tokens assumed where an instance does not tell


class CacheAware(Peer):
    """SGLang's router, SMG and vllm-router `cache_aware` (their default policy), CLI defaults: cache-threshold 0.3,
    balance-abs-threshold 64, balance-rel-threshold 1.5, max-tree-size 2^26 characters a worker, eviction each 120 s.

    Imbalanced (max - min > 64 and max > 1.5 · min requests in flight): the fewest requests. Else the longest match in
    an approximate prefix tree of what was sent where, if it covers more than 0.3 of the prompt; else the fewest
    requests. The prompt is then put into the chosen worker's tree.

    vllm-router 0.1.17, sglang-router 0.3.2 and smg 1.13.0 do so with a prompt that matches little; their headers still
    name what they did once, the smallest tree, which is slower. Among equals the first two take the first of their
    list, whose order is that of a hash map; here it is chance.
    """

    THRESHOLD, ABS, REL = 0.3, 64, 1.5
    MAX_TREE_TOKENS = (1 << 26) // 4  # characters, four a token
    EVICT_S = 120.0

    def __init__(self, name: str, site: Site, block_tokens: int, now: float) -> None:
        super().__init__(name, site, block_tokens, now)
        self._trees: dict[str, dict[int, None]] = {endpoint.id: {} for endpoint in site.endpoints}
        self._evicted = now

    def choose(self, ids: list[str], facts: Facts, prompt: int, now: float, draw: float) -> str:
        loads = [self.active[id] for id in ids]
        low, high = min(loads), max(loads)
        if high - low > self.ABS and high > low * self.REL:
            return self.fewest(ids, draw)
        best, matched = ids[0], 0
        for id in ids:
            count = _match(self._trees[id], facts.chain)
            if count > matched:
                best, matched = id, count
        if matched and matched / len(facts.chain) > self.THRESHOLD:
            return best
        return self.fewest(ids, draw)

    def fewest(self, ids: list[str], draw: float) -> str:
        """The fewest requests in flight."""
        low = min(self.active[id] for id in ids)
        best = [id for id in ids if self.active[id] == low]
        return best[int(draw * len(best))]

    def sent(self, id: str, lease: Lease, prompt: int, now: float) -> None:
        _remember(self._trees[id], lease.facts.chain)
        if now - self._evicted >= self.EVICT_S:
            self._evicted = now
            for tree in self._trees.values():
                _forget(tree, self.MAX_TREE_TOKENS // self.block_tokens)


class ScorerSum(Peer):
    """llm-d's endpoint picker (Gateway API inference extension), default plugins: prefix-cache-scorer weight 3,
    queue-scorer 2, kv-cache-utilization-scorer 2, each within 0..1, the highest sum, chance among equals.

    prefix = matched blocks / blocks of the prompt, in an LRU of what was sent to each endpoint, as large as its KV
    cache (autotune); at most 131,072 tokens are looked at. queue = (max - waiting) / (max - min), 1 where all are
    equal; KV = 1 - utilisation: both as scraped, each 50 ms.
    """

    PREFIX, QUEUE, KV = 3.0, 2.0, 2.0
    MAX_TOKENS = 131_072

    def __init__(self, name: str, site: Site, block_tokens: int, now: float) -> None:
        super().__init__(name, site, block_tokens, now)
        self._seen: dict[str, dict[int, None]] = {endpoint.id: {} for endpoint in site.endpoints}
        self._waiting = {endpoint.id: 0 for endpoint in site.endpoints}
        self._kv = {endpoint.id: 0.0 for endpoint in site.endpoints}

    def heard(self, id: str, load: LoadReport, now: float) -> None:
        self._waiting[id] = load.waiting or 0
        self._kv[id] = load.kv_used_ratio or 0.0

    def choose(self, ids: list[str], facts: Facts, prompt: int, now: float, draw: float) -> str:
        chain = facts.chain[: self.MAX_TOKENS // self.block_tokens]
        waiting = [self._waiting[id] for id in ids]
        low, high = min(waiting), max(waiting)
        scores = []
        for id, queue in zip(ids, waiting, strict=True):
            prefix = _match(self._seen[id], chain) / len(chain) if chain else 0.0
            free = (high - queue) / (high - low) if high > low else 1.0
            scores.append(self.PREFIX * prefix + self.QUEUE * free + self.KV * (1 - self._kv[id]))
        top = max(scores)
        best = [id for id, score in zip(ids, scores, strict=True) if score >= top - 1e-9]
        return best[int(draw * len(best))]

    def sent(self, id: str, lease: Lease, prompt: int, now: float) -> None:
        seen = self._seen[id]
        _remember(seen, lease.facts.chain[: self.MAX_TOKENS // self.block_tokens])
        _forget(seen, (self.endpoints[id].capacity.kv_tokens or KV_UNKNOWN) // self.block_tokens)


class KvOverlapCost(Peer):
    """Dynamo's KV router (`kv` mode, defaults): cost = prefill_scale · max(active + incoming - overlap, 0) + decode
    blocks, the least; prefill_scale 1, temperature 0, overlap credit 1.

    All in blocks: `active` = prompt still being computed there for this gateway's requests (until the first token),
    `incoming` = this prompt, `overlap` = its blocks that the instance holds by its KV events; decode blocks = blocks of
    this gateway's requests there, shared ones once, with this one's.
    """

    PREFILL_SCALE = 1.0

    def __init__(self, name: str, site: Site, block_tokens: int, now: float) -> None:
        super().__init__(name, site, block_tokens, now)
        self._held: dict[str, set[int]] = {endpoint.id: set() for endpoint in site.endpoints}
        self._prefill = {endpoint.id: 0.0 for endpoint in site.endpoints}
        self._decode: dict[str, dict[int, int]] = {endpoint.id: {} for endpoint in site.endpoints}
        self._anonymous = {endpoint.id: 0.0 for endpoint in site.endpoints}
        self._work: dict[int, tuple[str, float, float]] = {}  # seq -> instance, blocks to compute, blocks unnamed

    def choose(self, ids: list[str], facts: Facts, prompt: int, now: float, draw: float) -> str:
        incoming = prompt / self.block_tokens
        costs = []
        for id in ids:
            overlap = _match(self._held[id], facts.chain)
            prefill = max(self._prefill[id] + incoming - overlap, 0.0)
            decode = self._decode[id]
            shared = sum(1 for link in facts.chain if link in decode)
            blocks = len(decode) + self._anonymous[id] + max(incoming - shared, 0.0)
            costs.append(self.PREFILL_SCALE * prefill + blocks)
        least = min(costs)
        best = [id for id, cost in zip(ids, costs, strict=True) if cost <= least + 1e-9]
        return best[int(draw * len(best))]

    def sent(self, id: str, lease: Lease, prompt: int, now: float) -> None:
        chain = lease.facts.chain
        blocks = prompt / self.block_tokens
        todo = max(blocks - _match(self._held[id], chain), 0.0)
        unnamed = max(blocks - len(chain), 0.0)
        self._prefill[id] += todo
        self._anonymous[id] += unnamed
        decode = self._decode[id]
        for link in chain:
            decode[link] = decode.get(link, 0) + 1
        self._work[lease.seq] = (id, todo, unnamed)

    def first_token(self, lease: Lease) -> None:
        id, todo, unnamed = self._work[lease.seq]
        self._prefill[id] -= todo
        self._work[lease.seq] = (id, 0.0, unnamed)

    def ended(self, lease: Lease) -> None:
        id, todo, unnamed = self._work.pop(lease.seq)
        self._prefill[id] -= todo
        self._anonymous[id] -= unnamed
        decode = self._decode[id]
        for link in lease.facts.chain:
            users = decode[link] - 1
            if users:
                decode[link] = users
            else:
                del decode[link]

    def cache(self, endpoint: Endpoint, stored: bool, chain: Sequence[int], now: float) -> list[Effect]:
        held = self._held[endpoint.id]
        if stored:
            held.update(chain)
        else:
            held.difference_update(chain)
        return []


def _match(known: dict[int, None] | set[int], chain: Sequence[int]) -> int:
    """Blocks from the start that are known."""
    count = 0
    for link in chain:
        if link not in known:
            break
        count += 1
    return count


def _remember(known: dict[int, None], chain: Sequence[int]) -> None:
    """As the latest used; a prompt's beginning outlives its end."""
    for link in reversed(chain):
        known.pop(link, None)
        known[link] = None


def _forget(known: dict[int, None], size: int) -> None:
    """Down to `size`, least recently used first."""
    surplus = len(known) - size
    if surplus > 0:
        for link in [link for link, _ in zip(known, range(surplus), strict=False)]:
            del known[link]
