"""The fleet of a bare `infermesh up`: one LLM, one embedding and one rerank instance, as far as this machine allows."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.fleet import Fleet, Instance, Model
from deploy.launch.commands import Host

# About 1 GB, and small enough for two cores; pinned, so that everybody gets the same answers.
LLM_SOURCE = "Qwen/Qwen2.5-0.5B-Instruct"
LLM_REVISION = "7ae557604adf67be50417f59c2c2f167def9a775"
LLM_FILES = (
    *("config.json", "generation_config.json", "merges.txt", "vocab.json", "tokenizer.json", "tokenizer_config.json"),
    "model.safetensors",
)
LLM_MODEL = "qwen2.5-0.5b-instruct"
TINY_MODEL = "tiny-noise"
ENCODER = "all-minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class Llm:
    """The language model to start: where from, and what the operator should know before the first token."""

    model: str
    source: str
    revision: str = ""
    offline: bool = False  # everything is on the disk: do not ask the hub
    notes: tuple[str, ...] = ()


def choose_llm(
    host: Host,
    asked: str,
    hub_fault: Callable[[], str],
    cached: Callable[[str, str, tuple[str, ...]], bool],
    tiny: Path,
) -> Llm | None:
    """`tiny`: where the tiny model is, or will be generated. None where no LLM can be started at all."""
    if not host.llm:
        return None
    if asked:
        return Llm(Path(asked).name.lower() or "llm", asked)
    if cached(LLM_SOURCE, LLM_REVISION, LLM_FILES):
        return Llm(LLM_MODEL, LLM_SOURCE, LLM_REVISION, offline=True)
    fault = hub_fault()
    if not fault:
        return Llm(LLM_MODEL, LLM_SOURCE, LLM_REVISION, notes=(f"{LLM_SOURCE} is fetched once (about 1 GB)",))
    return Llm(
        TINY_MODEL,
        str(tiny),
        notes=(
            f"no model hub: {fault}",
            "a tiny generated model is served instead: ITS TEXT IS NOISE",
            "for a real one: infermesh up --llm-source FOLDER_OR_HUB_NAME",
        ),
    )


def default_fleet(llm: Llm | None, encoder_folder: str, *, gpu: bool) -> Fleet:
    """Whatever of it is there. On a CPU the KV cache is kept small; vLLM would take most of the memory."""
    models, instances = [], []
    if llm is not None:
        models.append(Model(id=llm.model, kind="llm", source=llm.source, revision=llm.revision))
        environment = {} if gpu else {"VLLM_CPU_KVCACHE_SPACE": "1"}
        environment |= {"HF_HUB_OFFLINE": "1"} if llm.offline else {}
        ratio = 0.5 if gpu else None
        instances.append(Instance(id="llm-1", model=llm.model, tp=1, environment=environment, vram_ratio=ratio))
    if encoder_folder:
        models.append(Model(id=ENCODER, kind="embedding", source=encoder_folder))
        models.append(Model(id=f"{ENCODER}-rerank", kind="rerank", source=encoder_folder, scorer="bi-encoder"))
        instances.append(Instance(id="embedding-1", model=ENCODER))
        instances.append(Instance(id="rerank-1", model=f"{ENCODER}-rerank"))
    return Fleet(version=1, models=tuple(models), instances=tuple(instances))


def make_tiny_model(python: str, folder: Path) -> None:
    """Generates the tiny LLM, about a second.

    Raises:
        ValueError: it could not be written.
    """
    if (folder / "complete.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = subprocess.run([python, "-P", "-m", "services.llm.tiny_model", str(folder)], capture_output=True, text=True)
    if made.returncode:
        raise ValueError(f"the tiny model could not be generated: {made.stderr.strip()[-500:]}")
