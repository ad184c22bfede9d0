"""Retries towards a registry, all of them, by tenacity. The request path never uses this."""

from __future__ import annotations

import random
from collections.abc import Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential


def patiently(
    errors: tuple[type[BaseException], ...],
    on_wait: Callable[[RetryCallState], None] | None = None,
    *,
    first_s: float = 0.2,
    most_s: float = 2.0,
) -> AsyncRetrying:
    """Tries for ever, waiting a random time up to `first_s`, doubled each time up to `most_s`: after an outage a whole
    fleet comes back within seconds, but not in the same instant. Other exceptions than `errors` pass through."""
    return AsyncRetrying(
        retry=retry_if_exception_type(errors),
        wait=wait_random_exponential(multiplier=first_s, max=most_s, min=0.05),
        before_sleep=on_wait,
        reraise=True,
    )


def jitter(seconds: float, share: float = 0.25) -> float:
    """`seconds` ± `share`, so that a fleet does not beat in step."""
    return seconds * random.uniform(1 - share, 1 + share)
