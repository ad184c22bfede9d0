"""`calibrate` and `verify` on real vLLM: a speed is found and adopted; the true weights pass, tampered ones do not."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from tests.kit.children import environment, infermesh
from tests.kit.llm import LlmProcess, llm_python
from tests.kit.llm_client import MODEL
from tests.kit.mesh import running_mesh

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(480)]
TAMPER = """
import sys
from safetensors.torch import load_file, save_file
path = sys.argv[1]
weights = load_file(path)
name = next(name for name in weights if "layers.1" in name and "down_proj" in name)
weights[name] = weights[name] * 1.5
save_file(weights, path, metadata={"format": "pt"})
"""


async def verb(*words: str, code: int = 0) -> str:
    process = await asyncio.create_subprocess_exec(
        *infermesh(*words), env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == code, f"{out.decode()}\n{err.decode()}"
    return out.decode()


async def undisturbed(*words: str) -> str:
    """As an operator would: what other work disturbed is refused, and measured again."""
    for _ in range(2):
        try:
            return await verb(*words)
        except AssertionError as refused:
            if "was disturbed" not in str(refused):
                raise
    return await verb(*words)


async def test_true_weights_pass_tampered_ones_do_not_and_a_speed_is_found(tiny_model: Path, tmp_path: Path) -> None:
    tampered = tmp_path / "tampered"
    shutil.copytree(tiny_model, tampered)
    llm_python("-c", TAMPER, str(next(tampered.glob("*.safetensors"))))
    reference = tmp_path / "reference.json"
    await verb("verify", "--record", str(reference), "--source", str(tiny_model), "--dtype", "bfloat16")
    async with running_mesh(tmp_path, {}) as mesh:
        at = ("--gateway", mesh.address)
        for source, code in ((tiny_model, 0), (tampered, 1)):
            folder = tmp_path / str(code)
            folder.mkdir()
            service = LlmProcess(folder, source, "--registry", mesh.registry, "--instance-id", f"llm-{code}")
            try:
                await asyncio.to_thread(service.wait_ready)
                await mesh.healthy(f"llm-{code}")
                said = json.loads(
                    await verb("verify", f"llm-{code}", "--against", str(reference), "--json", *at, code=code)
                )
                assert bool(said["faults"]) == bool(code) and said["model"] == MODEL
                assert said["positions"] > 100
                if not code:
                    assert said["unexplained"] == 0
                    file = tmp_path / "calibration.yaml"
                    words = ("calibrate", "llm-0", "--quick", "--json", "--calibration", str(file), *at)
                    found = json.loads(await undisturbed(*words))
                    assert found["adopted"] and file.exists() and len(found["held_out"]) == 2
                    assert found["speed"]["prefill_tps"] > 100 and found["speed"]["step_ms"] > 0.05
            finally:
                service.close()
