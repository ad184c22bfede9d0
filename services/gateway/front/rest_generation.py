"""The parameters that chat and completion share, from their REST names into the contract. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from infermesh.errors import MeshError, invalid, unsupported
from infermesh.v1 import inference_pb2 as inf
from infermesh.v1 import language_model_pb2 as lm
from services.gateway.front.rest_schema import Generation

# One event a quarter of a second is enough to feed watchdog and resume where nobody reads along.
COLLECTED = inf.Delivery(min_interval_ms=250)
MAX_TOKEN_ID = 2**32 - 1

_PLAIN = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "max_tokens", "min_tokens", "n", "ignore_eos", "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip

# Field path of the contract -> name of the REST parameter; what is not here loses its `sampling.` only.
NAMES = {
    "sampling.include_stop": "include_stop_str_in_output",
    "hints.document_id": "x-infermesh-document-id",
    "hints.session_id": "prompt_cache_key",
    "hints.priority": "priority",
    "hints.degrade": "x-infermesh-allow-degrade",
}


def sampling(body: Generation) -> lm.Sampling:
    """Everything but max_tokens' other names and logprobs, which the two endpoints spell differently.

    Raises:
        MeshError: INVALID_ARGUMENT.
    """
    made = lm.Sampling()
    for name in _PLAIN:
        value = getattr(body, name)
        if value is not None:
            setattr(made, name, value)
    if body.stop:
        made.stop.extend(body.stop)
    if body.stop_token_ids:
        made.stop_token_ids.extend(body.stop_token_ids)
    if body.include_stop_str_in_output:
        made.include_stop = True
    for token, bias in (body.logit_bias or {}).items():
        if not token.isascii() or not token.isdigit() or len(token) > 10 or int(token) > MAX_TOKEN_ID:
            raise invalid("logit_bias", f"{token[:32]!r} is not a token id")
        made.logit_bias[int(token)] = bias
    return made


def constraint(body: Generation, names: dict[str, str]) -> lm.Constraint | None:
    """The one shape asked for, if any; `names` learns what it was called.

    Raises:
        MeshError: INVALID_ARGUMENT for two at once, UNSUPPORTED for an unknown kind.
    """
    found: list[tuple[str, lm.Constraint]] = []
    if body.response_format is not None:
        made = _response_format(body.response_format)
        if made is not None:
            found.append(("response_format", made))
    given = {
        "guided_json": ("json", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "guided_grammar": ("grammar", body.guided_grammar),
        "guided_choice": ("choice", body.guided_choice),
    }
    if body.structured_outputs is not None:
        given["structured_outputs.json"] = ("json", body.structured_outputs.schema_)
        for kind in ("regex", "choice", "grammar", "json_object", "structural_tag"):
            given[f"structured_outputs.{kind}"] = (kind, getattr(body.structured_outputs, kind))
    for name, (kind, value) in given.items():
        if value is not None and value is not False:
            found.append((name, _constraint(name, kind, value)))
    if not found:
        return None
    if len(found) > 1:
        raise invalid(found[1][0], f"excludes {found[0][0]}: an answer can have one shape")
    name, made = found[0]
    names["constraint"] = name
    for field in ("json_schema", "json_object", "regex", "grammar", "choice", "structural_tag"):
        names[f"constraint.{field}"] = name
    if name == "response_format":
        names["constraint.json_schema"] = "response_format.json_schema.schema"
    return made


def _response_format(value: Any) -> lm.Constraint | None:
    path = "response_format"
    if not isinstance(value, dict):
        raise invalid(path, "must be an object with a `type`")
    kind = value.get("type")
    if kind == "structural_tag":
        return _constraint(path, "structural_tag", value)
    allowed = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    if not isinstance(kind, str) or kind not in allowed:
        raise unsupported(f"{path}.type", "must be text, json_object, json_schema or structural_tag")
    if extra := sorted(value.keys() - allowed[kind]):
        raise unsupported(f"{path}.{extra[0][:64]}", "this parameter is not served")
    if kind == "text":
        return None
    if kind == "json_object":
        return lm.Constraint(json_object=True)
    outer = value.get("json_schema")
    if not isinstance(outer, dict) or "schema" not in outer:
        raise invalid(f"{path}.json_schema", "must be an object with a `schema`")
    if extra := sorted(outer.keys() - {"name", "schema", "strict", "description"}):
        raise unsupported(f"{path}.json_schema.{extra[0][:64]}", "this parameter is not served")
    return _constraint(f"{path}.json_schema.schema", "json", outer["schema"])


def _constraint(path: str, kind: str, value: Any) -> lm.Constraint:
    if kind == "json_object":
        return lm.Constraint(json_object=True)
    if kind == "choice":
        return lm.Constraint(choice=lm.Choice(choices=value))
    if kind in ("json", "structural_tag"):
        if not isinstance(value, dict | str | bool):
            raise invalid(path, "must be an object")
        text = value if isinstance(value, str) else json_text(path, value)
        return lm.Constraint(json_schema=text) if kind == "json" else lm.Constraint(structural_tag=text)
    if not value:
        raise invalid(path, "must not be empty")
    return lm.Constraint(regex=value) if kind == "regex" else lm.Constraint(grammar=value)


def json_text(path: str, value: Any) -> str:
    """Free-form JSON as text.

    Raises:
        MeshError: INVALID_ARGUMENT, for what is nested too deep.
    """
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        raise _too_deep(path) from None


def _too_deep(path: str) -> MeshError:
    return invalid(path, "nested too deep")


def hints(body: Generation, made: inf.Hints) -> None:
    """Wishes from the body; headers overwrite them. vLLM's `priority` counts downwards, ours upwards."""
    session = body.session_id or body.prompt_cache_key
    if session:
        made.session_id = session
    if body.priority:
        made.priority = -body.priority


def delivery(body: Generation) -> inf.Delivery:
    made = inf.Delivery()
    if not body.stream:
        made.CopyFrom(COLLECTED)
    if body.return_token_ids:
        made.token_ids = True
    return made
