"""`infermesh doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from infermesh.cli import DONE, FAILED
from infermesh.cli.connect import Json
from infermesh.cli.printing import emit_json


def command(
    grpc: Annotated[str, typer.Option(help="The gRPC address that `up` would take.")] = "127.0.0.1:50050",
    http: Annotated[str, typer.Option(help="The REST address that `up` would take.")] = "127.0.0.1:8000",
    registry: Annotated[str, typer.Option(help="consul://H:P to examine as well.")] = "",
    ray: Annotated[str, typer.Option(metavar="HOST:PORT", help="Head of a Ray cluster to examine as well.")] = "",
    json: Json = False,
) -> int:
    """Check driver, cards, environments, memory, disk, ports, proxy, hub, Consul, Ray and clock; say what to do.

    The exit code is 1 when something fails that `infermesh up` needs.

    Examples:
        infermesh doctor
        infermesh doctor --registry consul://10.0.0.5:8500 --ray 10.0.0.5:6379
        infermesh doctor --json | jq '.findings[] | select(.level != "ok")'
    """
    from deploy.launch.examine import examine

    findings = []
    for finding in examine(grpc=grpc, http=http, registry=registry, ray=ray, folder=Path.cwd()):
        findings.append(finding)
        if not json:
            print(f"{finding.level:4}  {finding.name:12} {finding.what}", flush=True)
            if finding.do:
                print(f"{'':18} -> {finding.do}")
    failed = any(finding.level == "fail" for finding in findings)
    if json:
        emit_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    return FAILED if failed else DONE
