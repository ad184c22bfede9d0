"""The Python client against real gateways: what it sends and gives back, and what it does when a gateway dies."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

from infermesh.client import AsyncClient, Client, MeshError, Reason
from tests.kit.children import ROOT
from tests.kit.mesh import TestMesh, running_mesh, until
from tests.kit.processes import KEY, Served

FAST = ("--prefill-tps", "1e6", "--step-ms", "2")
SLOW = ("--prefill-tps", "1e6", "--step-ms", "30")
NOWHERE = "127.0.0.1:1"


@asynccontextmanager
async def gateway(mesh: TestMesh, name: str, *flags: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A further gateway, in a process that a test may kill."""
    ready = mesh.folder / f"{name}.json"
    words = ("gateway", "--registry", mesh.registry, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--grace-s", "1")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "infermesh.cli", *words, "--ready-file", str(ready), *flags),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        await until(ready.exists, 60)
        yield json.loads(ready.read_text())["address"], process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


async def test_chat_and_completion(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": FAST}) as mesh, AsyncClient(mesh.address) as client:
        answer = await client.chat("hello", model="chat", max_tokens=4)
        assert answer.text == " w0 w1 w2 w3" and answer.choices[0].finish == "length"
        assert answer.served.instance_id == "a" and answer.served.model == "chat" and answer.served.attempts == 1
        assert answer.usage.completion_tokens == 4 and answer.model == "chat" and answer.id

        texts, last = [], None
        async for chunk in client.chat_stream([{"role": "user", "content": "hello"}], model="chat", max_tokens=4):
            texts.append(chunk.text)
            last = chunk.so_far
        assert "".join(texts) == " w0 w1 w2 w3" and len(texts) > 1
        assert last is not None and last.text == answer.text and last.usage == answer.usage

        whole = await client.complete("once upon", model="chat", max_tokens=3, stop="w2", token_ids=True)
        assert (whole.text, whole.choices[0].finish, whole.choices[0].stop) == (" w0 w1 ", "stop", "w2")
        assert whole.choices[0].token_ids
        pieces = [chunk.text async for chunk in client.complete_stream("once upon", model="chat", max_tokens=3)]
        assert "".join(pieces) == " w0 w1 w2"
        told = await client.tokenize("one two three", model="chat")
        assert len(told.token_ids) == 3 and told.max_context > 0
        assert [instance.id for instance in await client.instances()] == ["a"]
        assert json.loads(await client.explain(_described()))["chosen"] == "a"


def _described() -> object:
    from infermesh.v1.mesh_pb2 import ExplainRequest

    return ExplainRequest(kind="llm", model="chat", prompt_tokens=10, max_tokens=10)


async def test_errors_are_typed(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": SLOW}) as mesh, AsyncClient(mesh.address) as client:
        for call, reason, param in (
            (client.chat("x", model="nobody"), Reason.MODEL_NOT_FOUND, None),
            (client.chat("x", model="chat", temperature=9), Reason.INVALID_ARGUMENT, "sampling.temperature"),
            (client.chat("x", model="chat", max_tokens=100, timeout=0.3), Reason.DEADLINE_EXCEEDED, None),
            (client.embed("x", model="chat"), Reason.MODEL_NOT_FOUND, None),
        ):
            with pytest.raises(MeshError) as caught:
                await call
            assert caught.value.reason is reason and (param is None or caught.value.param == param)
        with pytest.raises(TypeError, match="no such option: max_token;"):
            await client.chat("x", model="chat", max_token=3)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="exclude each other"):
            await client.chat("x", model="chat", regex="a", choice=["b"])
        with pytest.raises(ValueError, match="role 'robot' is not one of"):
            await client.chat([{"role": "robot", "content": "x"}], model="chat")


async def test_leaving_a_stream_ends_the_request(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": SLOW}) as mesh, AsyncClient(mesh.address) as client:
        stream = client.chat_stream("x", model="chat", max_tokens=5000)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

        async def idle() -> bool:
            (instance,) = await client.instances()
            return instance.load.running == 0 and instance.in_flight == 0

        await until(idle, 20)


async def test_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    entry = {"sha256": hashlib.sha256(b"sk-1").hexdigest(), "tenant": "t"}
    keys.write_text(yaml.safe_dump({"version": 1, "keys": [entry]}))
    async with running_mesh(tmp_path, {"a": FAST}) as mesh, gateway(mesh, "g1", "--keys", str(keys)) as (locked, _):
        async with AsyncClient(locked, api_key="sk-1") as client:
            assert (await client.chat("x", model="chat", max_tokens=1)).text == " w0"
        for wrong in ("", "sk-2"):
            async with AsyncClient(locked, api_key=wrong) as client:
                with pytest.raises(MeshError) as caught:
                    await client.chat("x", model="chat")
                assert caught.value.reason is Reason.UNAUTHENTICATED


async def test_another_gateway_takes_over(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": FAST}) as mesh, gateway(mesh, "g1") as (first, process):
        async with AsyncClient([NOWHERE, first, mesh.address]) as client:
            assert (await client.chat("x", model="chat", max_tokens=1)).text == " w0"
            process.kill()
            await process.wait()
            for _ in range(3):
                assert (await client.chat("x", model="chat", max_tokens=1)).text == " w0"
            pieces = [chunk.text async for chunk in client.chat_stream("x", model="chat", max_tokens=2)]
            assert "".join(pieces) == " w0 w1"
        async with AsyncClient([NOWHERE, first]) as client:
            with pytest.raises(MeshError, match=f"no gateway answers at {NOWHERE}, {first}") as caught:
                await client.chat("x", model="chat")
            assert caught.value.reason is Reason.NO_INSTANCE


async def test_a_frozen_gateway_is_left_within_seconds(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": FAST}) as mesh, gateway(mesh, "g1") as (first, process):
        async with AsyncClient([first, mesh.address]) as client:
            await client.chat("x", model="chat", max_tokens=1)
            process.send_signal(signal.SIGSTOP)
            started = time.monotonic()
            assert (await client.chat("x", model="chat", max_tokens=1)).text == " w0"
            took = time.monotonic() - started
            assert took < 8
            started = time.monotonic()
            await client.chat("x", model="chat", max_tokens=1)
            assert time.monotonic() - started < took / 2, "the one that answered is remembered"


async def test_a_stream_that_breaks_is_not_begun_anew(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": SLOW}) as mesh, gateway(mesh, "g1") as (first, process):
        async with AsyncClient([first, mesh.address]) as client:
            seen = 0
            with pytest.raises(MeshError) as caught:
                async for _ in client.chat_stream("x", model="chat", max_tokens=500):
                    seen += 1
                    if seen == 3:
                        process.kill()
            assert caught.value.reason is Reason.STREAM_LOST
            assert re.search(r"the connection to the gateway broke after \d+ tokens", caught.value.message)


async def test_a_whole_answer_that_breaks_is_begun_anew_at_another_gateway(tmp_path: Path) -> None:
    """Nobody has seen any of it; 2 s are long enough for some of it to have come."""
    async with running_mesh(tmp_path, {"a": SLOW}) as mesh, gateway(mesh, "g1") as (first, process):
        async with AsyncClient([first, mesh.address]) as client:
            asked = asyncio.create_task(client.chat("x", model="chat", max_tokens=100))
            await asyncio.sleep(1)
            assert not asked.done()
            process.kill()
            answer = await asked
            assert answer.text.endswith(" w99") and answer.usage.completion_tokens == 100


async def test_the_client_hears_of_a_resume(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": SLOW, "b": SLOW}) as mesh, AsyncClient(mesh.address) as client:
        killed = False
        async for chunk in client.chat_stream("x", model="chat", max_tokens=100):
            if not killed and len(chunk.so_far.text) > 100:
                killed = True
                mesh.instances[chunk.so_far.served.instance_id].kill()
        served = chunk.so_far.served
        assert chunk.so_far.text.endswith(" w99") and (served.attempts, served.resumes, served.exact) == (2, 1, True)


async def test_a_draining_gateway_sends_its_callers_on(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"a": FAST}) as mesh, gateway(mesh, "g1") as (first, process):
        async with AsyncClient([first, mesh.address]) as client:
            await client.chat("x", model="chat", max_tokens=1)
            process.terminate()
            while process.returncode is None:
                assert (await client.chat("x", model="chat", max_tokens=1)).text == " w0"
            assert process.returncode == 0


async def test_the_sync_client(tmp_path: Path) -> None:
    """The same, from threads that share one client."""

    def use(client: Client, found: list[str]) -> None:
        for _ in range(5):
            found.append(client.chat("x", model="chat", max_tokens=2).text)
            found.append("".join(chunk.text for chunk in client.chat_stream("x", model="chat", max_tokens=2)))
            found.append(client.complete([1, 2, 3], model="chat", max_tokens=2).text)

    def all_of_it(first: str, second: str) -> None:
        found: list[str] = []
        with Client(f"{NOWHERE},{first},{second}") as client:
            threads = [threading.Thread(target=use, args=(client, found)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert found == [" w0 w1"] * 60
            assert client.chat("x", model="chat", max_tokens=1).served.instance_id == "a"
            assert len(client.tokenize("one two", model="chat").token_ids) == 2
            assert [instance.id for instance in client.instances(kind="llm")] == ["a"]
            for call, reason in (
                (lambda: client.chat("x", model="nobody"), Reason.MODEL_NOT_FOUND),
                (lambda: client.rerank("x", ["y"], model="nobody"), Reason.MODEL_NOT_FOUND),
                (lambda: client.chat("x", model="chat", max_tokens=9999, timeout=0.2), Reason.DEADLINE_EXCEEDED),
            ):
                with pytest.raises(MeshError) as caught:
                    call()
                assert caught.value.reason is reason
            assert "within the time limit; give it more" in caught.value.message
        with Client(NOWHERE) as client, pytest.raises(MeshError, match="no gateway answers"):
            client.chat("x", model="chat")

    async with running_mesh(tmp_path, {"a": FAST}) as mesh, gateway(mesh, "g1") as (first, process):
        await asyncio.to_thread(all_of_it, first, mesh.address)
        process.kill()
        await process.wait()
        await asyncio.to_thread(all_of_it, first, mesh.address)


@pytest.mark.real
@pytest.mark.timeout(240)
async def test_vectors_and_ranks(served: Served) -> None:
    texts = ["the cat sat on the mat", "a feline rested on a rug", "stocks fell on Monday"]
    async with AsyncClient(served.grpc, api_key=KEY) as client:
        model = next(i.model for i in await client.instances(kind="embedding"))
        vectors = await client.embed(texts, model=model, normalize=True)
        array = np.asarray(vectors)
        assert array.shape == (3, vectors.dimensions) == (3, 384) and array.dtype == np.float32
        assert np.allclose(vectors.tolist(), array) and vectors[-1] == vectors[2] and len(vectors) == 3
        assert array[0] @ array[1] > 0.5 > array[0] @ array[2]
        assert vectors.served.instance_id and vectors.usage.prompt_tokens > 0
        with pytest.raises(IndexError):
            vectors[3]

        read = 0

        def batches() -> object:
            nonlocal read
            for number in range(40):
                read += 1
                yield [f"text {number}", f"another {number}"]

        seen = 0
        async for batch in client.embed_stream(batches(), model=model):
            seen += 1
            assert np.asarray(batch).shape == (2, 384) and read - seen <= 8
        assert seen == 40
        alone = np.asarray(await client.embed(["text 39"], model=model))
        assert np.allclose(np.asarray(batch)[0], alone[0], atol=1e-5)

        def broken() -> object:
            yield ["fine"]
            raise RuntimeError("the file ended early")

        with pytest.raises(RuntimeError, match="ended early"):
            async for _ in client.embed_stream(broken(), model=model):
                pass

        ranker = next(i.model for i in await client.instances(kind="rerank"))
        hits = await client.rerank("a pet animal", texts, model=ranker, top_n=2, return_documents=True)
        assert len(hits) == 2 and hits.hits[0].score > hits.hits[1].score
        assert {hit.document for hit in hits} <= set(texts) and hits.hits[0].index in (0, 1)


@pytest.mark.real
@pytest.mark.timeout(240)
def test_vectors_and_ranks_without_asyncio(served: Served) -> None:
    with Client(served.grpc, api_key=KEY) as client:
        model = next(i.model for i in client.instances(kind="embedding"))
        several = list(client.embed_stream(([f"text {n}"] for n in range(30)), model=model))
        alone = client.embed([f"text {n}" for n in range(30)], model=model)
        assert np.allclose(np.concatenate([np.asarray(one) for one in several]), np.asarray(alone), atol=1e-5)
        for batch in client.embed_stream(([f"text {n}"] for n in range(1000)), model=model):
            assert len(batch) == 1
            break  # leaving early ends the call and its threads

        def broken() -> object:
            yield ["fine"]
            raise RuntimeError("the file ended early")

        with pytest.raises(RuntimeError, match="ended early"):
            list(client.embed_stream(broken(), model=model))
        ranker = next(i.model for i in client.instances(kind="rerank"))
        best = client.rerank("a pet", ["a car", "a cat"], model=ranker)
        assert next(iter(best)).index == 1
