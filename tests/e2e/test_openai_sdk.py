"""OpenAI's own SDK, unmodified, against a whole mesh."""

from __future__ import annotations

import base64
import struct

import numpy as np
import openai
import pytest

from tests.kit.embedding import MODEL, reference
from tests.kit.processes import KEY, POOR_KEY

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
HELLO = [{"role": "user", "content": "hello there"}]
WORDS = " w0 w1 w2 w3 w4"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as made:
        yield made


def test_models(client):
    by_kind = {model.kind: model for model in client.models.list()}
    assert set(by_kind) == {"llm", "embedding", "rerank"}
    assert by_kind["llm"].id == "chat" and by_kind["embedding"].id == MODEL
    one = client.models.retrieve("chat")
    assert one.id == "chat" and one.object == "model" and one.max_model_len > 0


def test_chat(client):
    raw = client.chat.completions.with_raw_response.create(
        model="chat", messages=HELLO, max_completion_tokens=5, temperature=0, user="me"
    )
    reply = raw.parse()
    assert reply.choices[0].message.content == WORDS
    assert reply.choices[0].message.role == "assistant" and reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 5 > 5
    assert reply.model == "chat" and reply.object == "chat.completion" and reply.created > 1_700_000_000
    assert raw.headers["x-infermesh-model-id"] == "chat" and raw.headers["x-infermesh-instance-id"]
    assert raw.headers["x-infermesh-attempts"] == "1" and raw.headers["x-infermesh-ignored"] == "user"


def test_chat_stream_with_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="chat",
            messages=HELLO,
            max_tokens=5,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == WORDS
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5


def test_the_stream_helper_of_the_sdk(client):
    with client.chat.completions.stream(model="chat", messages=HELLO, stop=" w5", temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and final.choices[0].message.content == WORDS


def test_logprobs(client):
    reply = client.chat.completions.create(
        model="chat", messages=HELLO, max_tokens=2, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = reply.choices[0].logprobs.content
    assert [entry.token for entry in entries] == [" w0", " w1"]
    assert all(entry.logprob <= 0 and bytes(entry.bytes).decode() == entry.token for entry in entries)


@pytest.mark.parametrize(("prompt", "count"), [("one two", 1), (["one", "two"], 2), ([5, 6, 7], 1), ([[5], [6]], 2)])
def test_completions(client, prompt, count):
    reply = client.completions.create(model="chat", prompt=prompt, max_tokens=3, temperature=0)
    assert [choice.text for choice in reply.choices] == [" w0 w1 w2"] * count
    assert [choice.index for choice in reply.choices] == list(range(count))
    assert reply.usage.completion_tokens == 3 * count
    texts = [""] * count
    for chunk in client.completions.create(model="chat", prompt=prompt, max_tokens=3, temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [" w0 w1 w2"] * count


def test_completion_echo(client):
    reply = client.completions.create(model="chat", prompt="one two", max_tokens=2, temperature=0, echo=True)
    assert reply.choices[0].text == "one two w0 w1"


def test_embeddings(client):
    texts = ["the quick brown fox", "a lazy dog", "größe 🙂"]
    expected = reference("encode", {"texts": (texts, {})})["texts"]
    # The SDK asks for base64 on its own; floats must be asked for.
    packed = client.embeddings.create(model=MODEL, input=texts)
    floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    for reply in (packed, floats):
        vectors = np.array([entry.embedding for entry in reply.data])
        assert np.abs(vectors - expected).max() < 1e-5
        assert [entry.index for entry in reply.data] == [0, 1, 2]
        assert reply.usage.prompt_tokens > 3 and reply.model == MODEL
    raw = client.embeddings.create(model=MODEL, input="one", encoding_format="base64").data[0].embedding
    assert len(struct.unpack("<384f", base64.b64decode(raw))) == 384


def test_typed_errors(served, client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HELLO)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="chat", messages=HELLO, max_tokens=-1)
    assert bad.value.param == "max_tokens" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model="chat", messages=HELLO, extra_body={"frobnicate": 1})
    assert unknown.value.param == "frobnicate"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "word " * 200_000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=POOR_KEY, max_retries=0) as poor:
        with pytest.raises(openai.RateLimitError) as spent:
            for _ in range(5):
                poor.chat.completions.create(model="chat", messages=HELLO, max_tokens=10)
    assert spent.value.code == "rate_limited"
    assert int(spent.value.response.headers["retry-after-ms"]) > 0


def test_leaving_a_stream_frees_the_engine(served, client):
    stream = client.chat.completions.create(model="chat", messages=HELLO, max_tokens=100_000, stream=True)
    next(iter(stream))
    stream.close()
    reply = client.chat.completions.create(model="chat", messages=HELLO, max_tokens=5, temperature=0)
    assert reply.choices[0].message.content == WORDS


async def test_the_async_client(served):
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
        stream = await client.chat.completions.create(
            model="chat", messages=HELLO, max_tokens=5, temperature=0, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == WORDS
