"""`up --adopt URL[,URL…]`: running OpenAI-speaking servers as a fleet. Asks each which models it has."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from deploy.fleet import Fleet, Instance, Model

PROBE_S = 10.0
MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """One model of one server."""

    url: str
    model: str


def probe(url: str, api_key: str = "") -> list[Found]:
    """The models of the server at `url` (with or without /v1). The environment's proxy is not asked: this is the mesh.

    Raises:
        ValueError: it does not answer as an OpenAI-speaking server does.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--adopt {url}: not a URL, e.g. http://127.0.0.1:8001")
    base = url.rstrip("/").removesuffix("/v1")
    request = urllib.request.Request(f"{base}/v1/models", headers={"user-agent": "infermesh"})
    if api_key:
        request.add_header("authorization", f"Bearer {api_key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=PROBE_S) as reply:
            listed = json.loads(reply.read(MAX_BYTES))["data"]
        # A gateway of ours tells the kind; other servers do not, and what they list counts as a language model.
        models = [str(entry["id"]) for entry in listed if entry.get("kind", "llm") == "llm"]
    except urllib.error.HTTPError as error:
        hint = "; give --adopt-key-file" if error.code in (401, 403) else ""
        raise ValueError(f"--adopt {url}: {base}/v1/models answers {error.code}{hint}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"--adopt {url}: no OpenAI-speaking server there ({base}/v1/models: {reason})") from None
    if not models:
        raise ValueError(f"--adopt {url}: it lists no language model")
    return [Found(base, model) for model in models]


def adopted_fleet(urls: Sequence[str], key_file: str, ask: Callable[[str], list[Found]]) -> Fleet:
    """One instance a model and server; the same model on two servers is one model with two instances.

    Raises:
        ValueError: every server that cannot be adopted, a line each.
    """
    found, faults = [], []
    for url in urls:
        try:
            found += ask(url)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    models: dict[str, Model] = {}
    instances = []
    for number, one in enumerate(found, 1):
        id = model_id(one.model)
        models.setdefault(id, Model(id=id, kind="llm"))
        instances.append(
            Instance(
                id=f"adopted-{number}",
                model=id,
                engine="openai-http",
                url=one.url,
                upstream_model=one.model,
                api_key_file=key_file,
            )
        )
    return Fleet(version=1, models=tuple(models.values()), instances=tuple(instances))


def model_id(name: str) -> str:
    """A server's name for a model as one of ours: a path becomes its last part, odd characters become dashes."""
    short = name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".")) else name
    return re.sub(r"[^a-zA-Z0-9_.:/@-]", "-", short).lstrip("_.:/@-")[:128] or "model"
