"""Text-level continuation on an adopted server."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Relay, Resume
from tests.kit.mesh import running_mesh
from tests.kit.openai_server import USAGE, Fake, adopted, chat, chunk, collect, served, text_of


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


class Breaking(Fake):
    """Breaks off after two words, unless it is asked to go on with them."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        last = (await request.json())["messages"][-1]
        if last["role"] == "assistant":
            self.says(chunk("Tag"), chunk("", "stop"), USAGE)
        else:
            self.says(chunk("", role="assistant"), chunk("Guten "), chunk("schönen "), done=False)
        return await super().answer(request)


async def test_a_gateway_goes_on_at_another_adopted_server(tmp_path: Path) -> None:
    """What was delivered becomes the beginning of the other one's message. The client has one answer, and is told that
    it is not exact."""
    fakes = Breaking(), Breaking()
    async with served(fakes[0]) as one, served(fakes[1]) as two, running_mesh(tmp_path, {}, model="m") as mesh:
        for id, url in (("one", one), ("two", two)):
            await mesh.start(id, "--engine", "openai-http", "--source", url, model="m")
        await mesh.healthy("one", "two")
        call = mesh.llm.Chat(chat(sampling=lm.Sampling(max_tokens=9)))
        events = [event async for event in call]
        assert "".join(delta.content for event in events for delta in event.deltas) == "Guten schönen Tag"
        trailers = dict(await call.trailing_metadata())
        assert (trailers["x-infermesh-resumes"], trailers["x-infermesh-resume-exact"]) == ("1", "false")
        assert sorted(len(fake.asked) for fake in fakes) == [1, 1]
        begun = next(body for fake in fakes for body in fake.asked if body["messages"][-1]["role"] == "assistant")
        assert begun["messages"][-1]["content"] == "Guten schönen " and begun["continue_final_message"] is True
