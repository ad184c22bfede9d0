"""Real embedding and rerank instances as processes of their own, and what the library itself says.

    with encoding_service("embedding", tmp, "--replicas", "2") as service:
        service.channel, service.replicas(), service.load() ...

Loading takes some ten seconds, so tests share one a session.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

from infermesh.transport import channel_options
from infermesh.v1 import worker_pb2 as wk
from infermesh.v1 import worker_pb2_grpc
from services.chassis.encoding.settings import find_source

MODEL = "all-minilm-l6-v2"
START_S = 180
# Exports are keyed by model and versions, so that test runs can share them.
EXPORTS = Path(tempfile.gettempdir()) / f"infermesh-test-exports-{os.getuid()}"


@dataclass
class Service:
    """One running instance. `address` is where it serves."""

    address: str
    process: psutil.Process

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=channel_options())

    def aio_channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, options=channel_options())

    def replicas(self) -> list[psutil.Process]:
        """Its worker processes."""
        return [child for child in self.process.children() if "services.chassis.encoding.replica" in child.cmdline()]

    def describe(self) -> wk.DescribeResponse:
        with self.channel() as channel:
            return worker_pb2_grpc.WorkerServiceStub(channel).Describe(wk.DescribeRequest(), timeout=10)

    def load(self) -> wk.Load:
        return self.describe().load


@contextmanager
def encoding_service(kind: str, folder: Path, *options: str) -> Iterator[Service]:
    """Runs `infermesh KIND OPTIONS…` until the end of the block and expects it to leave well."""
    ready = folder / f"{kind}-{time.monotonic_ns()}.json"
    words = [sys.executable, "-P", "-m", "infermesh.cli", kind, "--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    with (folder / f"{kind}.log").open("ab") as log:
        process = subprocess.Popen(
            [*words, "--export-dir", str(EXPORTS), "--grace-s", "5", *options], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / f"{kind}.log").read_text()[-4000:])
            time.sleep(0.05)
        yield Service(json.loads(ready.read_text())["address"], psutil.Process(process.pid))
        process.terminate()
        assert process.wait(20) == 0, (folder / f"{kind}.log").read_text()[-4000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


_REFERENCE = """
import json, sys, numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer
task = json.load(sys.stdin)
loader = CrossEncoder if task["call"] == "predict" else SentenceTransformer
model = loader(task["source"], device="cpu")
found = {}
for name, (inputs, options) in task["jobs"].items():
    if options.pop("raw", False):
        import torch
        options["activation_fn"] = torch.nn.Identity()
    found[name] = getattr(model, task["call"])(inputs, show_progress_bar=False, **options)
np.savez(sys.argv[1], **found)
"""


def reference(call: str, jobs: dict[str, tuple[Any, dict[str, Any]]], source: str = "") -> dict[str, np.ndarray]:
    """What sentence-transformers itself gives on torch, in a process of its own: name -> (inputs, options of the call).

    `call` is `encode` or `predict`; the option `raw` means scores without activation.
    """
    task = {"call": call, "source": find_source(source), "jobs": jobs}
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.npz"
        words = [sys.executable, "-W", "ignore", "-c", _REFERENCE, out]
        subprocess.run(words, input=json.dumps(task).encode(), check=True, capture_output=True, timeout=240)
        with np.load(out) as found:
            return dict(found)


def cross_encoder(folder: Path) -> Path:
    """A real, tiny cross-encoder: BERT of random weights with MiniLM's own tokenizer."""
    code = """
import sys, torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
torch.manual_seed(7)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.model_max_length = 128
config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                    intermediate_size=128, max_position_embeddings=128, num_labels=1, initializer_range=0.4)
BertForSequenceClassification(config).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""
    words = [sys.executable, "-W", "ignore", "-c", code, find_source(""), str(folder)]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    return folder
