"""Tokens a minute for each tenant: reserve prompt + answer before, settle the difference after. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from infermesh.errors import MeshError, Reason


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


@dataclass(slots=True)
class Quota:
    """A token bucket a tenant, as large as one minute's tokens. Tenants come from the key file, so there are few."""

    _buckets: dict[str, _Bucket] = field(default_factory=dict)

    def reserve(self, tenant: str, per_minute: int, tokens: int, now: float) -> int:
        """Takes the tokens, or, for a request larger than the bucket, all of a full one. Returns what was taken.

        Raises:
            MeshError: RATE_LIMITED, with the time until there are enough.
        """
        if per_minute <= 0:
            return 0
        bucket = self._buckets.setdefault(tenant, _Bucket(per_minute, now))
        rate = per_minute / 60
        bucket.tokens = min(per_minute, bucket.tokens + (now - bucket.at) * rate)
        bucket.at = now
        need = min(tokens, per_minute)
        if bucket.tokens < need:
            raise MeshError(
                Reason.RATE_LIMITED,
                f"{per_minute} tokens a minute are used up; this request needs {need}",
                retry_after_s=(need - bucket.tokens) / rate,
            )
        bucket.tokens -= need
        return need

    def settle(self, tenant: str, reserved: int, used: int) -> None:
        """Gives back what was not used, or takes what was used beyond it (the bucket may go below zero)."""
        bucket = self._buckets.get(tenant)
        if bucket is not None:
            bucket.tokens += reserved - used
