"""`infermesh calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, Failure, connect
from infermesh.cli.printing import emit_json, remark, table

if TYPE_CHECKING:
    from deploy.fleet import Fleet
    from deploy.planner.calibration import Calibrations
    from infermesh.transport import Trust
    from infermesh.v1.mesh_pb2 import Instance
    from infermesh.v1.worker_pb2 import CalibrateResponse
    from registry.endpoint import Endpoint

DEFAULT_FILE = Path(".infermesh/calibration.yaml")  # as in deploy/planner/calibration.py, which is imported when called
UNITS = {
    "prefill_tps": "prompt tokens a second",
    "prefill_doubling_ctx": "tokens of context at which attention doubles a token's cost",
    "step_ms": "ms a decode step",
    "kv_us_per_ktoken": "µs a step for each 1,000 resident tokens",
    "fixed_ms": "ms that every request takes beside that",
    "tokens_per_s": "tokens a second",
}

Calibration = Annotated[Path, typer.Option("--calibration", help="File of measured speeds: added to, or replaced in.")]


def command(
    instance_id: Annotated[str, typer.Argument(help="Whom; `infermesh instances` lists the ids.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths and repetitions.")] = False,
    calibration: Calibration = DEFAULT_FILE,
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    instances_ca_file: connect.InstancesCaFile = None,
    instances_tls_name: connect.InstancesTlsName = "",
    timeout: connect.Timeout = 3600,
    json: connect.Json = False,
) -> None:
    """Measure how fast a running instance is, for the router, `up`, `plan` and `sim`.

    The instance asks itself through its own door: prompts of 1k, 8k, 32k tokens and the longest that it serves, and
    several answers at once. Nobody else may use it meanwhile: ban it for that time. From then on the mesh routes by
    what was measured. It needs the operator's key where keys are set.

    Examples:
        infermesh ban a800-1-a --for 10m --why calibrating && infermesh calibrate a800-1-a; infermesh unban a800-1-a
        infermesh calibrate embedding-1 --quick --json
    """
    from deploy.planner.calibration import key_of_endpoint

    tls = connect.trusted(instances_ca_file, instances_tls_name)
    read(calibration)  # a file that cannot be read is told before minutes are spent
    with connect.client(gateway, api_key_file, 10) as mesh:
        whom = connect.instance(mesh, instance_id)
    endpoint, last = _measure(whom, connect.api_key(api_key_file), tls, quick=quick, timeout=timeout)
    document = _document(endpoint, last)
    _write(calibration, key_of_endpoint(endpoint), document)
    if json:
        emit_json({**document, "file": str(calibration)})
        return
    _show(document)
    remark(f"written: {calibration}")


def read(path: Path) -> Calibrations:
    """The file's calibrations; none where it is not there."""
    from deploy.planner.calibration import Calibrations, parse_calibrations

    try:
        return parse_calibrations(path.read_text(encoding="utf-8"), str(path)) if path.exists() else Calibrations()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"--calibration {path}: {getattr(error, 'strerror', None) or error}", BAD_USAGE) from None


def file_of_fleet(fleet: Fleet, given: Path | None) -> Path:
    """Where a fleet's measured speeds are: as given, else as the fleet file says, else in the usual place."""
    return given or (Path(fleet.calibration) if fleet.calibration else DEFAULT_FILE)


def of_fleet(fleet: Fleet, given: Path | None) -> Calibrations:
    """A fleet's measured speeds; a file that was given must be there, one that the fleet file names comes in time."""
    if given is not None and not given.exists():
        raise Failure(f"--calibration {given}: is not there; `infermesh calibrate ID` writes it", BAD_USAGE)
    return read(file_of_fleet(fleet, given))


def _measure(
    whom: Instance, key: str, tls: Trust | None, *, quick: bool, timeout: float
) -> tuple[Endpoint, CalibrateResponse]:
    """The instance as it was before, and the last message of its calibration."""
    import grpc

    from infermesh.client.addresses import as_error
    from infermesh.transport import channel_options, open_channel
    from infermesh.v1.worker_pb2 import CalibrateRequest, DescribeRequest
    from infermesh.v1.worker_pb2_grpc import WorkerServiceStub
    from registry.endpoint import Endpoint, from_metadata

    last, address = None, whom.address
    with open_channel(address, channel_options(), tls) as line:
        stub: Any = WorkerServiceStub(line)
        try:
            told = stub.Describe(DescribeRequest(), timeout=10)
            for message in stub.Calibrate(
                CalibrateRequest(quick=quick), metadata=connect.operator_pass(key, address, timeout), timeout=timeout
            ):
                remark(f"{message.progress:4.0%}  {message.step}")
                last = message
        except grpc.RpcError as error:
            raise as_error(error, [address]) from None
    host, _, port = address.rpartition(":")
    endpoint = from_metadata(told.instance_id, whom.kind, host.strip("[]"), int(port), told.metadata)
    if last is None or not last.speed or not isinstance(endpoint, Endpoint):
        raise Failure(f"{address} ended the calibration without a result; its log tells more")
    return endpoint, last


def _document(endpoint: Endpoint, last: CalibrateResponse) -> dict[str, Any]:
    import json

    report = json.loads(last.report_json)
    return {
        "id": endpoint.id,
        "model": endpoint.model,
        "engine_version": endpoint.engine_version,
        "speed": {name: float(value) for name, value in sorted(last.speed.items())},
        "adopted": not report["not_adopted"],
        **report,
    }


def _write(path: Path, key: Any, document: dict[str, Any]) -> None:
    """Whole or not at all: a service that starts meanwhile reads one or the other."""
    import datetime
    import os

    from deploy.planner.calibration import Calibration, calibrations_text

    measured = {
        "instance": document["id"],
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "engine_version": document["engine_version"],
        "error": {name: round(value, 4) for name, value in document["error"].items()},
        "held_out": {one["what"]: round(one["error"], 4) for one in document["held_out"]},
    }
    found = read(path).with_one(Calibration(key, document["speed"], measured))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(calibrations_text(found), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise Failure(f"--calibration {path}: {error.strerror}; the instance has adopted the speed") from None


def _show(document: dict[str, Any]) -> None:
    rows = [(name, f"{value:.4g}", UNITS[name]) for name, value in document["speed"].items()]
    table(("", document["id"], ""), rows)
    for name, error in document["error"].items():
        print(f"{name}: half of the points within {error:.1%}, the worst {document['worst'][name]:.1%} off")
    for one in document["held_out"]:
        print(f"not fitted: {one['what']}: {one['predicted']:.4g} s predicted, {one['seen']:.4g} s seen", end="")
        print(f" ({one['error']:.1%} off)")
    if not document["adopted"]:
        remark(f"not adopted by {document['id']}: {document['not_adopted']}")
