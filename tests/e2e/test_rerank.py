"""The rerank service as a process: MiniLM as bi-encoder, and a tiny real cross-encoder."""

import asyncio
import itertools
import math
import shutil
import time

import grpc
import grpc.aio
import numpy as np
import psutil
import pytest

from infermesh.errors import Reason, from_rpc
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1 import rerank_pb2_grpc
from tests.kit.embedding import MODEL, cross_encoder, encoding_service, reference

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
TOLERANCE = 1e-5
QUESTION = "How long does the battery of the headphones last?"
ANSWER = "On a full charge they play music for about thirty hours."
UNRELATED = [
    "The parliament passed the tax bill on Thursday.",
    "Bake the bread at 220 degrees for forty minutes.",
    "Glaciers move a few metres a year.",
    "The striker scored twice in the second half.",
    "Photosynthesis turns light into chemical energy.",
    "The train to Lyon leaves from platform four.",
    "Her third novel is set in Lisbon.",
    "Interest rates rose by a quarter point.",
    "Cats sleep for most of the day.",
    "The bridge was built in 1889.",
]
LONG = "A long passage about many things, none of which matters here. " * 60
DOCUMENTS = [ANSWER, *UNRELATED, LONG, "", "日本語の文書", "Größe 🙂", "x" * 2000, "a " * 58, "a " * 119, "a " * 130]
QUERIES = [QUESTION, "why " * 150, "?"]


@pytest.fixture(scope="module")
def bi(tmp_path_factory):
    with encoding_service("rerank", tmp_path_factory.mktemp("bi")) as running:
        yield running


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return cross_encoder(tmp_path_factory.mktemp("tiny-cross-encoder"))


@pytest.fixture(scope="module", params=["auto", "torch"])
def cross(tmp_path_factory, model_folder, request):
    folder = tmp_path_factory.mktemp("cross")
    options = ("--model", "tiny", "--source", str(model_folder), "--backend", request.param, "--replicas", "2")
    with encoding_service("rerank", folder, *options) as running:
        yield running


@pytest.fixture(scope="module")
def library(model_folder):
    pairs = list(itertools.product(QUERIES, DOCUMENTS))
    cut = [(QUESTION, "one two three four"), (QUESTION, "one")]
    jobs = {"scores": (pairs, {}), "raw": (pairs, {"raw": True}), "cut": (cut, {})}
    return reference("predict", jobs, str(model_folder))


async def rerank(service, request, model=""):
    request.model = request.model or model
    async with service.aio_channel() as channel:
        call = rerank_pb2_grpc.RerankServiceStub(channel).Rerank(request)
        reply = await call
        metadata = dict(await call.initial_metadata())
    assert metadata["x-infermesh-model-id"] == request.model == reply.model
    return reply


def by_index(reply):
    found = {hit.index: hit.score for hit in reply.results}
    return np.array([found[index] for index in range(len(found))])


async def test_an_answer_ranks_above_unrelated_passages(bi):
    documents = [*UNRELATED[:5], ANSWER, *UNRELATED[5:]]
    reply = await rerank(bi, rr.RerankRequest(query=QUESTION, documents=documents, return_documents=True), MODEL)
    assert (reply.results[0].index, reply.results[0].document) == (5, ANSWER)
    scores = [hit.score for hit in reply.results]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 11
    assert reply.usage.prompt_tokens > 80


async def test_bi_encoder_scores_are_the_cosine(bi):
    texts = [QUESTION, ANSWER, UNRELATED[0], LONG]
    vectors = reference("encode", {"v": (texts, {})})["v"]
    reply = await rerank(bi, rr.RerankRequest(query=QUESTION, documents=texts[1:]), MODEL)
    assert np.abs(by_index(reply) - vectors[1:] @ vectors[0]).max() <= TOLERANCE
    assert not any(hit.document for hit in reply.results)


async def test_top_n_and_ties_in_the_caller_s_order(bi):
    documents = [UNRELATED[0], ANSWER, ANSWER, UNRELATED[1]]
    reply = await rerank(bi, rr.RerankRequest(query=QUESTION, documents=documents, top_n=2), MODEL)
    assert [hit.index for hit in reply.results] == [1, 2]


async def test_what_is_registered(bi, cross):
    assert bi.describe().metadata["scorer"] == "bi-encoder"
    meta = cross.describe().metadata
    assert (meta["scorer"], meta["context_max"], meta["replicas"]) == ("cross-encoder", "128", "2")
    assert float(meta["tokens_per_s"]) > 0


@pytest.mark.parametrize("raw", [False, True])
async def test_cross_encoder_scores_equal_those_of_the_library(cross, library, raw):
    replies = await asyncio.gather(
        *(rerank(cross, rr.RerankRequest(query=q, documents=DOCUMENTS, raw_scores=raw), "tiny") for q in QUERIES)
    )
    found = np.concatenate([by_index(reply) for reply in replies])
    expected = library["raw" if raw else "scores"]
    assert np.ptp(expected) > 0.05, "the reference tells nothing apart"
    assert np.abs(found - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())


async def test_raw_scores_are_before_the_activation(cross):
    plain, raw = [
        by_index(await rerank(cross, rr.RerankRequest(query="q", documents=UNRELATED, raw_scores=flag), "tiny"))
        for flag in (False, True)
    ]
    assert [1 / (1 + math.exp(-score)) for score in raw] == pytest.approx(plain, abs=1e-5)


async def test_documents_are_cut_at_the_callers_bound(cross, library):
    request = rr.RerankRequest(query=QUESTION, documents=["one two three four five", "one"])
    request.max_tokens_per_document = 4
    reply = await rerank(cross, request, "tiny")
    assert np.abs(by_index(reply) - library["cut"]).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("request_", "reason", "param"),
    [
        (rr.RerankRequest(documents=["a"]), Reason.INVALID_ARGUMENT, "query"),
        (rr.RerankRequest(query="q"), Reason.INVALID_ARGUMENT, "documents"),
        (rr.RerankRequest(query="q", documents=["a"] * 2049), Reason.INVALID_ARGUMENT, "documents"),
        (rr.RerankRequest(query="q", documents=["a"], model="nope"), Reason.MODEL_NOT_FOUND, "model"),
        (rr.RerankRequest(query="q", documents=["a"], truncation=7), Reason.INVALID_ARGUMENT, "truncation"),
        (
            rr.RerankRequest(query="q", documents=["a", LONG], truncation=em.TRUNCATION_NONE),
            Reason.CONTEXT_LENGTH_EXCEEDED,
            "documents[1]",
        ),
        (
            rr.RerankRequest(
                query="q", documents=["a", "a b c d"], max_tokens_per_document=3, truncation=em.TRUNCATION_NONE
            ),
            Reason.CONTEXT_LENGTH_EXCEEDED,
            "documents[1]",
        ),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(bi, cross, request_, reason, param):
    for service, model in ((bi, MODEL), (cross, "tiny")):
        sent = rr.RerankRequest()
        sent.CopyFrom(request_)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rerank(service, sent, model)
        error = from_rpc(caught.value)
        assert (error.reason, error.param) == (reason, param)


async def test_a_killed_replica_loses_no_request(cross):
    async def ask():
        return by_index(await rerank(cross, rr.RerankRequest(query=QUESTION, documents=DOCUMENTS * 20), "tiny"))

    expected = await ask()
    asking = [asyncio.create_task(ask()) for _ in range(8)]
    await asyncio.sleep(0.2)
    cross.replicas()[-1].kill()
    for scores in await asyncio.gather(*asking):
        assert np.abs(scores - expected).max() <= TOLERANCE


@pytest.mark.slow
def test_the_service_dies_when_no_replica_can_be_started(tmp_path, model_folder):
    doomed = shutil.copytree(model_folder, tmp_path / "doomed")
    options = ("--model", "tiny", "--source", str(doomed), "--backend", "torch")
    # Leaving the block expects exit code 0, and shows the log otherwise.
    with pytest.raises(AssertionError, match="the engine is dead"):
        with encoding_service("rerank", tmp_path, *options) as service:
            (doomed / "model.safetensors").unlink()
            service.replicas()[0].kill()
            deadline = time.monotonic() + 240
            while service.process.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline, "it did not die"
                time.sleep(0.2)
