"""What vLLM itself answers, without any of our code. Runs in the interpreter that has vLLM.

stdin: {"model": folder, "max_model_len", "block_size", "max_tokens", "prompts": [text], "chats": [messages]}
stdout, last line: {"prompts": [[token ids]], "chats": [[token ids]], "texts": [text]}
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        asked["model"],
        max_model_len=asked["max_model_len"],
        block_size=asked["block_size"],
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 30,
    )
    params = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True)
    # One at a time: rounding may differ between batches of different sizes.
    prompts = [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0] for prompt in asked["prompts"]]
    chats = [llm.chat([chat], params, use_tqdm=False)[0].outputs[0] for chat in asked["chats"]]
    answer = {
        "prompts": [list(output.token_ids) for output in prompts],
        "texts": [output.text for output in prompts],
        "chats": [list(output.token_ids) for output in chats],
    }
    print("\n" + json.dumps(answer), flush=True)
