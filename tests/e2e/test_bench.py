"""`infermesh bench` against a gateway with scripted instances: open and closed loop, gRPC and REST, prefixes, plot."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.kit.children import environment, infermesh
from tests.kit.mesh import running_mesh

SPEED = ("--prefill-tps", "20000", "--step-ms", "2")


async def bench(*words, code=0):
    process = await asyncio.create_subprocess_exec(
        *infermesh("bench", *words), env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == code, f"{out.decode()}\n{err.decode()}"
    return out.decode(), err.decode()


@pytest.mark.timeout(180)
async def test_open_and_closed_loops_over_both_doors(tmp_path):
    async with running_mesh(tmp_path, {"a": SPEED, "b": SPEED}, http="127.0.0.1:0") as mesh:
        spec = "requests=30,rps=15,prompt=400,output=8,prefixes=2,prefix=256,block=64,spread=0.2"
        plot = tmp_path / "load.svg"
        out, _ = await bench(
            *("--target", mesh.address, "--generate", spec, "--rate", "0.5,1", "--plot", str(plot), "--json")
        )
        runs = json.loads(out)["runs"]
        assert [run["completed"] for run in runs] == [30, 30] and [run["load"] for run in runs] == [0.5, 1]
        assert runs[0]["span_s"] > runs[1]["span_s"], "twice the rate, half the time"
        assert runs[1]["cache_hit_ratio"] > 0.2 and sum(runs[1]["instances"].values()) == 30
        assert all(0 < run["ttft_p50_s"] <= run["ttft_p99_s"] <= run["e2e_p99_s"] for run in runs)
        assert plot.read_text().startswith("<svg")
        trace = tmp_path / "trace.jsonl"
        lines = [{"timestamp": 20 * n, "input_length": 100, "output_length": 4, "hash_ids": [n]} for n in range(10)]
        trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out, _ = await bench(
            *(
                "--target",
                f"http://{mesh.http}",
                "--model",
                "chat",
                "--trace",
                str(trace),
                "--concurrency",
                "3",
                "--json",
            )
        )
        run = json.loads(out)
        assert (run["completed"], run["failed"], run["load"]) == (10, {}, 3)
        assert run["output_tokens_per_s"] > 0 and sum(run["instances"].values()) == 10
        out, err = await bench("--target", mesh.address, "--model", "nobody", "--limit", "2", code=1)
        assert "2 × model_not_found" in out
        out, err = await bench("--target", mesh.address, "--generate", "rps=500,requests=50", "--max-in-flight", "1")
        assert "--max-in-flight was reached" in err and "× not_sent" in out
