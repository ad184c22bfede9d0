"""Finding out what an OpenAI-speaking server is: family, version, model, context. Waits until it is up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson

from infermesh.errors import MeshError, Reason
from services.llm.engines.openai_family import family_of
from services.llm.engines.openai_reply import int_of
from services.llm.engines.openai_wire import Upstream

MAX_PROBE_BYTES = 4 << 20
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def base_url(source: str) -> str:
    """The server's root, whether the operator wrote it with /v1 or without.

    Raises:
        ValueError: not an http(s) URL.
    """
    if not source.startswith(("http://", "https://")):
        raise ValueError(f"source: {source!r} is not a URL like http://HOST:PORT")
    return source.rstrip("/").removesuffix("/v1")


async def read_all(reply: aiohttp.ClientResponse, limit: int) -> bytes:
    """The whole body.

    Raises:
        MeshError: ENGINE_FAILED, when it is longer than `limit` bytes.
    """
    body = bytearray()
    async for piece in reply.content.iter_any():
        body += piece
        if len(body) > limit:
            raise MeshError(Reason.ENGINE_FAILED, f"the server's answer is longer than {limit} bytes")
    return bytes(body)


async def probe(
    session: aiohttp.ClientSession,
    base: str,
    *,
    wanted: str,
    served: str,
    timeout_s: float,
    progress: Callable[[str], None],
) -> Upstream:
    """`wanted`: the server's name for the model, if the operator gave one; `served`: ours, taken if it lists that too.

    Raises:
        MeshError: FAILED_PRECONDITION, with what to do.
    """
    listed = await _models(session, base, timeout_s, progress)
    model = _choose(listed, wanted, served, base)
    entry = listed[model]
    family = family_of(str(entry.get("owned_by") or ""))
    version, context, slots = "", int_of(entry.get("max_model_len")), 0
    if family.name in ("vllm", "infermesh"):
        version = str((await _get(session, f"{base}/version")).get("version") or "")
    elif family.name == "sglang":
        version = str((await _get(session, f"{base}/get_server_info")).get("version") or "")
    elif family.name == "llama.cpp":
        props = await _get(session, f"{base}/props")
        version = str(props.get("build_info") or "")
        context = int_of((props.get("default_generation_settings") or {}).get("n_ctx"))  # of one slot
        slots = int_of(props.get("total_slots"))
    elif family.name == "ollama":
        version = str((await _get(session, f"{base}/api/version")).get("version") or "")
        loaded = (await _get(session, f"{base}/api/ps")).get("models") or ()
        context = next((int_of(one.get("context_length")) for one in loaded if one.get("name") == model), 0)
    return Upstream(family, model, version, context, slots)


async def _models(
    session: aiohttp.ClientSession, base: str, timeout_s: float, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """What the server lists, once it answers."""
    clock = asyncio.get_running_loop().time
    until, told = clock() + timeout_s, ""
    while True:
        try:
            async with session.get(f"{base}/v1/models", timeout=aiohttp.ClientTimeout(total=5)) as reply:
                body = await read_all(reply, MAX_PROBE_BYTES)
                if reply.status == 200:
                    return _listed(body, base)
                if reply.status not in _TRANSIENT:
                    what = (
                        "wants another API key (--api-key-file)" if reply.status in (401, 403) else "is no such server"
                    )
                    raise _refused(f"{base}/v1/models answers HTTP {reply.status}: it {what}")
                fault = f"HTTP {reply.status}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            fault = str(error) or type(error).__name__
        if clock() >= until:
            raise _refused(f"{base} does not answer within {timeout_s:g} s: {fault}")
        if fault != told:
            progress(f"waiting for {base}: {fault}")
            told = fault
        await asyncio.sleep(0.5)


def _listed(body: bytes, base: str) -> dict[str, dict[str, Any]]:
    try:
        entries = orjson.loads(body)["data"]
        return {str(entry["id"]): entry for entry in entries}
    except (ValueError, KeyError, TypeError):
        raise _refused(
            f"{base}/v1/models does not answer with a list of models: is this the server's base URL?"
        ) from None


def _choose(listed: dict[str, dict[str, Any]], wanted: str, served: str, base: str) -> str:
    names = ", ".join(sorted(listed)) or "none"
    if wanted and wanted not in listed:
        raise _refused(f"{base} does not serve {wanted!r}; it serves {names}")
    if wanted or served in listed:
        return wanted or served
    if len(listed) != 1:
        raise _refused(f"{base} serves {names}; name one of them with --upstream-model")
    return next(iter(listed))


async def _get(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """A page that may not be there; it only adds what the model list does not tell."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as reply:
            told = orjson.loads(await read_all(reply, MAX_PROBE_BYTES)) if reply.status == 200 else {}
            return told if isinstance(told, dict) else {}
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return {}


def _refused(message: str) -> MeshError:
    return MeshError(Reason.FAILED_PRECONDITION, message)
