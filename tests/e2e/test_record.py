"""`infermesh record` on real processes, ended by hand, and `infermesh sim` on what it wrote."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from infermesh.client import Client
from tests.kit.children import ROOT, Children, ask, environment, infermesh

SPEEDS = {"a": (8000, 4), "b": (4000, 8)}  # prefill tokens/s, ms a step
FLEET = """
version: 1
models: [{id: m, kind: llm}]
instances:
  - {id: a, model: m, engine: scripted, kv_tokens: 100000, max_running: 64, context: [0, 65536],
     speed: {prefill_tps: 8000, prefill_doubling_ctx: 55000, step_ms: 4, kv_us_per_ktoken: 45}}
  - {id: b, model: m, engine: scripted, kv_tokens: 100000, max_running: 64, context: [0, 65536],
     speed: {prefill_tps: 4000, prefill_doubling_ctx: 55000, step_ms: 8, kv_us_per_ktoken: 45}}
"""


def wait_for(what: Callable[[], Any], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"waited {seconds} s"
        time.sleep(0.05)


def recorder(folder: Path, gateway: str, name: str, *more: str) -> subprocess.Popen[str]:
    words = infermesh("record", "-o", str(folder / name), "--gateway", gateway, *more)
    with (folder / f"{name}.err").open("w") as err:
        return subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=err, text=True)


def test_a_recording_ended_by_hand_is_whole_and_sim_tells_how_near_it_is(tmp_path: Path) -> None:
    with Children(tmp_path) as children:
        registry = children.start("registry", "--listen", "127.0.0.1:0")
        shared = ("--registry", f"mesh://{registry.address}")
        for id, (tps, step) in SPEEDS.items():
            scripted = ("--engine", "scripted", "--model", "m", "--listen", "127.0.0.1:0", "--instance-id", id)
            speed = ("--prefill-tps", str(tps), "--prefill-doubling-ctx", "55000", "--step-ms", str(step))
            speed += ("--kv-us-per-ktoken", "45", "--kv-tokens", "100000", "--max-running", "64")
            children.start("llm", *scripted, *speed, "--context", "0-65536", *shared, name=id)
        where = ("--explain-dir", str(tmp_path / "past"))
        gateway = children.start("gateway", "--grpc", "127.0.0.1:0", "--http", "", *where, *shared)
        with Client(gateway.address, timeout=60) as mesh:
            wait_for(lambda: sum(one.state == "healthy" for one in mesh.instances()) == 2)
            by_hand = recorder(tmp_path, gateway.address, "hand.jsonl")
            counted = recorder(tmp_path, gateway.address, "counted.jsonl", "--requests", "5", "--json")
            for name in ("hand.jsonl", "counted.jsonl"):
                wait_for(lambda: "recording" in (tmp_path / f"{name}.err").read_text())  # noqa: B023

            def one(number: int) -> None:
                # Four beginnings of 600 words, six requests each.
                text = f"beginning{number % 4} " * 600 + f"secret{number} " * 100
                mesh.chat(text, model="m", max_tokens=20, session_id=f"person-{number % 4}")

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(one, range(24)))
            wait_for(lambda: len((tmp_path / "hand.jsonl").read_text().splitlines()) == 24)
        by_hand.send_signal(signal.SIGINT)
        printed = by_hand.communicate(timeout=20)[0], counted.communicate(timeout=20)[0]
        assert (by_hand.returncode, counted.returncode, printed[0]) == (0, 0, "")
        assert json.loads(printed[1]) == {
            "file": str(tmp_path / "counted.jsonl"),
            "requests": 5,
            "dropped": 0,
        }
        assert "24 requests; in " in (tmp_path / "hand.jsonl.err").read_text()

        text = (tmp_path / "hand.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert not any(word in text for word in ("beginning", "secret", "person", "default"))
        heads = {line["hash_ids"][0] for line in lines}
        assert len(heads) == len({line["session_id"] for line in lines}) == 4
        assert all(line["outcome"] == "ok" and line["output_length"] == 20 and line["ttft_ms"] > 0 for line in lines)
        few = [json.loads(line) for line in (tmp_path / "counted.jsonl").read_text().splitlines()]
        assert len(few) == 5 and not {h for line in few for h in line["hash_ids"]} & {
            h for line in lines for h in line["hash_ids"]
        }

        refused = subprocess.run(
            infermesh("record", "-o", str(tmp_path / "hand.jsonl"), "--gateway", gateway.address),
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert refused.returncode == 2 and "is there already" in refused.stderr

        # A gateway that dies in the middle leaves what came until then.
        cut = recorder(tmp_path, gateway.address, "cut.jsonl")
        wait_for(lambda: "recording" in (tmp_path / "cut.jsonl.err").read_text())
        with Client(gateway.address, timeout=60) as mesh:
            mesh.chat("hello", model="m", max_tokens=2)
        wait_for(lambda: (tmp_path / "cut.jsonl").read_text().endswith("\n"))
        gateway.kill()
        assert cut.communicate(timeout=30)[0] == "" and cut.returncode == 1
        assert json.loads((tmp_path / "cut.jsonl").read_text())["outcome"] == "ok"

    today, tomorrow = tmp_path / "today.yaml", tmp_path / "tomorrow.yaml"
    today.write_text(FLEET)
    tomorrow.write_text(FLEET.replace("prefill_tps: 4000", "prefill_tps: 400"))
    both = f"{today},{tomorrow}"
    said = json.loads(ask("sim", "--trace", str(tmp_path / "hand.jsonl"), "--fleet", both, "--json"))
    first, second = said["runs"]
    assert first["measured"]["completed"] == 24 and first["measured"]["cache_hit_ratio"] > 0.3
    error = first["policies"]["infermesh"]["error"]
    assert error["requests"] == 24 and -0.9 < error["ttft_p50_s"] < 1.0, error  # a loaded machine measures long times
    change = second["policies"]["infermesh"]["change"]
    assert change["ttft_mean_s"] >= 0 and "error" not in second["policies"]["infermesh"]
    both = f"{both},{foreign(tmp_path)}"
    shown, remarks = sim("--trace", str(tmp_path / "hand.jsonl"), "--fleet", both)
    assert "nobody serves 'm'; its 24 requests count as shed" in remarks
    for part in ("\nmeasured ", "ERROR TTFT", "CHANGE TTFT", "A change smaller than the error means nothing"):
        assert part in shown, shown
    print(shown)
    _, remarks = sim("--trace", str(tmp_path / "hand.jsonl"), "--fleet", str(foreign(tmp_path)))
    assert "the trace was recorded on a, b, which" in remarks and "put today's fleet first" in remarks


def foreign(folder: Path) -> Path:
    """A fleet that has nothing of the recording's."""
    path = folder / "foreign.yaml"
    path.write_text(
        FLEET.replace("id: m", "id: n")
        .replace("model: m", "model: n")
        .replace("id: a", "id: x")
        .replace("id: b", "id: y")
    )
    return path


def sim(*words: str) -> tuple[str, str]:
    command = infermesh("sim", *words)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_what_cannot_be_recorded_leaves_no_file(tmp_path: Path) -> None:
    words = infermesh("record", "-o", str(tmp_path / "x.jsonl"), "--gateway", "127.0.0.1:1")
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "127.0.0.1:1" in done.stderr and not (tmp_path / "x.jsonl").exists()
