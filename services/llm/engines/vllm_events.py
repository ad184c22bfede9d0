"""vLLM's KV events -> what the instance holds.

They carry prompts in clear, so they travel over a socket in a folder that only this user can enter, and end here.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from infermesh.v1 import language_model_pb2 as lm
from services.chassis.held_prefixes import HeldPrefixes
from services.chassis.prefix import block_share

MOST_WAITING = 100_000  # batches; one comes with each engine step that changes the cache
log = structlog.get_logger("vllm")


def block_keys(token_ids: Sequence[int], block: int, salt: str) -> list[int]:
    """The keys of all full blocks of a prompt: each over its tokens and everything before it."""
    parent = hash(salt)
    keys = []
    for at in range(0, len(token_ids) - block + 1, block):
        parent = hash((parent, *token_ids[at : at + block]))
        keys.append(parent)
    return keys


class Follower:
    """Gives vLLM's block hashes our keys, which can be had from a prompt without vLLM."""

    def __init__(self, held: HeldPrefixes) -> None:
        self._held = held
        self._keys: dict[int | bytes, int] = {}

    def apply(self, event: Mapping[str, Any]) -> None:
        kind = event.get("type")
        if kind == "AllBlocksCleared":
            self.lose()
        elif event.get("group_idx") or event.get("medium") not in (None, "GPU"):
            return  # a model's further layer groups; blocks that were moved out
        elif kind == "BlockStored":
            self._stored(event)
        elif kind == "BlockRemoved":
            for hash in event["block_hashes"]:
                if (key := self._keys.pop(hash, None)) is not None:
                    self._held.removed(key)

    def lose(self) -> None:
        """The cache is empty, or what is in it is no longer known."""
        self._keys.clear()
        self._held.cleared()

    def _stored(self, event: Mapping[str, Any]) -> None:
        size, ids, before = event["block_size"], event["token_ids"], event["parent_block_hash"]
        if len(ids) != size * len(event["block_hashes"]):
            return
        if before is None:
            extra = (event.get("extra_keys") or [None])[0]
            parent: int | None = hash(extra[-1] if extra else "")  # LoRA and images are refused, so it is the salt
        else:
            parent = self._keys.get(before)
        if parent is None:  # continues what was lost
            return
        for at, name in enumerate(event["block_hashes"]):
            parent = self._keys[name] = hash((parent, *ids[at * size : (at + 1) * size]))
            self._held.stored(parent)


class KvEvents:
    """Follows one engine, from `open` to `close`."""

    def __init__(self, held: HeldPrefixes) -> None:
        self._held = held
        self._folder = ""
        self._endpoint = ""
        self._block = 0
        self._following: asyncio.Task[None] | None = None

    def open(self) -> str:
        """The endpoint for the engine's configuration."""
        self._folder = tempfile.mkdtemp(prefix="infermesh-")
        self._endpoint = f"ipc://{self._folder}/kv"
        return self._endpoint

    def follow(self, config: Any, block: int) -> None:
        """`config`: the running engine's, of its KV events; `block`: tokens of a block of its cache."""
        if config is not None and config.endpoint == self._endpoint:
            self._block = block
            self._held.live = True
            self._following = asyncio.create_task(self._follow(), name="kv-events")
            self._following.add_done_callback(self._over)

    def tie(self, request: lm.ChatRequest | lm.CompleteRequest, ids: Sequence[int]) -> None:
        """A request is about to run with this prompt."""
        relay = request.relay
        if relay.prefix_chain and self._held.live:
            keys = block_keys(ids, self._block, relay.cache_salt.hex())
            self._held.tie(relay.prefix_chain, block_share(request), len(ids), keys, self._block)

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _over(self, following: asyncio.Task[None]) -> None:
        if not following.cancelled() and (error := following.exception()) is not None:
            log.error("KV events cannot be heard; gateways go on with what they guess", exc_info=error)
            self._held.cleared()

    async def _follow(self) -> None:
        import zmq.asyncio

        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.linger = 0
            socket.set_hwm(MOST_WAITING)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(self._endpoint)
            await self._listen(socket)

    async def _listen(self, socket: Any) -> None:
        import msgspec

        follower = Follower(self._held)
        decode = msgspec.msgpack.Decoder().decode
        expected: int | None = None
        while True:
            _, number, payload = await socket.recv_multipart()
            sequence = int.from_bytes(number, "big")
            if expected is not None and sequence != expected:
                log.warning("KV events were lost; what is cached is learnt anew", missed=sequence - expected)
                follower.lose()
            expected = sequence + 1
            try:
                for event in decode(payload)[1]:
                    follower.apply(event)
            except Exception as error:  # what routing believes is worth less than an engine that serves
                log.error("a KV event was not understood; what is cached is learnt anew", error=type(error).__name__)
                follower.lose()
