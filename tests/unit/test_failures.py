"""What a failed call means: who spoke, the instance or grpc itself."""

from __future__ import annotations

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from infermesh.errors import RETRY_AFTER_KEY, Reason, from_status
from services.gateway.upstream.failures import as_failure, exact_prompt_tokens
from tests.kit.failures import CORRUPTED, failed

INTERNAL = grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("code", "details", "reason"),
    [
        (INTERNAL, CORRUPTED, Reason.INSTANCE_LOST),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", Reason.INSTANCE_LOST),
        (INTERNAL, "Exception deserializing response!", Reason.INTERNAL),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max", Reason.REQUEST_TOO_LARGE),
    ],
)
def test_what_grpc_says_itself(code: grpc.StatusCode, details: str, reason: Reason) -> None:
    assert as_failure(failed(code, details)).reason is reason


@pytest.mark.parametrize("reason", [Reason.INTERNAL, Reason.INSTANCE_FULL, Reason.ENGINE_FAILED])
def test_what_an_instance_says_counts_as_it_was_meant(reason: Reason) -> None:
    assert as_failure(failed(INTERNAL, CORRUPTED, reason)).reason is reason


def test_digits_that_are_no_numbers_are_no_counts() -> None:
    odd = Metadata(("x-infermesh-prompt-tokens", "\u00b2"))
    said = AioRpcError(grpc.StatusCode.OUT_OF_RANGE, Metadata(), odd, "17 tokens")
    assert exact_prompt_tokens(said, as_failure(said)) == 17
    assert from_status(INTERNAL, "", [(RETRY_AFTER_KEY, "\u00b2")]).retry_after_s is None
