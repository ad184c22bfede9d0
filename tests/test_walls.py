"""The walls of the house: which room may import which. Reads every file's imports, runs nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ("infermesh", "registry", "services", "deploy")

# What everybody may import: values and arithmetic, no process of its own.
BOTTOM = ("infermesh.errors", "infermesh.v1", "registry.endpoint", "deploy.fleet", "deploy.planner")
SERVICE = (*BOTTOM, "infermesh.transport", "registry", "services.chassis")
GATEWAY = "services.gateway"
GRANTING = "services.chassis.granting"  # the rules that gateways and instances share, values and arithmetic
FAIRNESS = "services.chassis.fairness"
PREEMPTION = "services.chassis.preemption"
PROMPT_LINE = "services.chassis.prompt_line"
SHARED = (GRANTING, FAIRNESS, PREEMPTION, PROMPT_LINE)

# Room -> what it may import of the house beside itself. The longest prefix of a module is its room.
ROOMS: dict[str, tuple[str, ...]] = {
    "infermesh": (),  # the client wheel stands alone
    "infermesh.cli": HOUSE,
    "registry": (*BOTTOM, "infermesh.transport"),
    "registry.endpoint": BOTTOM,
    "services": (),
    "services.chassis": SERVICE,
    FAIRNESS: (),
    PREEMPTION: (),
    PROMPT_LINE: (PREEMPTION,),
    GRANTING: (*BOTTOM, FAIRNESS, PROMPT_LINE),
    "services.llm": SERVICE,
    "services.embedding": SERVICE,
    "services.rerank": SERVICE,
    GATEWAY: SERVICE,  # app.py, config.py and observe.py see all of the gateway
    f"{GATEWAY}.loop": SERVICE,
    f"{GATEWAY}.entrance": SERVICE,
    f"{GATEWAY}.report": (*SERVICE, f"{GATEWAY}.routing"),
    f"{GATEWAY}.metrics": (*SERVICE, *(f"{GATEWAY}.{room}" for room in ("loop", "report", "routing"))),
    f"{GATEWAY}.tracing": (*SERVICE, *(f"{GATEWAY}.{room}" for room in ("entrance", "noted", "report", "routing"))),
    f"{GATEWAY}.noted": (*SERVICE, *(f"{GATEWAY}.{room}" for room in ("entrance", "report", "routing", "tracing"))),
    f"{GATEWAY}.observe": (*SERVICE, *(f"{GATEWAY}.{room}" for room in ("entrance", "metrics", "report", "tracing"))),
    f"{GATEWAY}.config": (*SERVICE, f"{GATEWAY}.routing"),
    f"{GATEWAY}.front": (
        *SERVICE,
        *(f"{GATEWAY}.{room}" for room in ("config", "entrance", "past", "report", "routing", "upstream")),
    ),
    f"{GATEWAY}.past": (*SERVICE, *(f"{GATEWAY}.{room}" for room in ("report", "routing"))),
    f"{GATEWAY}.upstream": (
        *SERVICE,
        *(f"{GATEWAY}.{room}" for room in ("config", "entrance", "observe", "report", "routing")),
    ),
    f"{GATEWAY}.routing": (*BOTTOM, *SHARED),
    f"{GATEWAY}.simulator": (*BOTTOM, *SHARED, f"{GATEWAY}.routing"),
    "deploy": (*BOTTOM, "registry"),
    "deploy.fleet": BOTTOM,
    "deploy.planner": BOTTOM,
    "deploy.setup": BOTTOM,
}
# Plain functions and values: no I/O, no clock, no chance, no telemetry, nothing to await.
PURE = (*SHARED, f"{GATEWAY}.routing", f"{GATEWAY}.simulator", "deploy.planner")
IMPURE = (
    *("asyncio", "time", "random", "logging", "os", "secrets", "socket", "subprocess", "threading", "uuid"),
    *("aiohttp", "grpc", "opentelemetry", "prometheus_client", "structlog"),
)
# What embedding and rerank share, torch included: theirs alone, so that gateway and LLM service start without it.
PRIVATE = {"services.chassis.encoding": ("services.chassis.encoding", "services.embedding", "services.rerank")}
ENCODERS = ("services/chassis/encoding/*", "services/embedding/*", "services/rerank/*")
# Heavy or optional library -> the only files that may import it.
ADAPTERS: dict[str, tuple[str, ...]] = {
    "consul": ("registry/consul*.py",),
    "vllm": ("services/llm/engines/vllm*",),
    "torch": ("services/llm/engines/vllm*", "services/llm/reference.py", *ENCODERS),
    "sentence_transformers": ENCODERS,
    "openvino": ENCODERS,
    "transformers": ("services/llm/engines/*", "services/llm/reference.py", *ENCODERS),
    "ray": ("deploy/launch/on_ray/*", "services/llm/engines/vllm_ray.py"),
}
# The client wheel installs with these two and nothing else.
CLIENT_NEEDS = ("grpc", "google")
CLIENT_LACKS = (
    *("aiohttp", "consul", "httptools", "httpx", "numpy", "opentelemetry", "orjson", "prometheus_client", "psutil"),
    *("pydantic", "requests", "rich", "starlette", "structlog", "tenacity", "typer", "uvicorn", "yaml"),
)
VAGUE = ("utils", "util", "helpers", "helper", "common", "base", "manager", "managers", "misc")
LONGEST = 400


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: str  # from the root, with slashes
    tree: ast.Module
    lines: int

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def imports(self, modules: frozenset[str]) -> Iterator[tuple[int, str]]:
        """Yield (line, module) for each import, also those inside functions and through import_module("...")."""
        package = self.module if self.path.endswith("/__init__.py") else self.module.rpartition(".")[0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = node.module or ""
                if node.level:
                    parts = package.split(".")
                    start = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [start])])
                for alias in node.names:
                    deeper = f"{start}.{alias.name}"
                    yield node.lineno, deeper if deeper in modules else start
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                    yield node.lineno, node.args[0].value


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str:
    return max((room for room in ROOMS if within(module, room)), key=len, default="")


def read(root: Path) -> list[Source]:
    """Parse every hand-written file of the house and the tests; generated stubs are taken as given."""
    sources = []
    for top in (*HOUSE, "tests"):
        for path in sorted((root / top).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name.startswith("infermesh/v1/"):
                continue
            text = path.read_text()
            sources.append(Source(name, ast.parse(text, name), len(text.splitlines())))
    return sources


def arrow_fault(source: Source, target: str) -> str:
    """Say why this file may not import that module of the house, or nothing."""
    room = room_of(source.module)
    for private, users in PRIVATE.items():
        if within(target, private) and not any(within(source.module, user) for user in users):
            return f"{private} belongs to {', '.join(users)}"
    if target.split(".")[0] == "tests":
        return "the house does not know its tests"
    if room == "infermesh" and within(target, "infermesh") and not within(target, "infermesh.cli"):
        return ""
    if target == "infermesh" or any(within(target, other) for other in (*ROOMS[room], room)):  # the first: __version__
        return ""
    return f"{room} may import only {', '.join(ROOMS[room]) or 'itself'}"


def import_fault(source: Source, target: str) -> str:
    """Say why this file may not import that module, or nothing."""
    top = target.split(".")[0]
    if source.path.startswith("tests/"):
        return ""
    if top in (*HOUSE, "tests") and (fault := arrow_fault(source, target)):
        return fault
    if any(within(source.module, room) for room in PURE) and (top in IMPURE or target.endswith("_pb2_grpc")):
        return "a pure room: no I/O, clock, chance or telemetry"
    if top in ADAPTERS and not any(fnmatch(source.path, pattern) for pattern in ADAPTERS[top]):
        return f"{top} is imported only in {', '.join(ADAPTERS[top])}"
    if room_of(source.module) == "infermesh" and top in CLIENT_LACKS + tuple(ADAPTERS):
        return f"the client wheel needs only {' and '.join(CLIENT_NEEDS)}"
    return ""


def faults(root: Path) -> list[str]:
    """Return every fault of the tree, one line each."""
    sources = read(root)
    files = [path.relative_to(root) for top in HOUSE for path in (root / top).rglob("*.py")]
    packages = {parent for path in files for parent in path.parents}
    modules = frozenset(path.with_suffix("").as_posix().replace("/", ".") for path in (*files, *packages) if path.name)
    found = []
    for source in sources:
        for line, target in source.imports(modules):
            if fault := import_fault(source, target):
                found.append(f"{source.path}:{line}: imports {target}: {fault}")
        if any(within(source.module, room) for room in PURE):
            for node in ast.walk(source.tree):
                if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
                    found.append(f"{source.path}:{node.lineno}: a pure room awaits nothing")
        if Path(source.path).stem in VAGUE:
            found.append(f"{source.path}: the name says nothing about what is inside")
        if source.lines > LONGEST:
            found.append(f"{source.path}: {source.lines} lines; split it at {LONGEST}")
    return list(dict.fromkeys(found))


def test_the_walls_stand() -> None:
    found = faults(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_every_service_is_in_a_room() -> None:
    services = {path.name for path in (ROOT / "services").iterdir() if (path / "__init__.py").exists()}
    assert not {name for name in services if f"services.{name}" not in ROOMS}


def plant(root: Path, path: str, text: str) -> None:
    """Write one file of a made-up house."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


FORBIDDEN = {
    "services/llm/a.py": "from services.embedding import encoder",
    "services/rerank/a.py": "def f():\n    import services.gateway.app",
    "registry/presence.py": "from services.chassis import config",
    "deploy/launch/a.py": "import importlib\nimportlib.import_module('services.gateway.app')",
    "deploy/fleet.py": "import registry.consul",
    "infermesh/client/a.py": "from registry.endpoint import Endpoint",
    "infermesh/client/b.py": "import orjson",
    "services/gateway/upstream/a.py": "from ..front import rpc",
    "services/gateway/upstream/b.py": "from services.gateway import app",
    "services/gateway/routing/a.py": "from services.gateway.upstream import forward",
    "services/gateway/routing/b.py": "import time",
    "services/gateway/routing/c.py": "from infermesh.v1 import mesh_pb2_grpc",
    "services/gateway/routing/d.py": "async def f():\n    pass",
    "services/gateway/routing/e.py": "from services.chassis import config",
    "services/gateway/simulator/a.py": "from random import Random",
    "services/gateway/simulator/b.py": "async def f(x):\n    await x",
    "deploy/planner/a.py": "import opentelemetry.trace",
    "services/gateway/front/a.py": "import torch",
    "services/llm/engines/scripted.py": "import vllm",
    "services/llm/app.py": "from sentence_transformers import SentenceTransformer",
    "registry/embedded.py": "import consul.aio",
    "services/chassis/utils.py": "",
    "services/chassis/long.py": "x = 1\n" * (LONGEST + 1),
    "tests/unit/helpers.py": "",
    "services/gateway/app.py": "from services.chassis.encoding import model",
    "services/chassis/tested.py": "from tests import fakes",
}
ALLOWED = {
    "infermesh/cli/up.py": "import services.gateway.app\nfrom deploy.launch import host",
    "infermesh/client/a.py": "import grpc\nfrom infermesh import errors\nfrom infermesh.v1 import mesh_pb2_grpc",
    "services/llm/engines/vllm.py": "import vllm, torch\nfrom services.llm import engine",
    "services/embedding/encoder.py": "from sentence_transformers import SentenceTransformer",
    "services/rerank/app.py": "from services.chassis.encoding import model",
    "services/gateway/app.py": "from services.gateway.front import rpc\nfrom services.gateway.upstream import forward",
    "services/gateway/front/rpc.py": "from services.gateway.upstream import forward\nimport grpc",
    "services/gateway/upstream/forward.py": "from services.gateway.routing import router\nimport asyncio",
    "services/gateway/routing/router.py": "from registry.endpoint import Endpoint\nfrom . import cost\nimport math",
    "services/gateway/routing/cost.py": "",
    "services/gateway/simulator/run.py": "from services.gateway.routing import router\nfrom deploy import fleet",
    "deploy/fleet.py": "from deploy.planner import arithmetic",
    "registry/consul.py": "import consul.aio\nfrom registry.endpoint import Endpoint",
    "tests/unit/test_a.py": "import torch, time\nfrom services.gateway.routing import router",
}


def test_a_wall_that_is_broken_is_found(tmp_path: Path) -> None:
    for module in (
        "services/embedding/encoder",
        "services/gateway/app",
        "services/gateway/front/rpc",
        "registry/consul",
    ):
        plant(tmp_path, f"{module}.py", "")
    for module in ("services/gateway/upstream/forward", "services/chassis/config", "infermesh/v1/mesh_pb2_grpc"):
        plant(tmp_path, f"{module}.py", "")
    for path, text in FORBIDDEN.items():
        plant(tmp_path, path, text)
    found = faults(tmp_path)
    silent = [path for path in FORBIDDEN if not any(fault.startswith(path + ":") for fault in found)]
    assert not silent, f"the walls let through: {silent}"


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    for path, text in ALLOWED.items():
        plant(tmp_path, path, text)
    assert faults(tmp_path) == []
