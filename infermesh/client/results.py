"""Reply messages -> values. Pure."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1 import retrieve_pb2 as rt

FINISH = {
    lm.FINISH_STOP: "stop",
    lm.FINISH_LENGTH: "length",
    lm.FINISH_TOOL_CALLS: "tool_calls",
    lm.FINISH_ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class Served:
    """Who answered; of a stream that went on at another instance, the last one. `degraded`: the model asked for, when
    another one served the request. `resumes`: how often the answer went on elsewhere, known once it has ended; `exact`:
    it is all the same what one instance would have said.
    """

    instance_id: str = ""
    model: str = ""
    attempts: int = 0
    degraded: str = ""
    request_id: str = ""
    resumes: int = 0
    exact: bool = True

    def at_the_end(self, trailers: Iterable[tuple[str, str | bytes]]) -> Served:
        """With what the trailing metadata tells."""
        found: Mapping[str, str] = {key: value for key, value in trailers if isinstance(value, str)}
        resumes = found.get("x-infermesh-resumes", "")
        if not resumes.isdigit():
            return self
        attempts = found.get("x-infermesh-attempts", "")
        return replace(
            self,
            instance_id=found.get("x-infermesh-instance-id", self.instance_id),
            attempts=int(attempts) if attempts.isdigit() else self.attempts,
            resumes=int(resumes),
            exact=found.get("x-infermesh-resume-exact") == "true",
        )


def served(metadata: Iterable[tuple[str, str | bytes]]) -> Served:
    """From the initial metadata of a call."""
    found: Mapping[str, str] = {key: value for key, value in metadata if isinstance(value, str)}
    attempts = found.get("x-infermesh-attempts", "")
    return Served(
        instance_id=found.get("x-infermesh-instance-id", ""),
        model=found.get("x-infermesh-model-id", ""),
        attempts=int(attempts) if attempts.isdigit() else 0,
        degraded=found.get("x-infermesh-degraded", ""),
        request_id=found.get("x-request-id", ""),
    )


@dataclass(slots=True)
class ToolCall:
    id: str = ""
    name: str = ""
    arguments: str = ""  # JSON


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come. `finish`: stop, length, tool_calls, abort; empty while it runs."""

    index: int
    content: str = ""
    reasoning: str = ""
    finish: str = ""
    stop: str | int | None = None  # the stop string or the stop token that ended it
    token_ids: list[int] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[lm.TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Completion:
    """A whole answer to chat or completion."""

    id: str = ""
    model: str = ""  # that served
    created: int = 0  # unix seconds
    choices: list[Choice] = field(default_factory=list)
    usage: inf.Usage = field(default_factory=inf.Usage)
    served: Served = Served()
    prompt_logprobs: list[lm.PositionLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].content if self.choices else ""

    @property
    def got(self) -> str:
        """How far it has come, for people."""
        said = sum(len(choice.content) + len(choice.reasoning) for choice in self.choices)
        tokens = sum(len(choice.token_ids) for choice in self.choices)
        return f"{tokens} tokens" if tokens else f"{said} characters"

    def add(self, event: Any) -> lm.ChatResponse | lm.CompleteResponse:
        """Takes one more event of the stream; returns it as the language model's."""
        if event.HasField("started"):
            self.id, self.model, self.created = event.started.id, event.started.model, event.started.created
            self.prompt_logprobs = list(event.started.prompt_logprobs)
        for delta in event.deltas:
            while len(self.choices) <= delta.choice:
                self.choices.append(Choice(len(self.choices)))
            _grow(self.choices[delta.choice], delta)
        if event.HasField("usage"):
            self.usage = event.usage
        return event


@dataclass(slots=True)
class Answer(Completion):
    """An answer from passages. `[1]` in its text is `cited[0]`; `stages` tells what embedding and reranking did, or
    why they were skipped."""

    cited: list[rt.Cited] = field(default_factory=list)
    stages: list[rt.Stage] = field(default_factory=list)

    def add(self, event: Any) -> lm.ChatResponse | lm.CompleteResponse:
        self.cited += event.cited
        self.stages += event.stages
        return Completion.add(self, event.chat)


def _grow(choice: Choice, delta: lm.Delta) -> None:
    choice.content += delta.content
    choice.reasoning += delta.reasoning
    choice.token_ids += delta.token_ids
    choice.logprobs += delta.logprobs
    for part in delta.tool_calls:
        while len(choice.tool_calls) <= part.index:
            choice.tool_calls.append(ToolCall())
        call = choice.tool_calls[part.index]
        call.id, call.name = part.id or call.id, part.name or call.name
        call.arguments += part.arguments_json
    if delta.finish:
        choice.finish = FINISH.get(delta.finish, "stop")
        which = delta.WhichOneof("stop")
        choice.stop = getattr(delta, which) if which else None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream: the message as it came. `text` is what it adds to the first choice; `so_far` grows along
    and is the whole answer when the stream has ended.
    """

    event: lm.ChatResponse | lm.CompleteResponse
    so_far: Completion

    @property
    def text(self) -> str:
        return "".join(delta.content for delta in self.event.deltas if delta.choice == 0)

    @property
    def reasoning(self) -> str:
        return "".join(delta.reasoning for delta in self.event.deltas if delta.choice == 0)


class Embeddings:
    """Vectors in the order of the inputs: a sequence of lists of floats, and a float32 array for numpy without a copy
    (`numpy.asarray(result)`, shape (inputs, dimensions)).
    """

    def __init__(self, reply: em.EmbedResponse, served: Served = Served()) -> None:
        self._packed = b"".join(vector.packed for vector in reply.vectors)
        self._count = len(reply.vectors)
        self.dimensions = reply.dimensions or (len(self._packed) // 4 // self._count if self._count else 0)
        self.model = reply.model
        self.usage = reply.usage
        self.served = served

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[float]:
        if not -self._count <= index < self._count:
            raise IndexError(index)
        size = 4 * self.dimensions
        start = (index % self._count) * size
        values = array("f", self._packed[start : start + size])
        if sys.byteorder == "big":
            values.byteswap()
        return values.tolist()

    def __iter__(self) -> Iterator[list[float]]:
        return (self[index] for index in range(self._count))

    def tolist(self) -> list[list[float]]:
        return list(self)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        shape = (self._count, self.dimensions)
        return {"version": 3, "typestr": "<f4", "shape": shape, "data": self._packed}


@dataclass(frozen=True, slots=True)
class Hit:
    """A ranked document: its place in the request, and how relevant it is."""

    index: int
    score: float
    document: str = ""


@dataclass(frozen=True, slots=True)
class Rerank:
    """Documents by relevance, the best first."""

    hits: list[Hit]
    model: str
    usage: inf.Usage
    served: Served = Served()

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)


def rerank_result(reply: rr.RerankResponse, served: Served) -> Rerank:
    hits = [Hit(ranked.index, ranked.score, ranked.document) for ranked in reply.results]
    return Rerank(hits, reply.model, reply.usage, served)
