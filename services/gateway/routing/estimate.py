"""What a gateway learns of a model from usage: prompt tokens a byte, output tokens a request. Slow, bounded means."""

from __future__ import annotations

from dataclasses import dataclass

PRIOR_TOKENS_PER_BYTE = 0.25
PRIOR_OUTPUT = 256
RATE = 0.05  # of the newest observation
BOUNDS = (0.01, 2.0)  # tokens a byte: above 1 is a template longer than its text


@dataclass(slots=True)
class Estimate:
    """Of one tenant's requests; what it has not seen itself comes from `model`, the estimate over all tenants, which
    learns what this one learns."""

    model: Estimate | None = None
    tokens_per_byte: float = PRIOR_TOKENS_PER_BYTE
    output: float = PRIOR_OUTPUT

    def __post_init__(self) -> None:
        if self.model is not None:
            self.tokens_per_byte, self.output = self.model.tokens_per_byte, self.model.output

    def prompt_tokens(self, size: int) -> int:
        return max(1, round(size * self.tokens_per_byte))

    def output_tokens(self, max_tokens: int, choices: int) -> int:
        mean = max(1, round(self.output))
        return choices * (min(mean, max_tokens) if max_tokens else mean)

    def observe_prompt(self, size: int, tokens: int) -> None:
        if size > 0 and tokens > 0:
            seen = min(max(tokens / size, BOUNDS[0]), BOUNDS[1])
            self.tokens_per_byte += RATE * (seen - self.tokens_per_byte)
            if self.model is not None:
                self.model.observe_prompt(size, tokens)

    def observe_output(self, tokens: int) -> None:
        self.output += RATE * (tokens - self.output)
        if self.model is not None:
            self.model.observe_output(tokens)
