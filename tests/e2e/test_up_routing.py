"""`infermesh up` with a fleet file that steers traffic: the gateway it starts does what the file says."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from tests.e2e.test_up import up, wait_for

FLEET = """
version: 1
models:
  - {id: v1, kind: llm, fallback: small}
  - {id: v2, kind: llm}
  - {id: small, kind: llm}
instances:
  - {id: one, model: v1, engine: scripted, speed: {prefill_tps: 100000, step_ms: 2}}
  - {id: two, model: v2, engine: scripted, speed: {prefill_tps: 100000, step_ms: 2}}
  - {id: tiny, model: small, engine: scripted, speed: {prefill_tps: 100000, step_ms: 2}}
routing:
  objective: {ttft_s: 30, tpot_ms: 0.001}
  aliases: {chat: [{model: v1, weight: 4}, {model: v2, weight: 1}]}
"""


def test_alias_and_objective_reach_the_gateway(tmp_path: Path) -> None:
    with up(tmp_path, FLEET) as mesh:
        wait_for(lambda: mesh.is_ready("gateway", "one", "two", "tiny"), 60)
        http = mesh.run_file()["http"]

        def get(path: str, body: Any = None) -> Any:
            data = json.dumps(body).encode() if body is not None else None
            request = urllib.request.Request(f"http://{http}{path}", data, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                return dict(answer.headers), answer.read().decode()

        def entry() -> dict[str, Any]:
            listed = json.loads(get("/v1/models")[1])["data"]
            return next((one for one in listed if one["id"] == "chat" and len(listed) == 4), {})

        wait_for(entry)
        assert entry()["variants"] == [{"model": "v1", "weight": 4.0}, {"model": "v2", "weight": 1.0}]
        body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        served = [get("/v1/chat/completions", body)[0]["x-infermesh-model-id"] for _ in range(60)]
        assert set(served) == {"v1", "v2"} and served.count("v1") > served.count("v2")
        metrics = get("/metrics")[1]
        missed = sum(
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith("infermesh_gateway_objective_total") and 'verdict="tpot"' in line
        )
        assert missed == 60, "the file's 1 µs between tokens is the gateway's objective"
        said = json.loads(mesh.cli("explain", "--json", "--model", "chat").stdout)
        assert said["model"] in ("v1", "v2")
        assert list((tmp_path / ".infermesh/explain").rglob("*.jsonl")), "decisions are kept beside run files and logs"
