"""Models that one engine process on one host cannot hold: GGUF layers over several cards, and pipelines over hosts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from deploy.fleet import Instance, Model
from deploy.planner.catalogue import GIB, Support
from deploy.planner.demand import load, most
from deploy.planner.estimate import Estimate
from deploy.planner.gguf_split import Split, split_layers
from deploy.planner.hosts import Host
from deploy.planner.layout import engine_of
from deploy.planner.memory import MAX_RUNNING, Setup, memory
from deploy.planner.place_llm import SERVER_PORT, Found
from deploy.planner.placed import Placed, Tier
from deploy.planner.roofline import llm_speed
from deploy.planner.shape import Shape, tp_fault
from deploy.planner.wanted import Wanted

_NONE = Support(())
RPC_PORT = 50052  # llama.cpp's own default


def place_gguf(model: Model, shape: Shape, found: Found, wanted: Wanted, tier: str) -> bool:
    """On the fewest cards of one kind that hold all layers, those of one host before those of several."""
    for group in _by_card(shape, found):
        places = [(host, card) for host in group for card in host.free]
        length = min(max(model.max_context or wanted.threshold, wanted.short.length), shape.max_context)
        for count in range(1, len(places) + 1):
            taken = places[:count]
            split = split_layers(shape, [host.card for host, _ in taken], length)
            if split.fits:
                _put_gguf(model, shape, taken, split, length, found, wanted, tier)
                return True
    return False


def _by_card(shape: Shape, found: Found) -> list[list[Host]]:
    """Free hosts by card, the oldest cards first."""
    groups: dict[str, list[Host]] = {}
    for host in found.hosts:
        if host.free and engine_of(shape, host.card):
            groups.setdefault(host.card.name, []).append(host)
    return sorted(groups.values(), key=lambda group: group[0].card.bandwidth_gbs)


def _put_gguf(
    model: Model,
    shape: Shape,
    taken: Sequence[tuple[Host, int]],
    split: Split,
    length: int,
    found: Found,
    wanted: Wanted,
    tier: str,
) -> None:
    assert shape.gguf is not None
    lead, card = taken[0][0], taken[0][0].card
    hosts = list(dict.fromkeys(host.node.name for host, _ in taken))
    setup = Setup(shape.dtype, length, 1, len(taken), engine="openai-http", max_running=1)
    speed = llm_speed(shape, setup, card, nvlink=False, network=lead.node.network if len(hosts) > 1 else "")
    one = llm_speed(shape, replace(setup, pp=1), card, nvlink=False)
    # llama.cpp passes one batch through the cards in turn: more cards hold more, they do not compute faster.
    speed = replace(speed, prefill_tps=one.prefill_tps)
    layers = ", ".join(
        f"{host.node.name} card {index}: {n}" for (host, index), n in zip(taken, split.layers, strict=True)
    )
    reasons = [
        f"{split.need.value / GIB:.2f} GiB of VRAM for {length:,} tokens of context (weights + KV + compute buffer), a "
        f"{card.name} has {card.memory / GIB:.1f}: {len(taken)} card(s) of {len(hosts)} host(s)",
        f"layers: {layers}; the output head on the last; {split.ram.value / GIB:.2f} GiB of token table in RAM",
    ]
    name = f"{lead.node.name}-{model.id.split('/')[-1]}" if len(found.placed) else lead.node.name
    address = lead.node.address or lead.node.name
    told: dict[str, object] = {"id": name, "model": model.id, "node": lead.node.name, "engine": "openai-http"}
    told |= {"url": f"http://{address}:{SERVER_PORT}/v1", "tier": tier, "context": (0, length), "max_running": 1}
    told |= {"kv_tokens": length, "cards": [index for host, index in taken if host.node.name == lead.node.name]}
    demand = wanted.short
    idle = load(speed, demand, 0.0)
    rate = most(speed, replace(demand, ttft_s=math.inf, tpot_ms=math.inf), 1.0)
    found.placed.append(
        Placed(
            Instance.model_validate(told),
            tuple(reasons),
            Estimate(setup, memory(shape, setup, card), speed),
            rate=rate,
            ttft_s=idle.ttft_s if idle else None,
            tpot_ms=idle.tpot_ms if idle else None,
            split=split,
            commands=_commands(model, taken, split, length, lead),
        )
    )
    found.tiers.append(Tier(model.id, tier, demand.rate if tier == "primary" else 0.0, rate, None, None))
    for host, index in taken:
        found.take(host, (index,))


def _commands(model: Model, taken: Sequence[tuple[Host, int]], split: Split, length: int, lead: Host) -> dict[str, str]:
    """llama.cpp's own: a worker on every other host, the server on the first."""
    commands: dict[str, str] = {}
    workers = []
    for name in dict.fromkeys(host.node.name for host, _ in taken):
        if name == lead.node.name:
            continue
        host = next(host for host, _ in taken if host.node.name == name)
        cards = ",".join(str(index) for other, index in taken if other.node.name == name)
        commands[name] = f"CUDA_VISIBLE_DEVICES={cards} rpc-server -H 0.0.0.0 -p {RPC_PORT}"
        workers.append(f"{host.node.address or name}:{RPC_PORT}")
    own = ",".join(str(index) for host, index in taken if host.node.name == lead.node.name)
    # llama.cpp lists RPC devices before its own cards, and splits in that order.
    order = [n for (host, _), n in zip(taken, split.layers, strict=True) if host.node.name != lead.node.name]
    order += [n for (host, _), n in zip(taken, split.layers, strict=True) if host.node.name == lead.node.name]
    rpc = f" --rpc {','.join(workers)}" if workers else ""
    share = f" --tensor-split {','.join(map(str, order))}" if len(order) > 1 else ""
    commands[lead.node.name] = (
        f"CUDA_VISIBLE_DEVICES={own} llama-server -m {model.source} -c {length} -ngl 999{rpc}{share} "
        f"--host 0.0.0.0 --port {SERVER_PORT}"
    )
    return commands


def place_over_hosts(model: Model, shape: Shape, dtype: str, found: Found, wanted: Wanted) -> bool:
    """A pipeline with one stage a host and tensor parallelism inside each, on the fewest hosts that hold it."""
    groups: dict[tuple[str, int], list[Host]] = {}
    for host in found.hosts:
        if host.free and dtype in host.card.generation.engines.get("vllm", _NONE).dtypes:
            groups.setdefault((host.card.name, len(host.free)), []).append(host)
    for alike in groups.values():
        cards = len(alike[0].free)
        sizes = [tp for tp in range(1, cards + 1) if not tp_fault(shape, tp, dtype)]
        for count in range(2, len(alike) + 1):
            setup = Setup(dtype, wanted.short.length, max(sizes), count)
            sums = memory(shape, setup, alike[0].card)
            if sums.fits:
                _put_pipeline(model, shape, alike[:count], setup, found, wanted)
                return True
    return False


def _put_pipeline(
    model: Model, shape: Shape, hosts: Sequence[Host], setup: Setup, found: Found, wanted: Wanted
) -> None:
    lead = hosts[0]
    network = lead.node.network or "ethernet"
    sums = memory(shape, setup, lead.card)
    speed = llm_speed(shape, setup, lead.card, nvlink=lead.nvlink, network=network)
    rate = most(speed, wanted.short, sums.concurrent.value)
    names = ", ".join(host.node.name for host in hosts)
    reasons = (
        f"no host alone holds it: TP{setup.tp} inside each of {len(hosts)} hosts ({names}), PP{setup.pp} across them "
        f"over {network}; tensor parallelism stays inside a host, its all-reduces would wait for the network",
        f"{sums.weights.value / GIB:.1f} GiB of weights a card, room for {sums.kv_tokens.value:,.0f} KV tokens",
        "needs Ray, which `infermesh up` does not start yet",
    )
    instance = Instance(
        id=f"{lead.node.name}-wide",
        model=model.id,
        node=lead.node.name,
        tp=setup.tp,
        pp=setup.pp,
        context=(0, min(shape.max_context, int(sums.kv_tokens.value))),
        max_running=MAX_RUNNING,
    )
    idle = load(speed, wanted.short, 0.0)
    found.placed.append(
        Placed(
            instance,
            reasons,
            Estimate(setup, sums, speed),
            rate=rate,
            ttft_s=idle.ttft_s if idle else None,
            tpot_ms=idle.tpot_ms if idle else None,
        )
    )
    found.tiers.append(Tier(model.id, "primary", wanted.short.rate, rate, None, None))
    for host in hosts:
        found.take(host, host.free)
