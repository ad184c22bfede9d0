"""Tokens a minute: arithmetic, with time as a number."""

from __future__ import annotations

import pytest

from infermesh.errors import MeshError, Reason
from services.gateway.upstream.quota import Quota


def test_a_bucket_fills_at_its_rate_and_never_over_its_size() -> None:
    quota = Quota()
    assert quota.reserve("a", 600, 600, 0.0) == 600
    with pytest.raises(MeshError) as caught:
        quota.reserve("a", 600, 100, 5.0)  # 50 are back
    assert caught.value.reason is Reason.RATE_LIMITED and caught.value.retry_after_s == pytest.approx(5.0)
    assert quota.reserve("a", 600, 100, 10.0) == 100
    assert quota.reserve("a", 600, 10_000, 1000.0) == 600, "more than a minute's tokens: a full bucket pays for it"
    with pytest.raises(MeshError):
        quota.reserve("a", 600, 1, 1000.0)
    assert quota.reserve("b", 600, 600, 1000.0) == 600, "another tenant's"


def test_what_was_used_beyond_the_estimate_is_paid_later() -> None:
    quota = Quota()
    quota.settle("a", quota.reserve("a", 600, 100, 0.0), 700)
    with pytest.raises(MeshError) as caught:
        quota.reserve("a", 600, 1, 0.0)
    assert caught.value.retry_after_s == pytest.approx(10.1)


def test_no_quota_costs_nothing() -> None:
    assert Quota().reserve("a", 0, 1 << 40, 0.0) == 0
