"""The command line as a whole: help, variables, exit codes, and how little it imports."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.launch import examine
from infermesh.cli import Failure, main
from infermesh.cli import rerank as rerank_verb
from infermesh.cli.verbs import VERBS, load, split_docstring, variable
from infermesh.errors import MeshError, Reason

PYTHON = [sys.executable, "-P"]
CLIENT_VERBS = ("chat", "embed", "instances", "explain", "drain")


def run(*words: str, env: dict[str, str] | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """One call of the command line in a process of its own, without this one's INFERMESH_* variables."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("INFERMESH_")}
    command = [*PYTHON, "-m", "infermesh.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**clean, **(env or {})}, input=stdin, timeout=60
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_examples_and_a_variable_for_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text and f"infermesh {verb}" in text.partition("Examples:")[2]
    for option in load(verb).params:
        if option.param_type_name == "option" and "--help" not in option.opts:
            assert option.envvar and str(option.envvar).startswith("INFERMESH_"), option.opts


@pytest.mark.parametrize(
    ("verb", "option", "default"),
    [
        ("gateway", "--queue-wait-s", "30.0"),
        ("gateway", "--max-streams", "128"),
        ("gateway", "--objective-ttft-s", "2.0"),
        ("gateway", "--grace-s", "30.0"),
        ("embedding", "--batch-rows", "256"),
        ("llm", "--grace-s", "30.0"),
        ("llm", "--vram-ratio", "0.9"),
        ("llm", "--idle-timeout-s", "300"),
    ],
)
def test_help_shows_the_defaults_of_the_settings(verb: str, option: str, default: str) -> None:
    found = next(one for one in load(verb).params if option in one.opts)
    assert found.show_default == default


@pytest.mark.parametrize("verb", VERBS)
def test_the_variables_of_a_verb_are_all_different(verb: str) -> None:
    names = [option.envvar for option in load(verb).params if getattr(option, "envvar", None)]
    assert len(names) == len(set(names))


def test_every_verb_is_in_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert main([]) == 0 and capsys.readouterr().out == text
    files = {path.stem.replace("_", "-") for path in Path(rerank_verb.__file__).parent.glob("*.py")}
    assert set(VERBS) <= files


def test_the_overview_is_quick_and_imports_nothing_heavy() -> None:
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.4, f"infermesh --help took {best:.2f} s of CPU"
    heavy = ("grpc", "torch", "vllm", "pydantic", "yaml", "aiohttp", "numpy", "starlette", "rich")
    code = "import sys; from infermesh.cli import main; main(['--help']); print([m for m in %r if m in sys.modules])"
    seen = subprocess.run([*PYTHON, "-c", code % (heavy,)], capture_output=True, text=True, timeout=60, check=True)
    assert seen.stdout.strip().endswith("[]"), seen.stdout[-200:]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("chatt",), "no verb 'chatt'; did you mean chat?"),
        (("chat", "--modle", "x"), "--modle"),
        (("instances", "--timeout", "soon"), "not a valid float"),
        (("drain",), "INSTANCE_ID"),
        (("chat", "  "), "nothing to ask"),
        (("chat", "--gateway", "nonsense", "hi"), "--gateway: 'nonsense' is not HOST:PORT"),
        (("chat", "--api-key-file", "/nonexistent", "hi"), "--api-key-file /nonexistent: No such file"),
        (("up", "--fleet", "/nonexistent.yaml"), "--fleet /nonexistent.yaml: No such file"),
        (("up", "--adopt", "http://127.0.0.1:1", "--llm-source", "x"), "exclude each other"),
        (("up", "--adopt", "ftp://x"), "not a URL"),
        (("up", "--adopt", "http://127.0.0.1:1"), "no OpenAI-speaking server there"),
        (("gateway", "--grpc", "nonsense"), "grpc: 'nonsense' is not HOST:PORT"),
        (("gateway", "--grpc", "0.0.0.0:0"), "grpc: 0.0.0.0 can be reached from other machines"),
        (("gateway", "--instance-weight", "x"), "is not ID=FACTOR"),
        (("registry", "--listen", "0.0.0.0:0"), "can be reached from other machines"),
        (("registry", "--keys", "/nonexistent"), "name a readable file"),
        (("llm", "--model", "m", "--engine", "magic"), "engine: "),
        (("gateway", "--queue-wait-s", "-1"), "queue_wait_s: "),
        (("gateway", "--max-streams", "0"), "infermesh: max_streams: "),
        (("gateway", "--objective-ttft-s", "0"), "objective_ttft_s: "),
        (("registry", "--log-level", "loud"), "--log-level: 'loud' is none of debug, "),
    ],
)
def test_bad_usage_ends_with_2_and_one_clear_word(words: tuple[str, ...], expected: str) -> None:
    done = run(*words)
    assert done.returncode == 2 and expected in done.stderr, (done.returncode, done.stderr)
    assert done.stdout == "" and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", CLIENT_VERBS)
def test_no_gateway_ends_with_1_and_says_what_to_do(verb: str) -> None:
    words = [verb] if verb in ("instances", "explain") else [verb, "x"]
    done = run(*words, "--json", env={"INFERMESH_GATEWAY": "127.0.0.1:1", "INFERMESH_TIMEOUT": "5"})
    assert done.returncode == 1 and "no gateway answers at 127.0.0.1:1" in done.stderr, done.stderr
    assert "`infermesh up` starts one" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("target", ["127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_load_test_of_nobody_says_so_at_once(target: str) -> None:
    done = run("bench", "--target", target, "--model", "m", "--generate", "rps=5,requests=2")
    assert done.returncode == 1 and f"nobody answers at {target}" in done.stderr and done.stdout == ""


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code when `version` raises this."""
    from infermesh.cli import version

    def broken(document: object) -> None:
        raise error

    monkeypatch.setattr(version, "emit_json", broken)
    return main(["version", "--json"])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Failure("cannot", 1), 1, "infermesh: cannot"),
        (Failure("wrong", 2), 2, "infermesh: wrong"),
        (MeshError(Reason.QUEUE_FULL, "full", param="model"), 1, "infermesh: model: full [queue_full]"),
        (OSError(30, "Read-only file system", ".infermesh"), 1, "infermesh: .infermesh: Read-only file system\n"),
        (ValueError("bad file"), 2, "infermesh: bad file"),
        (KeyboardInterrupt(), 1, "stopped"),
        (RuntimeError("boom"), 1, "RuntimeError: boom (INFERMESH_DEBUG=1 shows the traceback)"),
        (ModuleNotFoundError("No module named 'x'"), 1, "run `make setup`"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error, monkeypatch) == code
    told = capsys.readouterr()
    assert words in told.err and told.out == "" and "Traceback" not in told.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERMESH_DEBUG", "1")
    with pytest.raises(RuntimeError):
        failing(RuntimeError("boom"), monkeypatch)


def test_json_is_one_document_and_nothing_else() -> None:
    done = run("version", "--json")
    assert json.loads(done.stdout)["infermesh"] and done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_reader_that_leaves_is_no_error() -> None:
    code = f"{' '.join(PYTHON)} -m infermesh.cli chat --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_doctor_answers_in_json_and_names_a_taken_port() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("doctor", "--json", "--grpc", address, "--http", "127.0.0.1:0", env={"INFERMESH_OFFLINE": "1"})
    told = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in told["findings"] if finding["level"] != "ok"}
    assert done.returncode == 1 and told["ok"] is False
    assert address in found["port"]["what"] and found["port"]["do"]
    assert "INFERMESH_OFFLINE" in found["hub"]["what"]
    names = {finding["name"] for finding in told["findings"]}
    assert names == {"python", "machine", "gpu", "environment", "memory", "disk", "port", "proxy", "hub", "clock"}


def test_doctor_warns_of_a_proxy_that_would_be_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert examine._proxy().level == "ok"
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    found = examine._proxy()
    assert found.level == "warn" and found.do == "export no_proxy=127.0.0.1,localhost"
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert examine._proxy().level == "ok"


ASKS: list[tuple[list[str], bool]] = [
    (["query", "doc"], True),
    (["--model", "m", "query", "doc"], True),
    (["-m", "m", "query", "-"], True),
    (["--json", "query", "doc"], True),
    (["--help"], True),
    ([], False),
    (["--model", "m"], False),
    (["--model", "m", "--source", "s"], False),
    (["--listen", "127.0.0.1:0", "--model=m"], False),
]


@pytest.mark.parametrize(("words", "asks"), ASKS)
def test_rerank_is_a_question_or_a_service(words: list[str], asks: bool) -> None:
    from infermesh.cli.serve_rerank import command as serve
    from infermesh.cli.verbs import command_of

    ask_command, serve_command = command_of(rerank_verb.command, "rerank"), command_of(serve, "rerank")
    assert rerank_verb.asks(words, ask_command, serve_command) is asks


def test_names_of_variables() -> None:
    assert variable(["--api-key-file"]) == "INFERMESH_API_KEY_FILE"
    assert variable(["-p", "--port"]) == "INFERMESH_PORT"
    assert variable(["--normalize", "--no-normalize"]) == "INFERMESH_NORMALIZE"


def test_a_docstring_is_help_and_examples() -> None:
    assert split_docstring("Does it.\n\n    More.\n\n    Examples:\n        a b\n        c\n") == (
        "Does it.\n\nMore.",
        "\b\nExamples:\n  a b\n  c",
    )
    assert split_docstring("Does it.") == ("Does it.", "")


def test_the_variable_is_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERMESH_JSON", "1")
    assert main(["version"]) == 0
    document: Any = json.loads(capsys.readouterr().out)
    assert document["python"]


@pytest.mark.parametrize("verb", ["gateway", "llm", "embedding", "serve_rerank"])
def test_every_process_can_be_told_all_of_the_registry(verb: str) -> None:
    from importlib import import_module
    from inspect import signature

    from services.chassis.registering import RegistrySettings

    assert set(RegistrySettings.model_fields) <= set(
        signature(import_module(f"infermesh.cli.{verb}").command).parameters
    )
