"""Rendering for tests: a fleet from parts, and command lines held against the verbs that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.fleet import Fleet, parse_fleet
from deploy.planner.catalogue import shipped
from deploy.render.container import Site
from infermesh.cli import gateway, llm, serve_rerank
from infermesh.cli.encoding_options import given
from infermesh.cli.verbs import command_of, load
from services.embedding.settings import EmbeddingSettings
from services.rerank.settings import RerankSettings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
SITE = Site("0.1.0", "", shipped())
POD = {"$(POD_IP)": "10.1.2.3", "$(POD_NAME)": "pod-0"}  # as the kubelet puts them in


def fleet_of(**parts: Any) -> Fleet:
    models = [{"id": "m", "kind": "llm", "source": "org/m"}]
    return parse_fleet(yaml.safe_dump({"version": 1, "models": models, **parts}))


def example(name: str) -> Fleet:
    return parse_fleet((EXAMPLES / name).read_text(), name)


def parsed(arguments: Sequence[str]) -> Any:
    """The settings that a rendered command line gives the process: typer parses it, the service's own checks pass.

    Raises:
        UsageError, ValueError: the verb does not take it.
    """
    verb, *words = arguments
    for variable, value in POD.items():
        words = [word.replace(variable, value) for word in words]
    command = command_of(serve_rerank.command, "rerank") if verb == "rerank" else load(verb)
    chosen = command.make_context(verb, words, auto_envvar_prefix=None).params
    if verb == "health":
        return chosen
    chosen = {name: value for name, value in chosen.items() if value not in (None, (), [])}
    if verb == "gateway":
        return gateway.settings_of(chosen)
    if verb == "llm":
        chosen.pop("prompt_template", None)  # a file of the container
        return llm.settings_of(chosen)
    return {"embedding": EmbeddingSettings, "rerank": RerankSettings}[verb](**given(chosen))
