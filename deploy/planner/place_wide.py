"""Models that one engine process on one host cannot hold: GGUF layers over several cards, and pipelines over hosts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address

from deploy.fleet import Instance, Model
from deploy.planner.catalogue import GIB, Support
from deploy.planner.demand import load, most
from deploy.planner.estimate import Estimate
from deploy.planner.gguf_split import Split, on_one_card, split_layers
from deploy.planner.hosts import Host
from deploy.planner.layout import engine_of
from deploy.planner.memory import MAX_RUNNING, Setup, memory
from deploy.planner.place_llm import SERVER_PORT, Found
from deploy.planner.placed import Placed, Tier
from deploy.planner.roofline import llm_speed
from deploy.planner.shape import Shape, tp_fault
from deploy.planner.wanted import Wanted

_NONE = Support(())
RPC_PORT = 50052  # llama.cpp's own default; the n-th worker of a host listens n ports further
MOST_CARDS = 16  # that llama.cpp lists


def place_gguf(model: Model, shape: Shape, found: Found, wanted: Wanted, tier: str) -> bool:
    """On the fewest cards of one kind that hold all layers, those of one host before those of several; on unlike cards
    where no kind has enough."""
    alike = _by_card(shape, found)
    mixed = [sorted((host for group in alike for host in group), key=lambda host: -host.card.memory)]
    for group in [*alike, *(mixed if len(alike) > 1 else [])]:
        places = [(host, card) for host in group for card in host.free]
        length = _length(model, shape, wanted)
        for count in range(1, len(places) + 1):
            taken = _in_their_order(places[:count])
            split = split_layers(shape, [host.card for host, _ in taken], length)
            if split.fits:
                _put_gguf(model, shape, taken, split, length, found, wanted, tier)
                return True
    return False


def no_gguf(model: Model, shape: Shape, found: Found, wanted: Wanted) -> str:
    """The fault of a GGUF model that all free cards together do not hold, with how many of a kind would."""
    length = _length(model, shape, wanted)
    need = on_one_card(shape, length).value / GIB
    kinds = {host.card.name: host for host in found.hosts if engine_of(shape, host.card) and not host.card.cpu}
    ways = []
    for name, host in kinds.items():
        counts = (n for n in range(1, MOST_CARDS + 1) if split_layers(shape, [host.card] * n, length).fits)
        if (count := next(counts, 0)) > 0:
            ways.append(f"{count} {name}, in one host or several")
    free = ", ".join(f"{len(host.free)} {host.card.name} in {host.node.name}" for host in found.hosts if host.free)
    return (
        f"fits nowhere: {need:.2f} GiB of VRAM for {length:,} tokens of context, and a compute buffer on each further "
        f"card; free are {free or 'no cards'}. Ways out: {'; '.join([*ways, 'a shorter max_context'])}"
    )


def _length(model: Model, shape: Shape, wanted: Wanted) -> int:
    """Tokens of context that a slot is given."""
    return min(max(model.max_context or wanted.threshold, wanted.short.length), shape.max_context)


def _in_their_order(taken: Sequence[tuple[Host, int]]) -> list[tuple[Host, int]]:
    """As llama.cpp lists them and fills them with layers: the workers' cards first, the server's own last. The server
    is on the first host, and what comes after the last layer is on its last card."""
    lead = taken[0][0]
    return [one for one in taken if one[0] is not lead] + [one for one in taken if one[0] is lead]


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
    lead = taken[-1][0]
    card = min((host.card for host, _ in taken), key=lambda card: card.bandwidth_gbs)  # the slowest sets the pace
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
        f"{split.need.value / GIB:.2f} GiB of VRAM for {length:,} tokens of context (weights + KV + compute buffer); "
        + ", ".join(dict.fromkeys(f"a {host.card.name} has {host.card.memory / GIB:.1f}" for host, _ in taken))
        + f": {len(taken)} card(s) of {len(hosts)} host(s)",
        f"layers: {layers}; the output head on the last; {split.ram.value / GIB:.2f} GiB of token table in RAM",
    ]
    name = f"{lead.node.name}-{model.id.split('/')[-1]}" if len(found.placed) else lead.node.name
    address = lead.node.address or lead.node.name
    told: dict[str, object] = {"id": name, "model": model.id, "node": lead.node.name, "engine": "openai-http"}
    port = SERVER_PORT + found.placed_on(lead.node.name)
    told |= {"url": f"http://{address}:{port}/v1", "tier": tier, "context": (0, length), "max_running": 1}
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
            commands=_commands(model, taken, split, length, port, found),
        )
    )
    found.tiers.append(Tier(model.id, tier, demand.rate if tier == "primary" else 0.0, rate, None, None))
    for host, index in taken:
        found.take(host, (index,))


def _commands(
    model: Model, taken: Sequence[tuple[Host, int]], split: Split, length: int, port: int, found: Found
) -> dict[str, str]:
    """llama.cpp's own: a worker on every other host, the server on the first."""
    lead = taken[-1][0]
    commands: dict[str, str] = {}
    workers = []
    for name in dict.fromkeys(host.node.name for host, _ in taken):
        if name == lead.node.name:
            continue
        host = next(host for host, _ in taken if host.node.name == name)
        cards = ",".join(str(index) for other, index in taken if other.node.name == name)
        # Workers ask nobody who they are, and take addresses only: never on more than the network of the hosts.
        near = sum(name in one.commands and one.instance.node != name for one in found.placed)
        commands[name] = f"CUDA_VISIBLE_DEVICES={cards} rpc-server -H {_bind(host)} -p {RPC_PORT + near}"
        workers.append(f"{host.node.address or name}:{RPC_PORT + near}")
    own = ",".join(str(index) for host, index in taken if host.node.name == lead.node.name)
    order = [*split.layers[:-1], split.layers[-1] + 1]  # it counts the output head as a layer
    rpc = f" --rpc {','.join(workers)}" if workers else ""
    share = f" --tensor-split {','.join(map(str, order))}" if len(order) > 1 else ""
    file = shlex.quote(model.source)
    commands[lead.node.name] = (
        f"CUDA_VISIBLE_DEVICES={own} llama-server -m {file} -c {length} -np 1 -ngl 999{rpc}{share} "
        f"--host {_bind(lead)} --port {port}"
    )
    return commands


def _bind(host: Host) -> str:
    """The node's address where it is one by its form, else all of them."""
    try:
        return str(ip_address(host.node.address))
    except ValueError:
        return "0.0.0.0"


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
        "spans hosts: start it with `infermesh up --ray HEAD:PORT`",
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
