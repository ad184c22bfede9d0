"""One call of one instance under one lease: begun, read, ended once."""

from __future__ import annotations

from typing import Any

import grpc.aio
import structlog

from infermesh.errors import MeshError, Reason
from registry.endpoint import Endpoint
from services.chassis.identity import INSTANCE_KEY, MODEL_KEY
from services.gateway.routing.decision import Lease
from services.gateway.routing.facts import End, Outcome
from services.gateway.upstream.calls import Event, Method
from services.gateway.upstream.carrier import Carrier
from services.gateway.upstream.failures import end
from services.gateway.upstream.transcript import Transcript

log = structlog.get_logger("attempt")


class Attempt:
    """`tokens` it has brought, `ttft_s` from the request's beginning to its first event, `usage` as it told. What it
    brings is written into `transcript`, if there is one."""

    __slots__ = (
        "_begun",
        "_call",
        "_carrier",
        "_method",
        "_transcript",
        "endpoint",
        "lease",
        "preempted",
        "tokens",
        "ttft_s",
        "usage",
        "verified",
    )

    def __init__(
        self,
        carrier: Carrier,
        method: Method,
        lease: Lease,
        endpoint: Endpoint,
        begun: float,
        transcript: Transcript | None = None,
    ) -> None:
        """`begun`: when the request came, on the carrier's clock."""
        self._carrier = carrier
        self._method = method
        self._begun = begun
        self._call: Any = None
        self._transcript = transcript
        self.lease = lease
        self.endpoint = endpoint
        self.tokens = 0
        self.preempted = 0  # times that its prompt was put aside
        self.ttft_s = 0.0
        self.usage: Any = None
        self.verified: bool | None = None  # whether who answered is who was asked; None: nobody has

    async def begin(self, request: bytes, timeout: float, metadata: tuple[tuple[str, str], ...]) -> Event:
        """Calls the instance and waits for the first event, or the whole answer of a unary method."""
        carrier, method = self._carrier, self._method
        dial = carrier.channels.open(self.endpoint).calls[method]
        call = self._call = dial(request, timeout=timeout, metadata=metadata)
        carrier.attach(self.lease, call)
        carrier.router.heeding(self.lease)
        first = await call.read() if method.streams else await call
        if first is grpc.aio.EOF:
            raise MeshError(Reason.ENGINE_FAILED, "the instance ended the answer before it began")
        self._verify(await call.initial_metadata())
        message = method.response.FromString(first)
        self.ttft_s = carrier.now() - self._begun
        carrier.do(carrier.router.started(self.lease, carrier.now()))
        if method.streams and message.HasField("started"):
            self.preempted = message.started.preempted
        self._note(message)
        return Event(first, message)

    async def read(self) -> Event | None:
        """The next event; None at the end."""
        self._carrier.router.heeding(self.lease)
        raw = await self._call.read()
        if raw is grpc.aio.EOF:
            if self.usage is None:
                raise MeshError(Reason.ENGINE_FAILED, "the instance ended the answer without its usage")
            return None
        message = self._method.response.FromString(raw)
        self._note(message)
        return Event(raw, message)

    def end(self, failure: BaseException | None) -> None:
        """Cuts the call if it still runs, and gives the lease back."""
        call, self._call = self._call, None
        if call is not None and not call.done():
            call.cancel()
        self._carrier.detach(self.lease)
        usage = self.usage
        outcome = Outcome(
            End.MISTAKEN if self.verified is False else end(failure),
            failure.reason if isinstance(failure, MeshError) else None,
            usage.prompt_tokens if usage is not None else 0,
            usage.completion_tokens if usage is not None else self.tokens,
            self.ttft_s,
            self._carrier.now() - self._begun,
            usage.cached_tokens if usage is not None and self._method.streams else None,
            preempted=self.preempted,
            queued_s=(failure.retry_after_s or 0.0) if isinstance(failure, MeshError) else 0.0,
        )
        self._carrier.release(self.lease, outcome)

    def _verify(self, initial: Any) -> None:
        """It must be the instance that was picked, with the model that it registered."""
        told = dict(initial or ())
        answered, model = told.get(INSTANCE_KEY, ""), told.get(MODEL_KEY, "")
        endpoint = self.endpoint
        self.verified = (answered, model) == (endpoint.id, endpoint.model)
        if not self.verified:
            said = f"{answered or 'nobody'} with {model or 'no model'}"
            log.warning(
                "not the instance that is registered", instance=endpoint.id, model=endpoint.model, answered=said
            )
            raise MeshError(Reason.INSTANCE_LOST, "the instance that answered is not the one that is registered")

    def _note(self, message: Any) -> None:
        """Counts what an event carries."""
        if self._method.streams:
            tokens, transcript = 0, self._transcript
            for delta in message.deltas:
                tokens += len(delta.token_ids)
                if transcript is not None:
                    transcript.take(delta)
            self.tokens += tokens
            self._carrier.router.progressed(self.lease, tokens)
        elif self._method.kind == "llm":
            return
        if message.HasField("usage"):
            self.usage = message.usage
