"""What the scripted engine says: its words, what ends them, and the events that carry them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from infermesh.errors import invalid
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.inference_pb2 import Usage
from services.llm.engine import Event, PromptFacts
from services.llm.engines.scripted_text import StopMatcher, word


@dataclass(slots=True)
class Answer:
    """What is still to be said, from word `said` on, and what ends it. All choices say the same."""

    prompt: list[int]
    sampling: lm.Sampling
    limit: int  # words in all
    finish: lm.Finish.ValueType  # when the limit is reached
    prefix: str = ""  # the prompt's text, when it is to be echoed
    said: int = 0
    over: bool = False
    started: bool = False
    ending: lm.Delta | None = None  # what ended it when all of it was said elsewhere
    matcher: StopMatcher = field(init=False)

    def __post_init__(self) -> None:
        self.matcher = StopMatcher(self.sampling.stop, self.sampling.include_stop)

    @property
    def choices(self) -> int:
        return max(1, self.sampling.n)

    def say(self, words: int) -> lm.Delta:
        """The next words, as the delta of one choice."""
        delta = lm.Delta()
        if not self.sampling.stop and not self.sampling.stop_token_ids:
            words = min(words, self.limit - self.said)
            numbers = range(self.said, self.said + words)
            delta.token_ids.extend(numbers)
            delta.content = "".join(map(word, numbers))
            self.said += words
        else:
            while words and self.said < self.limit and not self.over:
                self._say_one(delta)
                words -= 1
        if self.sampling.HasField("logprobs"):
            delta.logprobs.extend(_logprob(number, self.sampling.logprobs) for number in delta.token_ids)
        if self.said >= self.limit and not self.over:
            delta.content += self.matcher.rest()
            delta.finish = self.finish
            self.over = True
        return delta

    def _say_one(self, delta: lm.Delta) -> None:
        number = self.said
        self.said += 1
        delta.token_ids.append(number)
        if self.said <= self.sampling.min_tokens:
            delta.content += word(number)
        elif number in self.sampling.stop_token_ids:
            delta.content += self.matcher.rest() + (word(number) if self.sampling.include_stop else "")
            delta.finish, delta.stop_token, self.over = lm.FINISH_STOP, number, True
        else:
            delta.content += self.matcher.feed(word(number))
            if self.matcher.found:
                delta.finish, delta.stop_text, self.over = lm.FINISH_STOP, self.matcher.found, True

    def event(self, words: int, cached: int) -> Event:
        """The next words of all choices. `cached`: tokens found in the prefix cache, of prompt and replayed answer."""
        cached = min(cached, len(self.prompt))
        delta = self.ending or self.say(words)
        event = Event([delta])
        if not self.started:
            self.started = True
            event.prompt = PromptFacts(len(self.prompt), cached)
            delta.content = self.prefix + delta.content
        for choice in range(1, self.choices):
            other = lm.Delta()
            other.CopyFrom(delta)
            other.choice = choice
            event.deltas.append(other)
        if self.over:
            event.usage = Usage(
                prompt_tokens=len(self.prompt),
                completion_tokens=self.said * self.choices,
                cached_tokens=cached,
            )
        return event


def replay(answer: Answer, token_ids: Sequence[int]) -> list[int]:
    """Says the words that another instance has delivered, with output off. Returns their ids."""
    done = list(token_ids)
    if not done:
        return done
    if done != list(range(len(done))) or len(done) > answer.limit:
        raise invalid("relay.resume.token_ids", "these are not the words that this engine says")
    answer.prefix = ""
    last = answer.say(len(done))
    if answer.over:  # only its end is still to be told
        answer.ending = lm.Delta(finish=last.finish)
        if last.WhichOneof("stop") == "stop_text":
            answer.ending.stop_text = last.stop_text
        elif last.WhichOneof("stop") == "stop_token":
            answer.ending.stop_token = last.stop_token
    return done


def _logprob(number: int, alternatives: int) -> lm.TokenLogprob:
    """Made up, and the same every time: the word itself is the likeliest, the next ones follow."""
    top = [_top(number + rank, rank) for rank in range(alternatives)]
    text = word(number)
    return lm.TokenLogprob(
        token_id=number, token=text, token_bytes=text.encode(), logprob=-0.125 * (1 + number % 7), top=top
    )


def _top(number: int, rank: int) -> lm.TopLogprob:
    text = word(number)
    logprob = -0.125 * (1 + (number - rank) % 7) - 1.5 * rank
    return lm.TopLogprob(token_id=number, token=text, token_bytes=text.encode(), logprob=logprob, rank=rank + 1)
