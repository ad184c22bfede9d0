"""vLLM's own counters -> Load. vLLM calls `record` once an engine step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from infermesh.v1.worker_pb2 import Load
from services.llm.engine import Computed, unheard


@dataclass(slots=True)
class Counters:
    """The last step's figures of all engine ranks together. `steps` is ours: vLLM's moves under data parallel only.
    `computed` hears how many prompt tokens each step computed, before those who read the answers do."""

    running: int = 0
    waiting: int = 0
    kv_used_ratio: float = 0.0
    steps: int = 0
    computed: Computed = unheard

    def load(self, kv_tokens: int, queued_tokens: int) -> Load:
        """`kv_tokens`: what the KV cache holds; `queued_tokens`: of prompts not computed yet."""
        return Load(
            running=self.running,
            waiting=self.waiting,
            queued_tokens=queued_tokens,
            kv_used_ratio=self.kv_used_ratio,
            steps=self.steps,
            resident_tokens=round(self.kv_used_ratio * kv_tokens),
        )


def stat_logger(counters: Counters, *, in_order: bool, logs_steps: bool) -> Callable[[Any, int], StatLoggerBase]:
    """The factory that vLLM takes; it makes one logger an engine rank. `in_order`: prompts are computed one after the
    other, so that a step's tokens are the first one's. `logs_steps`: the operator wants a line of log for each step;
    vLLM's own loggers, which come after this one, would write it in any case."""
    ranks: dict[int, tuple[int, int, float]] = {}

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._rank = engine_index

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            counters.steps += 1
            if scheduler_stats is None:
                return
            waiting = scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
            ranks[self._rank] = (scheduler_stats.num_running_reqs, waiting, scheduler_stats.kv_cache_usage)
            counters.running = sum(rank[0] for rank in ranks.values())
            counters.waiting = sum(rank[1] for rank in ranks.values())
            counters.kv_used_ratio = sum(rank[2] for rank in ranks.values()) / len(ranks)
            details = scheduler_stats.iteration_details
            if details is not None:
                if in_order:
                    counters.computed(details.num_ctx_tokens)
                if not logs_steps:
                    scheduler_stats.iteration_details = None

        def log_engine_initialized(self) -> None:
            pass

    return Recorder
