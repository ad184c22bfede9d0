"""A mesh's children, ready to be started: on this host, or on Ray clusters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploy.fleet import Fleet, Instance
from deploy.fleet.values import RayCluster
from deploy.launch import logs, run_file
from deploy.launch.commands import Command, Host, Shared, gateway_command, instance_command
from deploy.launch.on_ray.command import ray_command
from deploy.launch.on_ray.need import Need, cluster_of, gpus_wanted, need_of
from deploy.launch.replicas import group_of, least, most
from deploy.launch.supervisor import Program
from deploy.model_files import read_models
from deploy.planner.catalogue import Catalogue, shipped
from deploy.planner.estimate import estimates

GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Programs:
    """`clusters`: Ray's, the default one first; empty = everything runs here. `reckoned`: instance -> the planner's
    speed.
    """

    fleet: Fleet
    host: Host
    shared: Shared
    clusters: tuple[RayCluster, ...] = ()
    reckoned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def gateway(self, grpc: str, http: str, tls: tuple[str, str] | None = None) -> Program:
        made = gateway_command(
            self.fleet, self.host, self.shared, grpc=grpc, http=http, ready_file=_ready(GATEWAY), tls=tls
        )
        if self.clusters:
            made = replace(made, argv=(*made.argv, *_scale(self.fleet)))
        # It goes first: it lets what is running finish, for which it needs the instances.
        return _program(GATEWAY, GATEWAY, "", made, tier=0)

    def instance(self, instance: Instance, group: str = "") -> Program:
        """`group`: what it is scaled with.

        Raises:
            ValueError: its interpreter is not there.
        """
        ready, speed = _ready(instance.id), self.reckoned.get(instance.id, {})
        if self.clusters:
            place = place_of(self.fleet, instance, self.clusters)
            made = ray_command(self.fleet, instance, self.host, self.shared, place, ready, speed, run_file.RAY, group)
        else:
            made = instance_command(self.fleet, instance, self.host, self.shared, ready, speed)
        return _program(instance.id, self.fleet.model(instance.model).kind, instance.model, made, tier=1)


def place_of(
    fleet: Fleet, instance: Instance, found: tuple[RayCluster, ...], catalogue: Catalogue | None = None
) -> tuple[RayCluster, Need]:
    """Which Ray cluster it is for, and what it reserves there."""
    gpus = gpus_wanted(fleet, instance, catalogue or shipped())
    return cluster_of(fleet, instance, found), need_of(fleet, instance, gpus)


def reckoned_speeds(fleet: Fleet) -> dict[str, Mapping[str, float]]:
    """What the planner reckons for the LLMs of which the file says no speed."""
    found = estimates(fleet, read_models(fleet, Path()).shapes, shipped())
    return {id: one.speed_values() for id, one in found.items()}


def _scale(fleet: Fleet) -> Iterator[str]:
    """The classes of which the gateway says how many replicas there should be."""
    for first in fleet.instances:
        if group := group_of(first):
            yield from ("--scale", f"{group}={least(first)}:{most(first)}")


def _ready(id: str) -> Path:
    return run_file.READY / f"{id}.json"


def _program(id: str, kind: str, model: str, made: Command, tier: int) -> Program:
    if shutil.which(made.argv[0]) is None:
        raise ValueError(
            f"{id}: its interpreter {made.argv[0]} is not there or cannot be run; see `python:` in the fleet"
        )
    for path, text in made.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    log = run_file.LOGS / f"{id}.log"
    logs.rotate(log)
    return Program(id, kind, made.argv, made.env, log, _ready(id), tier, model)
