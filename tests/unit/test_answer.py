"""The answer pipeline over a forwarder that answers as told: order, choice, and what a failing stage does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from infermesh.client.requests import answer_request
from infermesh.errors import MeshError, Reason
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1 import retrieve_pb2 as rt
from infermesh.v1.inference_pb2 import Usage
from services.gateway.front import passages
from services.gateway.front.answer import answer
from services.gateway.upstream.calls import Call, Caller, Event, Identity, Method, ModelView

MODELS = [ModelView("large", "llm"), ModelView("vectors", "embedding"), ModelView("ranker", "rerank")]
COLOURS = {"red": (1.0, 0.0), "pink": (0.9, 0.3), "green": (0.0, 1.0), "lime": (0.2, 0.9)}


def packed(text: str) -> bytes:
    """A text is as near to red as its first word."""
    return np.asarray(COLOURS[text.split()[0]], "<f4").tobytes()


@dataclass
class Mesh:
    """Forward and directory in one. `fail`: method -> what it raises. The reranker likes long texts."""

    served: list[ModelView] = field(default_factory=lambda: list(MODELS))
    fail: dict[Method, MeshError] = field(default_factory=dict)
    asked: list[tuple[Method, Any, Call]] = field(default_factory=list)

    def models(self) -> list[ModelView]:
        return self.served

    @asynccontextmanager
    async def open(self, method: Method, request: Any, call: Call) -> AsyncIterator[Any]:
        self.asked.append((method, request, call))
        if method in self.fail:
            raise self.fail[method]
        answers: dict[Method, Callable[[Any], list[Any]]] = {
            Method.EMBED: self._embed, Method.RERANK: self._rerank, Method.CHAT: self._chat
        }  # fmt: skip
        events = [Event(message.SerializeToString(), message) for message in answers[method](request)]

        class Reply:
            identity = Identity(f"{method.name.lower()}-1", request.model)

            async def __aiter__(self) -> AsyncIterator[Event]:
                for event in events:
                    yield event

        yield Reply()

    def _embed(self, request: em.EmbedRequest) -> list[Any]:
        reply = em.EmbedResponse(usage=Usage(prompt_tokens=len(request.texts)))
        for text in request.texts:
            reply.vectors.add(packed=packed(text))
        return [reply]

    def _rerank(self, request: rr.RerankRequest) -> list[Any]:
        order = sorted(range(len(request.documents)), key=lambda index: -len(request.documents[index]))
        ranked = [rr.Ranked(index=index, score=len(request.documents[index])) for index in order]
        return [rr.RerankResponse(results=ranked, usage=Usage(prompt_tokens=7))]

    def _chat(self, request: lm.ChatRequest) -> list[Any]:
        first = lm.ChatResponse(deltas=[lm.Delta(content="yes")], started=lm.Started(id="x", model="large"))
        return [first, lm.ChatResponse(deltas=[lm.Delta(content=" [1]", finish=lm.FINISH_STOP)])]

    def of(self, method: Method) -> list[Any]:
        return [request for one, request, _ in self.asked if one is method]


async def ask(mesh: Mesh, request: rt.AnswerRequest, call: Call = Call("r")) -> list[rt.AnswerResponse]:  # noqa: B008
    found = []
    async with aclosing(answer(request, call, mesh, mesh)) as events:  # type: ignore[arg-type]
        async for _, event in events:
            found.append(rt.AnswerResponse.FromString(event.SerializeToString()))
    return found


def request(*texts: str, **options: Any) -> rt.AnswerRequest:
    given = [{"id": text, "text": text, "document_id": "d", "position": at} for at, text in enumerate(texts)]
    return answer_request("red ?", given, options)


async def test_vectors_then_reranker_then_the_best_in_the_order_of_their_document() -> None:
    mesh = Mesh()
    texts = ("green", "pink and long", "red", "lime is longest of all", "pink")
    first, last = await ask(mesh, request(*texts, rerank_top=3, shown=2))
    # Vectors keep red, pink, pink (not lime); of these the reranker prefers the longest two.
    assert [one.id for one in first.cited] == ["pink and long", "pink"]
    assert [round(one.score) for one in first.cited] == [13, 4]
    assert not last.cited and not last.stages and first.chat.started.id == "x"
    assert [(one.name, one.model, one.instance_id, one.tokens, one.skipped) for one in first.stages] == [
        ("embed", "vectors", "embed-1", 6, ""),
        ("rerank", "ranker", "rerank-1", 7, ""),
    ]
    (chat,) = mesh.of(Method.CHAT)
    assert chat.messages[1].content == "[1] pink and long\n\n[2] pink\n\nQuestion: red ?"
    assert chat.model == "large" and chat.hints.document_id == "d"
    (ranked,) = mesh.of(Method.RERANK)
    assert sorted(ranked.documents) == ["pink", "pink and long", "red"]


async def test_stages_that_decide_nothing_are_left_out() -> None:
    mesh = Mesh()
    (first, _) = await ask(mesh, request("red", "green"))
    assert not first.stages and [method for method, _, _ in mesh.asked] == [Method.CHAT]
    await ask(mesh, request(*(f"red {number}" for number in range(9))))
    assert not mesh.of(Method.EMBED) and len(mesh.of(Method.RERANK)) == 1


async def test_vectors_that_the_caller_has_are_not_computed_again() -> None:
    mesh = Mesh()
    asked = request("lime", "green", "red", rerank_top=1, shown=1)
    for one in asked.candidates:
        one.vector.packed = packed(one.text)
    (first, _) = await ask(mesh, asked)
    (embed,) = mesh.of(Method.EMBED)
    assert list(embed.texts) == ["red ?"] and [one.id for one in first.cited] == ["red"]
    assert first.cited[0].score == pytest.approx(1)


async def test_pinned_passages_come_first_unranked_and_a_follow_up_begins_as_the_question_before() -> None:
    mesh = Mesh()
    pinned = [{"id": "b", "text": "green", "document_id": "z"}, {"id": "a", "text": "lime", "document_id": "z"}]
    asked = request("red", "pink", shown=1, pinned=pinned)
    asked.candidates.add(id="a", text="lime", document_id="z")
    (first, _) = await ask(mesh, asked)
    assert [(one.id, one.pinned) for one in first.cited] == [("b", True), ("a", True), ("pink", False)]
    (chat,) = mesh.of(Method.CHAT)
    assert chat.messages[1].content.startswith("[1] green\n\n[2] lime\n\n[3] pink")
    assert chat.hints.document_id == ""  # of two documents


@pytest.mark.parametrize("reason", [Reason.NO_INSTANCE, Reason.QUEUE_FULL, Reason.DEADLINE_EXCEEDED, Reason.INTERNAL])
async def test_a_stage_that_fails_by_the_meshs_fault_is_skipped_and_told(reason: Reason) -> None:
    mesh = Mesh(fail={Method.EMBED: MeshError(reason, "away"), Method.RERANK: MeshError(reason, "away")})
    (first, _) = await ask(mesh, request("green", "lime", "red", rerank_top=2, shown=1))
    assert [one.id for one in first.cited] == ["green"]  # as they came
    assert [one.skipped for one in first.stages] == [f"{reason.value}: away"] * 2
    without = Mesh(served=MODELS[:1])
    (first, _) = await ask(without, request("green", "lime", "red", rerank_top=2, shown=1))
    assert all("no model of this kind" in one.skipped for one in first.stages) and len(first.stages) == 2


async def test_what_is_the_callers_fault_ends_the_call_in_the_callers_words() -> None:
    denied = MeshError(Reason.PERMISSION_DENIED, "not yours", param="model")
    with pytest.raises(MeshError) as caught:
        await ask(Mesh(fail={Method.RERANK: denied}), request("red", "pink", shown=1))
    assert caught.value.reason is Reason.PERMISSION_DENIED and caught.value.param == "rerank_model"
    with pytest.raises(MeshError) as caught:
        failed = MeshError(Reason.CONTEXT_LENGTH_EXCEEDED, "too long", param="messages")
        await ask(Mesh(fail={Method.CHAT: failed}), request("red"))
    assert caught.value.param == "candidates"


async def test_the_model_of_a_stage_is_named_or_the_only_one_the_caller_may_use() -> None:
    two = [*MODELS, ModelView("small", "llm")]
    with pytest.raises(MeshError, match="large, small") as caught:
        await ask(Mesh(served=two), request("red"))
    assert caught.value.param == "chat_model"
    mesh = Mesh(served=two)
    await ask(mesh, request("red"), Call("r", Caller(models=("small",))))
    await ask(mesh, request("red", chat_model="large"))
    assert [one.model for one in mesh.of(Method.CHAT)] == ["small", "large"]
    aliased = Mesh(served=[*MODELS, ModelView("any", "llm", variants=(("large", 1.0),))])
    await ask(aliased, request("red"))
    await ask(aliased, request("red"), Call("r", Caller(models=("any",))))
    assert [one.model for one in aliased.of(Method.CHAT)] == ["large", "any"]
    with pytest.raises(MeshError) as caught:
        await ask(Mesh(served=MODELS[1:]), request("red"))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


async def test_stages_share_one_trace_and_get_a_part_of_the_time() -> None:
    mesh = Mesh()
    now = asyncio.get_running_loop().time()
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    call = Call("r", deadline=now + 8, trace=trace)
    await ask(mesh, request("red", "pink", "lime", rerank_top=2, shown=1), call)
    assert all(call.trace == trace for _, _, call in mesh.asked)
    limits = {method: call.deadline for method, _, call in mesh.asked}
    assert limits[Method.CHAT] == now + 8
    for method in (Method.EMBED, Method.RERANK):
        assert limits[method] is not None and now + 1 < limits[method] <= now + 3
    assert {call.request_id for _, _, call in mesh.asked} == {"r", "r-embed", "r-rerank"}


BAD = [
    ({"question": " "}, "question"),
    ({"candidates": []}, "candidates"),
    ({"candidates": [rt.Passage(text=" ")]}, "candidates[0].text"),
    ({"candidates": [rt.Passage(text="a", id="x"), rt.Passage(text="b", id="x")]}, "candidates[1].id"),
    ({"candidates": [rt.Passage(text="a", document_id="é" * 129)]}, "candidates[0].document_id"),
    ({"candidates": [rt.Passage(text="a")] * 2049}, "candidates"),
    ({"pinned": [rt.Passage(text="")]}, "pinned[0].text"),
    ({"top_k": 101}, "top_k"),
    ({"rerank_top": 1001}, "rerank_top"),
    ({"sampling": lm.Sampling(n=2)}, "sampling.n"),
]


@pytest.mark.parametrize(("change", "param"), BAD)
def test_bad_questions_are_refused_by_the_fields_name(change: dict[str, Any], param: str) -> None:
    fields = {"question": "q", "candidates": [rt.Passage(text="a")]} | change
    with pytest.raises(MeshError) as caught:
        passages.question(rt.AnswerRequest(**fields))
    assert caught.value.reason is Reason.INVALID_ARGUMENT and caught.value.param == param


def test_vectors_must_be_of_one_length_and_zero_is_like_nothing() -> None:
    odd = rt.AnswerRequest(question="q")
    for size in (8, 4):
        odd.candidates.add(text=f"t{size}").vector.packed = bytes(size)
    with pytest.raises(MeshError, match="one length"):
        passages.question(odd)
    with pytest.raises(MeshError, match="1 components, while the embedding model gives 2"):
        passages.similarities(bytes(8), [bytes(4)])
    red = np.asarray([1, 0], "<f4").tobytes()
    nan = np.asarray([np.nan, 1], "<f4").tobytes()
    assert passages.similarities(red, [bytes(8), nan, red]) == [0.0, 0.0, 1.0]
