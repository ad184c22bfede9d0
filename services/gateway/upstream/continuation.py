"""What is kept of an answer while it runs, and how it goes on elsewhere when its instance is lost."""

from __future__ import annotations

from typing import Any

from infermesh.errors import Reason
from registry.endpoint import Endpoint
from services.gateway.routing.facts import Facts
from services.gateway.upstream import resume
from services.gateway.upstream.calls import Event, Method
from services.gateway.upstream.transcript import Transcript


class Continuation:
    """Of one request. `obstacle`: why it cannot be resumed, as far as is known. `under_way`: the next attempt, or the
    present one, goes on with what others have begun. `strict`: nothing was sent yet, so that only an exact continuation
    is better than beginning anew. `before`: tokens of attempts that are over and whose work is kept.
    """

    __slots__ = ("_method", "_origin", "_request", "_strict", "before", "exact", "lost_at", "obstacle", "reason",
                 "resumes", "transcript", "under_way")  # fmt: skip

    def __init__(self, method: Method, request: Any, *, strict: bool) -> None:
        self._method = method
        self._request = request
        self._strict = strict
        self._origin: Endpoint | None = None
        self.obstacle = resume.refused(method, request)
        self.transcript = None if self.obstacle else Transcript()
        self.under_way = False
        self.exact = True
        self.resumes = 0
        self.before = 0
        self.lost_at = 0.0
        self.reason = Reason.INSTANCE_LOST

    def serve(self, endpoint: Endpoint) -> None:
        """This instance is about to be asked. Nobody knows yet what to keep but who asks which kind of engine."""
        if not self.under_way:
            self._origin = endpoint
            if self.transcript is not None:
                self.transcript.keep_text = resume.adopted(endpoint)

    def began(self, event: Event, endpoint: Endpoint) -> Event:
        """The first event of an attempt, as the caller is to see it: a resumed stream has one beginning, the first."""
        transcript = self.transcript
        if transcript is None:
            return event
        message = event.message
        if not self.under_way:
            transcript.started = message.started if message.HasField("started") else None
            return event
        self.resumes += 1
        if self._origin is not None:
            self.exact = self.exact and resume.exact(self._request, transcript, self._origin, endpoint)
        if not message.HasField("started"):
            return event
        told = type(message)()
        told.CopyFrom(message)
        told.ClearField("started")
        return self.closing(Event(told.SerializeToString(), told))

    def closing(self, event: Event) -> Event:
        """The last event of a resumed stream. Its instance found the delivered tokens in its cache or not, but the
        prompt was paid once, as the first one told."""
        started = self.transcript.started if self.transcript is not None else None
        if started is None or not event.message.HasField("usage"):
            return event
        told = type(event.message)()
        told.CopyFrom(event.message)
        told.usage.cached_tokens = started.cached_tokens
        return Event(told.SerializeToString(), told)

    def end(self) -> Event | None:
        """The last event, where all but that had come; None where it had not."""
        transcript = self.transcript
        if transcript is None or not transcript.finished:
            return None
        told = self._method.response(usage=transcript.usage())
        return Event(told.SerializeToString(), told)

    def possible(self) -> bool:
        """Can what there is be continued? Else `obstacle` says why not."""
        if self.transcript is None or self._origin is None:
            return False
        self.obstacle = resume.refused_now(self._request, self._origin, self.transcript)
        return not self.obstacle and (not self._strict or resume.promised(self._request, self.transcript))

    def brought(self, tokens: int) -> int:
        """Tokens that the attempt under way has added; `tokens`: as it counted them itself. Without ids, an event with
        text counts as one."""
        return self.transcript.tokens - self.before if self.transcript is not None else tokens

    def go_on(self, reason: Reason, tokens: int, now: float) -> None:
        """The next attempt continues. `tokens`: what the lost one had brought."""
        if tokens or not self.under_way:
            self.lost_at, self.reason = now, reason
        self.under_way = True
        self.before += tokens

    def begin_anew(self) -> None:
        """What there is will not be used."""
        self.under_way = False
        self.before = 0
        if self.transcript is not None:
            self.transcript.clear()

    def facts(self, base: Facts, now: float) -> Facts:
        """The request as routing is to see the next attempt."""
        if not self.under_way or self.transcript is None or self._origin is None:
            return base
        return resume.facts(base, self._origin, self.transcript, now, strict=self._strict)
