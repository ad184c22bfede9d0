"""Texts or token ids: the one field of OpenAI's API that is four things. Shared by completions and embeddings."""

from __future__ import annotations

import asyncio
from typing import Any

from infermesh.errors import invalid
from infermesh.v1 import inference_pb2 as inf

Input = str | inf.TokenIds
_STEP = 1 << 15  # token ids converted in one step of the loop
_ALLOWED = "must be a string, a list of strings, a list of token ids or a list of lists of token ids"


async def inputs(param: str, value: Any, most: int) -> list[Input]:
    """One entry a text or token list; all of one sort.

    Raises:
        MeshError: INVALID_ARGUMENT, with the entry's path.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise invalid(param, _ALLOWED)
    if not value:
        raise invalid(param, "must not be empty")
    first = value[0]
    if isinstance(first, int):
        return [await token_ids(param, value)]
    if len(value) > most:
        raise invalid(param, f"{len(value)} entries, at most {most}")
    if isinstance(first, str):
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise invalid(f"{param}[{index}]", "must be a string, as the first entry is")
        return value
    if isinstance(first, list):
        return [await token_ids(f"{param}[{index}]", item) for index, item in enumerate(value)]
    raise invalid(param, _ALLOWED)


async def token_ids(param: str, value: Any) -> inf.TokenIds:
    made = inf.TokenIds()
    if not isinstance(value, list):
        raise invalid(param, "must be a list of token ids")
    for start in range(0, len(value), _STEP):
        part = value[start : start + _STEP]
        if set(map(type, part)) != {int}:
            raise invalid(param, "token ids must be integers")
        try:
            made.ids.extend(part)
        except (ValueError, OverflowError):
            raise invalid(param, f"token ids must be 0 .. {2**32 - 1}") from None
        if len(value) > _STEP:
            await asyncio.sleep(0)
    return made
