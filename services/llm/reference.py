"""What transformers answers with a model's weights: greedy answers to fixed prompts, as a file to verify against.

The file is JSON: {version, source, dtype, made_by, prompts: [{text, ids, answer: [{token, logprob, top: {id:
logprob}}]}], chat: {messages, ids} or null}. Log-probabilities are natural, after the softmax of float32 logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.llm.agreement import VERSION

TOP = 8
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "1, 2, 4, 8, 16,",
    "Once upon a time there was a small town where",
    "今天天气很好，我们",
    "The quick brown fox jumps over the lazy dog. " * 12 + "The next sentence is",
)
CHAT = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Name three primes."}]


def record(source: str, dtype: str, tokens: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Runs the reference; float32 needs 4 bytes a parameter of memory. Uses the first GPU where torch sees one."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress(f"loading {source} in {dtype}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    kind = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=kind).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = []
    for number, text in enumerate(PROMPTS):
        progress(f"prompt {number + 1} of {len(PROMPTS)}")
        ids = tokenizer(text)["input_ids"]
        prompts.append({"text": text, "ids": ids, "answer": _answer(model, ids, tokens)})
    chat = None
    if tokenizer.chat_template:
        rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        chat = {"messages": CHAT, "ids": tokenizer(rendered, add_special_tokens=False)["input_ids"]}
    return {
        "version": VERSION,
        "source": source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "made_by": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "prompts": prompts,
        "chat": chat,
    }


def _answer(model: Any, ids: list[int], tokens: int) -> list[dict[str, Any]]:
    """Greedy, one token after the other, the end of text among them."""
    import torch

    found = []
    step, cache = torch.tensor([ids], device=model.device), None
    with torch.inference_mode():
        for _ in range(tokens):
            said = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = said.past_key_values
            logprobs = torch.log_softmax(said.logits[0, -1].float(), dim=-1)
            values, best = logprobs.topk(min(TOP, logprobs.numel()))
            top = dict(zip(best.tolist(), (round(value, 5) for value in values.tolist()), strict=True))
            token = int(best[0])
            found.append({"token": token, "logprob": top[token], "top": top})
            step = best[:1].reshape(1, 1)
    return found
