"""From errors to OpenAI's error JSON, status and headers, by the one table in infermesh.errors. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import ValidationError

from infermesh.errors import MeshError, Reason, named

Headers = list[tuple[bytes, bytes]]
MAX_FAULTS = 8
DEFAULT_RETRY_S = 1.0
_PLAINLY = {"model_type": "must be an object", "dict_type": "must be an object", "list_type": "must be a list"}
_UNFIT = re.compile(r"[\x00-\x1f\x7f]")


def error_json(error: MeshError, param: str | None) -> bytes:
    """OpenAI's error object."""
    row = error.row
    body = {"message": named(error.message, param), "type": row.kind, "param": param, "code": error.reason.value}
    return orjson.dumps({"error": body})


def error_headers(error: MeshError) -> Headers:
    """When to come again, and whether that makes sense at all.

    SDKs repeat 408, 409, 429 and 5xx on their own. What the gateway has already tried elsewhere must not be multiplied
    by them, so only refusals for want of room or of an instance invite them back; who decides for himself hears after
    every fault of ours when to come.
    """
    row = error.row
    again = row.http == 429 or (row.http == 503 and not row.dispatched)
    never: Headers = [] if again else [(b"x-should-retry", b"false")]
    if not again and row.http not in (500, 503):
        return never
    after = DEFAULT_RETRY_S if error.retry_after_s is None else max(0.0, error.retry_after_s)
    return [
        *never,
        (b"retry-after", str(math.ceil(after)).encode()),
        (b"retry-after-ms", str(round(after * 1000)).encode()),
    ]


def rest_param(param: str | None, names: Mapping[str, str]) -> str | None:
    """The name that a REST caller knows for a path of the contract: the longest entry of `names` that begins it."""
    if param is None:
        return None
    best = ""
    for prefix in names:
        if (
            len(prefix) > len(best)
            and param.startswith(prefix)
            and param[len(prefix) : len(prefix) + 1] in ("", "[", ".")
        ):
            best = prefix
    if best:
        return names[best] + param[len(best) :]
    return param.removeprefix("sampling.")


def faults(error: ValidationError) -> MeshError:
    """Every fault of a body, each with its path; `param` is the first."""
    found = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        path = dotted(fault["loc"])
        if fault["type"] == "extra_forbidden":
            found.append((path, "this parameter is not served", True))
        elif fault["type"] == "missing":
            found.append((path, "this parameter is required", False))
        else:
            found.append((path, _PLAINLY.get(fault["type"], fault["msg"]), False))
    text = "; ".join(f"{path}: {message}" for path, message, _ in found[:MAX_FAULTS])
    if len(found) > MAX_FAULTS:
        text += f"; and {len(found) - MAX_FAULTS} more"
    reason = Reason.UNSUPPORTED if all(unserved for _, _, unserved in found) else Reason.INVALID_ARGUMENT
    return MeshError(reason, text, param=found[0][0] or None)


def dotted(location: tuple[Any, ...]) -> str:
    """("messages", 0, "content") as messages[0].content."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{str(step)[:128]}" if path else str(step)[:128]
    return path


def header_value(text: str) -> bytes:
    """Fit for a header: no control characters, UTF-8."""
    return _UNFIT.sub("", text).encode()
