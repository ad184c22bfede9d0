"""From the bytes of a body to its checked shape."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from services.gateway.front.rest_errors import faults
from services.gateway.front.rest_exchange import Exchange
from services.gateway.front.rest_json import parse_json
from services.gateway.front.rest_schema import IGNORED, Shape

Body = TypeVar("Body", bound=Shape)


async def read_body(exchange: Exchange, shape: type[Body]) -> Body:
    """Reads, parses and checks; notes which parameters will have no effect.

    Raises:
        MeshError: with every fault of the body.
        ClientGone
    """
    data = await exchange.body()
    await exchange.breathe()
    raw = await parse_json(data)
    await exchange.breathe()
    exchange.ignored = ignored(raw, shape)
    try:
        return shape.model_validate(raw)
    except ValidationError as error:
        raise faults(error) from None


def ignored(raw: dict[str, Any], shape: type[Shape]) -> list[str]:
    """Parameters that are accepted without effect, sorted."""
    names = [key for key in raw.keys() & IGNORED if raw[key] is not None and key not in shape.known]
    options = raw.get("stream_options")
    if isinstance(options, dict) and options.get("include_obfuscation") is not None:
        names.append("stream_options.include_obfuscation")
    return sorted(names)
