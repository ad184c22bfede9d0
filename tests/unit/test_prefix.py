from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from infermesh.v1 import inference_pb2 as inference
from infermesh.v1 import language_model_pb2 as lm
from services.chassis.prefix import BLOCK_BYTES, MASK, MAX_CHAIN, Prefix, prefix

LONG = "All work and no play makes a dull gateway. " * 60


def chat(*texts: str, **more: object) -> lm.ChatRequest:
    roles = (lm.ROLE_USER, lm.ROLE_ASSISTANT)
    messages = [lm.Message(role=roles[at % 2], content=text) for at, text in enumerate(texts)]
    return lm.ChatRequest(messages=messages, **more)  # type: ignore[arg-type]


def of(request: lm.ChatRequest | lm.CompleteRequest, salt: bytes = b"a", at: int = 0) -> Prefix:
    return prefix(request, salt, at)


def shared(one: Prefix, other: Prefix) -> int:
    same = 0
    for a, b in zip(one.chain, other.chain, strict=False):
        if a != b:
            break
        same += 1
    assert not set(one.chain[same:]) & set(other.chain[same:])
    return same


def test_a_longer_conversation_repeats_the_chain_of_the_shorter() -> None:
    first, second = of(chat(LONG)), of(chat(LONG, "Indeed. " * 200, LONG))
    assert shared(first, second) == len(first.chain) == len(LONG) // BLOCK_BYTES
    assert len(second.chain) > 2 * len(first.chain)


def test_one_message_that_begins_another_shares_its_beginning() -> None:
    assert shared(of(chat(LONG + "one")), of(chat(LONG + "other" * 300))) == len(LONG) // BLOCK_BYTES


def test_what_changes_the_rendering_changes_the_first_hash() -> None:
    requests = [
        *(chat(LONG), chat(LONG, lora="l"), chat(LONG, template_args_json="{}")),
        chat(LONG, tools=[lm.Tool(name="find")]),
        lm.ChatRequest(messages=[lm.Message(role=lm.ROLE_SYSTEM, content=LONG)]),
        lm.CompleteRequest(text=LONG),
    ]
    heads = [of(request).chain[0] for request in requests]
    heads += [of(chat(LONG), salt=b"b").chain[0], of(chat(LONG), at=86400).chain[0]]
    assert len(set(heads)) == len(heads)
    text = lm.CompleteRequest(text=LONG)
    assert of(text, at=1) == of(text, at=2)  # a completion has no template, so no time


def test_seams_cannot_be_imitated() -> None:
    body = "x" * 600
    plain = of(chat("a" + body))
    named = lm.ChatRequest(messages=[lm.Message(role=lm.ROLE_USER, content="a", name=body)])
    parts = [lm.ContentPart(text="a"), lm.ContentPart(text=body)]
    assert of(named).chain != plain.chain != of(chat("a", body)).chain
    assert of(lm.ChatRequest(messages=[lm.Message(role=lm.ROLE_USER, parts=parts)])) == plain  # rendered alike


def test_token_ids_share_by_token() -> None:
    ids = [(7 * n) % 150_000 for n in range(4000)]
    short = lm.CompleteRequest(token_ids=inference.TokenIds(ids=ids[:2000]))
    long = lm.CompleteRequest(token_ids=inference.TokenIds(ids=ids))
    assert shared(of(short), of(long)) == len(of(short).chain) > 5
    assert of(lm.CompleteRequest(token_ids=inference.TokenIds())) == Prefix()


def test_bounds() -> None:
    assert of(chat("short")) == Prefix()
    huge = of(lm.CompleteRequest(text="y" * (BLOCK_BYTES * (MAX_CHAIN + 10))))
    assert len(huge.chain) == MAX_CHAIN
    assert all(0 <= key <= MASK for key in huge.chain)
    one = of(lm.CompleteRequest(text="y" * 1024))
    assert (len(one.chain), one.share) == (2, 0.5)


def test_the_hashes_are_the_same_in_every_process() -> None:
    assert of(lm.CompleteRequest(text="z" * 1024), salt=b"salt").chain == PINNED


PINNED = (1106358185029996984, 220533598949231416)


@given(st.lists(st.text(max_size=900), min_size=1, max_size=5))
def test_every_turn_extends_the_chain(texts: list[str]) -> None:
    chains = [of(chat(*texts[: n + 1])).chain for n in range(len(texts))]
    for before, after in pairwise(chains):
        assert after[: len(before)] == before
