"""`infermesh sim`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, Failure
from infermesh.cli.connect import Json, Measured
from infermesh.cli.printing import emit_json, remark
from infermesh.cli.sim_autoscale import autoscaled, print_autoscaled
from infermesh.cli.sim_report import compare, print_run, recorded_elsewhere

if TYPE_CHECKING:
    from services.gateway.simulator.fleet import Site
    from services.gateway.simulator.sweep import Sweep
    from services.gateway.simulator.trace import Trace


def command(
    fleet: Annotated[str, typer.Option(metavar="FLEET.yaml[,…]", help="Fleet files to compare.")],
    trace: Annotated[
        Path | None, typer.Option(help="JSONL in Mooncake's form: timestamp, input_length, output_length, hash_ids.")
    ] = None,
    generate: Annotated[
        str, typer.Option(metavar="SPEC", help="Made-up traffic instead: rps=4,requests=2000,prompt=3000,shape=square")
    ] = "",
    policy: Annotated[str, typer.Option(metavar="NAME[,…]", help="Policies to compare, or all.")] = "infermesh",
    rate: Annotated[str, typer.Option(metavar="X[,…]", help="Speed of the arrivals, 1 = as in the trace.")] = "",
    load: Annotated[
        str, typer.Option(metavar="X[,…]", help="Rates as shares of what the best peer sustains (mean TTFT 10 s).")
    ] = "",
    gateways: Annotated[int, typer.Option(help="Gateways that share nothing.", min=1, max=256)] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same result.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="Only the first so many requests; 0: all.", min=0)] = 0,
    max_wait_s: Annotated[
        float,
        typer.Option(help="Longest wait in infermesh's own queue; 0: as long as it takes, like the peers.", min=0),
    ] = 0,
    autoscale: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Instances come and go between `min` and `max`; a new one starts in so many seconds.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at the same time, a process each.", min=1, max=64)] = 1,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw TTFT and goodput against load.")] = None,
    calibration: Measured = None,
    json: Json = False,
) -> None:
    """Try routing policies and fleets on a trace, in virtual time: the very router, simulated engines.

    With a trace of `infermesh record`, the first fleet is the one it was recorded on: its simulation is shown against
    what was measured, and the others as changes to it.

    Examples:
        infermesh sim --trace trace.jsonl --fleet fleet.yaml --policy infermesh,cache_aware --rate 0.5
        infermesh sim --trace trace.jsonl --fleet fleet.yaml --policy all --load 0.5,0.9,1.1 --jobs 4 --plot load.svg
        infermesh sim --trace mine.jsonl --fleet today.yaml,tomorrow.yaml
        infermesh sim --generate rps=4,prompt=3000,prefixes=8 --fleet today.yaml,tomorrow.yaml --json
        infermesh sim --generate rps=2,requests=7000,shape=day,period=3600 --fleet fleet.yaml --autoscale 60
    """
    from services.gateway.simulator.sweep import Sweep

    if (trace is None) == (not generate):
        raise Failure("one of --trace and --generate is needed", BAD_USAGE)
    if rate and load:
        raise Failure("--rate and --load exclude each other", BAD_USAGE)
    if plot and plot.suffix != ".svg":
        raise Failure(f"--plot {plot}: only .svg is written", BAD_USAGE)
    names = _policies(policy)
    numbers = _numbers("--load" if load else "--rate", load or rate or "1")
    requests = _trace(trace, generate, seed, limit)
    measured = _measured(requests)
    if autoscale is not None and (names != ["infermesh"] or len(numbers) > 1 or load or plot or jobs > 1):
        raise Failure(
            "--autoscale goes with one --rate and the policy infermesh; not with --load, --plot, --jobs", BAD_USAGE
        )
    runs: list[dict[str, Any]] = []
    for file in filter(None, fleet.split(",")):
        site = _site(Path(file), calibration)
        _tell_floor(requests, site)
        _tell_unserved(file, requests, site)
        sweep = Sweep(requests, site, _conditions(gateways), _random, seed, _bounds(max_wait_s))
        if autoscale is not None:
            run: dict[str, Any] = {"trace": requests.name, "fleet": file, "seed": seed, "rate": numbers[0]}
            run["start_s"] = autoscale
            runs.append({**run, "autoscale": autoscaled(sweep, numbers[0], autoscale)})
            continue
        capacity = _capacity(sweep) if load else None
        rates = [number * capacity if capacity else number for number in numbers]
        found = _all(sweep, names, rates, jobs)
        for number, at in zip(numbers, rates, strict=True):
            run = {"trace": requests.name, "fleet": file, "seed": seed, "rate": at}
            if gateways > 1:
                run["gateways"] = gateways
            if capacity:
                run |= {"load": number, "capacity": capacity}
            runs.append({**run, "policies": {name: found[name, at] for name in names}})
    if autoscale is not None:
        return _tell_autoscaled(runs, json)
    if measured is not None and (others := recorded_elsewhere(runs[0], measured)):
        remark(f"the trace was recorded on {others}, which {runs[0]['fleet']} does not have: put today's fleet first")
        measured = None
    compare(runs, measured)
    if plot:
        _write(plot, runs, names, "load (1 = what the best peer sustains)" if load else "rate")
    if json:
        emit_json(runs[0] if len(runs) == 1 else {"trace": requests.name, "seed": seed, "runs": runs})
    else:
        for run in runs:
            print_run(run)


def _tell_autoscaled(runs: list[dict[str, Any]], json: bool) -> None:
    if json:
        emit_json(runs[0] if len(runs) == 1 else {"runs": runs})
        return
    for run in runs:
        print(
            f"{run['trace']} on {run['fleet']}, rate {run['rate']:.4g}; a new instance starts in {run['start_s']:g} s"
        )
        print_autoscaled(run["autoscale"])


def _policies(text: str) -> list[str]:
    from services.gateway.simulator.policies import NAMES

    names = list(NAMES) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise Failure(f"--policy: {', '.join(unknown) or 'none'} is not one of all, {', '.join(NAMES)}", BAD_USAGE)
    return list(dict.fromkeys(names))


def _numbers(option: str, text: str) -> list[float]:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise Failure(f"{option} {text!r}: numbers with commas between them", BAD_USAGE) from None
    if not all(1e-6 <= number <= 1e6 for number in numbers):
        raise Failure(f"{option} {text!r}: each must be within 1e-6 .. 1e6", BAD_USAGE)
    return list(dict.fromkeys(numbers))


def _trace(path: Path | None, spec: str, seed: int, limit: int) -> Trace:
    from services.gateway.simulator.arrivals import generate, parse_spec
    from services.gateway.simulator.trace import parse_trace

    if path is None:
        found = generate(parse_spec(spec), _random(seed))
    else:
        with _open(path, "--trace") as lines:
            found = parse_trace(lines, str(path))
    return found.first(limit) if limit else found


def _measured(trace: Trace) -> dict[str, Any] | None:
    from services.gateway.simulator.fidelity import measured

    return measured(trace)


def _site(path: Path, calibration: Path | None) -> Site:
    from deploy.fleet import parse_fleet
    from deploy.model_files import read_models
    from deploy.planner.catalogue import shipped
    from deploy.planner.estimate import estimates
    from deploy.planner.measured import with_measured
    from infermesh.cli.calibrate import of_fleet
    from services.gateway.simulator.fleet import site_of

    with _open(path, "--fleet") as file:
        fleet = parse_fleet(file.read(), str(path))
    reckoned = estimates(fleet, read_models(fleet, path.parent).shapes, shipped())
    site = site_of(fleet, with_measured(fleet, reckoned, of_fleet(fleet, calibration)))
    if not site.endpoints:
        raise Failure(f"--fleet {path}: it has no instances", BAD_USAGE)
    for line in site.remarks:
        remark(f"{path}: {line}")
    return site


def _tell_floor(trace: Trace, site: Site) -> None:
    from services.gateway.simulator.floor import mean_ttft_floor_s

    floor = mean_ttft_floor_s(trace, site)
    if floor is not None:
        remark(f"no policy can have a mean TTFT below {floor:.3g} s here: that is with no queue and an endless cache")


def _tell_unserved(file: str, trace: Trace, site: Site) -> None:
    served = {*site.aliases, *(name for one in site.endpoints for name in (one.model, *one.aliases))}
    unserved = Counter(request.model for request in trace.requests if request.model and request.model not in served)
    for model, count in sorted(unserved.items()):
        remark(f"{file}: nobody serves {model!r}; its {count} requests count as shed")


def _open(path: Path, option: str) -> Any:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise Failure(f"{option} {path}: {error.strerror}", BAD_USAGE) from None


def _random(seed: int) -> Any:
    from random import Random

    return Random(seed)


def _conditions(gateways: int) -> Any:
    from services.gateway.simulator.world import Conditions

    return Conditions(gateways=gateways)


def _bounds(max_wait_s: float) -> Any:
    from services.gateway.routing.admission import Bounds
    from services.gateway.simulator.ours import PATIENT

    return Bounds(max_wait_s=max_wait_s) if max_wait_s else PATIENT


def _capacity(sweep: Sweep) -> float:
    from services.gateway.simulator.capacity import capacity
    from services.gateway.simulator.policies import STRONGEST_FIRST

    found = capacity(_told(sweep), STRONGEST_FIRST)
    remark(f"capacity: {found:.4g} x the trace's own rate")
    return found


def _told(sweep: Sweep) -> Any:
    def mean_ttft(name: str, rate: float) -> float:
        mean = sweep.mean_ttft(name, rate)
        remark(f"rate {rate:.4g} {name}: mean TTFT {mean:.3g} s")
        return mean

    return mean_ttft


def _all(sweep: Sweep, names: Sequence[str], rates: Sequence[float], jobs: int) -> dict[tuple[str, float], Any]:
    from time import monotonic

    tasks = [(name, rate) for rate in rates for name in names]
    found: dict[tuple[str, float], Any] = {}
    begun = monotonic()

    def note(task: tuple[str, float], said: dict[str, Any]) -> None:
        found[task] = said
        mean = said["ttft_mean_s"]
        shown = "nobody was served" if mean is None else f"mean TTFT {mean:.3g} s"
        remark(f"[{len(found)}/{len(tasks)}, {monotonic() - begun:.0f} s] rate {task[1]:.4g} {task[0]}: {shown}")

    if jobs == 1:
        for task in tasks:
            note(task, sweep.run(*task))
        return found
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(sweep.run, *task): task for task in tasks}
        for future in as_completed(futures):
            note(futures[future], future.result())
    return found


def _write(path: Path, runs: Sequence[dict[str, Any]], names: Sequence[str], axis: str) -> None:
    from services.gateway.simulator.picture import picture

    points: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    fleets = list(dict.fromkeys(run["fleet"] for run in runs))
    for run in sorted(runs, key=lambda run: run["rate"]):
        for name in names:
            line = name if len(fleets) == 1 else f"{name} on {Path(run['fleet']).stem}"
            points.setdefault(line, []).append((run.get("load", run["rate"]), run["policies"][name]))
    title = f"{Path(runs[0]['trace']).name} on {', '.join(Path(fleet).stem for fleet in fleets)}"
    try:
        path.write_text(picture(title, axis, points), encoding="utf-8")
    except OSError as error:
        raise Failure(f"--plot {path}: {error.strerror}") from None
