"""The port of a replica: what a model must offer, and the values it is loaded from and described by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from services.chassis.encoding.rows import Floats, Row

Purpose = Literal["embedding", "cross-encoder"]
Backend = Literal["auto", "torch", "onnx", "openvino"]


class LoadPlan(BaseModel):
    """How one replica loads its model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    purpose: Purpose
    source: str  # a local folder or a hub name
    revision: str = ""
    backend: Backend = "auto"
    device: str = "auto"  # auto, cpu, cuda, cuda:2 …
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    max_tokens: int = 0  # of a row; 0 = the model's own limit
    threads: int = 1  # of computation, where the device is the CPU
    export_dir: str = ""  # where exported models are kept; empty = the user's cache folder
    trust_remote_code: bool = False


class ModelFacts(BaseModel):
    """What a replica loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    columns: int  # of a result: dimensions of a vector; 2 for a cross-encoder (raw score, activated score)
    max_tokens: int  # of a row, special tokens included
    vocabulary: int
    tokenizer: str  # serialised, as the pipeline uses it
    prompts: Mapping[str, str] = {}
    default_prompt: str = ""
    pools_prompt: bool = True  # False: the tokens of a prompt are left out of pooling
    normalizes: bool = False  # the pipeline ends with unit vectors (the replica leaves that step to the service)
    activation: str = ""
    backend: str
    backend_reason: str
    device: str  # cpu or cuda:N
    device_name: str
    dtype: str
    weights_version: str
    engine_version: str


class StartAgain(Exception):
    """Loading prepared something and goes on in a new process (an export leaves this one twice as large)."""


class Encoder(Protocol):
    """One loaded model in one process. It is called by one thread."""

    facts: ModelFacts

    def compute(self, rows: Sequence[Row]) -> Floats:
        """float32 [rows, facts.columns]. The rows share one `skip`."""
        ...


EncoderFactory = Callable[[LoadPlan, Callable[[str], None]], Encoder]
