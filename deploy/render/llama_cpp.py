"""What the planner starts of llama.cpp, as systemd units: a worker or the server a host. Pure.

Beside the containers and not in them, whatever the target: an instance of ours only adopts the server, and its workers
are for the very cards and addresses of the plan.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from deploy.fleet import Fault, Fleet
from deploy.planner.placed import Placed
from deploy.render.container import Rendered, slug

FOLDER = "llama.cpp"
SERVER = "llama-server"
UNIT = """# Made by `infermesh render`. On {node}, with llama.cpp's programs in /usr/local/bin (newer builds call the
# worker ggml-rpc-server): systemctl enable --now /THE/FOLDER/{name}
[Unit]
Description={what}
Wants=network-online.target
After=network-online.target

[Service]
{environment}ExecStart={line}
DynamicUser=yes
Restart=always
RestartSec=2

[Install]
WantedBy=multi-user.target
"""


def llama_units(fleet: Fleet, placed: Sequence[Placed]) -> Rendered:
    """`llama.cpp/NODE/ID-server.service` and `…-worker.service` of every instance of which the plan has commands, and a
    remark where a server is expected that no plan of this run has."""
    files: dict[str, str] = {}
    remarks: list[str] = []
    for one in placed:
        workers: list[str] = []
        servers: list[str] = []
        for node, command in one.commands.items():
            words = shlex.split(command)
            program = words[sum(_sets(word) for word in words)]
            part = "server" if program == SERVER else "worker"
            path = f"{FOLDER}/{slug(node)}/{slug(one.instance.id)}-{part}.service"
            what = f"llama.cpp's {part} of {one.instance.model} (instance {one.instance.id} of the mesh)"
            files[path] = _unit(node, path.rpartition("/")[2], what, words)
            (servers if part == "server" else workers).append(f"{path} on {node}")
        if servers:
            order = ", then ".join(filter(None, (", ".join(workers), *servers)))
            remarks.append(f"{one.instance.id}: adopts a llama.cpp that is started by systemd units, {order}")
    planned = {one.instance.id for one in placed if one.commands}
    return Rendered(files, (*remarks, *_expected(fleet, planned)))


def llama_faults(fleet: Fleet, placed: Iterable[Placed]) -> Iterator[Fault]:
    """A unit has no working folder."""
    for model in {one.instance.model: None for one in placed if one.commands}:
        source = fleet.model(model).source
        if not source.startswith("/"):
            at = f"models[{[item.id for item in fleet.models].index(model)}].source"
            why = "is seen from this folder; llama.cpp's unit needs /an/absolute/path, the same on every host"
            yield Fault(at, f"{source!r} {why}")


def _expected(fleet: Fleet, planned: set[str]) -> Iterator[str]:
    for instance in fleet.instances:
        source = fleet.model(instance.model).source
        if fleet.engine_of(instance) != "openai-http" or instance.id in planned or not source.endswith(".gguf"):
            continue
        yield (
            f"{instance.id}: expects a llama.cpp at {instance.url}, of which nothing is rendered; where a file has the "
            "model and no instance of it, its workers and its server are planned and rendered"
        )


def _unit(node: str, name: str, what: str, words: Sequence[str]) -> str:
    settings = [word for word in words if _sets(word)]
    environment = "".join(f"Environment={_word(setting)}\n" for setting in settings)
    program, *rest = words[len(settings) :]
    line = " ".join([program, *(_word(word) for word in rest)])
    return UNIT.format(node=node, name=name, what=what.replace("%", "%%"), environment=environment, line=line)


def _sets(word: str) -> bool:
    return re.match(r"[A-Z][A-Z0-9_]*=", word) is not None


def _word(text: str) -> str:
    """As systemd reads it: specifiers and variables are none, and a space is part of it."""
    plain = text.replace("%", "%%").replace("$", "$$")
    if not re.search(r"[\s\"'\\;]", plain):
        return plain
    escaped = plain.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
