"""Sampling, logprobs, prefix cache and cancellation of the LLM service on real vLLM, against vLLM itself."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from infermesh.errors import Reason
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay, Resume, TokenIds
from infermesh.v1.worker_pb2 import DescribeRequest
from tests.kit.llm import BLOCK, CONTEXT, llm_python
from tests.kit.llm_client import GREEDY, MODEL, Client
from tests.kit.mesh import until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]
REFERENCE = Path(__file__).resolve().parents[1] / "kit" / "vllm_reference.py"
PROMPTS = ["What is the weather", "Once upon a time there was", "def add(a, b):", "用户问:今天", "The answer is 4"]
QUESTIONS = ["Hi there", "Name a city.", "今天天气怎么样?"]
TOKENS = 96


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> dict[str, Any]:
    asked = {
        "model": str(tiny_model),
        "max_model_len": CONTEXT,
        "block_size": BLOCK,
        "max_tokens": TOKENS,
        "prompts": PROMPTS,
        "chats": [[{"role": "user", "content": question}] for question in QUESTIONS],
    }
    return json.loads(llm_python(str(REFERENCE), input=json.dumps(asked)).strip().splitlines()[-1])


async def test_greedy_completion_equals_vllm_offline(vllm: Client, reference: dict[str, Any]) -> None:
    for prompt, ids, text in zip(PROMPTS, reference["prompts"], reference["texts"], strict=True):
        answer = await vllm.complete(prompt, sampling=lm.Sampling(max_tokens=TOKENS, **GREEDY))
        assert answer.ids() == ids
        assert answer.text() == text
        assert len(ids) == TOKENS and len(set(ids)) >= 30, "a model that repeats itself would prove nothing"
        assert answer.usage.completion_tokens == TOKENS
        assert answer.finish() == lm.FINISH_LENGTH


async def test_greedy_chat_equals_vllm_offline(vllm: Client, reference: dict[str, Any]) -> None:
    for question, ids in zip(QUESTIONS, reference["chats"], strict=True):
        answer = await vllm.chat(question, sampling=lm.Sampling(max_tokens=TOKENS, **GREEDY))
        assert answer.ids() == ids and len(set(ids)) >= 30


async def test_token_ids_continue_like_their_text(vllm: Client, reference: dict[str, Any]) -> None:
    prompt = (await vllm.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text=PROMPTS[0]))).token_ids
    whole = reference["prompts"][0]
    answer = await vllm.complete(
        token_ids=TokenIds(ids=[*prompt, *whole[:40]]), sampling=lm.Sampling(max_tokens=TOKENS - 40, **GREEDY)
    )
    assert answer.ids() == whole[40:]


async def test_one_event_an_engine_step(vllm: Client) -> None:
    answer = await vllm.complete("Once", sampling=lm.Sampling(max_tokens=20, **GREEDY))
    assert 4 <= len(answer.events) <= 20  # fewer only where the reader was slower than the engine
    assert answer.started.prompt_tokens == 1 and answer.started.model == MODEL
    assert all(not event.HasField("started") for event in answer.events[1:])
    assert all(not event.HasField("usage") for event in answer.events[:-1])


async def test_a_shared_prefix_is_cached_but_not_across_tenants(vllm: Client) -> None:
    document = "The gateway counts tokens, not requests. " * 150
    sampling = lm.Sampling(max_tokens=4, **GREEDY)
    first = await vllm.complete(document + "What is the weather?", sampling=sampling)
    second = await vllm.complete(document + "Name a city.", sampling=sampling)
    assert first.usage.cached_tokens == 0
    assert first.usage.prompt_tokens > 1000
    assert second.usage.cached_tokens >= 1000 - BLOCK
    assert second.started.cached_tokens == second.usage.cached_tokens
    other = await vllm.complete(document + "Name a city.", sampling=sampling, relay=Relay(cache_salt=b"acme"))
    assert other.usage.cached_tokens == 0
    again = await vllm.complete(document + "Name a city.", sampling=sampling, relay=Relay(cache_salt=b"acme"))
    assert again.usage.cached_tokens >= 1000 - BLOCK
    assert again.ids() == second.ids()


async def test_choices_do_not_count_each_other_as_cache(vllm: Client) -> None:
    prompt = "Four choices of one prompt compute it once, which is no hit of a cache. " * 40
    sampling = lm.Sampling(max_tokens=2, n=4, temperature=1, ignore_eos=True)
    cold, warm = [await vllm.complete(prompt, sampling=sampling) for _ in range(2)]
    assert cold.usage.prompt_tokens > 500
    assert (cold.started.cached_tokens, cold.usage.cached_tokens) == (0, 0)
    assert warm.usage.cached_tokens >= warm.usage.prompt_tokens - 2 * BLOCK


async def test_a_hundred_vanished_clients_leave_nothing(vllm: Client) -> None:
    sampling = lm.Sampling(max_tokens=3500, ignore_eos=True)
    calls = [vllm.stub.Complete(lm.CompleteRequest(model=MODEL, text=f"{i}", sampling=sampling)) for i in range(100)]
    await asyncio.gather(*(call.read() for call in calls))

    async def all_run() -> bool:
        load = await vllm.load()
        return load.running == 100 and load.kv_used_ratio > 0 and load.resident_tokens > 0

    async def idle() -> bool:
        load = await vllm.load()
        return (load.running, load.waiting, load.kv_used_ratio, load.resident_tokens) == (0, 0, 0, 0)

    await until(all_run)
    for call in calls:
        call.cancel()
    await until(idle, 10)
    steps = (await vllm.load()).steps
    await asyncio.sleep(0.3)
    assert (await vllm.load()).steps == steps, "the engine still computes for nobody"


async def test_a_deadline_reaches_the_engine(vllm: Client) -> None:
    request = lm.CompleteRequest(model=MODEL, text="x", sampling=lm.Sampling(max_tokens=4000, ignore_eos=True))
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in vllm.stub.Complete(request, timeout=0.3):
            pass
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def idle() -> bool:
        return (await vllm.load()).running == 0

    await until(idle, 10)


async def test_stop_strings(vllm: Client, reference: dict[str, Any]) -> None:
    whole = reference["texts"][0]
    stop = next(whole[at : at + 3] for at in range(20, 60) if whole[at : at + 3].isascii())
    cut = whole[: whole.index(stop)]
    sampling = lm.Sampling(max_tokens=TOKENS, stop=[stop, "never there"], **GREEDY)
    answer = await vllm.complete(PROMPTS[0], sampling=sampling)
    assert answer.text() == cut
    assert answer.finish() == lm.FINISH_STOP and answer.deltas[-1].stop_text == stop
    sampling.include_stop = True
    assert (await vllm.complete(PROMPTS[0], sampling=sampling)).text() == cut + stop


async def test_stop_tokens(vllm: Client, reference: dict[str, Any]) -> None:
    ids = reference["prompts"][0]
    token = next(token for at, token in enumerate(ids) if at >= 10 and token not in ids[:at])
    answer = await vllm.complete(PROMPTS[0], sampling=lm.Sampling(max_tokens=TOKENS, stop_token_ids=[token], **GREEDY))
    assert answer.ids() == ids[: ids.index(token) + 1]
    assert answer.finish() == lm.FINISH_STOP and answer.deltas[-1].stop_token == token


async def test_seed_and_n(vllm: Client) -> None:
    sampling = lm.Sampling(max_tokens=24, n=2, seed=7, temperature=1, ignore_eos=True)
    first, second = await vllm.complete("Once", sampling=sampling), await vllm.complete("Once", sampling=sampling)
    assert first.ids(0) != first.ids(1)
    assert [first.ids(0), first.ids(1)] == [second.ids(0), second.ids(1)]
    assert first.usage.completion_tokens == 48
    assert {first.finish(0), first.finish(1)} == {lm.FINISH_LENGTH}
    assert sum(event.HasField("usage") for event in first.events) == 1


async def test_logprobs(vllm: Client) -> None:
    sampling = lm.Sampling(max_tokens=12, logprobs=5, prompt_logprobs=2, **GREEDY)
    answer = await vllm.complete("Once upon a time", sampling=sampling)
    lines = [line for delta in answer.deltas for line in delta.logprobs]
    assert [line.token_id for line in lines] == answer.ids()
    for line in lines:
        assert len(line.top) == 5 and line.top[0].rank == 1
        assert line.logprob == line.top[0].logprob <= 0  # which of two equal ones was taken is not said
        assert [top.logprob for top in line.top] == sorted((top.logprob for top in line.top), reverse=True)
    spelled = b"".join(line.token_bytes for line in lines).decode(errors="replace")
    assert spelled.removesuffix("\ufffd") == answer.text().removesuffix("\ufffd")  # half a character may end it
    positions = answer.started.prompt_logprobs
    prompt = (await vllm.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text="Once upon a time"))).token_ids
    assert [position.candidates[0].token_id for position in positions] == list(prompt[1:])
    # The chance of a whole is the product of its tokens' chances: prompt + answer scored at once gives the same.
    scored = await vllm.complete(
        token_ids=TokenIds(ids=[*prompt, *answer.ids()]), sampling=lm.Sampling(max_tokens=1, prompt_logprobs=0)
    )
    later = [position.candidates[0].logprob for position in scored.started.prompt_logprobs[len(prompt) - 1 :]]
    assert sum(later) == pytest.approx(sum(line.logprob for line in lines), abs=0.3)  # bfloat16


async def test_all_logprobs_without_alternatives(vllm: Client) -> None:
    answer = await vllm.complete("Once", sampling=lm.Sampling(max_tokens=5, logprobs=0, **GREEDY))
    assert [len(line.top) for delta in answer.deltas for line in delta.logprobs] == [0] * 5


async def test_echo_of_token_ids(vllm: Client) -> None:
    ids = (await vllm.stub.Tokenize(lm.TokenizeRequest(model=MODEL, text="Once upon a time"))).token_ids
    answer = await vllm.complete(token_ids=TokenIds(ids=ids), echo=True, sampling=lm.Sampling(max_tokens=3, **GREEDY))
    assert answer.text().startswith("Once upon a time") and len(answer.ids()) == 3
    refused = await vllm.refused(
        vllm.complete(token_ids=TokenIds(ids=[*ids] * 20_000), echo=True, sampling=lm.Sampling(**GREEDY))
    )
    assert refused.reason is Reason.CONTEXT_LENGTH_EXCEEDED


async def test_echo(vllm: Client) -> None:
    answer = await vllm.complete("Once upon", echo=True, sampling=lm.Sampling(max_tokens=3, logprobs=1, **GREEDY))
    plain = await vllm.complete("Once upon", sampling=lm.Sampling(max_tokens=3, **GREEDY))
    assert answer.text() == "Once upon" + plain.text() and answer.ids() == plain.ids()
    assert len(answer.started.prompt_logprobs) == answer.started.prompt_tokens - 1


async def test_min_and_max_tokens(vllm: Client, reference: dict[str, Any]) -> None:
    ids = reference["prompts"][0]
    stop = ids[5]
    answer = await vllm.complete(
        PROMPTS[0], sampling=lm.Sampling(max_tokens=40, min_tokens=20, stop_token_ids=[stop], temperature=0)
    )
    assert 20 <= len(answer.ids()) <= 40 and stop not in answer.ids()[:19]
    one = await vllm.complete(PROMPTS[0], sampling=lm.Sampling(max_tokens=1, temperature=0))
    assert one.ids() == ids[:1] and one.finish() == lm.FINISH_LENGTH


async def test_without_max_tokens_the_context_is_the_bound(vllm: Client) -> None:
    ids = list(range(256, 512)) * 15 + [300] * 200
    answer = await vllm.complete(token_ids=TokenIds(ids=ids), sampling=lm.Sampling(**GREEDY))
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == CONTEXT
    assert answer.finish() == lm.FINISH_LENGTH


async def test_penalties_and_bias_are_obeyed(vllm: Client, reference: dict[str, Any]) -> None:
    whole = reference["prompts"][0]
    first = whole[0]
    barred = await vllm.complete(PROMPTS[0], sampling=lm.Sampling(max_tokens=8, logit_bias={first: -100}, **GREEDY))
    forced = await vllm.complete(PROMPTS[0], sampling=lm.Sampling(max_tokens=8, logit_bias={first: 100}, **GREEDY))
    assert first not in barred.ids() and forced.ids() == [first] * 8
    penalised = await vllm.complete(
        PROMPTS[0], sampling=lm.Sampling(max_tokens=TOKENS, frequency_penalty=2, presence_penalty=2, **GREEDY)
    )
    assert len(set(penalised.ids())) > len(set(whole))


async def test_a_prompt_over_the_context_is_counted(vllm: Client) -> None:
    error = await vllm.refused(vllm.complete(token_ids=TokenIds(ids=[300] * 5000)))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED and "5000" in error.message and str(CONTEXT) in error.message
    error = await vllm.refused(vllm.complete("The weather " * 3000))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    (count,) = re.findall(r"has (\d+) tokens", error.message)
    assert int(count) > CONTEXT + 1, "counted, not cut off"
    error = await vllm.refused(vllm.chat("weather " * 40_000))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"sampling": lm.Sampling(stop_token_ids=[5000])}, Reason.INVALID_ARGUMENT, "sampling.stop_token_ids"),
        ({"sampling": lm.Sampling(logit_bias={9999: 1})}, Reason.INVALID_ARGUMENT, "sampling.logit_bias"),
        ({"relay": Relay(resume=Resume(token_ids=[9999]))}, Reason.INVALID_ARGUMENT, "relay.resume.token_ids"),
        ({"sampling": lm.Sampling(max_tokens=-1)}, Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
        ({"sampling": lm.Sampling(max_tokens=2**62)}, Reason.INVALID_ARGUMENT, "sampling.max_tokens"),
        ({"sampling": lm.Sampling(n=16384)}, Reason.INVALID_ARGUMENT, "sampling.n"),
        ({"lora": "a"}, Reason.UNSUPPORTED, "lora"),
    ],
)
async def test_bad_fields_are_named(vllm: Client, fields: dict[str, Any], reason: Reason, param: str) -> None:
    error = await vllm.refused(vllm.complete("x", **fields))
    assert (error.reason, error.param) == (reason, param)


async def test_unknown_token_ids_are_refused(vllm: Client) -> None:
    error = await vllm.refused(vllm.complete(token_ids=TokenIds(ids=[1, 70_000])))
    assert error.reason is Reason.INVALID_ARGUMENT and error.param == "prompt"


async def test_it_describes_itself(vllm: Client) -> None:
    told = (await vllm.worker.Describe(DescribeRequest())).metadata
    assert told["engine"] == "vllm" and told["device"] == "cpu" and told["dtype"] == "bfloat16"
    assert (told["context_max"], told["max_running"], told["kv_block"]) == (str(CONTEXT), "128", str(BLOCK))
    assert int(told["kv_tokens"]) > 100_000
    assert {"tools", "reasoning", "json_schema", "n", "logprobs", "token_ids"} <= set(told["features"].split(","))
    assert all(len(told[name]) == 16 for name in ("weights_version", "tokenizer_digest", "template_digest"))
