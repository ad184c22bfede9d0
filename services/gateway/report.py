"""The end of one request, as everything that tells of it reads it."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.routing.decision import Record
from services.gateway.routing.facts import Facts

OK = "ok"


@dataclass(frozen=True, slots=True)
class Tried:
    """One decision for a request, and how what it began ended: `ok` or the word of a Reason."""

    record: Record
    outcome: str


@dataclass(frozen=True, slots=True)
class Report:
    """The end of one request. Times in seconds, 0 = never came; `outcome` is `ok` or the word of a Reason.

    `record` is the last decision; `tried` has every one, in order, retries and refusals included. `facts` is None where
    a check turned the request away.
    """

    request_id: str
    method: str
    tenant: str
    model: str
    outcome: str
    instance: str = ""
    served_model: str = ""
    attempts: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    record: Record | None = None
    tried: tuple[Tried, ...] = ()
    facts: Facts | None = None
    resumes: int = 0
    preempted: int = 0
    trace_id: str = ""

    @property
    def token_s(self) -> float:
        """Seconds from one token of an answer to the next, on average; 0 = there was none after the first."""
        intervals = self.completion_tokens / (self.facts.choices if self.facts else 1) - 1
        return (self.duration_s - self.ttft_s) / intervals if intervals > 0 and self.ttft_s else 0.0

    @property
    def lane(self) -> str:
        """The model that serves, or was to; empty for a name that nobody has ever served: callers choose names."""
        if self.served_model:
            return self.served_model
        return self.record.model if self.record is not None and self.outcome != "model_not_found" else ""
