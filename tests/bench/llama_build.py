"""llama.cpp's server and RPC worker, built from the source that llama-cpp-python carries: a package index is enough."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
import venv
from pathlib import Path

SOURCE = "llama-cpp-python==0.3.36"
TARGETS = ("ggml-rpc-server", "llama-server")
OPTIONS = (
    *(
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_RPC=ON",
        "-DGGML_NATIVE=OFF",
        "-DGGML_OPENMP=OFF",
        "-DBUILD_SHARED_LIBS=OFF",
    ),
    *("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"),
    *("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
)


def built(folder: Path) -> Path:
    """The folder with the programs; the first time it takes cmake, a C++ compiler and some minutes."""
    programs = folder / "bin"
    if all((programs / name).exists() for name in TARGETS):
        return programs
    if missing := [name for name in ("cmake", "c++", "make") if shutil.which(name) is None]:
        raise SystemExit(f"building llama.cpp needs {', '.join(missing)}; or give a build of it with --llama FOLDER")
    with tempfile.TemporaryDirectory() as place:
        venv.create(f"{place}/venv", with_pip=True)  # our own environments are uv's, which downloads no source
        fetch = [f"{place}/venv/bin/python", "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        _run([*fetch, "-d", place, SOURCE])
        (archive,) = Path(place).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(place, filter="data")
        (tree,) = Path(place).glob("*/vendor/llama.cpp")
        _run(["cmake", "-S", str(tree), "-B", str(folder), *OPTIONS])
        _run(["cmake", "--build", str(folder), "-j", "2", "--target", *TARGETS])
    return programs


def _run(words: list[str]) -> None:
    print("+", " ".join(words), flush=True)
    subprocess.run(words, check=True)
