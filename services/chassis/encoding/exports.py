"""Which runtime a model runs on, and the cache of models exported for it.

`auto` means: on a GPU torch; on a CPU openvino at fp32, if it is installed, can export the model, and its results
differ from torch's by at most MAX_DIFFERENCE on the sample below, measured at export and kept beside it; else torch.
(OpenVINO's own default, bf16 where the CPU has it, differs by 1e-3.) Exports never go into the model's folder, which
may be read-only or shared.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from services.chassis.encoding.encoder import LoadPlan, StartAgain

MAX_DIFFERENCE = 1e-5
NEEDS = {"openvino": ("openvino", "optimum.intel"), "onnx": ("onnxruntime", "optimum.onnxruntime")}
EXTRAS = {"openvino": "sentence-transformers[openvino]", "onnx": "sentence-transformers[onnx]"}
SAMPLE = ("a", "How long does the battery last?", "Größe, 日本語 and 🙂", "one two three four five " * 40)
WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.xml",
    "*.onnx",
    "*.json",  # prompts, lengths and pooling among them
    "*/*.json",
)


def choose(
    plan: LoadPlan, version: str, device: str, progress: Callable[[str], None], open_model: Callable[[str], Any]
) -> tuple[str, str, str]:
    """Backend, why, and the folder of its export (empty for torch). `version`: the weights'.

    Raises:
        ValueError: the backend that was asked for is not installed.
        StartAgain: an export was made.
    """
    if plan.backend == "torch":
        return "torch", "asked for", ""
    if plan.backend == "auto":
        if device.startswith("cuda"):
            return "torch", "auto: a GPU", ""
        if plan.dtype not in ("auto", "fp32"):
            return "torch", f"auto: dtype {plan.dtype}", ""
        if missing := _missing("openvino"):
            return "torch", f"auto: {missing} is not installed", ""
        try:
            folder, difference = _exported(plan, version, "openvino", progress, open_model)
        except StartAgain:
            raise
        except Exception as error:
            return "torch", f"auto: openvino cannot run this model: {type(error).__name__}: {error}"[:300], ""
        if difference > MAX_DIFFERENCE:
            return "torch", f"auto: openvino differs from torch by {difference:.1e}", ""
        return "openvino", f"auto: a CPU; differs from torch by {difference:.1e}", folder
    if missing := _missing(plan.backend):
        raise ValueError(f"backend {plan.backend}: {missing} is not installed; install {EXTRAS[plan.backend]}")
    folder, difference = _exported(plan, version, plan.backend, progress, open_model)
    return plan.backend, f"asked for; differs from torch by {difference:.1e}", folder


def _missing(backend: str) -> str:
    """The first package that the backend lacks; empty if it has all."""
    for name in NEEDS[backend]:
        try:
            if importlib.util.find_spec(name) is None:
                return name
        except ModuleNotFoundError:
            return name
    return ""


def runtime_options(backend: str, device: str, threads: int) -> dict[str, Any]:
    """What the runtime is told. Pinning is off: replicas side by side would be pinned to the same cores."""
    if backend == "openvino":
        return {
            "device": "GPU" if device.startswith(("gpu", "xpu")) else "CPU",
            "ov_config": {
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": str(threads),
                "NUM_STREAMS": "1",
                "ENABLE_CPU_PINNING": "NO",
            },
        }
    return {"provider": "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"}


def _exported(
    plan: LoadPlan, version: str, backend: str, progress: Callable[[str], None], open_model: Callable[[str], Any]
) -> tuple[str, float]:
    """The folder of the export and its greatest difference from torch."""
    folder = _root(plan) / _key(plan, version, backend)
    note = folder / "difference.json"
    if not note.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one replica exports, the others wait for it
            if not note.exists():
                progress(f"exporting {plan.source} for {backend}, once; kept in {folder}")
                _export(folder, backend, open_model)
                raise StartAgain(str(folder))
    return str(folder), float(json.loads(note.read_text())["max_abs"])


def _export(folder: Path, backend: str, open_model: Callable[[str], Any]) -> None:
    """Exports, measures and moves the result into place in one step."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model, reference = open_model(backend), open_model("torch")
        difference = float(np.max(np.abs(_sample(model) - _sample(reference))))
        model.save_pretrained(str(partial))
        (partial / "difference.json").write_text(json.dumps({"max_abs": difference, "sample": len(SAMPLE)}))
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sample(model: Any) -> Any:
    texts = list(SAMPLE)
    if hasattr(model, "predict"):
        return model.predict([(texts[1], text) for text in texts], show_progress_bar=False)
    return model.encode(texts, show_progress_bar=False)


def _root(plan: LoadPlan) -> Path:
    if plan.export_dir:
        return Path(plan.export_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infermesh" / "exports"


def _key(plan: LoadPlan, version: str, backend: str) -> str:
    """Another model, another revision or another version of the exporters is another export; the same folder at
    another place is not.
    """
    place = "" if Path(plan.source).is_dir() else plan.source
    parts = [plan.purpose, backend, place, plan.revision, version]
    parts += [_version(name) for name in ("sentence-transformers", "transformers", "torch", "optimum", "optimum-intel")]
    parts += [_version("openvino" if backend == "openvino" else "onnxruntime")]
    return f"{Path(plan.source).name}-{backend}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def weights_version(source: str, commit: str | None) -> str:
    """Digest of a local model's files, or the hub's commit: equal versions give equal vectors."""
    folder = Path(source)
    if not folder.is_dir():
        return (commit or "")[:16]
    digest = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def cpu_name() -> str:
    """The CPU's model as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
