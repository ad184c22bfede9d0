"""`infermesh render`: a fleet file as files for Docker Compose, Kubernetes or Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infermesh import __version__
from infermesh.cli import BAD_USAGE, Failure
from infermesh.cli.printing import remark

if TYPE_CHECKING:
    from deploy.fleet import Fleet
    from deploy.planner.placed import Placed
    from deploy.render.container import Rendered, Site

TARGETS = ("compose", "k8s", "ray")
AUTOSCALERS = ("hpa", "keda", "none")


def command(
    target: Annotated[str, typer.Argument(metavar="compose|k8s|ray", help="What the files are for.")],
    fleet: Annotated[Path, typer.Argument(metavar="FLEET.yaml", help="A fleet file; k8s also takes Worker resources.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the files go.")],
    node: Annotated[str, typer.Option(help="compose: which of the fleet's nodes the project is for.")] = "",
    autoscaler: Annotated[
        str, typer.Option(help="k8s: what scales classes with min and max: hpa, keda (ScaledObjects) or none.")
    ] = "hpa",
    grace_s: Annotated[float, typer.Option(help="Seconds to finish what is running when stopped.", min=0)] = 30,
) -> None:
    """Write what starts a fleet elsewhere: a Compose project for a host, Kubernetes objects, or a Ray cluster's `ray
    start` lines with the placement groups that `up --ray` will make there. Starts nothing.

    Models without instances are placed as `infermesh plan` does. Files that are there already are overwritten.

    Examples:
        infermesh render compose deploy/examples/containers.yaml -o build/compose
        infermesh render k8s deploy/examples/containers.yaml -o build/k8s
        infermesh render k8s worker.yaml -o build/k8s
        infermesh render ray deploy/examples/ray.yaml -o build/ray
    """
    if target not in TARGETS:
        raise Failure(f"{target!r} is not a target; there are {', '.join(TARGETS)}", BAD_USAGE)
    if node and target != "compose":
        raise Failure("--node is for compose; Kubernetes and Ray place by what nodes have", BAD_USAGE)
    if autoscaler not in AUTOSCALERS:
        raise Failure(f"--autoscaler {autoscaler!r}: there are {', '.join(AUTOSCALERS)}", BAD_USAGE)
    found = _rendered(target, fleet, node, autoscaler, grace_s)
    for name, text in found.files.items():
        path = output / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise Failure(f"{path}: {error.strerror}") from None
        print(path)
    for line in found.remarks:
        remark(f"infermesh: {line}")


def _rendered(target: str, path: Path, node: str, autoscaler: str, grace_s: float) -> Rendered:
    from deploy.fleet import parse_fleet
    from deploy.render.compose import compose
    from deploy.render.k8s import render_k8s
    from deploy.render.llama_cpp import llama_units
    from deploy.render.ray import render_ray
    from deploy.render.shipped import shipped_files
    from deploy.render.worker import fleet_of_workers, has_workers

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: {getattr(error, 'strerror', None) or error}", BAD_USAGE) from None
    assumed: tuple[str, ...] = ()
    if has_workers(text):
        told, assumed = fleet_of_workers(text, str(path))
    else:
        told = parse_fleet(text, str(path))
    told, site, placed = _completed(told, target, path, grace_s)
    if target == "compose":
        found = compose(told, site, shipped_files(), node=node, name=str(path))
    elif target == "ray":
        found = render_ray(told, site, name=str(path))
    else:
        found = render_k8s(told, site, autoscaler=autoscaler, name=str(path))
    units = llama_units(told, placed)
    remarks = (*assumed, *found.remarks, *units.remarks)
    return replace(found, files={**found.files, **units.files}, remarks=remarks)


def _completed(fleet: Fleet, target: str, path: Path, grace_s: float) -> tuple[Fleet, Site, tuple[Placed, ...]]:
    """The fleet with all its instances, the speeds that the planner reckons for them, and what it has placed."""
    from deploy.fleet import FleetError, unserved
    from deploy.model_files import read_models
    from deploy.planner.catalogue import shipped
    from deploy.planner.estimate import estimates
    from deploy.planner.planner import plan
    from deploy.render.container import Site
    from deploy.render.llama_cpp import llama_faults

    read, catalogue = read_models(fleet, path.parent), shipped()
    placed: tuple[Placed, ...] = ()
    served = {instance.model for instance in fleet.instances}
    if fleet.nodes and any(model.id not in served for model in fleet.models):
        try:
            planned = plan(fleet, read.shapes, catalogue, read.needed(fleet), str(path))
        except FleetError as error:
            raise FleetError(str(path), [*unserved(fleet, target), *error.faults]) from None
        if faults := list(llama_faults(planned.fleet, planned.placed)):
            raise FleetError(str(path), [*unserved(fleet, target), *faults])
        fleet, placed = planned.fleet, planned.placed
    reckoned = {id: one.speed_values() for id, one in estimates(fleet, read.shapes, catalogue).items()}
    return fleet, Site(__version__, "", catalogue, reckoned, grace_s), placed
