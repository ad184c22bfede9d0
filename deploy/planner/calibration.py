"""The calibration file: what `infermesh calibrate` measured, by what the speed depends on. Pure: text <-> values.

    version: 1
    calibrations:
      - {model: qwen2.5-72b, engine: vllm, device: A800-80G, count: 4, tp: 4, pp: 1, dtype: fp16, quantization: none,
         replicas: 1, speed: {prefill_tps: 4300, …}, measured: {instance: a800-1-a, at: '2026-11-21T01:10:00+00:00', …}}

What a fleet file leaves open (a dtype `auto`, no node) meets any value; of several entries the newest counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

import yaml

from deploy.fleet import Fault, Fleet, FleetError, Instance
from registry.endpoint import Endpoint, Speed

DEFAULT_FILE: Final = ".infermesh/calibration.yaml"
NUMBERS: Final = tuple(item.name for item in fields(Speed) if item.name != "source")
DTYPES: Final = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # engines' -> ours
UNQUANTIZED: Final = "none"
WEIGHTS: Final = ("int8", "int4", "fp8")  # dtypes of weights; what a running instance tells is what it computes in
OPEN: Final = ("", "auto", 0)  # not said


@dataclass(frozen=True, slots=True)
class Key:
    """What a speed belongs to. A value of `OPEN` is not known."""

    model: str
    engine: str = ""
    device: str = ""
    count: int = 0
    tp: int = 0
    pp: int = 0
    dtype: str = ""
    quantization: str = ""
    replicas: int = 0  # processes of an embedding or rerank instance

    def meets(self, other: Key) -> bool:
        """Whether they may be the same: nothing that both know differs."""
        pairs = ((getattr(self, item.name), getattr(other, item.name)) for item in fields(self))
        return all(a in OPEN or b in OPEN or a == b for a, b in pairs)


@dataclass(frozen=True, slots=True)
class Calibration:
    """`measured`: instance, at (ISO 8601), engine_version, errors: for people, and to tell the newest."""

    key: Key
    speed: Mapping[str, float]
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def at(self) -> str:
        return str(self.measured.get("at", ""))


@dataclass(frozen=True, slots=True)
class Calibrations:
    entries: tuple[Calibration, ...] = ()

    def of(self, key: Key) -> Calibration | None:
        """The newest that meets the key."""
        return max((entry for entry in self.entries if entry.key.meets(key)), key=lambda entry: entry.at, default=None)

    def with_one(self, new: Calibration) -> Calibrations:
        """Replaces the entry of the very same key."""
        return Calibrations((*(entry for entry in self.entries if entry.key != new.key), new))

    def calibrated(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with the measured speed, unless its operator declared one."""
        found = None if endpoint.speed.source == "declared" else self.of(key_of_endpoint(endpoint))
        return endpoint if found is None else with_speed(endpoint, found.speed)


def with_speed(endpoint: Endpoint, values: Mapping[str, float]) -> Endpoint:
    return replace(endpoint, speed=Speed(**values, source="calibrated"))


def key_of_endpoint(endpoint: Endpoint) -> Key:
    """What a running instance knows of itself."""
    hardware, replicas = endpoint.hardware, endpoint.extra.get("replicas", "")
    return Key(
        model=endpoint.model,
        engine=endpoint.engine,
        device=endpoint.extra.get("device_name", "") if hardware.device in OPEN else hardware.device,
        count=hardware.count,
        tp=hardware.tp,
        pp=hardware.pp,
        dtype=DTYPES.get(endpoint.dtype, endpoint.dtype),
        quantization=endpoint.quantization or UNQUANTIZED,
        replicas=int(replicas) if replicas.isdigit() else 0,
    )


def key_of_instance(fleet: Fleet, instance: Instance) -> Key:
    """What a fleet file says of an instance; of an encoder, cards × processes are its replicas."""
    model = fleet.model(instance.model)
    node = next((node for node in fleet.nodes if node.name == instance.node), None)
    device, count = (node.device if node else ""), len(instance.cards)
    if model.kind != "llm":
        replicas = instance.replicas * max(1, count)
        return Key(model.id, fleet.engine_of(instance), device, count, dtype=model.dtype, replicas=replicas)
    parallel = len(instance.cards) // instance.pp if instance.cards and not instance.tp else instance.tp or 0
    return Key(
        model=model.id,
        engine=fleet.engine_of(instance),
        device=device,
        count=count or parallel * instance.pp,
        tp=parallel,
        pp=instance.pp if parallel else 0,
        dtype="" if model.dtype in WEIGHTS else model.dtype,
        quantization=instance.quantization or (model.dtype if model.dtype in WEIGHTS else ""),
    )


def parse_calibrations(text: str, name: str) -> Calibrations:
    """Raises FleetError with every fault, each with its path; an empty file holds none."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FleetError(name, [Fault("", f"not YAML: {error}")]) from None
    if document is None:
        return Calibrations()
    if not isinstance(document, dict) or document.get("version") != 1:
        raise FleetError(name, [Fault("version", "must be 1; `infermesh calibrate` writes this file")])
    entries, faults = [], []
    for index, raw in enumerate(document.get("calibrations") or ()):
        try:
            entries.append(_entry(raw))
        except (KeyError, TypeError, ValueError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            faults.append(Fault(f"calibrations[{index}]", why))
    if faults:
        raise FleetError(name, faults)
    return Calibrations(tuple(entries))


def _entry(raw: Any) -> Calibration:
    if not isinstance(raw, dict):
        raise TypeError("must be a mapping")
    rest = dict(raw)
    speed, measured = rest.pop("speed"), rest.pop("measured", {})
    known = {item.name: item.type for item in fields(Key)}
    if unknown := [key for key in rest if key not in known]:
        raise ValueError(f"{', '.join(unknown)}: not one of {', '.join(known)}, speed, measured")
    if wrong := [key for key in speed if key not in NUMBERS]:
        raise ValueError(f"speed.{wrong[0]}: not one of {', '.join(NUMBERS)}")
    numbers = {key: float(value) for key, value in speed.items()}
    for key, value in numbers.items():
        lowest = 0.0 if key in ("fixed_ms", "kv_us_per_ktoken") else 1e-6
        if not lowest <= value <= 1e9:
            raise ValueError(f"speed.{key}: {value:g} is not within {lowest:g} .. 1e9")
    values = {key: int(value) if known[key] == "int" else str(value) for key, value in rest.items()}
    return Calibration(Key(**values), numbers, measured)  # type: ignore[arg-type]


def calibrations_text(found: Calibrations) -> str:
    entries = [
        {**asdict(entry.key), "speed": dict(entry.speed), "measured": dict(entry.measured)} for entry in found.entries
    ]
    body = yaml.safe_dump({"version": 1, "calibrations": entries}, sort_keys=False, allow_unicode=True, width=120)
    return f"# Written by `infermesh calibrate`; read by `up`, `plan`, `sim` and the services at their start.\n{body}"
