"""What a process of the fleet is in a container: its command line, image, cards and files. The same for Compose and
Kubernetes. Pure.

In a container a process listens on all addresses at a fixed port, sees its cards as 0 … n-1, writes to /state, /models
and /tmp only, and finds keys in /run/secrets. So `listen`, `advertise` and `python` of the file are for `up` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploy.fleet import Fault, Fleet, Instance
from deploy.launch.cards import gpus_of
from deploy.launch.commands import Host, Shared, gateway_command, instance_command, start_faults
from deploy.planner.catalogue import Catalogue
from deploy.render import tls

UID = 10001  # the user of our images
GRPC, HTTP, SERVICE = 50050, 8000, 50051  # ports inside the containers
SECRETS = "/run/secrets"
MODELS = "/models"  # hub downloads and local weights
FILES = Path("/etc/infermesh")  # what the command line refers to and the fleet file holds
STOP_MARGIN_S = 15  # from the end of the drain to the kill
START_S = 3600  # what loading a large model may take
LOOPBACK = re.compile(r"https?://(localhost|127\.[\d.]+|\[::1\])([:/]|$)")
LOADING = ("vllm", "sentence-transformers")  # engines that read a model's files themselves
RESERVED = ("consul", "gateway", "otel-collector", "prometheus", "grafana")


@dataclass(frozen=True, slots=True)
class Site:
    """Where the fleet is rendered for. `reckoned`: instance id -> the planner's speed, in the names of `speed:`."""

    version: str  # of the images
    registry: str  # as the processes dial it
    catalogue: Catalogue
    reckoned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    grace_s: float = 30.0  # to finish what is running; the container's own grace is longer


@dataclass(frozen=True, slots=True)
class Container:
    """`arguments` come after `infermesh`, the images' entry point. `files`: path inside -> text."""

    name: str
    kind: str
    image: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[str, str]
    gpus: int = 0
    cards: tuple[int, ...] = ()  # of the host; empty = any
    instance: Instance | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """Files by their path below the output folder, and what the operator should know."""

    files: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def slug(id: str) -> str:
    """An id as a DNS label."""
    return re.sub(r"[^a-z0-9]+", "-", id.lower()).strip("-")[:50].strip("-")


def gateway_container(fleet: Fleet, site: Site, advertise: str = "") -> Container:
    certificate = tls.door(fleet)
    made = gateway_command(
        fleet,
        _host(0),
        _shared(fleet, site),
        grpc=f"0.0.0.0:{GRPC}",
        http=f"0.0.0.0:{HTTP}",
        ready_file=FILES,
        tls=(certificate.cert, certificate.key) if certificate else None,
    )
    told = ("--advertise", advertise) if advertise else ()
    arguments = (*_after_infermesh(made.argv), *told)
    return Container("gateway", "gateway", f"infermesh-gateway:{site.version}", arguments, {}, {})


def instance_container(fleet: Fleet, instance: Instance, site: Site, *, id: str = "", advertise: str) -> Container:
    """`id`: what it registers as, where that is not its id of the file (a pod's name). `advertise`: HOST:PORT."""
    gpus = gpus_of(fleet, instance, site.catalogue)
    seen = tuple(range(gpus)) if fleet.engine_of(instance) != "openai-http" else ()
    inside = instance.model_copy(
        update={
            "cards": seen,
            "listen": f"0.0.0.0:{SERVICE}",
            "advertise": advertise,
            "python": "",
            "api_key_file": secret(instance.api_key_file),
        }
    )
    made = instance_command(
        fleet, inside, _host(gpus), _shared(fleet, site), FILES / "instance.json", site.reckoned.get(instance.id, {})
    )
    arguments = list(_after_infermesh(made.argv))
    if id:  # the first option is the instance's id, as the file has it
        arguments[arguments.index("--instance-id") + 1] = id
    return Container(
        name=slug(instance.id),
        kind=fleet.model(instance.model).kind,
        image=instance.image or _image(fleet, instance, site, gpus),
        arguments=tuple(arguments),
        environment=made.env,
        files={str(path): text for path, text in made.files.items()},
        gpus=gpus,
        cards=instance.cards,
        instance=instance,
    )


def secret(path: str) -> str:
    """Where a container finds a secret that the fleet file names by its path on the host."""
    return f"{SECRETS}/{Path(path).name}" if path else ""


def secrets_of(fleet: Fleet, instance: Instance | None = None) -> list[str]:
    """File names of the secrets that a process reads."""
    names = [] if fleet.gateway.insecure else [Path(path).name for path in _keys(fleet)]
    return [*names, Path(instance.api_key_file).name] if instance and instance.api_key_file else names


def container_faults(fleet: Fleet, site: Site, *, pvc: bool) -> Iterator[Fault]:
    """What keeps a fleet out of containers. `pvc`: weights can only come from a hub or a volume below /models."""
    yield from start_faults(fleet)
    names: dict[str, int] = {name: -1 for name in RESERVED}
    for index, instance in enumerate(fleet.instances):
        at, name = f"instances[{index}]", slug(instance.id)
        if name in names:
            taken = f"instances[{names[name]}]" if names[name] >= 0 else "a service of ours"
            yield Fault(f"{at}.id", f"{name!r} in a container's name, which {taken} has; give another id")
        names.setdefault(name, index)
        url = instance.url or fleet.model(instance.model).source
        if fleet.engine_of(instance) == "openai-http" and LOOPBACK.match(url):
            yield Fault(f"{at}.url", f"{url} would be the container itself; name the server's host")
        gpus, told = gpus_of(fleet, instance, site.catalogue), instance.resources
        if told and told.gpus is not None and instance.cards and told.gpus != len(instance.cards):
            yield Fault(f"{at}.resources.gpus", f"{told.gpus}, but `cards` names {len(instance.cards)}")
        elif (
            gpus and fleet.engine_of(instance) == "vllm" and gpus != (instance.tp or gpus // instance.pp) * instance.pp
        ):
            yield Fault(f"{at}.resources.gpus", f"{gpus} GPUs for tp {instance.tp} × pp {instance.pp}")
    yield from _secret_faults(fleet)
    for index, model in enumerate(fleet.models):
        users = [item for item in fleet.instances if item.model == model.id and fleet.engine_of(item) in LOADING]
        for key in ("source", "chat_template"):
            path = getattr(model, key)
            local = key == "chat_template" or path.startswith((".", "~", "/")) or path.endswith(".gguf")
            if not path or not users or not local or "://" in path:
                continue
            if not path.startswith("/"):
                yield Fault(
                    f"models[{index}].{key}", f"{path!r} is seen from this folder; a container needs /an/absolute/path"
                )
            elif pvc and not path.startswith(f"{MODELS}/"):
                yield Fault(
                    f"models[{index}].{key}", f"{path} is not in a pod: volumes are mounted at {MODELS}, use {MODELS}/…"
                )


def _secret_faults(fleet: Fleet) -> Iterator[Fault]:
    """All secrets of a container are in one folder, by their file names."""
    told = {} if fleet.gateway.insecure else {Path(path).name: path for path in _keys(fleet)}
    for index, instance in enumerate(fleet.instances):
        path = instance.api_key_file
        if path and told.setdefault(Path(path).name, path) != path:
            other = told[Path(path).name]
            yield Fault(f"instances[{index}].api_key_file", f"{path} and {other} have one file name; give them two")


def container_remarks(fleet: Fleet) -> Iterator[str]:
    """What of the file is for `up` and has no part here."""
    for index, instance in enumerate(fleet.instances):
        for key in ("listen", "advertise", "python"):
            if getattr(instance, key) != Instance.model_fields[key].get_default():
                yield f"instances[{index}].{key}: is for `up`; a container has its own"
    if not fleet.gateway.insecure and not fleet.gateway.keys:
        yield (
            "gateway.keys: none is given, and a container listens beyond loopback: keys.yaml and operator.key are "
            "expected as secrets (gateway.insecure: true lets everybody in)"
        )


def _keys(fleet: Fleet) -> tuple[str, str]:
    return fleet.gateway.keys or "keys.yaml", fleet.gateway.operator_key_file or "operator.key"


def _shared(fleet: Fleet, site: Site) -> Shared:
    gateway = fleet.gateway
    shared = Shared(site.registry, insecure=gateway.insecure, grace_s=site.grace_s)
    shared = replace(shared, otlp=gateway.otlp, otlp_ratio=gateway.otlp_ratio, instances_tls=tls.inside(fleet))
    if gateway.insecure:
        return shared
    keys, operator = _keys(fleet)
    return replace(shared, keys=secret(keys), operator_key_file=secret(operator))


def _image(fleet: Fleet, instance: Instance, site: Site, gpus: int) -> str:
    """Adopted servers and the scripted engine need no torch: the gateway's image has them. vLLM for CPUs is another
    program than vLLM for GPUs."""
    engine = fleet.engine_of(instance)
    kinds = {"vllm": "llm", "sentence-transformers": "encoder"}
    cpu = "-cpu" if engine == "vllm" and not gpus else ""
    return f"infermesh-{kinds.get(engine, 'gateway')}:{site.version}{cpu}"


def _host(gpus: int) -> Host:
    return Host(python="infermesh", llm="infermesh", gpus=gpus, environ={})


def _after_infermesh(argv: tuple[str, ...]) -> tuple[str, ...]:
    """A child's command line without its interpreter and without --ready-file, which is how `up` hears of it."""
    start = argv.index("infermesh.cli") + 1
    assert argv[-2] == "--ready-file"
    return argv[start:-2]
