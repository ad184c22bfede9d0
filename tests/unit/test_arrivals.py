import pytest

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay
from services.chassis.arrivals import Arrivals
from services.llm.service import _guess_tokens


async def test_shares_are_a_gateways_own():
    arrivals = Arrivals()
    queued = arrivals.room.arbiter.queued_tokens
    with arrivals.enter(Relay(gateway_id="a", seq=7), tokens=100) as first:
        with arrivals.enter(Relay(gateway_id="b", seq=1), tokens=5):
            assert arrivals.running == 2
            assert (arrivals.share("a").running, queued("a"), queued("b"), queued()) == (1, 100, 5, 105)
            assert arrivals.share("a").seen_seq == 7
        first.started()
        assert queued("a") == 0
    assert (arrivals.running, arrivals.share("a").running, queued()) == (0, 0, 0)


async def test_a_gateways_own_count_of_tokens_goes_before_a_guess_and_shrinks_with_each_step():
    arrivals = Arrivals()
    queued, computed = arrivals.room.arbiter.queued_tokens, arrivals.room.computed
    with (
        arrivals.enter(Relay(gateway_id="a", uncached_tokens=3000), tokens=9000),
        arrivals.enter(Relay(gateway_id="b", uncached_tokens=1000), tokens=9000),
    ):
        computed(0)
        assert (queued("a"), queued("b")) == (3000, 1000)
        computed(2048)
        assert arrivals.room.arbiter.hears and (queued("a"), queued("b")) == (952, 1000)
        computed(2048)
        assert (queued("a"), queued("b"), queued()) == (0, 0, 0), "no more than there is"


async def test_an_error_leaves_nothing_behind():
    arrivals = Arrivals()
    with pytest.raises(RuntimeError), arrivals.enter(None, tokens=3):
        raise RuntimeError
    assert arrivals.running == 0
    assert await arrivals.wait_idle(0.01)


async def test_waiting_for_idle_gives_up_in_time():
    arrivals = Arrivals()
    with arrivals.enter(None):
        assert not await arrivals.wait_idle(0.01)


async def test_a_gateway_is_remembered_while_it_is_linked_or_has_something_running():
    arrivals = Arrivals()
    with arrivals.linked("a"), arrivals.linked("a"):
        with arrivals.enter(Relay(gateway_id="a", seq=7)):
            pass
        assert arrivals.share("a").seen_seq == 7
    assert arrivals.share("a").seen_seq == 0
    for life in range(50):  # a gateway that restarts has another name each time
        with arrivals.enter(Relay(gateway_id=f"a-{life}", seq=1)), arrivals.linked(f"a-{life}"):
            pass
    assert not arrivals._shares and not arrivals._links


@pytest.mark.parametrize(("text", "tokens"), [("word " * 100, 125), ("知识库" * 100, 225)])
def test_prompts_nobody_has_counted_are_guessed_by_their_bytes_as_gateways_do(text, tokens):
    """Fewer than a gateway's own estimate, and it would take the rest for computed."""
    parts = lm.Message(role=lm.ROLE_USER, parts=[lm.ContentPart(text=text)])
    assert _guess_tokens(lm.CompleteRequest(text=text)) == tokens
    assert _guess_tokens(lm.ChatRequest(messages=[lm.Message(role=lm.ROLE_USER, content=text)])) == tokens
    assert _guess_tokens(lm.ChatRequest(messages=[parts, parts])) == 2 * tokens


def test_where_the_gateway_does_not_count_what_is_cached_is_not_guessed_to_be_computed():
    arrivals = Arrivals()
    with arrivals.enter(Relay(gateway_id="old", cached_tokens=700), tokens=1000):
        assert arrivals.room.arbiter.queued_tokens("old") == 300
    with arrivals.enter(Relay(gateway_id="old", cached_tokens=2000), tokens=1000):
        assert arrivals.room.arbiter.queued_tokens("old") == 1
