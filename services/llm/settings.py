"""Settings of one LLM instance: what every instance takes, the engine's name, and that engine's own options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.chassis.settings import InstanceSettings

EngineName = Literal["vllm", "openai-http", "scripted"]


class PromptTemplate(BaseModel):
    """A prompt in four parts, for models without a chat template: `sys`, then `user`, `ai`, `sep` for every turn.

    `{}` in `sys` takes the current time, in `user` and `ai` the message. The last `ai` ends where its `{}` stands.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sys: str = ""
    user: str
    ai: str
    sep: str = ""

    @model_validator(mode="after")
    def _slots(self) -> PromptTemplate:
        faults = [name for name in ("user", "ai") if getattr(self, name).count("{}") != 1]
        if faults:
            raise ValueError(f"{' and '.join(faults)}: exactly one {{}} is needed, where the message goes")
        if self.sys.count("{}") > 1:
            raise ValueError("sys: at most one {}, where the current time goes")
        return self


class VllmOptions(BaseModel):
    """What vLLM's engine takes. Empty text and 0 mean: as the model says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tp: int = Field(default=0, ge=0, le=1024)  # 0 = the visible GPUs shared out among `pp`; 1 on a CPU
    pp: int = Field(default=1, ge=1, le=1024)
    vram_ratio: float = Field(default=0.9, gt=0, le=1)  # of each card's memory
    kv_cache_dtype: str = "auto"
    quantization: str = ""
    dtype: str = "auto"
    max_context: int = Field(default=0, ge=0, le=1 << 31)  # tokens, prompt and answer together
    chat_template: Path | None = None
    prompt_template: PromptTemplate | None = None
    time_granularity_s: int = Field(default=86400, ge=1, le=1 << 31)  # of the time in templates
    tool_parser: str = ""
    reasoning_parser: str = ""
    engine_args: dict[str, Any] = Field(default_factory=dict)  # any further argument of vLLM's AsyncEngineArgs

    @model_validator(mode="after")
    def _one_template(self) -> VllmOptions:
        if self.chat_template and self.prompt_template:
            raise ValueError("chat_template and prompt_template exclude each other")
        return self


class OpenAiHttpOptions(BaseModel):
    """How an OpenAI-speaking server is adopted. Its URL is the instance's `source`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    upstream_model: str = ""  # its own name for the model; empty = the only one it lists
    api_key_file: Path | None = None
    max_context: int = Field(default=0, ge=0, le=1 << 31)  # tokens; 0 = what the server tells
    probe_timeout_s: float = Field(default=60, gt=0, le=3600)  # for it to come up
    idle_timeout_s: float = Field(default=300, gt=0, le=3600)  # without a byte from it


class ScriptedOptions(BaseModel):
    """The scripted engine beyond its speed, KV room and batch, which are the instance's `speed`, `kv_tokens` and
    `max_running`. The `fail_*` options are faults for tests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_context: int = Field(default=32768, ge=16, le=1 << 31)  # tokens, prompt and answer together
    chat_tokens: int = Field(default=64, ge=1, le=1 << 31)  # length of an answer to chat when max_tokens is absent
    prefill_chunk: int = Field(default=2048, ge=1, le=1 << 20)  # prompt tokens computed in one step, at most
    fail_after_tokens: int = Field(default=0, ge=0)  # each answer breaks with ENGINE_FAILED after so many; 0 = never
    fail_start: bool = False


class LlmSettings(InstanceSettings):
    """One LLM instance. Options of another engine than the chosen one are refused, not ignored."""

    kind: Literal["llm"] = "llm"
    engine: EngineName
    max_waiting: int | None = Field(default=None, ge=0, le=1 << 20)  # beyond max_running; unset = a quarter of it
    preempt: bool = True  # shorter prompts overtake longer ones, where the engine keeps prefixes
    vllm: VllmOptions = VllmOptions()
    openai_http: OpenAiHttpOptions = OpenAiHttpOptions()
    scripted: ScriptedOptions = ScriptedOptions()

    @model_validator(mode="after")
    def _own_options(self) -> LlmSettings:
        own = self.engine.replace("-", "_")
        foreign = [name for name in ("vllm", "openai_http", "scripted") if name != own and _given(getattr(self, name))]
        faults = [f"{name}: {', '.join(_given(getattr(self, name)))}" for name in foreign]
        if faults:
            raise ValueError(f"engine {self.engine} does not take options of {'; '.join(faults)}")
        if self.engine in ("vllm", "openai-http") and not self.source:
            what = "a hub name or a local folder" if self.engine == "vllm" else "the server's base URL"
            raise ValueError(f"source: engine {self.engine} needs {what}")
        return self


def _given(options: BaseModel) -> list[str]:
    return sorted(
        name
        for name in type(options).model_fields
        if getattr(options, name) != type(options).model_fields[name].get_default(call_default_factory=True)
    )
