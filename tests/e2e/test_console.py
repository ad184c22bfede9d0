"""The console in a real headless Chromium: every page, streaming, a killed instance, keys, phone width, two languages.

`INFERMESH_SCREENSHOTS=docs/img` makes the pictures of the documents.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rest_server import ask, connection, raw_request
from tests.e2e.test_rest_mesh import rest
from tests.kit.answering import answering_mesh
from tests.kit.browser import page
from tests.kit.mesh import TestMesh, running_mesh, until

FAST = ("--prefill-tps", "1e6", "--step-ms", "5")
WAIT_MS = 20_000
PAGES = {"models": "模型", "resources": "资源", "routing": "路由", "playground": "试用"}
FILES = {"../../etc/passwd": 404, "nothing.js": 404, "app.js": 200, "vendor/preact.js": 200}
# A browser shares two cores with the mesh, and the mesh runs in the test's loop: the page is driven from a thread.
pytestmark = pytest.mark.timeout(240)


def picture(shown: Any, name: str) -> None:
    folder = os.environ.get("INFERMESH_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        shown.wait_for_timeout(400)
        shown.screenshot(path=f"{folder}/console-{name}.png")


def live(shown: Any, mesh: TestMesh, at: str = "") -> None:
    shown.goto(f"http://{mesh.http}/console/{at}")
    shown.wait_for_selector("[data-link=live]", timeout=WAIT_MS)


@pytest.mark.real
async def test_every_page_shows_what_the_mesh_does_and_a_killed_instance_as_such(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with answering_mesh(tmp_path, {"chat-0": FAST, "chat-1": FAST}, http="127.0.0.1:0") as mesh:

        def kill(id: str) -> None:
            asyncio.run_coroutine_threadsafe(_kill(mesh, id), loop).result(10)

        def drive() -> None:
            with page() as shown:
                shown.goto(f"http://{mesh.http}/console")
                shown.wait_for_selector("[data-link=live]", timeout=WAIT_MS)
                models = {text.split("\n")[0] for text in shown.locator("main .card").all_inner_texts()}
                assert models == {"chat", "all-minilm-l6-v2"}
                assert shown.locator(".chip a").all_inner_texts() == ["chat-0", "chat-1", "embedding-0", "rerank-0"]
                picture(shown, "models")

                shown.keyboard.press("4")
                shown.fill("#message", "Tell me about routers")
                shown.fill("#longest", "60")
                shown.keyboard.press("Control+Enter")
                shown.locator(".turn.assistant").get_by_text("w3").wait_for(timeout=WAIT_MS)
                by = shown.locator(".turn.assistant .by")
                by.get_by_text("tokens/s").wait_for(timeout=WAIT_MS)
                assert " w59" in shown.locator(".turn.assistant").inner_text()
                assert shown.input_value("#longest") == "60"
                picture(shown, "playground")
                first = by.locator("a").first.inner_text()
                assert first in ("chat-0", "chat-1")

                shown.click("nav.tabs >> text=Similarity")
                shown.click("text=compare")
                heat = shown.locator(".heat")
                heat.first.wait_for(timeout=WAIT_MS)
                values = [float(text) for text in heat.all_inner_texts()]
                assert values[0] == values[4] == 1 and values[1] > 0.5 > values[2]
                shown.click("nav.tabs >> text=Rerank")
                shown.click("button:text-is('rank')")
                best = shown.locator("tbody tr").first
                best.wait_for(timeout=WAIT_MS)
                assert "Paris" in best.inner_text()

                shown.click("nav >> text=Routing")
                rows = shown.locator("tr.pick")
                rows.nth(2).wait_for(timeout=WAIT_MS)
                rows.filter(has_text="chat").last.focus()
                shown.keyboard.press("Enter")
                chosen = shown.locator("section[aria-label=decision] tr.chosen")
                chosen.wait_for(timeout=WAIT_MS)
                assert first in chosen.inner_text()
                terms = shown.locator("section[aria-label=decision] .terms")
                assert terms.count() == 2 and "prefill" in terms.first.get_attribute("aria-label")
                shown.locator("section[aria-label=explain] button").click()
                shown.locator("section[aria-label=explain] tr.chosen").wait_for(timeout=WAIT_MS)
                picture(shown, "routing")

                kill("chat-1")
                shown.keyboard.press("2")
                shown.wait_for_selector("#instance-chat-1:not([data-state=healthy])", timeout=WAIT_MS)
                assert shown.locator("#instance-chat-0").get_attribute("data-state") == "healthy"
                assert shown.locator("#instance-chat-1 .history i").count() >= 2
                picture(shown, "resources")

        await asyncio.to_thread(drive)


async def _kill(mesh: TestMesh, id: str) -> None:
    mesh.instances[id].kill()


async def test_a_phone_and_another_language(tmp_path: Path) -> None:
    scaled = {"routing": {"scale": {"chat-cpu": {"least": 2, "most": 3}}}}
    started = {"chat-0": (*FAST, "--group", "chat-cpu")}
    async with running_mesh(tmp_path, started, http="127.0.0.1:0", **scaled) as mesh:
        await ask(rest(mesh), "/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": "x"}]})

        def drive() -> None:
            with page(390, 844, locale="zh-CN") as shown:
                live(shown, mesh)
                for name, title in (
                    ("models", "模型"),
                    ("resources", "资源"),
                    ("routing", "路由"),
                    ("playground", "试用"),
                ):
                    shown.click(f"nav >> text={title}")
                    shown.wait_for_selector(f"nav a[href='#{name}'][aria-current=page]")
                    assert shown.evaluate("document.documentElement.scrollWidth") <= 390, (
                        f"{name} is wider than a phone"
                    )
                picture(shown, "phone")
                group_is_shown(shown)
                shown.click("header >> text=English")
                shown.wait_for_selector("nav >> text=Playground")
                assert shown.evaluate("document.documentElement.lang") == "en"

        await asyncio.to_thread(drive)


def group_is_shown(shown: Any) -> None:
    """One of at least two is there: both numbers, on both pages."""
    shown.click("nav >> text=资源")
    row = shown.locator("[data-group=chat-cpu]")
    row.get_by_text("1 → 2").wait_for(timeout=WAIT_MS)
    assert "2–3" in row.inner_text()
    assert "chat-cpu" in shown.locator("#instance-chat-0").inner_text()
    shown.click("nav >> text=模型")
    shown.locator("main .card", has_text="chat-cpu 1 → 2").first.wait_for(timeout=WAIT_MS)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390


async def test_keys_guard_what_is_shown_and_show_their_own(tmp_path: Path) -> None:
    secrets = {"operator-key": "operator", "team-key": "client"}
    lines = [
        f"  - {{sha256: {hashlib.sha256(key.encode()).hexdigest()}, tenant: {key[:4]}, role: {role}}}"
        for key, role in secrets.items()
    ]
    keys = tmp_path / "keys.yaml"
    keys.write_text("version: 1\nkeys:\n" + "\n".join(lines) + "\n")
    secret = tmp_path / "operator.key"
    secret.write_text("operator-key")
    flags = (*FAST, "--keys", str(keys), "--operator-key-file", str(secret))
    settings: dict[str, Any] = {"http": "127.0.0.1:0", "keys": keys, "operator_key_file": secret}
    async with running_mesh(tmp_path, {}, **settings) as mesh:
        await mesh.start("chat-0", *flags)
        server: Any = rest(mesh)
        page_itself = await ask(server, "/console/", method="GET")
        assert page_itself.status == 200 and "default-src 'none'" in page_itself.headers["content-security-policy"]
        for path in ("state", "events", "explain?model=chat", "requests/x"):
            assert (await ask(server, f"/console/api/{path}", method="GET")).status == 401, path

        def drive() -> None:
            with page() as shown:
                shown.goto(f"http://{mesh.http}/console/")
                shown.fill("#key", "wrong")
                shown.keyboard.press("Enter")
                shown.wait_for_selector("dialog .fault", timeout=WAIT_MS)
                shown.fill("#key", "team-key")
                shown.keyboard.press("Enter")
                shown.wait_for_selector("[data-link=live]", timeout=WAIT_MS)
                shown.click("nav >> text=Playground")
                shown.wait_for_selector("#model", timeout=WAIT_MS)
                shown.fill("#message", "hello")
                shown.click("text=send")
                shown.wait_for_selector(".turn.assistant .by", timeout=WAIT_MS)

        await asyncio.to_thread(drive)
        bearer: Any = {"authorization": "Bearer operator-key"}
        mine: Any = {"authorization": "Bearer team-key"}
        chat = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        told = await ask(server, "/v1/chat/completions", chat, **bearer, x_request_id="of-the-operator")
        assert told.status == 200, told.body
        path = "/console/api/requests/of-the-operator"
        seen = await ask(server, path, method="GET", **bearer)
        assert seen.status == 200 and seen.json["tried"][0]["record"]["chosen"] == "chat-0"
        assert (await ask(server, path, method="GET", **mine)).status == 404


async def test_the_stream_tells_changes_and_requests_and_is_bounded(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, {"chat-0": FAST}, http="127.0.0.1:0") as mesh:
        server: Any = rest(mesh)
        async with connection(server) as client:
            await client.send(raw_request("/console/api/events", b"", method="GET"))
            status, headers = await client.head()
            assert status == 200 and headers["content-type"].startswith("text/event-stream")
            state = json.loads(await _event(client, "state"))
            assert [one["id"] for one in state["instances"]] == ["chat-0"] and state["gateway"]["requests"] == 0
            chat = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            await ask(server, "/v1/chat/completions", chat)
            (one,) = json.loads(await _event(client, "requests"))
            assert (one["instance"], one["outcome"], one["completion_tokens"]) == ("chat-0", "ok", 1)
        for path, status in (
            ("../../etc/passwd", 404),
            ("nothing.js", 404),
            ("app.js", 200),
            ("vendor/preact.js", 200),
        ):
            assert (await ask(server, f"/console/{path}", method="GET")).status == status, path
        script = await ask(server, "/console/app.js", method="GET")
        again = await ask(server, "/console/app.js", method="GET", if_none_match=script.headers["etag"])
        assert again.status == 304 and not again.body
        for query in ("", "?model=chat&kind=x", "?model=chat&prompt_tokens=-1"):
            assert (await ask(server, f"/console/api/explain{query}", method="GET")).status == 400, query
        explained = await ask(server, "/console/api/explain?model=chat&prompt_tokens=5000", method="GET")
        assert explained.json["chosen"] == "chat-0" and explained.json["prompt_tokens"] == 5000

        many = [connection(server) for _ in range(33)]
        clients = [await one.__aenter__() for one in many]
        statuses = []
        for client in clients:
            await client.send(raw_request("/console/api/events", b"", method="GET"))
            statuses.append((await client.head())[0])
        assert statuses.count(200) == 32 and statuses.count(429) == 1
        for one in many:
            await one.__aexit__(None, None, None)

        async def room_again() -> bool:
            async with connection(server) as client:
                await client.send(raw_request("/console/api/events", b"", method="GET"))
                return bool((await client.head())[0] == 200)

        await until(room_again)


async def _event(client: Any, name: str) -> bytes:
    """The data of the next event of that name."""
    async with asyncio.timeout(30):
        while True:
            found = re.match(rb"event: (\w+)\ndata: (.*)\n\n", await client.chunk(), re.S)
            if found and found[1].decode() == name:
                return found[2]
