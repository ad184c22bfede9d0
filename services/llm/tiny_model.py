"""Writes a tiny Qwen3 model with random weights, for tests and for machines that cannot reach a model hub.

Its text is noise, and deterministic noise: the same seed gives the same files, byte for byte. The weights are untied
and widely initialised, so that greedy decoding wanders through the vocabulary (a tied, narrow one repeats a single
token and every comparison of outputs would pass).

`python -m services.llm.tiny_model DIR` takes about a second and writes about 2 MB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

VOCABULARY = 896
CONTEXT = 8192  # tokens
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER = 128, 2, 4, 2, 32, 256
INITIALIZER_RANGE = 0.25
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # skipped in text
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # one token each, but part of the text
COMPLETE = "complete.json"  # written last: whoever finds it has a whole model

TEMPLATE = """\
{%- set system = namespace(text='') -%}
{%- for message in messages if message.role in ('system', 'developer') -%}
{%- set system.text = system.text + ('\\n' if system.text else '') + message.content -%}
{%- endfor -%}
{%- if system.text or tools -%}
<|im_start|>system
{{ system.text }}
{%- if tools %}
Functions, one JSON object a line:
{%- for tool in tools %}
{{ tool.function | tojson }}
{%- endfor %}
Call one with <tool_call>
{"name": ..., "arguments": {...}}
</tool_call>
{%- endif -%}
<|im_end|>
{% endif -%}
{%- for message in messages if message.role not in ('system', 'developer') -%}
{%- set content = message.content or '' -%}
{%- if message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ content }}
</tool_response>
{%- elif message.role == 'assistant' -%}
<|im_start|>assistant
{{ content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
{%- else -%}
<|im_start|>user
{{ content }}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""

# Enough to learn the words of a data centre from; written for this purpose.
TEXT = """
A mesh of model servers answers questions about documents. Each request carries a prompt, and the prompt has a prefix
that many requests share. The server that holds the prefix in its cache will finish sooner than a server that does not.
When a server is lost, its work moves to another server, and the reader of the stream sees a pause instead of an error.
The gateway counts tokens, not requests, because a long question costs more than a short one. It knows the speed of
each card: how fast it reads the prompt, how fast it writes the answer, how much memory is left for the cache.
What is the weather in Paris? The weather in Paris is mild, with some rain in the evening and a light wind from the
west.
Once upon a time there was a small computer in a large room. It wanted to learn the names of all the stars. Every night
it asked the window, and every night the window showed a few of them. After a thousand nights it knew most of the sky.
To make bread you need flour, water, salt and time. Mix the flour with the water, wait for an hour, add the salt, fold
the dough four times, let it rest until morning, then bake it in a hot oven for forty minutes.
The answer is 42. The sum of 1, 2, 3, 4, 5, 6, 7, 8 and 9 is 45. In 2024 there were 366 days, in 2025 there are 365.
def add(a, b): return a + b
for item in items: print(item.name, item.value, item.count)
if error is not None: raise ValueError("the value is not a number")
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
{"type": "object", "properties": {}, "required": []}
SELECT name, count FROM instances WHERE state = 'ready' ORDER BY load LIMIT 10;
用户问:今天的天气怎么样? 助手答:今天天气很好,适合出门散步。模型服务把请求送到最快的显卡上。
知识库问答需要先检索文档,再生成答案。
Größe, Straße, Übung; où est la bibliothèque, s'il vous plaît; ¿dónde está la estación?
"""


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Writes the model into `folder`, which is made if need be, and returns it. Files of these names are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPLETE).unlink(missing_ok=True)
    ids = _write_tokenizer(folder)
    _write_json(folder / "config.json", _config(ids))
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "temperature": 0.7, "top_p": 0.95},
    )
    _write_weights(folder, seed)
    _write_json(folder / COMPLETE, {"seed": seed})
    return folder


def _config(ids: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "initializer_range": INITIALIZER_RANGE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "use_cache": True,
    }


def _write_weights(folder: Path, seed: int) -> None:
    from safetensors.numpy import save_file

    random = np.random.Generator(np.random.PCG64(seed))

    def wide(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape, dtype=np.float32) * INITIALIZER_RANGE).astype(np.float32)

    def ones(size: int) -> np.ndarray:
        return np.ones(size, dtype=np.float32)

    weights = {"model.embed_tokens.weight": wide(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.input_layernorm.weight": ones(HIDDEN),
            f"{at}.self_attn.q_proj.weight": wide(HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.k_proj.weight": wide(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.v_proj.weight": wide(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.o_proj.weight": wide(HIDDEN, HEADS * HEAD_DIM),
            f"{at}.self_attn.q_norm.weight": ones(HEAD_DIM),
            f"{at}.self_attn.k_norm.weight": ones(HEAD_DIM),
            f"{at}.post_attention_layernorm.weight": ones(HIDDEN),
            f"{at}.mlp.gate_proj.weight": wide(INNER, HIDDEN),
            f"{at}.mlp.up_proj.weight": wide(INNER, HIDDEN),
            f"{at}.mlp.down_proj.weight": wide(HIDDEN, INNER),
        }
    weights |= {"model.norm.weight": ones(HIDDEN), "lm_head.weight": wide(VOCABULARY, HIDDEN)}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level BPE of exactly `VOCABULARY` tokens; returns the ids of the added ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(MARKERS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return {text: tokenizer.token_to_id(text) for text in (*SPECIAL, *MARKERS)}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m services.llm.tiny_model DIR")
    print(write_tiny_model(Path(sys.argv[1])))
