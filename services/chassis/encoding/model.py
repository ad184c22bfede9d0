"""A sentence-transformers model behind the port of encoder.py: the only file that imports it, torch or openvino.

Embedding models and cross-encoders are one kind of pipeline here: token ids in, `sentence_embedding` or `scores` out.
Tokenisation happened in the service; the pipeline's own tokenizer, limits and prompts were handed to it for that.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from services.chassis.encoding import exports
from services.chassis.encoding.encoder import LoadPlan, ModelFacts
from services.chassis.encoding.rows import Floats, Row, padded

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNBOUNDED = 1 << 24  # tokenizers without a limit say 1e30
logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class PipelineEncoder:
    """Implements encoder.Encoder."""

    def __init__(self, model: Any, plan: LoadPlan, backend: str, reason: str, version: str) -> None:
        self._model = model.eval()
        self._device = torch.device(str(model.device))
        self._cross = plan.purpose == "cross-encoder"
        first = _text_module(model)
        tokenizer = first.tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._left = tokenizer.padding_side == "left"
        self._segments = "token_type_ids" in tokenizer.model_input_names
        normalizes = not self._cross and isinstance(model[-1], Normalize)
        # The last step is left to the service: callers may ask for fewer dimensions first, or for none of it.
        self._modules = list(model)[: -1 if normalizes else None]
        self.facts = ModelFacts(
            columns=2 if self._cross else int(model.get_embedding_dimension()),
            max_tokens=_max_tokens(first, plan.max_tokens),
            vocabulary=len(tokenizer),
            tokenizer=tokenizer.backend_tokenizer.to_str(),
            prompts={name: text for name, text in model.prompts.items() if text is not None},
            default_prompt=model.prompts.get(model.default_prompt_name or "", "") or "",
            pools_prompt=all(module.include_prompt for module in model if isinstance(module, Pooling)),
            normalizes=normalizes,
            activation=type(model.activation_fn).__name__ if self._cross else "",
            backend=backend,
            backend_reason=reason,
            device=str(self._device),
            device_name=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else exports.cpu_name(),
            dtype=_dtype_name(first),
            weights_version=version,
            engine_version=engine_version(backend),
        )

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row]) -> Floats:
        try:
            return self._forward(rows)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(rows) == 1:
                raise
        half = len(rows) // 2
        return np.concatenate([self.compute(rows[:half]), self.compute(rows[half:])])

    def _forward(self, rows: Sequence[Row]) -> Floats:
        ids, mask, segments = padded(rows, self._pad_id, left=self._left)
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._segments:
            features["token_type_ids"] = segments
        features = {name: torch.from_numpy(array).to(self._device) for name, array in features.items()}
        features["modality"] = "text"
        if rows[0].skip:
            features["prompt_length"] = rows[0].skip
        for module in self._modules:
            features = module(features)
        if not self._cross:
            return features["sentence_embedding"].float().cpu().numpy()
        raw = features["scores"].float()
        scores = torch.stack([raw.reshape(-1), self._model.activation_fn(raw).float().reshape(-1)], dim=1)
        return scores.cpu().numpy()


def load(plan: LoadPlan, progress: Callable[[str], None]) -> PipelineEncoder:
    """Loads one replica.

    Raises:
        ValueError: the model is of a kind that is not served; the message says which.
        StartAgain: the model was exported.
    """
    torch.set_num_threads(plan.threads)
    device = plan.device
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this machine, or this build of torch, has no CUDA; use cpu")
    commit = None
    if not Path(plan.source).is_dir():
        config = transformers.AutoConfig.from_pretrained(
            plan.source, revision=plan.revision or None, trust_remote_code=plan.trust_remote_code
        )
        commit = config._commit_hash
    version = exports.weights_version(plan.source, commit)
    backend, reason, folder = exports.choose(
        plan, version, device, progress, lambda kind: open_model(plan, device, kind)
    )
    progress(f"loading {plan.source} on {device} with {backend}")
    return PipelineEncoder(open_model(plan, device, backend, folder), plan, backend, reason, version)


def open_model(plan: LoadPlan, device: str, backend: str, folder: str = "") -> Any:
    """The library's own model. `folder` holds an export; without one, onnx and openvino export into memory."""
    options: dict[str, Any] = {}
    if backend == "torch":
        if plan.dtype != "auto":
            options["dtype"] = DTYPES[plan.dtype]
    else:
        options = exports.runtime_options(backend, device, plan.threads)
        if not folder:
            options["export"] = True
    loader = CrossEncoder if plan.purpose == "cross-encoder" else SentenceTransformer
    model: Any = loader(
        folder or plan.source,
        device="cpu" if backend != "torch" and not device.startswith("cuda") else device,
        backend=backend,
        revision=(plan.revision or None) if not folder else None,
        trust_remote_code=plan.trust_remote_code,
        model_kwargs=options,
    )
    if plan.purpose == "cross-encoder" and model.num_labels != 1:
        raise ValueError(f"{plan.source} gives {model.num_labels} scores a pair; reranking needs a model with one")
    return model


def _text_module(model: Any) -> Any:
    first = model[0]
    config = getattr(first, "modality_config", None)
    if config is None or "text" not in config or "message" in config:
        raise ValueError(f"{type(first).__name__} is not a plain text transformer; such models are not served")
    if not hasattr(first.tokenizer, "backend_tokenizer"):
        raise ValueError(f"{type(first.tokenizer).__name__} has no tokenizer.json; models need a fast tokenizer")
    return first


def _max_tokens(module: Any, asked: int) -> int:
    known = [int(module.max_seq_length or UNBOUNDED), int(getattr(module.config, "max_position_embeddings", UNBOUNDED))]
    own = min(known)
    if asked > own:
        raise ValueError(f"max_tokens: {asked} is more than the model's own {own}")
    return asked or own


def _dtype_name(module: Any) -> str:
    dtype = getattr(module.model, "dtype", torch.float32)
    return next((name for name, kind in DTYPES.items() if kind == dtype), str(dtype).removeprefix("torch."))


def engine_version(backend: str) -> str:
    names = ["sentence-transformers", {"torch": "torch", "onnx": "onnxruntime"}.get(backend, backend)]
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
