"""Rows 63 and 65: keys that are none, and a tenant that measures what another one has asked."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import secrets
import time
from pathlib import Path

import yaml

from infermesh.client import AsyncClient
from tests.fault.fleet import fleet
from tests.fault.load import MODEL, Told, ask, quantile, streams
from tests.fault.matrix import Ground, Measured, Row
from tests.fault.rest import chat, post, session

PROMPT_WORDS = 400
VOCABULARY = [str(1_000_000 + number) for number in range(2000)]


def keys(folder: Path, *names: str) -> tuple[str, ...]:
    """Flags of a gateway; each key is its tenant's name."""
    lines = [{"sha256": hashlib.sha256(name.encode()).hexdigest(), "tenant": name} for name in names]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"version": 1, "keys": lines}))
    return "--keys", str(folder / "keys.yaml")


def _jwt(head: object, body: object, signature: bytes = b"") -> str:
    parts = (json.dumps(head).encode(), json.dumps(body).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


async def bad_keys(ground: Ground) -> Measured:
    """Keys are opaque here: a token of any form is a wrong key, and how much of it is right shows in no time."""
    right = secrets.token_hex(24)
    hour = {"sub": "a", "exp": int(time.time()) + 3600}
    bad = {
        "alg none": _jwt({"alg": "none"}, hour),
        "kid": _jwt({"alg": "HS256", "kid": "../../dev/null"}, hour, bytes(32)),
        "expired": _jwt({"alg": "HS256"}, {"exp": 1}, bytes(32)),
        "empty": "",
        "long": "x" * 8000,
        "its hash": hashlib.sha256(right.encode()).hexdigest(),
    }
    async with fleet(
        ground.folder, "a", gateway_flags=keys(ground.folder, right), api_key=right, flags=("--step-ms", "5")
    ) as mesh:
        async with session() as one, streams(mesh.client, 2, tokens=5) as load:

            async def status(key: str) -> tuple[int, float]:
                answer = await post(one, mesh.http(), chat(), headers={"authorization": f"Bearer {key}"})
                return answer.status, answer.seconds

            told = {name: (await status(key))[0] for name, key in bad.items()}
            near, far, let_in = [], [], 0
            for _ in range(ground.runs(1000)):  # in turn, so that the machine's moods hit both alike
                for times, key in ((near, right[:-1] + "!"), (far, secrets.token_hex(24))):
                    code, seconds = await status(key)
                    times.append(seconds)
                    let_in += code != 401
            still = (await status(right))[0]
    middles = [quantile(times, 0.5) * 1000 for times in (near, far)]
    text = (
        f"{told}; {len(near) + len(far)} guesses, {let_in} let in; median of a key that is right but for its end "
        f"{middles[0]:.2f} ms, of any other {middles[1]:.2f} ms; the right one after it: {still}; others: {load}"
    )
    fine = set(told.values()) == {401} and not let_in and still == 200 and not load.failures
    return Measured(fine and abs(middles[0] - middles[1]) < 0.1 * middles[1] + 0.1, text)


async def timing(ground: Ground) -> Measured:
    """One tenant asks, another one asks the same and something new: can it tell from the first token's time which of
    them was known? Beside it, the tenant itself, who can: so the measure would show it."""
    draw = random.Random(65)
    slow = ("--prefill-tps", "16000", "--step-ms", "1", "--kv-us-per-ktoken", "0.001", "--kv-tokens", "2000000")
    flags = keys(ground.folder, "victim", "prober")
    async with fleet(ground.folder, "a", flags=slow, gateway_flags=flags, api_key="victim") as mesh:
        prober = AsyncClient(mesh.grpc, api_key="prober", timeout=30)
        times: dict[str, tuple[list[float], list[float]]] = {"prober": ([], []), "victim": ([], [])}
        async with prober:
            await mesh.client.chat(" ".join(VOCABULARY), model=MODEL, max_tokens=1)
            for _ in range(ground.runs(200)):
                for who, client in (("prober", prober), ("victim", mesh.client)):
                    asked, new = (" ".join(draw.choices(VOCABULARY, k=PROMPT_WORDS)) for _ in range(2))
                    await mesh.client.chat(asked, model=MODEL, max_tokens=1)
                    probes = [(0, asked), (1, new)]
                    draw.shuffle(probes)
                    for kind, prompt in probes:
                        told = await ask(client, Told(1, time.monotonic()), prompt)
                        assert told.ok, told.error
                        times[who][kind].append(told.ttft_s)
    areas = {who: _auc(*pair) for who, pair in times.items()}
    text = f"AUC {areas['prober']:.3f} over {len(times['prober'][0])} pairs; of the tenant itself {areas['victim']:.3f}"
    return Measured(abs(areas["prober"] - 0.5) <= 0.05 and areas["victim"] >= 0.95, text)


def _auc(known: list[float], new: list[float]) -> float:
    """How often one that was known is faster than one that was not (Mann-Whitney)."""
    wins = sum((a < b) + 0.5 * (a == b) for a in known for b in new)
    return wins / (len(known) * len(new))


ROWS = (
    Row(63, "wrong keys: JWTs of all kinds, guesses", "401, alike in time, others unaffected", bad_keys, 180),
    Row(65, "timing of prompts that another tenant has asked", "AUC within 0.45 .. 0.55", timing, 400),
)
