"""`infermesh calibrate` over a running mesh: known speeds are found again, adopted, kept over a restart; a busy
instance refuses."""

from __future__ import annotations

import asyncio
import json

import pytest
import yaml

from tests.kit.children import environment, infermesh
from tests.kit.mesh import running_mesh, until

# Slow enough that a loaded machine's own milliseconds matter little; the exact numbers are for tests/unit.
TOLD = {"prefill_tps": 6000.0, "prefill_doubling_ctx": 2000.0, "step_ms": 12.0, "kv_us_per_ktoken": 2000.0}
SPEED = tuple(word for name, value in TOLD.items() for word in (f"--{name.replace('_', '-')}", str(value)))
FLAGS = (*SPEED, "--speed-source", "catalogue", "--max-context", "2000", "--kv-tokens", "16000")


async def speed_of(mesh, id):
    from infermesh.client import AsyncClient

    async with AsyncClient(mesh.address) as client:
        (found,) = [one for one in await client.instances() if one.id == id]
    return {name: float(found.metadata[name]) for name in TOLD}, found.metadata["speed_source"]


async def verb(*words, code=0):
    process = await asyncio.create_subprocess_exec(
        *infermesh(*words), env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == code, f"{out.decode()}\n{err.decode()}"
    return out.decode(), err.decode()


@pytest.mark.timeout(180)
async def test_a_known_speed_is_found_adopted_and_kept(tmp_path):
    file = tmp_path / "calibration.yaml"
    flags = (*FLAGS, "--calibration", str(file))
    async with running_mesh(tmp_path, {"llm-1": flags}) as mesh:
        assert (await speed_of(mesh, "llm-1"))[1] == "catalogue"
        words = ("calibrate", "llm-1", "--quick", "--json", "--calibration", str(file), "--gateway", mesh.address)
        out, err = await verb(*words)
        document = json.loads(out)
        for name, value in TOLD.items():
            assert value / 3 < document["speed"][name] < value * 3, document
        assert document["adopted"] and len(document["held_out"]) == 2
        assert "prefill" in err and "decode 4" in err, "progress is told"

        async def adopted():
            return (await speed_of(mesh, "llm-1"))[1] == "calibrated"

        await until(adopted, 20)
        (entry,) = yaml.safe_load(file.read_text())["calibrations"]
        assert (entry["model"], entry["engine"], entry["speed"]) == ("chat", "scripted", document["speed"])
    (tmp_path / "again").mkdir()
    async with running_mesh(tmp_path / "again", {"llm-1": flags}) as mesh:
        numbers, source = await speed_of(mesh, "llm-1")
        assert source == "calibrated"
        assert numbers == pytest.approx({name: document["speed"][name] for name in TOLD}, rel=1e-4)


@pytest.mark.timeout(120)
async def test_a_busy_instance_refuses_and_says_how_to_go_on(tmp_path):
    async with running_mesh(tmp_path, {"llm-1": FLAGS}) as mesh:
        from infermesh.client import AsyncClient

        async with AsyncClient(mesh.address) as client:
            stream = client.complete_stream("hello", model="chat", max_tokens=4000, ignore_eos=True)
            await anext(stream)
            _, err = await verb("calibrate", "llm-1", "--gateway", mesh.address, code=1)
            assert "1 requests of others run here" in err and "infermesh ban llm-1 --for 10m" in err
            await stream.aclose()
        assert (await speed_of(mesh, "llm-1"))[1] == "catalogue"


@pytest.mark.timeout(120)
async def test_a_declared_speed_stays_and_no_speed_is_refused(tmp_path):
    ids = {"told": ("--prefill-tps", "1e6", "--step-ms", "1"), "narrow": ("--max-context", "100")}
    async with running_mesh(tmp_path, ids) as mesh:
        _, err = await verb("calibrate", "narrow", "--gateway", mesh.address, code=1)
        assert "not calibrated: " in err and "too narrow a range" in err
        _, err = await verb("calibrate", "nobody", "--gateway", mesh.address, code=2)
        assert "nobody is not registered; registered: narrow, told" in err
