"""Adopts a running OpenAI-speaking server (vLLM serve, SGLang, llama.cpp, llama-box, Ollama, …) as an instance.

What such a server does not tell stays unknown: token ids (but for vLLM's), the prompt's length before the end (but for
vLLM's and SGLang's), speed and KV room. A stream is continued as text where the server can (`openai_resume`). Prefix
caches of tenants are kept apart by vLLM only; the time for chat templates is the server's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import aiohttp
import orjson

from infermesh.errors import MeshError, Reason, unsupported
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1.worker_pb2 import Load
from registry.endpoint import Capacity, Hardware
from services.llm.engine import EngineInfo, Event
from services.llm.engines.openai_probe import base_url, probe, read_all
from services.llm.engines.openai_reply import Reply, SseLines, error_of, int_of
from services.llm.engines.openai_resume import check, continued
from services.llm.engines.openai_wire import Upstream, chat_body, complete_body
from services.llm.settings import LlmSettings
from services.llm.window import Window

WATCH_S = 2.0
GONE_AFTER_S = 15.0  # without anybody listening there
MAX_REPLY_BYTES = 64 << 20
_CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choice", "structural_tag")
_FEATURES = frozenset(("n", "logprobs", "tools", "echo", "token_ids", *_CONSTRAINTS))


class OpenAiHttpEngine:
    def __init__(self, settings: LlmSettings) -> None:
        self._settings = settings
        self._options = settings.openai_http
        self._base = base_url(settings.source)
        self._http: aiohttp.ClientSession | None = None
        self._upstream: Upstream | None = None
        self._in_flight = 0
        self._steps = 0
        self._up = asyncio.Event()

    async def start(self, progress: Callable[[str], None]) -> EngineInfo:
        options, settings = self._options, self._settings
        self._http = aiohttp.ClientSession(
            trust_env=False,  # the environment's proxy is for the internet, not for a server that an operator named
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=options.idle_timeout_s),
            headers=self._headers(),
            json_serialize=lambda body: orjson.dumps(body).decode(),
        )
        upstream = await probe(
            self._http,
            self._base,
            wanted=options.upstream_model,
            served=settings.model,
            timeout_s=options.probe_timeout_s,
            progress=progress,
        )
        self._upstream = upstream
        self._up.set()
        progress(f"adopted {self._base}: {upstream.family.name} {upstream.version}, model {upstream.model}")
        if settings.context and "tokenize" not in upstream.family.features:
            progress("this server does not count tokens: the context range is kept by the gateway's estimate alone")
        low, high = settings.context or (0, 0)
        model_context = options.max_context or upstream.context
        return EngineInfo(
            engine=f"openai-http:{upstream.family.name}",
            engine_version=upstream.version,
            model=settings.model,
            hardware=Hardware(device=settings.device or "unknown"),
            capacity=Capacity(
                context_min=low,
                context_max=Window(model_context, low, high).top if model_context else high,
                max_running=settings.max_running or upstream.slots,
            ),
            features=(upstream.family.features & _FEATURES)
            | ({"resume"} if "continue_final" in upstream.family.features else set()),
        )

    async def chat(self, request: lm.ChatRequest) -> AsyncIterator[Event]:
        before = await self._before(request)
        if before is not None:
            request = continued(request, before)
        body = chat_body(request, self._known)
        if self._settings.context:
            ask = lm.TokenizeRequest(chat=lm.Conversation(messages=request.messages, tools=request.tools))
            ask.chat.template_args_json = request.template_args_json
            await self._check_range(ask, request.sampling)
        reply = Reply(chat=True, choices=_choices(request), before=before)
        async with aclosing(self._answer("/v1/chat/completions", body, reply)) as events:
            async for event in events:
                yield event

    async def complete(self, request: lm.CompleteRequest) -> AsyncIterator[Event]:
        before = await self._before(request)
        if before is not None:
            request = continued(request, before)
        body = complete_body(request, self._known)
        if self._settings.context and request.WhichOneof("prompt") == "text":
            await self._check_range(lm.TokenizeRequest(text=request.text), request.sampling)
        reply = Reply(chat=False, choices=_choices(request), before=before)
        async with aclosing(self._answer("/v1/completions", body, reply)) as events:
            async for event in events:
                yield event

    async def tokenize(self, request: lm.TokenizeRequest) -> lm.TokenizeResponse:
        upstream = self._known
        if request.WhichOneof("input") == "chat":
            if "tokenize_chat" not in upstream.family.features:
                raise _unimplemented("tokenizing a conversation")
            chat = lm.ChatRequest(messages=request.chat.messages, tools=request.chat.tools)
            chat.template_args_json = request.chat.template_args_json
            if request.chat.HasField("add_generation_prompt"):
                chat.add_generation_prompt = request.chat.add_generation_prompt
            names = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt")
            full = chat_body(chat, upstream)
            body = {name: full[name] for name in names if name in full}
        elif "tokenize" not in upstream.family.features:
            raise _unimplemented("tokenizing")
        elif upstream.family.name == "llama.cpp":
            body = {"content": request.text, "add_special": not request.HasField("add_special_tokens")}
            if request.HasField("add_special_tokens"):
                body["add_special"] = request.add_special_tokens
        else:
            body = {"prompt": request.text}
            if request.HasField("add_special_tokens"):
                body["add_special_tokens"] = request.add_special_tokens
        told = await self._post("/tokenize", {"model": upstream.model, **body})
        return lm.TokenizeResponse(
            token_ids=told.get("tokens") or (),
            max_context=int_of(told.get("max_model_len"), self._options.max_context or upstream.context),
            tokens=told.get("token_strs") or (),
        )

    async def detokenize(self, request: lm.DetokenizeRequest) -> lm.DetokenizeResponse:
        upstream = self._known
        if "tokenize" not in upstream.family.features:
            raise _unimplemented("detokenizing")
        told = await self._post("/detokenize", {"model": upstream.model, "tokens": list(request.token_ids)})
        return lm.DetokenizeResponse(text=told.get("prompt") or told.get("text") or told.get("content") or "")

    def load(self) -> Load:
        """Our own requests are what is known; others may use the server beside us."""
        return Load(running=self._in_flight, steps=self._steps)

    async def died(self) -> str:
        """Dead is a server where nobody listens any more; one that is slow or busy is not."""
        await self._up.wait()
        clock = asyncio.get_running_loop().time
        seen = clock()
        while clock() - seen < GONE_AFTER_S:
            await asyncio.sleep(WATCH_S)
            try:
                async with self._session.get(f"{self._base}/health", timeout=aiohttp.ClientTimeout(total=WATCH_S)):
                    seen = clock()
            except aiohttp.ClientConnectorError:
                continue
            except (aiohttp.ClientError, TimeoutError, OSError):
                seen = clock()
        return f"nobody has answered at {self._base} for {GONE_AFTER_S:g} s"

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            raise MeshError(Reason.STARTING, "still looking for the server")
        return self._http

    @property
    def _known(self) -> Upstream:
        if self._upstream is None:
            raise MeshError(Reason.STARTING, "still looking for the server")
        return self._upstream

    def _headers(self) -> dict[str, str]:
        path = self._options.api_key_file
        if path is None:
            return {}
        try:
            return {"Authorization": f"Bearer {path.read_text().strip()}"}
        except OSError as error:
            raise MeshError(Reason.FAILED_PRECONDITION, f"--api-key-file {path}: {error.strerror}") from None

    async def _check_range(self, ask: lm.TokenizeRequest, sampling: lm.Sampling) -> None:
        """The context range of this instance, where the server can count."""
        which = "tokenize_chat" if ask.WhichOneof("input") == "chat" else "tokenize"
        if which not in self._known.family.features or self._settings.context is None:
            return
        low, high = self._settings.context
        counted = await self.tokenize(ask)
        Window(counted.max_context or high, low, high).budget(len(counted.token_ids), sampling)

    async def _before(self, request: lm.ChatRequest | lm.CompleteRequest) -> int | None:
        """Tokens that another server has said of this answer; None where it begins here."""
        if not request.relay.HasField("resume"):
            return None
        check(request, self._known)
        resume = request.relay.resume
        if resume.token_ids:
            return len(resume.token_ids)
        if "tokenize" in self._known.family.features:
            return len((await self.tokenize(lm.TokenizeRequest(text=resume.text, add_special_tokens=False))).token_ids)
        if request.sampling.HasField("max_tokens"):
            raise unsupported("relay.resume", "this server counts no tokens, so that max_tokens could not be kept")
        return 0

    async def _answer(self, path: str, body: dict[str, Any], reply: Reply) -> AsyncGenerator[Event]:
        if body.get("max_tokens") == 0:  # the one that was lost had said everything but the end
            yield reply.cut()
            return
        async with aclosing(self._stream(path, body, reply)) as events:
            async for event in events:
                yield event

    async def _stream(self, path: str, body: dict[str, Any], reply: Reply) -> AsyncGenerator[Event]:
        lines, over = SseLines(), False
        self._in_flight += 1
        answer: aiohttp.ClientResponse | None = None
        try:
            answer = await self._session.post(self._base + path, json=body)
            if answer.status != 200:
                told = await read_all(answer, 1 << 20)
                raise error_of(answer.status, told, answer.headers.get("Retry-After", ""))
            async for piece in answer.content.iter_any():
                for payload in lines.feed(piece):
                    if payload == b"[DONE]":
                        over = True
                    elif (event := reply.take(payload)) is not None:
                        self._steps += 1
                        yield event
                if over:
                    break
            else:
                for payload in lines.rest():
                    if payload != b"[DONE]" and (event := reply.take(payload)) is not None:
                        yield event
            if not reply.finished:
                raise MeshError(Reason.ENGINE_FAILED, "the server ended the answer before it was finished")
            yield reply.end()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _lost(error, begun=answer is not None) from error
        finally:
            self._in_flight -= 1
            if answer is not None:
                answer.close()  # closes the connection of an answer that is not read to its end: the server aborts it

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self._session.post(self._base + path, json=body) as reply:
                told = await read_all(reply, MAX_REPLY_BYTES)
                if reply.status != 200:
                    raise error_of(reply.status, told)
                parsed = orjson.loads(told)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _lost(error, begun=False) from error
        except orjson.JSONDecodeError:
            raise MeshError(Reason.ENGINE_FAILED, f"the server's {path} does not answer with JSON") from None
        return parsed if isinstance(parsed, dict) else {}


def _choices(request: lm.ChatRequest | lm.CompleteRequest) -> int:
    return max(1, request.sampling.n)


def _unimplemented(what: str) -> MeshError:
    return MeshError(Reason.UNIMPLEMENTED, f"the server behind this instance does not offer {what}")


def _lost(error: Exception, *, begun: bool) -> MeshError:
    what = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError):
        return MeshError(Reason.INSTANCE_LOST, f"the server behind this instance cannot be reached: {what}")
    lost = "broke off" if begun else "did not answer"
    return MeshError(Reason.INSTANCE_LOST, f"the server behind this instance {lost}: {what}")
