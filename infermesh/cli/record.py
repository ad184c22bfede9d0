"""`infermesh record`."""

from __future__ import annotations

import json as jsonlib
import signal
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from infermesh.cli import BAD_USAGE, Failure, connect
from infermesh.cli.printing import emit_json, remark

if TYPE_CHECKING:
    from infermesh.v1.mesh_pb2 import RecordTrafficResponse, TracedRequest

TELL_S = 5.0  # between two words on how far it is


def command(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.jsonl", help="A file that is not there yet.")],
    duration: Annotated[float, typer.Option(help="Seconds to record; 0: until Ctrl-C.", min=0)] = 0,
    requests: Annotated[int, typer.Option(help="Requests to record; 0: any number.", min=0)] = 0,
    gateway: connect.Gateway = connect.DEFAULT_GATEWAY,
    api_key_file: connect.ApiKeyFile = None,
    json: connect.Json = False,
) -> None:
    """Record a gateway's traffic for `infermesh sim`: lengths, times, salted hashes of prompt blocks, tenant class, and
    what was measured. No prompts, no answers, no names of tenants. Needs the operator's key. Ctrl-C ends it well.

    Requests that arrived before it began, or have not ended when it ends, are not in it.

    Examples:
        infermesh record -o mine.jsonl --duration 600
        infermesh sim --trace mine.jsonl --fleet today.yaml,tomorrow.yaml
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    try:
        file = output.open("x", encoding="utf-8")
    except FileExistsError:
        raise Failure(f"--output {output}: is there already; name another file", BAD_USAGE) from None
    except OSError as error:
        raise Failure(f"--output {output}: {error.strerror}", BAD_USAGE) from None
    taken = Taken()
    try:
        _record(file, output, taken, (gateway, api_key_file), duration, requests)
    except OSError as error:  # also of closing the file, where a full disk tells a second time
        raise Failure(f"--output {output}: {error.strerror or error}") from None
    if json:
        emit_json({"file": str(output), "requests": taken.count, "dropped": taken.dropped})
    elif not taken.count:
        remark(f"no request ended meanwhile; {output} is empty")


def _record(
    file: IO[str], output: Path, taken: Taken, at: tuple[str, Path | None], duration: float, requests: int
) -> None:
    """Until it is told to end, or has what was asked for; a file without a request goes with its error."""
    with file:
        try:
            with connect.client(*at, 10) as mesh, closing(mesh.record()) as messages:
                _follow(messages, file, taken, duration, requests)
        except KeyboardInterrupt:
            pass
        except BaseException:
            if not taken.count:
                output.unlink()
            raise
        finally:
            if taken.count:
                remark(f"{taken}; in {output}")


@dataclass(slots=True)
class Taken:
    """How far it is. `dropped`: requests that the gateway could not hand over fast enough."""

    count: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        return f"{self.count} requests" + (f", {self.dropped} were dropped: they came too fast" if self.dropped else "")


def _follow(
    messages: Iterable[RecordTrafficResponse], file: IO[str], taken: Taken, duration: float, requests: int
) -> None:
    begun = told = time.monotonic()
    for number, message in enumerate(messages):
        if not number:
            remark("recording; Ctrl-C ends it" if not duration else f"recording for {duration:g} s")
        lines = [line_of(one) for one in message.requests]
        if requests:
            lines = lines[: requests - taken.count]
        file.write("".join(lines))  # whole lines, and all of them at once
        file.flush()
        taken.count += len(lines)
        taken.dropped = message.dropped
        now = time.monotonic()
        if (duration and now - begun >= duration) or (requests and taken.count >= requests):
            return
        if now - told >= TELL_S:
            told = now
            remark(f"{now - begun:.0f} s: {taken}")


def line_of(one: TracedRequest) -> str:
    """A line of a trace, in the form that `infermesh sim` reads; what was not told is left out."""
    fields: dict[str, Any] = {
        "timestamp": one.timestamp_ms,
        "input_length": max(1, one.input_length),
        "output_length": max(1, one.output_length) if one.kind == "llm" else one.output_length,
        "hash_ids": list(one.hash_ids),
        "kind": one.kind,
        "model": one.model,
        "tenant": one.tenant,
        "class": one.tenant_class,
        "outcome": one.outcome,
    }
    if one.hash_ids:
        fields["block_tokens"] = round(max(1.0, one.block_tokens), 2)
    if one.HasField("degrade"):
        fields["degrade"] = one.degrade
    optional = ("priority", "max_tokens", "session_id", "document_id", "instance", "served_model", "cached_tokens")
    fields |= {name: getattr(one, name) for name in optional if getattr(one, name)}
    fields |= {name: round(getattr(one, name), 3) for name in ("ttft_ms", "e2e_ms") if getattr(one, name)}
    if one.attempts > 1:
        fields["attempts"] = one.attempts
    return jsonlib.dumps(fields, separators=(",", ":")) + "\n"
