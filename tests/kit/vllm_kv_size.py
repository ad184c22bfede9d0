"""What vLLM itself says of its KV cache. Runs in the interpreter that has vLLM; its log goes to stderr.

argv: model folder, bytes of KV cache, tokens of the longest request
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    os.environ |= {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    from vllm import LLM

    LLM(
        sys.argv[1],
        kv_cache_memory_bytes=int(sys.argv[2]),
        max_model_len=int(sys.argv[3]),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
    )
