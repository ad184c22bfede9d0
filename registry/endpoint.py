"""What an instance tells the world about itself: frozen values <-> flat registry metadata. Pure.

Metadata is what Consul can carry (at most 64 pairs, keys `[A-Za-z0-9_-]{1,128}`, values of at most 512 bytes), and the
embedded registry carries the same. A key that this version does not know is kept in `extra`; metadata that cannot be
read gives a `Rejected` with its reason, never an exception and never silence.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

CONTRACT: Final = "1"
KINDS: Final = ("llm", "embedding", "rerank", "gateway")
TIERS: Final = ("primary", "long-context", "fallback")
SPEED_SOURCES: Final = ("prior", "catalogue", "declared", "calibrated", "observed")
MAX_PAIRS: Final = 64
MAX_VALUE_BYTES: Final = 512
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
# Where clouds answer with credentials outside the link-local range: AWS over IPv6, Alibaba, Azure, Oracle.
_METADATA_SERVICES: Final = frozenset(
    ipaddress.ip_address(text) for text in ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
)
# Ports at which something else listens, if anything: a gateway that connects there works for whoever wrote the entry.
_OTHERS_PORTS: Final = frozenset(
    [
        *(20, 21, 22, 23, 25, 53, 110, 111, 135, 139, 143, 389, 445, 465, 514, 587, 636, 873, 993, 995),
        *(2049, 2375, 2376, 2379, 2380, 3306, 3389, 5432, 6379, 11211, 27017),
    ]
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """The cards that one instance uses."""

    device: str = "cpu"  # a name of the catalogue, e.g. A800-80G
    count: int = 1
    memory_mib: int = 0  # of one card; 0 = unknown
    tp: int = 1
    pp: int = 1


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast, as DESIGN §6 models it. None is unknown, which is a prior and never zero.

    LLM: `prefill_tps` [tokens/s], `prefill_doubling_ctx` [tokens of context at which attention doubles the cost of a
    token], `step_ms` [ms a decode step], `kv_us_per_ktoken` [µs a step per 1,000 resident tokens].
    Embedding and rerank: `fixed_ms` [ms a request] and `tokens_per_s`.
    """

    prefill_tps: float | None = None
    prefill_doubling_ctx: float | None = None
    step_ms: float | None = None
    kv_us_per_ktoken: float | None = None
    fixed_ms: float | None = None
    tokens_per_s: float | None = None
    source: str = "prior"


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits. `context_min..context_max` is the range of prompt + answer, in tokens, that is served here."""

    context_min: int = 0
    context_max: int = 0  # 0 = unknown
    max_running: int = 0  # 0 = unknown
    kv_tokens: int = 0  # 0 = unknown or none
    kv_block: int = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One instance, in one of its lives."""

    id: str
    kind: str
    host: str
    port: int
    model: str
    incarnation: int = 0  # random 64 bits at start; another one is another life: ledger and cache begin anew
    aliases: tuple[str, ...] = ()
    engine: str = ""
    engine_version: str = ""
    dtype: str = ""
    quantization: str = ""
    hardware: Hardware = Hardware()
    speed: Speed = Speed()
    capacity: Capacity = Capacity()
    tier: str = "primary"
    weight: float = 1.0  # the operator's factor
    zone: str = ""
    group: str = ""  # of like instances that are scaled together
    weights_version: str = ""
    tokenizer_digest: str = ""
    template_digest: str = ""
    features: frozenset[str] = frozenset()
    pid: int = 0
    version: str = ""  # of infermesh
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """host:port, as gRPC dials it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def serves(self, model: str) -> bool:
        return model == self.model or model in self.aliases


@dataclass(frozen=True, slots=True)
class Rejected:
    """An entry of the registry that cannot be used; it is shown, with its reason."""

    id: str
    kind: str
    address: str
    reason: str


# Readers of metadata values; they raise ValueError with what is allowed.
def _number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(_plain(text))
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{text} is not within {low:g} .. {high:g}")
        return value

    return read


def _count(high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(_plain(text))
        if not 0 <= value <= high:
            raise ValueError(f"{text} is not within 0 .. {high}")
        return value

    return read


def _plain(text: str) -> str:
    """Python reads 1_000 and digits of every script as numbers; other readers of the registry do not."""
    if not text.isascii() or "_" in text:
        raise ValueError(f"{text!r} is not a plain number")
    return text


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return read


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _hex64(text: str) -> int:
    value = int(text, 16)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{text} is not 64 bits")
    return value


# Wider than any machine, and narrow enough that a slip of units or a zero too many is told, not routed by.
_RATE = _number(0.01, 1e8)  # a second
_MS = 60_000.0
# Key of the metadata -> (attribute path, reader). Unknown and empty values are left out.
_FIELDS: Final[dict[str, tuple[str, Callable[[str], object]]]] = {
    "model": ("model", str),
    "aliases": ("aliases", _names),
    "incarnation": ("incarnation", _hex64),
    "engine": ("engine", str),
    "engine_version": ("engine_version", str),
    "dtype": ("dtype", str),
    "quantization": ("quantization", str),
    "device": ("hardware.device", str),
    "device_count": ("hardware.count", _count(4096)),
    "memory_mib": ("hardware.memory_mib", _count(1 << 24)),
    "tp": ("hardware.tp", _count(1024)),
    "pp": ("hardware.pp", _count(1024)),
    "prefill_tps": ("speed.prefill_tps", _RATE),
    "prefill_doubling_ctx": ("speed.prefill_doubling_ctx", _number(1, 1e12)),
    "step_ms": ("speed.step_ms", _number(1e-6, _MS)),
    "kv_us_per_ktoken": ("speed.kv_us_per_ktoken", _number(0, 1000 * _MS)),
    "fixed_ms": ("speed.fixed_ms", _number(0, _MS)),
    "tokens_per_s": ("speed.tokens_per_s", _RATE),
    "speed_source": ("speed.source", _one_of(*SPEED_SOURCES)),
    "context_min": ("capacity.context_min", _count(1 << 31)),
    "context_max": ("capacity.context_max", _count(1 << 31)),
    "max_running": ("capacity.max_running", _count(1 << 20)),
    "kv_tokens": ("capacity.kv_tokens", _count(1 << 40)),
    "kv_block": ("capacity.kv_block", _count(1 << 20)),
    "tier": ("tier", _one_of(*TIERS)),
    "weight": ("weight", _number(0.001, 1000)),
    "zone": ("zone", str),
    "group": ("group", str),
    "weights_version": ("weights_version", str),
    "tokenizer_digest": ("tokenizer_digest", str),
    "template_digest": ("template_digest", str),
    "features": ("features", lambda text: frozenset(_names(text))),
    "pid": ("pid", _count(1 << 31)),
    "version": ("version", str),
}
_PARTS: Final = {"hardware": Hardware, "speed": Speed, "capacity": Capacity}


def to_metadata(endpoint: Endpoint) -> dict[str, str]:
    """The flat form that is registered.

    Raises:
        ValueError: a value is longer than a registry can carry.
    """
    pairs = {**endpoint.extra, "contract": CONTRACT}
    for key, (path, _) in _FIELDS.items():
        value: object = endpoint
        for name in path.split("."):
            value = getattr(value, name)
        text = _text(key, value)
        if text:
            pairs[key] = text
    for key, text in pairs.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"metadata key {key!r} is not 1 to 128 of [A-Za-z0-9_-]")
        if not text.isprintable():
            raise ValueError(f"{key}: {text!r} holds unprintable characters")
        if len(text.encode()) > MAX_VALUE_BYTES:
            raise ValueError(f"{key}: {len(text.encode())} bytes, a registry carries at most {MAX_VALUE_BYTES}")
    if len(pairs) > MAX_PAIRS:
        raise ValueError(f"{len(pairs)} metadata keys, a registry carries at most {MAX_PAIRS}")
    return pairs


def _text(key: str, value: object) -> str:
    if value is None or value == "":
        return ""
    if key == "incarnation":
        return f"{value:016x}"
    if isinstance(value, tuple | frozenset):
        return ",".join(sorted(value) if isinstance(value, frozenset) else value)
    return repr(value) if isinstance(value, float) else str(value)


def from_metadata(id: str, kind: str, host: str, port: int, metadata: Mapping[str, str]) -> Endpoint | Rejected:
    """Reads what a registry holds, without trusting it."""
    # What is shown of a hostile entry must not write log lines of its own, nor fill a screen.
    address = _shown(f"{host}:{port}")
    fault = unusable_id(id) or undialable(host, port)
    id = _shown(id)
    if fault:
        return Rejected(id, kind, address, _shown(fault))
    if kind not in KINDS:
        return Rejected(id, kind, address, f"kind {kind!r} is not one of {', '.join(KINDS)}")
    contract = metadata.get("contract", "")
    if contract != CONTRACT:
        return Rejected(id, kind, address, _shown(f"contract {contract!r}, this gateway speaks {CONTRACT!r}"))
    if len(metadata) > MAX_PAIRS:
        return Rejected(id, kind, address, f"{len(metadata)} metadata keys, at most {MAX_PAIRS} are read")
    values: dict[str, object] = {}
    parts: dict[str, dict[str, object]] = {name: {} for name in _PARTS}
    for key, text in metadata.items():
        if key not in _FIELDS:
            continue
        path, read = _FIELDS[key]
        try:
            if not text.isprintable() or len(text.encode()) > MAX_VALUE_BYTES:
                raise ValueError(f"unprintable, or longer than {MAX_VALUE_BYTES} bytes")
            value = read(text)
        except ValueError as error:
            return Rejected(id, kind, address, _shown(f"metadata {key}: {error}"))
        owner, _, name = path.rpartition(".")
        (parts[owner] if owner else values)[name or path] = value
    if not values.get("model") and kind != "gateway":
        return Rejected(id, kind, address, "metadata model: absent")
    values.setdefault("model", "")
    for name, build in _PARTS.items():
        values[name] = build(**parts[name])
    low, high = (parts["capacity"].get(f"context_{end}", 0) for end in ("min", "max"))
    if high and low >= high:  # type: ignore[operator]  # both are counts
        return Rejected(id, kind, address, f"metadata context_min: {low} is not below context_max {high}")
    extra = {key: text for key, text in metadata.items() if key not in _FIELDS and key != "contract"}
    return Endpoint(id=id, kind=kind, host=host, port=port, extra=extra, **values)  # type: ignore[arg-type]


def unusable_id(id: str) -> str:
    """Why this cannot be an instance's id; empty if it can. Ids travel in gRPC metadata, URLs, labels and log lines."""
    return "" if _ID.fullmatch(id) else "an id is 1 to 128 of A-Z a-z 0-9 . _ : - and begins with a letter or digit"


def undialable(host: str, port: int) -> str:
    """Why nobody should dial this address; empty if it is fine.

    A registry is not trusted: whoever can write to it must not make gateways call cloud metadata or the like.
    """
    if not 0 < port < 65536:
        return f"port {port} is not within 1 .. 65535"
    if port in _OTHERS_PORTS:
        return f"port {port} belongs to another protocol (ssh, mail, a database …)"
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return _unfit_name(host)
    # ::ffff:169.254.169.254 reaches the same machine as 169.254.169.254.
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_unspecified:
        return f"{host} is not an address that can be dialled; start the instance with --advertise HOST:PORT"
    if ip.is_link_local or ip.is_multicast or ip in _METADATA_SERVICES:
        return f"{host} is link-local, multicast or a cloud's metadata service"
    return ""


def _unfit_name(host: str) -> str:
    if not host or len(host) > 253 or not all(c.isascii() and (c.isalnum() or c in "-._") for c in host):
        return f"host {host!r} is not a host name"
    # Resolvers read 2852039166, 0xa9fea9fe and 169.254.43518 as 169.254.169.254; no host name ends in a number.
    last = host.rstrip(".").rpartition(".")[2].lower()
    if last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last):
        return f"host {host!r} is a number, not a host name"
    return ""


def _shown(text: str) -> str:
    clean = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return clean if len(clean) <= 200 else clean[:199] + "…"
