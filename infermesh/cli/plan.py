"""`infermesh plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, Failure
from infermesh.cli.connect import Json, Measured
from infermesh.cli.printing import emit_json, remark

if TYPE_CHECKING:
    from deploy.planner.placed import Plan

SIMULATED = 400  # requests


def command(
    fleet: Annotated[Path, typer.Argument(metavar="FLEET.yaml", help="Models, nodes and traffic.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the completed fleet file there.")
    ] = None,
    explain: Annotated[
        str, typer.Option(metavar="ID", help="Show every number of one instance with its formula and inputs.")
    ] = "",
    simulate: Annotated[
        bool, typer.Option("--simulate/--no-simulate", help="Check the plan with the very router, in virtual time.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the simulated traffic.", min=0)] = 0,
    calibration: Measured = None,
    json: Json = False,
) -> None:
    """Plan what runs on which card: fills in the instances of a fleet file, with the reasons, and what does not fit.

    Examples:
        infermesh plan deploy/examples/heap-of-cards.yaml
        infermesh plan fleet.yaml -o completed.yaml
        infermesh plan fleet.yaml --explain a800-1-a
        infermesh plan fleet.yaml --json
    """
    from deploy.planner.document import plan_document

    found = _planned(fleet, calibration)
    verdict = _verdict(found, seed) if simulate else None
    if output:
        _write(output, found, fleet)
    if json:
        emit_json(plan_document(found, verdict))
    elif explain:
        _explain(found, explain)
    else:
        from infermesh.cli.plan_screen import show

        show(found, verdict, str(fleet))


def _planned(path: Path, calibration: Path | None) -> Plan:
    from deploy.fleet import parse_fleet
    from deploy.model_files import read_models
    from deploy.planner.catalogue import shipped
    from deploy.planner.measured import plan_with_measured
    from deploy.planner.planner import plan
    from infermesh.cli.calibrate import of_fleet

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: {getattr(error, 'strerror', None) or error}", BAD_USAGE) from None
    fleet = parse_fleet(text, str(path))
    read = read_models(fleet, path.parent)
    found = plan(fleet, read.shapes, shipped(), read.needed(fleet), str(path))
    return plan_with_measured(found, of_fleet(fleet, calibration))


def _verdict(found: Plan, seed: int) -> dict[str, Any] | None:
    """The traffic of the file on the planned fleet, through the router and simulated engines; the planner itself knows
    neither."""
    from deploy.planner.verdict import traffic_spec, verdict
    from services.gateway.simulator.arrivals import generate, parse_spec
    from services.gateway.simulator.fleet import site_of
    from services.gateway.simulator.metrics import summary
    from services.gateway.simulator.policies import policy
    from services.gateway.simulator.world import Conditions
    from services.gateway.simulator.world import simulate as run

    def simulate(spec: str) -> dict[str, Any]:
        site = site_of(found.fleet, {one.instance.id: one.estimate for one in found.placed})
        trace = generate(parse_spec(spec), _random(seed))
        done = run(trace, site, policy("infermesh"), Conditions(), _random(seed))
        return summary(done, site)

    if traffic_spec(found, SIMULATED) is None:
        return None
    return verdict(found, simulate, SIMULATED)


def _random(seed: int) -> Any:
    from random import Random

    return Random(seed)


def _write(path: Path, found: Plan, source: Path) -> None:
    import yaml

    from deploy.planner.document import fleet_document

    text = yaml.safe_dump(fleet_document(found.fleet), sort_keys=False, allow_unicode=True, width=120)
    try:
        path.write_text(f"# Made by `infermesh plan {source}`.\n{text}", encoding="utf-8")
    except OSError as error:
        raise Failure(f"--output {path}: {error.strerror}") from None
    remark(f"written: {path}")


def _explain(found: Plan, id: str) -> None:
    from deploy.planner.document import plan_document

    instances = {one["id"]: one for one in plan_document(found, None)["instances"]}
    if id not in instances:
        raise Failure(f"--explain {id!r}: the plan has {', '.join(instances)}", BAD_USAGE)
    for line in (*instances[id]["reasons"], *instances[id].get("working", ())):
        sys.stdout.write(f"{line}\n")
