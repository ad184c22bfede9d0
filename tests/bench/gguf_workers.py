"""A GGUF model split over two RPC workers of a real llama.cpp answers through the mesh: `make gguf`.

The lines of the rendered units are run, which are the planner's. llama.cpp is built from llama-cpp-python's source on
the package index, unless `--llama` names a folder with `llama-server` and the worker (`rpc-server`, by now called
`ggml-rpc-server`). A build without GPUs lends its CPU as a worker's one device, and has none of its own: a third worker
stands in for the card of the server's host. Each host is an address of the loopback network, so that the planned ports
hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Awaitable
from configparser import ConfigParser
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from deploy.fleet import parse_fleet
from deploy.model_files import read_models
from deploy.planner.catalogue import shipped
from deploy.planner.placed import Placed
from deploy.planner.planner import plan
from deploy.render.llama_cpp import llama_units
from infermesh.v1 import language_model_pb2 as lm
from tests.bench.llama_build import built
from tests.kit.children import leave_nothing_when_told_to_stop
from tests.kit.gguf_model import tiny_llama
from tests.kit.mesh import TestMesh, running_mesh, until

CONTEXT = 1024
OWN_CARD = "127.0.0.14:50052"
FLEET = """
version: 1
models: [{{id: tiny, kind: llm, source: {model}, max_context: {context}}}]
nodes:
  - {{name: head, device: pocket, count: 1, address: 127.0.0.11}}
  - {{name: left, device: pocket, count: 1, address: 127.0.0.12}}
  - {{name: right, device: pocket, count: 1, address: 127.0.0.13}}
devices:
  pocket: {{memory_mib: 10.4, bandwidth_gbs: 1, tflops: {{fp32: 0.01, fp16: 0.01}}, compute_capability: "6.1"}}
traffic: {{requests_per_s: 0.01, prompt_tokens: 100, output_tokens: 50}}
"""


def planned(model: Path) -> tuple[Placed, dict[str, str]]:
    """The one instance that the planner makes of it, and what a host's rendered unit starts."""
    fleet = parse_fleet(FLEET.format(model=model, context=CONTEXT))
    read = read_models(fleet, model.parent)
    found = plan(fleet, read.shapes, shipped(), read.unread, "tiny")
    (placed,) = found.placed
    lines = {}
    for path, text in llama_units(found.fleet, found.placed).files.items():
        told = ConfigParser(interpolation=None)
        told.read_string(text)
        lines[path.split("/")[1]] = f"{told['Service']['Environment']} {told['Service']['ExecStart']}"
    return placed, lines


class Processes:
    """llama.cpp's processes, each in a session of its own."""

    def __init__(self, folder: Path, llama: Path, stack: ExitStack) -> None:
        self._folder, self._llama, self._stack = folder, llama, stack

    def start(self, name: str, command: str, *more: str) -> subprocess.Popen[bytes]:
        """A planned command line: NAME=VALUE words, the program, its arguments."""
        words = shlex.split(command)
        settings = dict(word.split("=", 1) for word in words if "=" in word and word.split("=", 1)[0].isupper())
        program, *arguments = words[len(settings) :]
        names = (program, f"ggml-{program}")
        path = next(self._llama / name for name in names if (self._llama / name).exists())
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(path), *arguments, *more],
                env={**os.environ, **settings},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._stack.callback(_end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait(10)


async def up(url: str) -> None:
    async def answers() -> bool:
        with suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as answer:
                return answer.status == 200
        return False

    await until(answers, 60)


def ask(text: str, **sampling: Any) -> lm.ChatRequest:
    said = lm.Message(role=lm.ROLE_USER, content=text)
    return lm.ChatRequest(model="tiny", messages=[said], sampling=lm.Sampling(**{"temperature": 0, **sampling}))


async def chat(stub: Any, request: lm.ChatRequest) -> tuple[str, Any]:
    replies = [reply async for reply in stub.Chat(request, timeout=60)]
    return "".join(delta.content for reply in replies for delta in reply.deltas), replies[-1].usage


async def raised(call: Awaitable[Any]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        reason = dict(error.trailing_metadata() or ()).get("x-infermesh-reason", "")
        return f"{error.code().name} {reason} {(error.details() or '')[:110]}".replace("  ", " ")
    return "no error"


class Proof:
    """Says what it does, and what came of it."""

    def __init__(self, mesh: TestMesh, server: str) -> None:
        self.mesh, self.server = mesh, server
        self.failed: list[str] = []

    def told(self, what: str, held: bool, said: str) -> None:
        print(f"{'ok  ' if held else 'FAIL'}  {what}: {said}", flush=True)
        if not held:
            self.failed.append(what)

    async def answers(self, alone: str) -> None:
        llm = self.mesh.llm
        text, usage = await chat(llm, ask("which card is fast?", max_tokens=24))
        same = (
            "the same text as one process without workers" if text == alone else f"another text than alone: {alone!r}"
        )
        self.told("greedy chat over gRPC", text == alone, f"{text[:24]!a}…, {same}")
        counts = (usage.prompt_tokens, usage.completion_tokens)
        self.told(
            "usage at the end of the stream", counts[0] > 0 and counts[1] == 24, f"{counts[0]} + {counts[1]} tokens"
        )
        _, again = await chat(llm, ask("which card is fast?", max_tokens=4))
        self.told("its own prefix cache is told", again.cached_tokens > 0, f"{again.cached_tokens} tokens cached")
        sampling = lm.Sampling(max_tokens=5, logprobs=2, temperature=0)
        replies = [
            reply
            async for reply in llm.Complete(
                lm.CompleteRequest(model="tiny", text="the card", sampling=sampling), timeout=60
            )
        ]
        entries = [entry for reply in replies for delta in reply.deltas for entry in delta.logprobs]
        good = 0 < len(entries) <= 5 and all(entry.logprob < 0 and len(entry.top) == 2 for entry in entries)
        # The server leaves out tokens that end within a character, which a random model often makes.
        self.told("log-probabilities of a completion", good, f"of {len(entries)} tokens of 5, with 2 others each")
        tokens = await llm.Tokenize(lm.TokenizeRequest(model="tiny", text="the model runs"))
        text = (await llm.Detokenize(lm.DetokenizeRequest(model="tiny", token_ids=tokens.token_ids))).text
        self.told("tokenize and back", "the model runs" in text, f"{len(tokens.token_ids)} tokens, {text!r}")
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        async with aiohttp.ClientSession() as session:
            async with session.post(f"http://{self.mesh.http}/v1/chat/completions", json=asked) as answer:
                body, id = await answer.json(), answer.headers.get("x-infermesh-instance-id")
        self.told("REST", answer.status == 200, f"{body['usage']['completion_tokens']} tokens from {id}")

    async def refusals(self) -> None:
        llm = self.mesh.llm
        long = await raised(chat(llm, ask("word " * 2000, max_tokens=3)))
        self.told("a prompt that is too long", "context_length_exceeded" in long, long)
        several = await raised(chat(llm, ask("hi", max_tokens=3, n=2, temperature=1)))
        self.told("two choices, which it has not", several.startswith("INVALID_ARGUMENT"), several)

    async def cancels(self) -> None:
        call = self.mesh.llm.Chat(ask("tell me all", max_tokens=900, ignore_eos=True))
        await call.read()
        busy = await self.busy()
        call.cancel()
        begun = time.monotonic()

        async def free() -> bool:
            return not await self.busy()

        await until(free, 20)
        took = time.monotonic() - begun
        self.told("a caller who leaves frees the slot", busy and took < 5, f"after {took:.2f} s")

    async def busy(self) -> bool:
        async with aiohttp.ClientSession() as session, session.get(f"{self.server}/slots") as answer:
            return any(slot["is_processing"] for slot in await answer.json())

    async def loses(self, worker: subprocess.Popen[bytes], server: subprocess.Popen[bytes]) -> None:
        """llama.cpp cannot go on without a worker: its server ends, and callers hear of it."""
        worker.kill()
        said = await raised(chat(self.mesh.llm, ask("are you there? " * 9, max_tokens=400)))
        self.told("a worker dies", said.startswith("UNAVAILABLE"), f"{said}; llama-server ended with {server.poll()}")


async def prove(folder: Path, llama: Path) -> list[str]:
    model = tiny_llama(folder / "tiny.gguf")
    placed, lines = planned(model)
    print("planned:", *placed.reasons, sep="\n  ")
    for host, command in lines.items():
        print(f"  {host}: {command}")
    url = (placed.instance.url or "").removesuffix("/v1")
    with ExitStack() as stack:
        processes = Processes(folder, llama, stack)
        single = processes.start("alone", f"llama-server -m {model} -c {CONTEXT} -np 1 --host 127.0.0.15 --port 8080")
        await up("http://127.0.0.15:8080")
        async with aiohttp.ClientSession() as session:
            asked = {
                "messages": [{"role": "user", "content": "which card is fast?"}],
                "max_tokens": 24,
                "temperature": 0,
            }
            async with session.post("http://127.0.0.15:8080/v1/chat/completions", json=asked) as answer:
                alone = (await answer.json())["choices"][0]["message"]["content"]
        _end(single)
        workers = {host: processes.start(host, line) for host, line in lines.items() if host != "head"}
        processes.start("card of head", f"rpc-server -H {OWN_CARD.partition(':')[0]} -p {OWN_CARD.partition(':')[2]}")
        await asyncio.sleep(1)
        others = ",".join(f"{address}:50052" for address in ("127.0.0.12", "127.0.0.13"))
        line = lines["head"].replace(f"--rpc {others} ", f"--rpc {others},{OWN_CARD} ")
        assert OWN_CARD in line
        server = processes.start("head", line, "--slots", "-lv", "5")
        await up(url)
        flags = ("--engine", "openai-http", "--source", url)
        async with running_mesh(folder, {"gguf": flags}, model="tiny", http="127.0.0.1:0") as mesh:
            proof = Proof(mesh, url)
            (listed,) = (await mesh.mesh.ListInstances(_all())).instances
            told = {
                key: listed.metadata.get(key, "") for key in ("engine", "engine_version", "context_max", "max_running")
            }
            proof.told("adopted", told["engine"] == "openai-http:llama.cpp" and told["max_running"] == "1", str(told))
            log = (folder / "head.log").read_text(errors="replace").rpartition("load_tensors: layer   0")
            found = re.findall(r"layer +\d+ assigned to device (\w+)", "layer 0" + log[2])
            held = [found[: sum(placed.split.layers) + 1].count(f"RPC{at}") for at in range(3)] if placed.split else []
            wanted = [2, 2, 3]
            proof.told("layers where they were planned", held == wanted, f"{held}, the last with the output head")
            await proof.answers(alone)
            await proof.refusals()
            await proof.cancels()
            await proof.loses(workers["right"], server)
            return proof.failed


def _all() -> Any:
    from infermesh.v1.mesh_pb2 import ListInstancesRequest

    return ListInstancesRequest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", type=Path, help="folder with llama-server and rpc-server; built unless told")
    told = parser.parse_args()
    llama = told.llama or built(Path("build/llama.cpp"))
    with tempfile.TemporaryDirectory() as folder:
        failed = asyncio.run(prove(Path(folder), llama.resolve()))
    print("failed: " + ", ".join(failed) if failed else "all of it held")
    return 1 if failed else 0


if __name__ == "__main__":
    leave_nothing_when_told_to_stop()
    raise SystemExit(main())
