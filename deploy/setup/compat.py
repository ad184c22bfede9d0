"""Prove what the client wheel promises: it works on the oldest and the newest protobuf and grpcio of its ranges.

Builds the wheel, installs it alone into .venv-compat, and sends one message through it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from install import ROOT, read_settings, say, uv_binary, uv_command

PAIRS = (("6.33.5", "1.81.1"), ("7.36.2", "1.81.1"), ("6.33.5", "1.85.0"), ("7.36.2", "1.85.0"))
PROOF = ROOT / "deploy" / "setup" / "compat_proof.py"


def main() -> int:
    """Try every pair; stop at the first that fails."""
    settings = read_settings(uv_binary().with_name("python"))
    python = ROOT / ".venv-compat" / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        if uv_command(settings, "build", "--quiet", "--wheel", "packages/infermesh-client", "-o", folder):
            return 1
        wheel = next(Path(folder).glob("*.whl"))
        if uv_command(settings, "venv", "--quiet", "--clear", "--python", sys.executable, ".venv-compat"):
            return 1
        for protobuf, grpcio in PAIRS:
            exact = (f"protobuf=={protobuf}", f"grpcio=={grpcio}", str(wheel))
            if uv_command(settings, "pip", "install", "--quiet", "--exact", "--python", ".venv-compat", *exact):
                return 1
            say(f"client with protobuf {protobuf} and grpcio {grpcio}")
            if subprocess.run([str(python), "-I", str(PROOF)], cwd=folder, check=False).returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
