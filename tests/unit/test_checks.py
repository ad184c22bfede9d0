"""The bad-input table, as far as ranges go; the same rows run through both fronts in tests/e2e."""

import pytest

from infermesh.errors import MeshError, Reason
from infermesh.v1 import embedding_pb2 as em
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import rerank_pb2 as rr
from infermesh.v1.inference_pb2 import Relay
from services.chassis import checks


def chat(**fields) -> lm.ChatRequest:
    request = lm.ChatRequest(model="m", **fields)
    if "messages" not in fields:
        request.messages.add(role=lm.ROLE_USER, content="hi")
    return request


def sampled(**fields) -> lm.ChatRequest:
    return chat(sampling=lm.Sampling(**fields))


def test_an_ordinary_request_passes():
    checks.check_chat(
        sampled(temperature=0.7, top_p=0.9, max_tokens=100, n=2, stop=["\n"], logprobs=5, logit_bias={5: -100}, seed=1)
    )
    checks.check_complete(lm.CompleteRequest(text="once"))
    checks.check_embed(em.EmbedRequest(texts=["a", "b"], dimensions=64, task="query"))
    checks.check_rerank(rr.RerankRequest(query="q", documents=["d"]))


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (chat(messages=[]), "messages"),
        (chat(messages=[lm.Message(content="x")]), "messages[0].role"),
        (chat(messages=[lm.Message(role=lm.ROLE_TOOL, content="x")]), "messages[0].tool_call_id"),
        (chat(continue_final_message=True), "continue_final_message"),
        (chat(template_args_json="[1]"), "template_args_json"),
        (chat(template_args_json='{"a": NaN}'), "template_args_json"),
        (chat(template_args_json="[" * 100_000), "template_args_json"),
        (chat(tools=[lm.Tool(name="bad name")]), "tools[0].name"),
        (chat(tools=[lm.Tool(name="f", parameters_json="3")]), "tools[0].parameters"),
        (chat(tool_choice=lm.ToolChoice(mode=lm.ToolChoice.MODE_REQUIRED)), "tool_choice"),
        (sampled(max_tokens=-1), "sampling.max_tokens"),
        (sampled(max_tokens=0), "sampling.max_tokens"),
        (sampled(max_tokens=2**63 - 1), "sampling.max_tokens"),
        (sampled(n=16384), "sampling.n"),
        (sampled(n=2, temperature=0), "sampling.n"),
        (sampled(temperature=float("nan")), "sampling.temperature"),
        (sampled(temperature=-0.1), "sampling.temperature"),
        (sampled(top_p=0), "sampling.top_p"),
        (sampled(presence_penalty=float("inf")), "sampling.presence_penalty"),
        (sampled(min_tokens=5, max_tokens=4), "sampling.min_tokens"),
        (sampled(stop=[""]), "sampling.stop[0]"),
        (sampled(stop=["x"] * 17), "sampling.stop"),
        (sampled(logit_bias={1: 101}), "sampling.logit_bias[1]"),
        (chat(constraint=lm.Constraint(json_schema="{")), "constraint.json_schema"),
        (chat(constraint=lm.Constraint(choice=lm.Choice())), "constraint.choice"),
        (chat(constraint=lm.Constraint(regex="")), "constraint.regex"),
    ],
)
def test_bad_chat_names_its_field(request_, param):
    with pytest.raises(MeshError) as caught:
        checks.check_chat(request_)
    assert (caught.value.reason, caught.value.param) == (Reason.INVALID_ARGUMENT, param)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (chat(lora="style"), "lora"),
        (
            chat(messages=[lm.Message(role=lm.ROLE_USER, parts=[lm.ContentPart(image_url="http://x")])]),
            "messages[0].content[0]",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(request_, param):
    with pytest.raises(MeshError) as caught:
        checks.check_chat(request_)
    assert (caught.value.reason, caught.value.param) == (Reason.UNSUPPORTED, param)


@pytest.mark.parametrize(
    ("check", "request_", "param"),
    [
        (checks.check_complete, lm.CompleteRequest(), "prompt"),
        (checks.check_complete, lm.CompleteRequest(text=""), "prompt"),
        (checks.check_complete, lm.CompleteRequest(token_ids={}), "prompt"),
        (checks.check_complete, lm.CompleteRequest(text="x", suffix="y"), "suffix"),
        (checks.check_embed, em.EmbedRequest(), "texts"),
        (checks.check_embed, em.EmbedRequest(texts=["a", ""]), "texts[1]"),
        (checks.check_embed, em.EmbedRequest(texts=["a"], token_ids=[{"ids": [1]}]), "texts"),
        (checks.check_embed, em.EmbedRequest(texts=["a"] * 2049), "texts"),
        (checks.check_embed, em.EmbedRequest(token_ids=[{"ids": [1]}], task="query"), "task"),
        (checks.check_embed, em.EmbedRequest(texts=["a"], task="query", prefix="q: "), "prefix"),
        (checks.check_rerank, rr.RerankRequest(documents=["d"]), "query"),
        (checks.check_rerank, rr.RerankRequest(query="q"), "documents"),
    ],
)
def test_bad_requests_of_the_other_methods(check, request_, param):
    with pytest.raises(MeshError) as caught:
        check(request_)
    assert caught.value.param == param


@pytest.mark.parametrize("at", [-1, 2**62])
def test_a_relay_s_time_is_a_time(at):
    with pytest.raises(MeshError) as caught:
        checks.check_relay(Relay(rendered_at=at))
    assert caught.value.param == "relay.rendered_at"


@pytest.mark.parametrize(
    ("text", "depth"), [("1", 0), ("[" * 70 + "]" * 70, 70), ('"' + "[" * 70 + '"', 0), ('"a\\"' + "{" * 70 + '"', 0)]
)
def test_depth_counts_brackets_outside_strings(text, depth):
    assert checks.json_depth(text) == depth
