"""From an instance to the child that stands for it on Ray: the same command line as on this host, with the node's own
interpreter, address and folder in it. Pure, but for asking which of the files to be shipped are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from deploy.fleet import Fleet, Instance
from deploy.fleet.values import RayCluster
from deploy.launch.commands import INHERITED, Command, Host, Shared, instance_command
from deploy.launch.on_ray.cluster import group_name
from deploy.launch.on_ray.need import Need
from deploy.launch.on_ray.service import ADDRESS, FOLDER, LLM_PYTHON, PYTHON
from deploy.launch.on_ray.spec import Spec, there

SHIPPED_OPTIONS = ("token-file", "ca-file", "cert-file", "key-file")  # of --registry-*
EXECUTOR = "distributed_executor_backend"
GROUP = "INFERMESH_RAY_GROUP"  # the placement group that vLLM's Ray executor shall use
DEFAULT_LISTEN = Instance.model_fields["listen"].get_default()


def ray_command(
    fleet: Fleet,
    instance: Instance,
    host: Host,
    shared: Shared,
    place: tuple[RayCluster, Need],
    ready_file: Path,
    reckoned: Mapping[str, float],
    folder: Path,
    group: str = "",
) -> Command:
    """`folder`: of this mesh's Ray files here. `group`: what it is scaled with.

    Raises:
        ValueError: as `instance_command`.
    """
    cluster, need = place
    ship: dict[str, str] = {}

    def shipped(path: str) -> str:
        if not path:
            return ""
        return ship.setdefault(str(Path(path).expanduser().absolute()), there(path, len(ship)))

    node = node_command(fleet, instance, need, _shared_there(shared, shipped), shipped, reckoned, group)
    spec = Spec(
        id=instance.id,
        model=instance.model,
        address=cluster.headAddress,
        need=need,
        argv=node.argv,
        env=dict(node.env)
        | _span(need, cluster, instance)
        | {k: host.environ[k] for k in INHERITED if k in host.environ},
        ready_file=str(ready_file.absolute()),
        lock=str((folder / "placing.lock").absolute()),
        files={str(path): text for path, text in node.files.items()},
        ship=ship,
        keep_threads=bool(instance.resources and instance.resources.cpus),
    )
    path = folder / f"{instance.id}.json"
    argv = (host.python, "-P", "-m", "deploy.launch.on_ray.child", str(path))
    return Command(argv, host.environ, {path: spec.text()})


def node_command(
    fleet: Fleet,
    instance: Instance,
    need: Need,
    shared: Shared,
    shipped: Callable[[str], str],
    reckoned: Mapping[str, float],
    group: str = "",
) -> Command:
    """The service's own command line, with placeholders for what its node knows. `shipped` names files there."""
    seen = tuple(range(need.gpus)) if need.gpus and not need.spans else ()
    engine_args = instance.engine_args
    if need.spans:
        engine_args = {EXECUTOR: "ray"} | engine_args
    listen = f"{ADDRESS}:0" if instance.listen == DEFAULT_LISTEN else instance.listen
    placed = instance.model_copy(
        update={
            "cards": () if fleet.engine_of(instance) in ("vllm", "openai-http") else seen,
            "tp": instance.tp or need.tp // (1 if need.spans else instance.pp) or None,
            "listen": listen,
            "api_key_file": shipped(instance.api_key_file),
            "engine_args": engine_args,
        }
    )
    template = fleet.model(instance.model).chat_template
    if template:
        models = [
            model.model_copy(update={"chat_template": shipped(template)}) if model.id == instance.model else model
            for model in fleet.models
        ]
        fleet = fleet.model_copy(update={"models": tuple(models)})
    host = Host(PYTHON, LLM_PYTHON, need.gpus, {})
    made = instance_command(fleet, placed, host, shared, Path(FOLDER) / "ready.json", reckoned)
    return replace(made, argv=(*made.argv, "--group", group)) if group else made


def _shared_there(shared: Shared, shipped: Callable[[str], str]) -> Shared:
    options = {
        name: shipped(value) if name in SHIPPED_OPTIONS else value for name, value in shared.registry_options.items()
    }
    inside = shared.instances_tls
    measured = shared.calibration if shared.calibration and Path(shared.calibration).exists() else ""
    return replace(
        shared,
        keys=shipped(shared.keys),
        operator_key_file=shipped(shared.operator_key_file),
        calibration=shipped(measured),
        instances_tls=inside and replace(inside, cert=shipped(inside.cert), key=shipped(inside.key)),
        registry_options=options,
    )


def _span(need: Need, cluster: RayCluster, instance: Instance) -> dict[str, str]:
    """Where vLLM finds the cluster and the cards that are reserved for it."""
    if not need.spans:
        return {}
    return {"RAY_ADDRESS": cluster.headAddress, GROUP: group_name(instance.model, instance.id)}
