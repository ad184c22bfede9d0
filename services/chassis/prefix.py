"""Canonical prompt -> hash chain: the only place that knows what makes two prompts begin alike. Pure.

The prompt's bytes are cut into blocks; each hash covers its block and, through the seed, everything before it. So two
prompts share exactly as many hashes as they share whole blocks, and a longer conversation repeats the chain of the
shorter one. What changes a rendering without standing in the messages (the template's arguments and time, the tenant's
salt) seeds the first block. Which template an instance has is left out: gateways learn by instance what is cached.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from infermesh.v1 import inference_pb2 as inference
from infermesh.v1 import language_model_pb2 as lm

BLOCK_BYTES = 512
BLOCK_TOKENS = 128  # of an average text, 4 bytes a token
MAX_CHAIN = 8192  # 4 MiB of prompt; hashing more would hold the event loop for milliseconds
_CUTS = tuple(slice(at, at + BLOCK_BYTES) for at in range(0, MAX_CHAIN * BLOCK_BYTES, BLOCK_BYTES))
MASK = (1 << 60) - 1  # an int of two digits takes 32 bytes in CPython, one of three takes 48

# UTF-8 never holds these bytes, so that no text can imitate the seam between two others.
_ROLES = {role: bytes([0xF8 + role]) for role in range(6)}
_PART, _FIELD = b"\xfe", b"\xff"


@dataclass(frozen=True, slots=True)
class Prefix:
    """`chain`: 60-bit hashes, one a full block. `share`: the part of the prompt that one block is."""

    chain: tuple[int, ...] = ()
    share: float = 0.0


def prefix(request: lm.ChatRequest | lm.CompleteRequest, salt: bytes, rendered_at: int) -> Prefix:
    """`salt` separates tenants; `rendered_at` is the template's time, unix seconds, which only chats have."""
    head: tuple[bytes, ...]
    if isinstance(request, lm.ChatRequest):
        head = (b"chat", salt, b"%d" % rendered_at, request.lora.encode(), request.template_args_json.encode())
    else:
        head = ((request.WhichOneof("prompt") or "").encode(), salt, request.lora.encode())
    return hash_blocks(_FIELD.join(head), _body(request))


def block_share(request: lm.ChatRequest | lm.CompleteRequest) -> float:
    """The part of the prompt that one block of its chain is: `Prefix.share`, without hashing; 0 if there is none."""
    size = len(_body(request))
    return BLOCK_BYTES / size if size >= BLOCK_BYTES else 0.0


def hash_blocks(head: bytes, prompt: bytes) -> Prefix:
    """The chain over the full blocks of `prompt`, begun with the hash of `head`. A smaller rest has no hash."""
    size = len(prompt)
    blocks = min(size // BLOCK_BYTES, MAX_CHAIN)
    if not blocks:
        return Prefix()
    digest = xxh3_64_intdigest
    seed = digest(head)
    chain = [seed := digest(prompt[cut], seed) & MASK for cut in _CUTS[:blocks]]
    return Prefix(tuple(chain), BLOCK_BYTES / size)


def _body(request: lm.ChatRequest | lm.CompleteRequest) -> bytes:
    if isinstance(request, lm.ChatRequest):
        return b"".join(_conversation(request))
    if request.WhichOneof("prompt") == "token_ids":
        return _packed(request.token_ids)
    return request.text.encode()


def _conversation(request: lm.ChatRequest) -> list[bytes]:
    """Tools first, where templates put them; then the messages, each with its text before its rarer fields, so that two
    of which one begins the other share that beginning."""
    found: list[bytes] = []
    for tool in request.tools:
        found += _texts((tool.name, tool.description, tool.parameters_json))
    for message in request.messages:
        found.append(_ROLES.get(message.role, _FIELD))
        if parts := message.parts:
            found += [part.text.encode() or _PART + part.image_url.encode() for part in parts]
        else:
            found.append(message.content.encode())
        if message.name or message.tool_calls or message.tool_call_id or message.reasoning:
            found += _texts((message.reasoning, message.name, message.tool_call_id))
            for call in message.tool_calls:
                found += _texts((call.id, call.name, call.arguments_json))
    return found


def _texts(texts: Iterable[str]) -> list[bytes]:
    return [_FIELD + text.encode() for text in texts]


def _packed(ids: inference.TokenIds) -> bytes:
    """Token ids as protobuf packs them, without the field's tag and length: equal beginnings have equal bytes."""
    packed = ids.SerializeToString()
    start = 1
    while start < len(packed) and packed[start] & 0x80:
        start += 1
    return packed[start + 1 :]
