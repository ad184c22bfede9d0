"""From flags to settings: each engine takes its own options and refuses the others'."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from infermesh.cli import main
from infermesh.cli.llm import OPENAI_HTTP, SCRIPTED, SPEED, VLLM, command, settings_of
from services.chassis.settings import SpeedSettings
from services.llm.settings import LlmSettings, OpenAiHttpOptions, PromptTemplate, ScriptedOptions, VllmOptions


def test_every_setting_can_be_given_as_a_flag() -> None:
    flags = set(inspect.signature(command).parameters)
    renamed = {"aliases": "alias", "engine_args": "engine_arg"}
    nested = {"speed", "vllm", "openai_http", "scripted", "kind"}
    for settings in (LlmSettings, VllmOptions, OpenAiHttpOptions, ScriptedOptions):
        for name in set(settings.model_fields) - nested:
            assert renamed.get(name, name) in flags, name
    assert set(SPEED) <= set(SpeedSettings.model_fields)
    for names, options in ((VLLM, VllmOptions), (OPENAI_HTTP, OpenAiHttpOptions), (SCRIPTED, ScriptedOptions)):
        assert set(names) | {"max_context"} == set(options.model_fields)


def test_flags_land_where_they_belong(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"sys": "Now: {}", "user": "U: {}", "ai": "A: {}", "sep": "</s>"}')
    made = settings_of(
        {
            "engine": "vllm",
            "model": "m",
            "source": "./model",
            "alias": ["a", "b"],
            "context": "16-4096",
            "max_context": 8192,
            "tp": 2,
            "step_ms": 27.0,
            "engine_arg": ["enable_prefix_caching=true", "block_size=32", "note=text"],
            "prompt_template": tmp_path / "t.json",
        }
    )
    assert (made.aliases, made.context, made.speed.step_ms) == (("a", "b"), (16, 4096), 27.0)
    assert (made.vllm.tp, made.vllm.max_context) == (2, 8192)
    assert made.vllm.engine_args == {"enable_prefix_caching": True, "block_size": 32, "note": "text"}
    assert made.vllm.prompt_template == PromptTemplate(sys="Now: {}", user="U: {}", ai="A: {}", sep="</s>")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"engine": "scripted", "tp": 2}, "does not take options of vllm: tp"),
        ({"engine": "vllm"}, "source: engine vllm needs"),
        ({"engine": "openai-http"}, "source: engine openai-http needs"),
        ({"engine": "nonsense"}, "'vllm', 'openai-http' or 'scripted'"),
        ({"engine": "scripted", "context": "9"}, "MIN-MAX"),
        ({"engine": "scripted", "context": "9-3"}, "MIN must be below MAX"),
        ({"engine": "scripted", "listen": "0.0.0.0:0"}, "--keys FILE, or --insecure"),
        ({"engine": "vllm", "source": "x", "engine_arg": ["=1"]}, "NAME=VALUE"),
        ({"engine": "vllm", "source": "x", "prompt_template": Path("missing.json")}, "prompt-template: missing.json"),
        ({"engine": "scripted", "step_ms": -1.0}, "greater than 0"),
    ],
)
def test_bad_settings_say_what_is_wrong(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        settings_of({"model": "m", **given})


def test_a_four_part_template_needs_its_slots() -> None:
    with pytest.raises(ValueError, match="user and ai: exactly one"):
        PromptTemplate(user="no slot", ai="{} {}")


def test_the_command_ends_with_2_and_names_all_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llm", "--engine", "nonsense", "--model", "m", "--weight", "0"]) == 2
    told = capsys.readouterr().err
    assert "engine:" in told and "weight:" in told
