"""The life of the process around vLLM: killed engines, killed services, what cannot start. Each test starts its own."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from infermesh.errors import Reason, from_rpc
from infermesh.v1 import language_model_pb2 as lm
from infermesh.v1 import language_model_pb2_grpc
from infermesh.v1.inference_pb2 import Relay
from tests.kit.llm import PYTHON, ROOT, LlmProcess, wait_until
from tests.kit.llm_client import MODEL

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]
NOON = 1_700_049_600
TEMPLATE = {
    "sys": "A chat.\nCurrent time: {}.\n",
    "user": "\nUSER: {}",
    "ai": "\nASSISTANT: {}",
    "sep": "</s>",
}
Start = Callable[..., LlmProcess]


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[LlmProcess] = []

    def begin(*flags: str, source: Path = tiny_model) -> LlmProcess:
        started.append(LlmProcess(tmp_path, source, *flags))
        return started[-1]

    yield begin
    for service in started:
        service.close()


def test_four_parts_then_the_engine_is_killed(start: Start, tmp_path: Path) -> None:
    template = tmp_path / "template.json"
    template.write_text(json.dumps(TEMPLATE))
    service = start("--prompt-template", str(template))
    address = service.wait_ready()
    with grpc.insecure_channel(address) as channel:
        stub = language_model_pb2_grpc.LanguageModelServiceStub(channel)
        messages = [lm.Message(role=lm.ROLE_USER, content="Hi")]
        conversation = lm.Conversation(messages=messages)
        for rendered_at, time_shown in ((NOON, "2023-11-15 12:00:00"), (0, time.strftime("%Y-%m-%d", time.gmtime()))):
            relay = Relay(rendered_at=rendered_at)
            ids = stub.Tokenize(lm.TokenizeRequest(model=MODEL, chat=conversation, relay=relay)).token_ids
            text = stub.Detokenize(lm.DetokenizeRequest(model=MODEL, token_ids=ids)).text
            assert text == f"A chat.\nCurrent time: {time_shown}.\n\nUSER: Hi\nASSISTANT:"
        sampling = lm.Sampling(max_tokens=40, temperature=0, ignore_eos=True)
        relay = Relay(rendered_at=NOON)
        chat = list(stub.Chat(lm.ChatRequest(model=MODEL, messages=messages, sampling=sampling, relay=relay)))
        prompt = "A chat.\nCurrent time: 2023-11-15 12:00:00.\n\nUSER: Hi\nASSISTANT:"
        whole = list(stub.Complete(lm.CompleteRequest(model=MODEL, text=prompt, sampling=sampling, relay=relay)))
        assert _ids(chat) == _ids(whole)
        tools = [lm.Tool(name="f")]
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Chat(lm.ChatRequest(model=MODEL, messages=messages, tools=tools)))
        assert (from_rpc(refused.value).reason, from_rpc(refused.value).param) == (Reason.UNSUPPORTED, "tools")

        running = stub.Complete(
            lm.CompleteRequest(model=MODEL, text="x", sampling=lm.Sampling(max_tokens=4000, ignore_eos=True))
        )
        next(running)
        service.engine_core().kill()
        killed = time.monotonic()
        with pytest.raises(grpc.RpcError) as lost:
            list(running)
        assert time.monotonic() - killed < 5, "its callers were told too late"
        assert lost.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
    assert service.process.wait(30) == 1
    log = service.log.read_text()
    assert "the engine is dead: vLLM's EngineCore" in log and "signal 9" in log
    assert wait_until(lambda: not service.children(), 20), service.children()


def test_a_killed_service_leaves_no_process(start: Start) -> None:
    service = start()
    service.wait_ready()
    core = service.engine_core()
    service.process.kill()
    assert wait_until(lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE, 20), "an orphaned engine"
    assert wait_until(lambda: not service.children(), 20), service.children()


def test_told_to_stop_while_loading(start: Start) -> None:
    service = start()
    assert wait_until(lambda: any("EngineCore" in child.name() for child in _named(service)), 120), "no engine process"
    began = time.monotonic()
    assert service.close() == 0
    assert time.monotonic() - began < 25
    assert wait_until(lambda: not service.children(), 20), service.children()


@pytest.mark.parametrize(
    ("flags", "source", "told"),
    [
        ((), "/nonexistent/model", "is missing: give a folder"),
        (("--engine-arg", "no_such_argument=1"), "", "vLLM's engine takes no no_such_argument"),
        (("--tool-parser", "nonsense"), "", "nonsense"),
    ],
)
def test_what_cannot_start_says_what_to_do(
    start: Start, tiny_model: Path, flags: tuple[str, ...], source: str, told: str
) -> None:
    service = start(*flags, source=Path(source) if source else tiny_model)
    try:
        assert service.process.wait(120) == 2
    except subprocess.TimeoutExpired:
        pytest.fail(service.log.read_text()[-2000:])
    assert told in service.log.read_text()
    assert not service.children()


def test_equal_seeds_write_equal_models(tmp_path: Path) -> None:
    for name in ("a", "b"):
        subprocess.run([PYTHON, "-P", "-m", "services.llm.tiny_model", tmp_path / name], cwd=ROOT, check=True)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files and "chat_template.jinja" in files
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def _ids(events: list[lm.ChatResponse]) -> list[int]:
    return [token for event in events for delta in event.deltas for token in delta.token_ids]


def _named(service: LlmProcess) -> list[psutil.Process]:
    return [child for child in service.children() if child.is_running()]
