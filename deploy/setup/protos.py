"""Generate infermesh/v1 from protos/infermesh/v1, or check that it is fresh. Runs in .venv-protos.

.venv-protos/bin/python deploy/setup/protos.py            write the stubs
.venv-protos/bin/python deploy/setup/protos.py --check    compare, change nothing, exit 1 when they differ
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "protos" / "infermesh" / "v1"
TARGET = ROOT / "infermesh" / "v1"
INIT = '"""Generated stubs of the package infermesh.v1. Never edited: `make protos` writes them."""\n'
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi", "__init__.py")


def generate(out: Path) -> dict[str, bytes]:
    """Run protoc into `out` and return file name -> content."""
    protos = sorted(SOURCES.glob("*.proto"))
    if not protos:
        sys.exit(f"no .proto files in {SOURCES}")
    bin_dir = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'protos'}"]
    command += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    done = subprocess.run(
        [*command, *(str(path.relative_to(ROOT / "protos")) for path in protos)],
        env=env,
        cwd=ROOT / "protos",
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    noise = ("Writing mypy to ",)
    sys.stderr.write("".join(line for line in done.stderr.splitlines(True) if not line.startswith(noise)))
    if done.returncode:
        sys.exit(done.returncode)
    package = out / "infermesh" / "v1"
    (package / "__init__.py").write_text(INIT)
    return {path.name: path.read_bytes() for path in sorted(package.iterdir()) if path.is_file()}


def committed() -> dict[str, bytes]:
    """Return what stands in infermesh/v1 now."""
    return {path.name: path.read_bytes() for pattern in GENERATED for path in sorted(TARGET.glob(pattern))}


def main(argv: list[str]) -> int:
    """Write or check the stubs."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
    old = committed()
    changed = sorted(name for name in fresh.keys() | old.keys() if fresh.get(name) != old.get(name))
    if "--check" in argv:
        if changed:
            print("stale stubs in infermesh/v1 (run `make protos` and commit): " + ", ".join(changed))
            return 1
        print(f"infermesh/v1 is fresh ({len(fresh)} files)")
        return 0
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in changed:
        if name in fresh:
            (TARGET / name).write_bytes(fresh[name])
        else:
            (TARGET / name).unlink()
    print(f"infermesh/v1: {len(fresh)} files, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
