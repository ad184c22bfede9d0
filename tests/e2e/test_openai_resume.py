"""Text-level continuation on an adopted server."""

from __future__ import annotations

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay, Resume
from tests.kit.openai_server import USAGE, Fake, adopted, chat, collect, text_of


async def test_a_stream_that_another_server_began_goes_on_as_text() -> None:
    fake = Fake()
    told = {"index": 0, "delta": {"content": "Tag"}, "token_ids": [5], "finish_reason": "stop"}
    fake.says({"id": "x", "choices": [told]}, USAGE)
    async with adopted(fake) as (engine, info):
        assert "resume" in info.features
        for resume, done in ((Resume(text="Guten ", token_ids=[1, 2]), 2), (Resume(text="Guten schönen "), 2)):
            asked = chat(relay=Relay(resume=resume), sampling=lm.Sampling(max_tokens=9))
            events = await collect(engine.chat(asked))
            assert text_of(events) == "Tag" and not events[0].deltas[0].token_ids
            usage = events[-1].usage
            assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (7 - done, 2 + done)
            assert fake.asked[-1]["max_tokens"] == 9 - done and fake.asked[-1]["continue_final_message"] is True
        asked = chat(relay=Relay(resume=Resume(text="Guten Tag", token_ids=[1, 2])), sampling=lm.Sampling(max_tokens=2))
        (end,) = await collect(engine.chat(asked))
        assert end.deltas[0].finish == lm.FINISH_LENGTH and end.usage and end.usage.completion_tokens == 2
        assert len(fake.asked) == 2, "nothing was left to ask for"
