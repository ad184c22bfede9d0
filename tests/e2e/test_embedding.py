"""The embedding service as a process with two real MiniLM replicas."""

import asyncio
import os
import time

import grpc
import grpc.aio
import numpy as np
import pytest

from infermesh.errors import Reason, from_rpc
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import embedding_pb2_grpc
from infermesh.v1.inference_pb2 import Hints, Relay, TokenIds
from tests.kit.embedding import MODEL, encoding_service, reference

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
LONG = "The quick brown fox jumps over the lazy dog. " * 120
TEXTS = [
    *(f"sentence number {n} about {('cats', 'tax law', 'gRPC', 'rain')[n % 4]}" for n in range(24)),
    *(" ".join(["word"] * n) for n in (1, 2, 3, 60, 100, 250, 254, 255, 400)),
    *("", " ", "\n\t")[1:],
    *(
        "Größe und Straße",
        "日本語のテキスト",
        "Привет, мир",
        "مرحبا بالعالم",
        "🙂🙃🤖",
        "e\u0301 vs \u00e9",
        "\u200bzero\u200bwidth",
    ),
    *(
        "a",
        "I",
        "?",
        "!!!",
        "C++ & Rust <tags> {json: true}",
        "UPPER lower MiXeD",
        "NUL\x00inside",
        "tab\tnewline\nend",
    ),
    *(LONG, LONG.upper(), "日本語" * 300, "x" * 5000, "supercalifragilisticexpialidocious " * 50),
    *("https://example.org/a?b=c#d", "SELECT * FROM t;", "def f(x):\n    return x", "-1.5e-10", "…—–"),
    *("The cat sat on the mat.", "A feline rested on the rug.", "Stocks fell sharply today.", "12345 67890", "…"),
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    with encoding_service("embedding", folder, "--replicas", "2", "--alias", "minilm") as running:
        yield running


STREAMED = ["first", *(f"text {n} {'x ' * (n % 7) * 20}" for n in range(1, 60))]


@pytest.fixture(scope="module")
def library():
    """What the library gives, by name."""
    unit = {"normalize_embeddings": True}
    jobs = {
        "texts": (TEXTS, {}),
        "short": (TEXTS[:8], {"truncate_dim": 64, **unit}),
        "prefixed": (["what is grpc?"], {"prompt": "query: "}),
        "tasked": (["what is grpc?"], {"prompt_name": "query"}),
        "hello": (["hello world"], {}),
        "streamed": (STREAMED, {"truncate_dim": 32, **unit}),
    }
    return reference("encode", jobs)


@pytest.fixture
def expected(library):
    return library["texts"]


@pytest.fixture
async def stub(service):
    async with service.aio_channel() as channel:
        yield embedding_pb2_grpc.EmbeddingServiceStub(channel)


def matrix(reply):
    rows = [np.frombuffer(vector.packed, "<f4") for vector in reply.vectors]
    assert {len(row) for row in rows} == {reply.dimensions}
    return np.stack(rows)


def distance(one, other):
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)


async def test_vectors_equal_those_of_the_library(stub, service, expected):
    assert len(TEXTS) >= 60
    call = stub.Embed(em.EmbedRequest(model=MODEL, texts=TEXTS))
    reply = await call
    assert distance(matrix(reply), expected) <= TOLERANCE
    assert reply.model == MODEL
    metadata = dict(await call.initial_metadata())
    assert metadata["x-infermesh-instance-id"] == service.describe().instance_id
    assert metadata["x-infermesh-model-id"] == MODEL
    one_by_one = await asyncio.gather(*(stub.Embed(em.EmbedRequest(model="minilm", texts=[text])) for text in TEXTS))
    assert distance(np.concatenate([matrix(reply) for reply in one_by_one]), expected) <= TOLERANCE


async def test_usage_counts_special_tokens_and_truncation(stub):
    reply = await stub.Embed(em.EmbedRequest(model=MODEL, texts=["hello world", "hello", LONG]))
    assert reply.usage.prompt_tokens == 4 + 3 + 256


async def test_what_is_registered(service):
    reply = service.describe()
    meta = reply.metadata
    assert float(meta["fixed_ms"]) > 0
    assert float(meta["tokens_per_s"]) > 500
    assert meta["speed_source"] == "observed"
    assert meta["context_max"] == "256"
    assert meta["dims"] == "384"
    assert meta["backend"] in ("torch", "openvino")
    assert (meta["replicas"], len(service.replicas())) == ("2", 2)
    assert len(meta["weights_version"]) == 16
    assert "token_ids" in meta["features"].split(",")
    assert meta["engine_version"].startswith("sentence-transformers")
    for name in ("running", "waiting", "queued_tokens", "steps"):
        assert reply.load.HasField(name)


async def test_dimensions_and_normalisation(stub, library):
    texts = TEXTS[:8]
    short = matrix(await stub.Embed(em.EmbedRequest(model=MODEL, texts=texts, dimensions=64, normalize=True)))
    assert distance(short, library["short"]) <= TOLERANCE
    raw = matrix(await stub.Embed(em.EmbedRequest(model=MODEL, texts=texts, normalize=False)))
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert not np.allclose(lengths, 1, atol=0.05)
    assert distance(raw / lengths, library["texts"][:8]) <= TOLERANCE
    unset = matrix(await stub.Embed(em.EmbedRequest(model=MODEL, texts=texts, dimensions=64)))
    assert np.allclose(np.linalg.norm(unset, axis=1), 1)


async def test_truncation_at_either_end(stub):
    words = [f"w{n}" for n in range(400)]
    text = " ".join(words)
    whole = await stub.Embed(em.EmbedRequest(model=MODEL, texts=[text], max_tokens=32))
    assert whole.usage.prompt_tokens == 32
    # Every "wN" is at least two tokens, so the ends alone decide.
    cut = em.TRUNCATION_START
    end = matrix(await stub.Embed(em.EmbedRequest(model=MODEL, texts=[text], max_tokens=32, truncation=cut)))
    tail = " ".join(words[200:])
    same = matrix(await stub.Embed(em.EmbedRequest(model=MODEL, texts=[tail], max_tokens=32, truncation=cut)))
    assert distance(end, same) <= TOLERANCE
    assert distance(end, matrix(whole)) > 0.01


async def test_prefix_task_and_token_ids(stub, library):
    prefixed = matrix(await stub.Embed(em.EmbedRequest(model=MODEL, texts=["what is grpc?"], prefix="query: ")))
    assert distance(prefixed, library["prefixed"]) <= TOLERANCE
    tasked = matrix(await stub.Embed(em.EmbedRequest(model=MODEL, texts=["what is grpc?"], task="query")))
    assert distance(tasked, library["tasked"]) <= TOLERANCE
    ids = TokenIds(ids=[101, 7592, 2088, 102])
    reply = await stub.Embed(em.EmbedRequest(model=MODEL, token_ids=[ids]))
    assert reply.usage.prompt_tokens == 4
    assert distance(matrix(reply), library["hello"]) <= TOLERANCE


REFUSALS = {
    "nothing": (em.EmbedRequest(), Reason.INVALID_ARGUMENT, "texts"),
    "empty text": (em.EmbedRequest(texts=["a", ""]), Reason.INVALID_ARGUMENT, "texts[1]"),
    "both": (em.EmbedRequest(texts=["a"], token_ids=[TokenIds(ids=[1])]), Reason.INVALID_ARGUMENT, "texts"),
    "too many": (em.EmbedRequest(texts=["a"] * 2049), Reason.INVALID_ARGUMENT, "texts"),
    "too long": (
        em.EmbedRequest(texts=["a", LONG], truncation=em.TRUNCATION_NONE),
        Reason.CONTEXT_LENGTH_EXCEEDED,
        "texts[1]",
    ),
    "too many ids": (
        em.EmbedRequest(token_ids=[TokenIds(ids=[5] * 300)], truncation=em.TRUNCATION_NONE),
        Reason.CONTEXT_LENGTH_EXCEEDED,
        "token_ids[0]",
    ),
    "unknown id": (
        em.EmbedRequest(token_ids=[TokenIds(ids=[5]), TokenIds(ids=[30522])]),
        Reason.INVALID_ARGUMENT,
        "token_ids[1]",
    ),
    "huge id": (em.EmbedRequest(token_ids=[TokenIds(ids=[2**32 - 1])]), Reason.INVALID_ARGUMENT, "token_ids[0]"),
    "dimensions": (em.EmbedRequest(texts=["a"], dimensions=385), Reason.INVALID_ARGUMENT, "dimensions"),
    "max_tokens": (em.EmbedRequest(texts=["a"], max_tokens=257), Reason.INVALID_ARGUMENT, "max_tokens"),
    "no room": (em.EmbedRequest(texts=["a"], max_tokens=2), Reason.INVALID_ARGUMENT, "max_tokens"),
    "task": (em.EmbedRequest(texts=["a"], task="poetry"), Reason.INVALID_ARGUMENT, "task"),
    "task and prefix": (em.EmbedRequest(texts=["a"], task="query", prefix="x"), Reason.INVALID_ARGUMENT, "prefix"),
    "prefix and ids": (
        em.EmbedRequest(token_ids=[TokenIds(ids=[5])], prefix="x"),
        Reason.INVALID_ARGUMENT,
        "prefix",
    ),
    "priority": (em.EmbedRequest(texts=["a"], hints=Hints(priority=1000)), Reason.INVALID_ARGUMENT, "hints.priority"),
    "salt": (
        em.EmbedRequest(texts=["a"], relay=Relay(cache_salt=b"x" * 65)),
        Reason.INVALID_ARGUMENT,
        "relay.cache_salt",
    ),
    "truncation": (em.EmbedRequest(texts=["a"], truncation=9), Reason.INVALID_ARGUMENT, "truncation"),
    "model": (em.EmbedRequest(texts=["a"], model="nope"), Reason.MODEL_NOT_FOUND, "model"),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_cannot_be_served_is_refused_by_name(stub, name):
    request, reason, param = REFUSALS[name]
    sent = em.EmbedRequest()
    sent.CopyFrom(request)
    sent.model = sent.model or MODEL
    error = await refusal(stub.Embed(sent))
    assert (error.reason, error.param) == (reason, param)


def test_replicas_are_of_their_services_session(service):
    """Who kills the session of a service that was lost (`up`, before a restart) finds its replicas there."""
    assert {os.getsid(replica.pid) for replica in service.replicas()} == {os.getsid(service.process.pid)}


async def test_small_requests_share_batches(stub, service):
    before = service.load().steps
    requests = [em.EmbedRequest(model=MODEL, texts=[f"request {n}"]) for n in range(64)]
    replies = await asyncio.gather(*(stub.Embed(request) for request in requests))
    assert all(len(reply.vectors) == 1 for reply in replies)
    assert service.load().steps - before <= 40


async def test_a_request_that_nobody_waits_for_is_not_computed(stub, service):
    texts = [f"{LONG} {n}" for n in range(1000)]
    began = time.monotonic()
    call = stub.Embed(em.EmbedRequest(model=MODEL, texts=texts))
    while not service.load().queued_tokens:
        assert time.monotonic() - began < 20
        await asyncio.sleep(0.02)
    call.cancel()
    while (load := service.load()).queued_tokens or load.waiting or load.running:
        assert time.monotonic() - began < 20
        await asyncio.sleep(0.02)
    began = time.monotonic()
    await stub.Embed(em.EmbedRequest(model=MODEL, texts=["still there?"]))
    assert time.monotonic() - began < 10  # computing all of it takes a minute


async def test_a_query_does_not_wait_for_the_whole_of_a_large_request(stub):
    large = stub.Embed(em.EmbedRequest(model=MODEL, texts=[LONG] * 300, hints=Hints(priority=-1)))
    await asyncio.sleep(0.3)
    began = time.monotonic()
    await stub.Embed(em.EmbedRequest(model=MODEL, texts=["a short question"]))
    took = time.monotonic() - began
    assert not large.done()
    began = time.monotonic()
    assert len((await large).vectors) == 300
    assert took < 2 + (time.monotonic() - began) / 2, "it waited for most of the large one"


async def test_a_killed_replica_loses_no_request(stub, service, expected):
    async def ask(n):
        await asyncio.sleep(0.03 * n)
        return await stub.Embed(em.EmbedRequest(model=MODEL, texts=TEXTS))

    asking = [asyncio.create_task(ask(n)) for n in range(12)]
    await asyncio.sleep(0.25)
    victim = service.replicas()[0]
    victim.kill()
    for reply in await asyncio.gather(*asking):
        assert distance(matrix(reply), expected) <= TOLERANCE
    deadline = time.monotonic() + 60
    while len(service.replicas()) < 2 or victim in service.replicas():
        assert time.monotonic() < deadline, "the replica was not replaced"
        await asyncio.sleep(0.1)


async def test_a_stream_keeps_its_order_and_inherits_options(stub, library):
    async def batches():
        yield em.EmbedStreamRequest(
            tag=100, batch=em.EmbedRequest(model=MODEL, texts=["first"], dimensions=32, normalize=True)
        )
        for n in range(1, 60):
            yield em.EmbedStreamRequest(tag=100 + n, batch=em.EmbedRequest(texts=[STREAMED[n]]))

    replies = [reply async for reply in stub.EmbedStream(batches())]
    assert [reply.tag for reply in replies] == list(range(100, 160))
    assert {reply.batch.dimensions for reply in replies} == {32}
    found = np.concatenate([matrix(reply.batch) for reply in replies])
    assert distance(found, library["streamed"]) <= TOLERANCE


async def test_a_bad_batch_ends_the_stream_after_the_good_ones(stub):
    async def batches():
        for n in range(3):
            yield em.EmbedStreamRequest(tag=n, batch=em.EmbedRequest(model=MODEL, texts=["good"]))
        yield em.EmbedStreamRequest(tag=3, batch=em.EmbedRequest(texts=[""]))

    tags = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for reply in stub.EmbedStream(batches()):
            tags.append(reply.tag)
    error = from_rpc(caught.value)
    assert tags == [0, 1, 2]
    assert (error.reason, error.param) == (Reason.INVALID_ARGUMENT, "texts[0]")


@pytest.mark.slow
async def test_a_long_stream_with_a_slow_reader_takes_no_memory(stub, service):
    total, texts = 5000, ["one two", "three", "four five six", "seven"]
    sent = 0

    async def batches():
        nonlocal sent
        for n in range(total):
            yield em.EmbedStreamRequest(tag=n, batch=em.EmbedRequest(model=MODEL, texts=texts))
            sent += 1

    memory, peak, seen = 0, 0, 0
    async for reply in stub.EmbedStream(batches()):
        assert reply.tag == seen
        seen += 1
        if seen == 300:
            memory = service.process.memory_info().rss
        if seen % 500 == 0:
            await asyncio.sleep(0.5)  # reads nothing meanwhile
            peak = max(peak, service.process.memory_info().rss)
    assert (seen, sent) == (total, total)
    # All replies together are 30 MB.
    assert peak - memory < 12 << 20


async def test_a_stream_that_is_left_leaves_nothing_behind(stub, service):
    async def batches():
        for n in range(1000):
            yield em.EmbedStreamRequest(tag=n, batch=em.EmbedRequest(model=MODEL, texts=[LONG] * 20))

    call = stub.EmbedStream(batches())
    assert (await call.read()).tag == 0
    call.cancel()
    deadline = time.monotonic() + 30  # all of it takes many minutes
    while (load := service.load()).queued_tokens or load.running or load.waiting:
        assert time.monotonic() < deadline, load
        await asyncio.sleep(0.05)
