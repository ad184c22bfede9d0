"""Which ids callers are told. Inside the mesh, instances are verified by their own ids all the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from registry.endpoint import Endpoint

EVERYBODY = "*"


@dataclass(frozen=True, slots=True)
class Shown:
    """Of one instance: `enable` False hides both ids; a name that is empty is the instance's own."""

    enable: bool = True
    instance_id: str = ""
    model_id: str = ""


@dataclass(frozen=True, slots=True)
class Showing:
    """`rules` by instance id; `EVERYBODY` is for those without one."""

    rules: Mapping[str, Shown] = field(default_factory=dict)

    def ids(self, endpoint: Endpoint) -> tuple[str, str]:
        """Instance and model id as a caller may see them; empty = hidden."""
        rule = self.rules.get(endpoint.id) or self.rules.get(EVERYBODY)
        if rule is None:
            return endpoint.id, endpoint.model
        return (rule.instance_id or endpoint.id, rule.model_id or endpoint.model) if rule.enable else ("", "")

    def told(self, first: Any, endpoint: Endpoint) -> tuple[str, str] | None:
        """`ids`, which are also written into the first event of an answer; None where nothing is to be changed."""
        told = self.ids(endpoint)
        if told == (endpoint.id, endpoint.model):
            return None
        started = getattr(first.message, "started", None)
        if started is not None and started.instance_id:
            started.instance_id, started.incarnation = told[0], 0
            first.raw = first.message.SerializeToString()
        return told
