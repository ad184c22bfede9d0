"""`infermesh bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, FAILED, Failure, connect
from infermesh.cli.printing import emit_json, remark, table

if TYPE_CHECKING:
    from services.gateway.simulator.trace import Trace

DEFAULT_SPEC = "requests=100,rps=2,prompt=500,output=50"


def command(
    target: Annotated[
        str, typer.Option(metavar="ADDR", help="[grpcs://]HOST:PORT (gRPC) or http[s]://HOST:PORT (REST).")
    ],
    model: connect.Model = "",
    trace: Annotated[
        Path | None, typer.Option(help="JSONL in Mooncake's form: timestamp, input_length, output_length, hash_ids.")
    ] = None,
    generate: Annotated[
        str,
        typer.Option(metavar="SPEC", help="Made-up traffic: rps=4,requests=200,prompt=3000,prefixes=8,shape=bursts"),
    ] = "",
    rate: Annotated[str, typer.Option(metavar="X[,…]", help="Speed of the arrivals, 1 = as in the trace.")] = "",
    concurrency: Annotated[
        str,
        typer.Option(metavar="N[,…]", help="Closed loop instead: so many callers, each with one request at a time."),
    ] = "",
    limit: Annotated[int, typer.Option(help="Only the first so many requests; 0: all.", min=0)] = 0,
    max_in_flight: Annotated[
        int, typer.Option(help="Requests on the way at once; more are not sent, and counted.", min=1, max=65536)
    ] = 1024,
    objective_ttft_s: Annotated[float, typer.Option(help="Goodput: seconds to the first token, at most.")] = 2.0,
    objective_tpot_ms: Annotated[float, typer.Option(help="Goodput: ms a further token, at most.")] = 80.0,
    seed: Annotated[int, typer.Option(help="Of the made-up traffic and the texts.", min=0)] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw TTFT and goodput against load.")] = None,
    api_key_file: connect.ApiKeyFile = None,
    timeout: connect.Timeout = 300,
    json: connect.Json = False,
) -> int:
    """Load a gateway: TTFT, time per output token, throughput and goodput, over gRPC or REST.

    Requests go out when the trace says, whether earlier ones have been answered or not, and every time counts from
    then: a slow server cannot hide behind a client that waits for it. `bench` says when the client itself was late.

    Examples:
        infermesh bench --target 127.0.0.1:50050 --generate rps=4,requests=200,prompt=800,output=60
        infermesh bench --target http://127.0.0.1:8000 --model chat --trace mine.jsonl --rate 0.5,1,2 --plot load.svg
        infermesh bench --target 127.0.0.1:50050 --concurrency 1,4,16 --limit 100 --json
    """
    import asyncio

    from infermesh.cli.bench_drive import Target, drive
    from infermesh.cli.bench_report import summary

    if trace and generate:
        raise Failure("--trace and --generate exclude each other", BAD_USAGE)
    if rate and concurrency:
        raise Failure("--rate is for an open loop, --concurrency for a closed one", BAD_USAGE)
    if plot and plot.suffix != ".svg":
        raise Failure(f"--plot {plot}: only .svg is written", BAD_USAGE)
    rest = target.startswith(("http://", "https://"))
    if not rest:
        with connect.client(target, api_key_file, 10) as mesh:
            model = connect.only_model(mesh, "llm", model)
    elif not model:
        raise Failure("over REST say which model with --model", BAD_USAGE)
    requests = _requests(trace, generate, seed, limit)
    told = Target(target.rstrip("/"), rest, model, connect.api_key(api_key_file), timeout, requests.block_tokens, seed)
    closed = bool(concurrency)
    runs: list[dict[str, Any]] = []
    for load in _numbers("--concurrency", concurrency) if closed else _numbers("--rate", rate or "1"):
        at = requests if closed else requests.at_rate(load)
        remark(f"{len(at.requests)} requests, {f'{load:g} callers' if closed else f'rate {load:g}'}")
        run = asyncio.run(drive(at.requests, told, callers=round(load) if closed else 0, bound=max_in_flight))
        said = summary(run, objective_ttft_s, objective_tpot_ms)
        for line in said["remarks"]:
            remark(line)
        runs.append({"target": target, "model": model, "trace": at.name, "seed": seed, "load": load, **said})
    if plot:
        _plot(plot, runs, "callers" if closed else "rate")
    if json:
        emit_json(runs[0] if len(runs) == 1 else {"runs": runs})
    else:
        _show(runs, closed=closed)
    return FAILED if not any(run["completed"] for run in runs) else 0


def _requests(path: Path | None, spec: str, seed: int, limit: int) -> Trace:
    from services.gateway.simulator.arrivals import generate, parse_spec
    from services.gateway.simulator.trace import parse_trace

    if path is None:
        found = generate(parse_spec(spec or DEFAULT_SPEC), _random(seed))
    else:
        try:
            with path.open(encoding="utf-8") as lines:
                found = parse_trace(lines, str(path))
        except OSError as error:
            raise Failure(f"--trace {path}: {error.strerror}", BAD_USAGE) from None
    if strange := {request.kind for request in found.requests} - {"llm"}:
        raise Failure(f"requests of kind {', '.join(strange)}: bench sends those of language models only", BAD_USAGE)
    return found.first(limit) if limit else found


def _random(seed: int) -> Any:
    from random import Random

    return Random(seed)


def _numbers(option: str, text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise Failure(f"{option} {text!r}: numbers with commas between them", BAD_USAGE) from None
    low = 1.0 if option == "--concurrency" else 1e-6
    if not all(low <= number <= 1e6 for number in found):
        raise Failure(f"{option} {text!r}: each must be within {low:g} .. 1e6", BAD_USAGE)
    return found


def _show(runs: list[dict[str, Any]], *, closed: bool) -> None:
    names = ("completed", "failed", "qps", "ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "tpot_p99_ms", "goodput_share")
    columns = ("CALLERS" if closed else "RATE", *(name.upper() for name in names))

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return str(sum(value.values()))
        return "-" if value is None else f"{value:.4g}"

    table(columns, [(f"{run['load']:g}", *(cell(run[name]) for name in names)) for run in runs])
    for run in runs:
        for reason, count in run["failed"].items():
            print(f"{run['load']:g}: {count} × {reason}")


def _plot(path: Path, runs: list[dict[str, Any]], axis: str) -> None:
    from services.gateway.simulator.picture import picture

    points = {str(runs[0]["target"]): [(run["load"], run) for run in sorted(runs, key=lambda run: run["load"])]}
    try:
        path.write_text(picture(f"{Path(runs[0]['trace']).name} on {runs[0]['model']}", axis, points), encoding="utf-8")
    except OSError as error:
        raise Failure(f"--plot {path}: {error.strerror}") from None
