"""The fleet file: its values, its schema and its checks (DESIGN §9). Pure.

All faults are told at once, each with its key's path and what is allowed. A key marked `Later` has its place in the
schema and is refused by name by whoever cannot serve it (`unserved`); nothing is ignored.
"""

from __future__ import annotations

import json

from deploy.fleet.checks import FleetError, parse_fleet, unserved
from deploy.fleet.faults import Fault
from deploy.fleet.values import Architecture, Fleet, Gateway, Instance, Model, Node, PromptTemplate, Speed

__all__ = [
    "Architecture",
    "Fault",
    "Fleet",
    "FleetError",
    "Gateway",
    "Instance",
    "Model",
    "Node",
    "PromptTemplate",
    "Speed",
    "parse_fleet",
    "schema_text",
    "unserved",
]


def schema_text() -> str:
    """The JSON schema, as it is committed in deploy/fleet.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Fleet.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"
