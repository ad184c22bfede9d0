"""Rows 54, 60-62, 66, 67: requests that are wrong, and what must never leave the mesh."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from typing import Any

import aiohttp
import grpc.aio
import yaml

from infermesh.transport import channel_options
from tests.fault.fleet import fleet
from tests.fault.load import MODEL, streams
from tests.fault.matrix import Ground, Measured, Row
from tests.fault.rest import Answer, chat, post, session

METHODS = [
    *("LanguageModelService/Chat", "LanguageModelService/Complete", "LanguageModelService/Tokenize"),
    *("EmbeddingService/Embed", "RerankService/Rerank", "MeshService/Explain", "MeshService/DrainInstance"),
]


async def malformed(ground: Ground) -> Measured:
    """Random bytes as messages, well-formed fields with wild values, and truncated real requests, at every method."""
    draw = random.Random(54)
    count = ground.runs(2000)
    async with fleet(ground.folder, "a", "b", flags=("--step-ms", "5")) as mesh:
        codes: dict[str, int] = {}
        async with streams(mesh.client, 2, tokens=10) as load:
            async with grpc.aio.insecure_channel(mesh.grpc, options=channel_options()) as channel:
                for _ in range(count // 20):
                    calls = []
                    for _ in range(20):
                        call: Any = channel.unary_stream(f"/infermesh.v1.{draw.choice(METHODS)}")
                        calls.append(_code(call(_bytes(draw), timeout=5)))
                    for code in await asyncio.gather(*calls):
                        codes[code] = codes.get(code, 0) + 1
        lives = not any(child.ended for child in (*mesh.gateways, *mesh.llms.values()))
        left = await mesh.leftovers()
    wrong = {
        code: n for code, n in codes.items() if code in ("UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED", "UNAVAILABLE")
    }
    text = f"{sum(codes.values())} messages: {codes}; all live: {lives}; left over: {left or 'nothing'}; others: {load}"
    return Measured(lives and not wrong and not left and not load.failures, text)


def _bytes(draw: random.Random) -> bytes:
    kind = draw.random()
    if kind < 0.4:
        return draw.randbytes(draw.randrange(0, 300))
    made = b""
    for _ in range(draw.randrange(1, 12)):  # fields that could be there, with any content
        number, wire = draw.randrange(1, 20), draw.choice((0, 2, 2, 2, 5))
        made += bytes((number << 3 | wire,))
        if wire == 0:
            made += draw.randbytes(draw.randrange(1, 9)) + b"\x01"
        elif wire == 5:
            made += draw.randbytes(4)
        else:
            inner = draw.randbytes(draw.randrange(0, 40))
            made += bytes((len(inner),)) + inner
    return made if kind < 0.8 else made[: draw.randrange(0, len(made))]


async def _code(call: Any) -> str:
    try:
        async for _ in call:
            pass
        return "OK"
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)


def _judged(answers: dict[str, Answer], allowed: tuple[int, ...] = (400, 413, 422)) -> tuple[bool, str]:
    """Whether each was refused in OpenAI's shape, and what came."""
    bad = {}
    for name, answer in answers.items():
        shaped = isinstance(answer.body, dict) and {"message", "type", "code"} <= set(answer.body.get("error", {}))
        if answer.status not in allowed or not shaped:
            bad[name] = f"HTTP {answer.status} {str(answer.body)[:80]}"
    statuses = sorted({answer.status for answer in answers.values()})
    return not bad, f"{len(answers)} requests: HTTP {statuses}" + (f"; not as they should be: {bad}" if bad else "")


async def bad_json(ground: Ground) -> Measured:
    fine = json.dumps(chat(1))
    cases: dict[str, bytes] = {
        "depth 100,000": b'{"model":"chat","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a million keys": b"{" + b",".join(b'"k%d":1' % number for number in range(1_000_000 // 2)) + b"}",
        "NaN": fine.replace('"max_tokens": 1', '"max_tokens": 1, "temperature": NaN').encode(),
        "Infinity": fine.replace('"max_tokens": 1', '"max_tokens": 1, "temperature": Infinity').encode(),
        "lone surrogate": fine.replace("hello there", "\\ud800").encode(),
        "bytes that are not UTF-8": fine.replace("hello there", "X").encode().replace(b"X", b"\xff\xfe"),
        "huge integer": fine.replace('"max_tokens": 1', '"max_tokens": ' + "9" * 400).encode(),
        "2**63": fine.replace('"max_tokens": 1', f'"max_tokens": {2**63}').encode(),
        "a list": b"[]",
        "text": b'"chat"',
        "null": b"null",
        "empty": b"",
        "half": fine.encode()[:30],
        "two documents": fine.encode() * 2,
    }
    wrong: list[Any] = [None, True, 1, 1.5, "x", [], {}, [[]], [{}], [None]]
    for key in ("model", "messages", "max_tokens", "temperature", "stop", "stream", "n", "tools", "logit_bias", "seed"):
        for number, value in enumerate(wrong):
            if not _might_do(key, value):
                cases[f"{key} = {json.dumps(value)} ({number})"] = json.dumps({**chat(1), key: value}).encode()
    async with fleet(ground.folder, "a", flags=("--step-ms", "5")) as mesh, session() as one:
        answers = {}
        async with streams(mesh.client, 2, tokens=10) as load:
            for name, body in cases.items():
                answers[name] = await post(one, mesh.http(), body)
        ok, text = _judged(answers, (400, 404, 413, 422))
        lives = not mesh.gateways[0].ended
    return Measured(ok and lives and not load.failures, f"{text}; gateway lives: {lives}; others: {load}")


def _might_do(key: str, value: Any) -> bool:
    """Whether this value is right, or one that OpenAI takes as absent."""
    fine: dict[str, tuple[Any, ...]] = {
        "max_tokens": (1,),
        "temperature": (1, 1.5),
        "stop": ("x", []),
        "stream": (True,),
        "n": (1,),
        "tools": ([],),
        "logit_bias": ({},),
        "seed": (1,),
    }
    return value is None or any(value == one and type(value) is type(one) for one in fine.get(key, ()))


async def out_of_bounds(ground: Ground) -> Measured:
    """None of it may reach an engine."""
    changes: dict[str, dict[str, Any]] = {
        "prompt over the context": {"messages": [{"role": "user", "content": "word " * 40_000}]},
        "no messages": {"messages": []},
        "4 M characters": {"messages": [{"role": "user", "content": "x " * 2_000_000}]},
        "n 16384": {"n": 16384},
        "max_tokens -1": {"max_tokens": -1},
        "max_tokens 0": {"max_tokens": 0},
        "max_tokens 2**63": {"max_tokens": 2**63},
        "1,000 stops": {"stop": [f"stop{number}" for number in range(1000)]},
        "temperature 1e9": {"temperature": 1e9},
        "top_p 0": {"top_p": 0},
        "logprobs 100": {"logprobs": True, "top_logprobs": 100},
        "unknown role": {"messages": [{"role": "wizard", "content": "x"}]},
    }
    async with fleet(ground.folder, breakable=True) as mesh, session() as one:
        mesh.add_llm("a", "--step-ms", "5", faults={})
        await mesh.healthy()
        answers = {name: await post(one, mesh.http(), {**chat(1), **change}) for name, change in changes.items()}
        reached = mesh.calls("a")
        nul = await post(one, mesh.http(), chat(1, "a\x00b"))
    ok, text = _judged(answers)
    return Measured(
        ok and reached <= 2 and nul.status in (200, 400),
        f"{text}; {reached} reached the engine (a prompt over the context is counted there); NUL: HTTP {nul.status}",
    )


def _keys(folder: Any, **entries: dict[str, Any]) -> tuple[str, ...]:
    """A file of keys, whose secrets are their names; flags for a gateway."""
    lines = [
        {"sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": name, **entry}
        for name, entry in entries.items()
    ]
    path = folder / "keys.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "keys": lines}))
    return ("--keys", str(path))


async def no_access(ground: Ground) -> Measured:
    flags = _keys(ground.folder, all={}, one={"models": ["chat"]}, other={"models": ["secret-model-7b"]})
    async with fleet(ground.folder, "a", gateway_flags=flags, api_key="all") as mesh, session() as one:
        url = f"http://{mesh.http()}/v1/models"

        async def told(key: str, model: str) -> Answer:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            return await post(one, mesh.http(), {**chat(1), "model": model}, headers=headers)

        answers = {
            "no key": await told("", MODEL),
            "wrong key": await told("sk-guess", MODEL),
            "unknown model": await told("all", "nothing"),
            "no access, exists": await told("other", MODEL),
            "no access, does not": await told("one", "secret-model-7b"),
            "access": await told("one", MODEL),
        }
        listed = await _models(one, url, "other")
    statuses = {name: answer.status for name, answer in answers.items()}
    leak = any(
        "secret-model" in str(a.body) and "secret-model-7b" not in n
        for n, a in answers.items()
        if n != "no access, does not"
    )
    wanted = {"no key": 401, "wrong key": 401, "unknown model": 404, "access": 200}
    ok = all(statuses[name] == status for name, status in wanted.items())
    ok = ok and statuses["no access, exists"] in (403, 404) and statuses["no access, does not"] in (403, 404)
    return Measured(
        ok and MODEL not in listed and not leak, f"{statuses}; a key without access lists {listed or 'nothing'}"
    )


async def _models(one: aiohttp.ClientSession, url: str, key: str) -> list[str]:
    async with one.get(url, headers={"authorization": f"Bearer {key}"}) as reply:
        return [model["id"] for model in (await reply.json())["data"]]


async def canary(ground: Ground) -> Measured:
    """A word that nobody else says, in prompts that succeed, fail, are refused and cut off; then every log is read."""
    word, key = "canary-9f3b2e71", "sk-canary-5d1c"
    line = {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": "bird"}
    debug = ("--log-level", "debug")
    (ground.folder / "keys.yaml").write_text(yaml.safe_dump({"version": 1, "keys": [line]}))
    gateway_flags = ("--keys", str(ground.folder / "keys.yaml"), *debug)
    async with (
        fleet(ground.folder, "a", "b", flags=debug, breakable=True, gateway_flags=gateway_flags, api_key=key) as mesh,
        session() as one,
    ):
        for id in ("a", "b"):
            mesh.broken(id, fail=0.3)
        headers = {"authorization": f"Bearer {key}"}
        bodies = [
            chat(3, word),
            chat(3, word, temperature=99),
            chat(3, word, stop=[word] * 100),
            chat(3, word, user=word, metadata={"a": word}),
            {**chat(3, word), "model": "nothing"},
            json.dumps(chat(3, word)).encode()[:-5],
        ]
        answers = []
        for _ in range(ground.runs(10)):
            answers += await asyncio.gather(*(post(one, mesh.http(), body, headers=headers) for body in bodies))
        cut = asyncio.create_task(post(one, mesh.http(), chat(500, word), headers=headers))
        await asyncio.sleep(0.5)
        cut.cancel()
        mesh.llms["a"].kill()
        await asyncio.sleep(0.5)
        async with one.get(f"http://{mesh.http()}/metrics", headers=headers) as reply:
            metrics = await reply.text()
        told = "".join(str(answer.body.get("error")) for answer in answers if isinstance(answer.body, dict))
    sinks = {child.name: child.text() for child in (*mesh.gateways, *mesh.llms.values())}
    sinks |= {"metrics": metrics, "errors": told}
    found = {name: sum(text.count(secret) for secret in (word, key)) for name, text in sinks.items()}
    leaks = {name: count for name, count in found.items() if count}
    size = sum(map(len, sinks.values()))
    return Measured(
        not leaks and size > 2000,
        f"{len(answers)} prompts; {size >> 10} KiB in {len(sinks)} sinks: {leaks or 'absent'}",
    )


async def injected(ground: Ground) -> Measured:
    """Names that callers choose must not become lines in logs or series in metrics."""
    async with fleet(ground.folder, "a", flags=("--step-ms", "2"), gateway_flags=("--log-level", "info")) as mesh:
        async with session() as one:
            for number in range(ground.runs(300)):
                await post(one, mesh.http(), {**chat(1), "model": f'x{number}"\n{{evil="1"}} 1'})
                await post(one, mesh.http(), chat(1), headers={"x-request-id": f'{number}"}} evil{{a="b'})
            async with one.get(f"http://{mesh.http()}/metrics") as reply:
                text = await reply.text()
        log = mesh.gateways[0].text()
    series = [line for line in text.splitlines() if line and not line.startswith("#")]
    chosen = sum("evil" in line or "x1" in line for line in series)
    broken = 0
    for line in log.splitlines():
        try:
            broken += not isinstance(json.loads(line), dict)
        except ValueError:
            broken += 1
    text = (
        f"{len(series)} series, {chosen} with a caller's words; {len(log.splitlines())} log lines, "
        f"{broken} that are not JSON"
    )
    return Measured(not chosen and not broken and len(series) < 400, text)


ROWS = (
    Row(
        54,
        "malformed protobuf at every method",
        "no crash, nothing UNKNOWN or INTERNAL, others unaffected",
        malformed,
        300,
    ),
    Row(
        60,
        "JSON: depth, keys, NaN, surrogates, wrong types",
        "400/413/422 in OpenAI's shape, others unaffected",
        bad_json,
    ),
    Row(61, "bounds: prompt, n, max_tokens, stops", "400 before the engine", out_of_bounds),
    Row(62, "unknown model, no access", "401 / 403 / 404, no names leak", no_access),
    Row(66, "a canary in prompts and keys", "in no log, metric or error", canary),
    Row(67, "injection through names", "log lines stay JSON, no series by a caller's words", injected),
)
