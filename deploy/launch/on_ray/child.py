"""An instance on Ray, as a child of `up`: finds it a place, has it started there, passes on its log and its address,
and ends as it ends. One job of the cluster each, so that Ray itself takes back what a killed one held.

    python -P -m deploy.launch.on_ray.child SPEC.json
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from deploy.launch.on_ray import cluster
from deploy.launch.on_ray.choose import RayNode, choose, missing
from deploy.launch.on_ray.service import Launch, Seen, code_of
from deploy.launch.on_ray.spec import Spec, read_spec, shipped

BAD_CONFIG, LOST = 2, 75  # EX_TEMPFAIL: its node is gone; `up` starts it again, elsewhere
LOOK_S = 0.2
RETRY_S = 2.0  # between two looks for room
REPEAT_S = 30.0  # of a line that has not changed
ANSWER_S = 10.0  # of the actor, before a word about it
SILENCE_S = 30.0  # that a node may keep before its instance is started elsewhere; Ray mostly knows earlier
START_S = 120.0  # of a Ray worker on a busy node


class Stop:
    """SIGTERM and SIGINT. Ray installs handlers of its own: listen again after connecting."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def main(argv: list[str]) -> int:
    stop = Stop()
    stop.listen()
    spec = read_spec(Path(argv[0]))
    try:
        ray = cluster.connect(spec.address)
        launch = Launch(spec.id, spec.argv, spec.env, shipped(spec), not spec.need.spans, spec.keep_threads)
    except cluster.ClusterFault as fault:
        say(f"error: {fault}")
        return LOST
    except OSError as error:
        say(f"error: {error}")
        return BAD_CONFIG
    stop.listen()
    last = Path(spec.ready_file).with_suffix(".last")  # the node that was lost with it, if any
    group, hosts = place(ray, spec, stop, last.read_text() if last.exists() else "")
    if not hosts:
        return 0
    last.write_text(hosts[0].id)
    actor = cluster.settle(ray, spec.need, group, hosts[0])
    try:
        ray.get(actor.start.remote(launch), timeout=START_S)
        code = follow(ray, actor, spec, stop)
        last.unlink(missing_ok=True)
        return code
    except ray.exceptions.RayTaskError as error:  # what the service's own code raised there
        say(f"error: {error.cause}")
        return BAD_CONFIG if isinstance(error.cause, FileNotFoundError) else 1
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        say(f"error: {cluster.why(error)}")
        return LOST
    finally:
        with contextlib.suppress(Exception):
            ray.kill(actor)
            ray.util.remove_placement_group(group)
        ray.shutdown()


def place(ray: Any, spec: Spec, stop: Stop, avoid: str) -> tuple[Any, tuple[RayNode, ...]]:
    """A placement group and its hosts; waits for room and says what it waits for. None: told to stop. `avoid`: the node
    that was lost with it: the cluster may not know yet.
    """
    said, when = "", 0.0
    name = cluster.group_name(spec.model, spec.id)
    while not stop.asked:
        # One at a time: who places next sees where the last one went.
        with _turn(Path(spec.lock)):
            now = cluster.view(ray)
            hosts = choose(spec.need, spec.model, now.nodes, avoid)
            group = cluster.reserve(spec.need, name, hosts) if hosts else None
        if group is not None:
            say(f"placed on {', '.join(host.address for host in hosts)}")
            Path(spec.ready_file).unlink(missing_ok=True)
            return group, hosts
        avoid = hosts[0].id if hosts else avoid
        text = f"pending: {missing(spec.need, now.nodes)}"
        if text != said or time.monotonic() - when >= REPEAT_S:
            said, when = text, time.monotonic()
            say(text)
            tell(spec, {"pending": text.removeprefix("pending: ")})
        until = time.monotonic() + RETRY_S
        while not stop.asked and time.monotonic() < until:
            time.sleep(LOOK_S / 2)
    return None, ()


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def follow(ray: Any, actor: Any, spec: Spec, stop: Stop) -> int:
    """Until it ends. What is left of it, and its folder, are gone then."""
    offset, told, terminated, asked_at, said = 0, False, False, time.monotonic(), 1.0
    while True:
        if stop.asked and not terminated:
            terminated = True
            actor.terminate.remote()
        try:
            seen: Seen = ray.get(actor.look.remote(offset), timeout=ANSWER_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            silent = time.monotonic() - asked_at
            if silent > SILENCE_S:
                raise
            if silent > said:
                say(f"its node has not answered for {silent:.0f} s")
                said = silent + ANSWER_S
            time.sleep(LOOK_S)
            continue
        asked_at, said = time.monotonic(), 1.0
        offset += len(seen.log)
        sys.stdout.buffer.write(seen.log)
        sys.stdout.flush()
        if seen.facts and not told:
            told = True
            tell(spec, dict(seen.facts))
        if seen.code is not None and not seen.log:
            if left := ray.get(actor.end.remote(), timeout=START_S):
                say(f"processes on its node that would not die: {left}")
            return code_of(seen.code)
        time.sleep(0 if seen.log else LOOK_S)


def tell(spec: Spec, facts: dict[str, Any]) -> None:
    """The ready file, as a service on this host would write it; its process is this one."""
    path = Path(spec.ready_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**facts, "pid": os.getpid()}))
    partial.replace(path)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    # Ray writes a dead node's internals there, in a thread of its own; what matters of it is said by us.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = main(sys.argv[1:])
    except Exception:
        say(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    os._exit(code)  # Ray's threads are not waited for
