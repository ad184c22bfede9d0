"""The two wheels, the constraints and the set-up's reading of pip's settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from deploy.setup.pip_settings import Settings, parse

ROOT = Path(__file__).resolve().parents[2]
CLIENT_PROJECT = ROOT / "packages" / "infermesh-client"
DATA = (".yaml", ".json", ".html", ".js", ".css", ".jinja", ".typed")


def run(*command: str | Path, cwd: Path = ROOT, timeout: float = 240) -> str:
    """Run a command and return what it printed; its whole output is the message when it fails."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "INFERMESH_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both wheels as an image or a release does; hatchling is in .venv, so no network is needed."""
    out = tmp_path_factory.mktemp("wheels")
    for project in (ROOT, CLIENT_PROJECT):
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, project)
    return {path.name.split("-")[0]: path for path in out.glob("*.whl")}


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata(wheel: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = Parser().parsestr(archive.read(name).decode())
    return {key: message.get_all(key, []) for key in set(message.keys())}


def checkout_files() -> set[str]:
    """Every file of the import packages that git does not ignore and that is there."""
    listing = run("git", "ls-files", "-co", "--exclude-standard", "--", "infermesh", "registry", "services", "deploy")
    return {name for name in listing.splitlines() if (ROOT / name).is_file() and not name.startswith("deploy/setup/")}


@pytest.mark.slow
def test_the_wheels_share_the_tree_without_overlap(wheels: dict[str, Path]) -> None:
    client, services = contents(wheels["infermesh_client"]), contents(wheels["infermesh"])
    assert not client & services
    assert client | services == checkout_files()
    assert all(name.startswith("infermesh/") and not name.startswith("infermesh/cli/") for name in client)
    assert not [name for name in client | services if "tests/" in name or "__pycache__" in name]
    assert {"infermesh/__init__.py", "infermesh/errors.py", "infermesh/py.typed"} <= client
    assert "infermesh/v1/language_model_pb2_grpc.py" in client
    assert {"registry/endpoint.py", "infermesh/cli/__init__.py"} <= services
    assert any(name.endswith(DATA) for name in services)


@pytest.mark.slow
def test_the_client_wheel_needs_grpcio_and_protobuf_only(wheels: dict[str, Path]) -> None:
    client, services = metadata(wheels["infermesh_client"]), metadata(wheels["infermesh"])
    assert sorted(re.split(r"[<>=]", need)[0] for need in client["Requires-Dist"]) == ["grpcio", "protobuf"]
    assert client["Version"] == services["Version"]
    assert f"infermesh-client=={client['Version'][0]}" in services["Requires-Dist"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheels_work_outside_the_checkout(wheels: dict[str, Path], tmp_path: Path) -> None:
    uv = (sys.executable, ROOT / "deploy" / "setup" / "install.py", "uv")
    venv = tmp_path / "venv"
    run(*uv, "venv", "--quiet", "--python", sys.executable, venv)
    limits = ("--constraints", ROOT / "constraints" / "main.txt")
    install = (*uv, "pip", "install", "--quiet", "--python", venv, *limits, *wheels.values())
    try:  # what `make setup` fetched is in uv's cache
        run(*install, "--offline")
    except AssertionError:
        run(*install, timeout=500)
    # A folder of the user's own with our name must not be picked up.
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").write_text("raise RuntimeError('the wrong services')\n")
    assert "up" in run(venv / "bin" / "infermesh", "--help", cwd=tmp_path)
    fleet, rendered = ROOT / "deploy" / "examples" / "containers.yaml", tmp_path / "compose"
    run(venv / "bin" / "infermesh", "render", "compose", fleet, "-o", rendered, cwd=tmp_path)
    assert (rendered / "grafana" / "dashboard.json").exists()
    show = "import infermesh.v1, infermesh.cli, registry, services; print(infermesh.__file__, *services.__path__)"
    places = run(venv / "bin" / "python", "-P", "-c", show, cwd=tmp_path).split()
    assert all(place.startswith(str(venv)) for place in places)


PIN = re.compile(
    r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*( ; python_version == '3\.\d+'( or python_version == '3\.\d+')*)?"
)


@pytest.mark.parametrize("name", ["main.txt", "llm-cpu.txt", "llm-gpu.txt", "protos.txt", "pins.txt", "tools.txt"])
def test_constraints_are_plain_pins(name: str) -> None:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    odd = [line for line in lines if not line.startswith("#") and not PIN.fullmatch(line)]
    assert not odd, "no addresses, hashes or local versions in constraints"


def test_one_grpc_family_everywhere() -> None:
    for name in ("main.txt", "llm-cpu.txt", "llm-gpu.txt"):
        pins = (ROOT / "constraints" / name).read_text().splitlines()
        family = {line.split("==")[1] for line in pins if re.match(r"grpcio(-[a-z-]+)?==", line)}
        assert len(family) == 1, (name, family)


def test_no_registry_host_and_no_path_of_one_machine() -> None:
    # Written so that they do not match themselves.
    hosts = ("pyp[i][.]org", "pythonhos[t]ed", "npm[j]s[.]org", "deb[.]debia[n][.]org", "download[.]pytorc[h][.]org")
    pattern = "|".join((*hosts, "/wor[k]/", "/opt/whee[l]s"))
    found = subprocess.run(["git", "grep", "-nIE", pattern], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1, found.stdout + found.stderr


LISTING = """\
global.index-url='https://mirror.example/simple'
global.extra-index-url='https://a.example/simple https://b.example/simple'
global.find-links='/srv/one'
install.find-links='/srv/two file:///srv/three'
global.timeout='5'
:env:.timeout='60'
:env:.cert='/etc/ssl/ca.pem'
:env:.proxy='http://proxy.example:3128'
:env:.no-index='true'
wheel.find-links='/srv/never'
not a setting
"""


def test_pips_settings_reach_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("UV_", "SSL_", "HTTP"))]:
        monkeypatch.delenv(name)
    environ = parse(LISTING).environ()
    assert environ["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert environ["UV_INDEX"] == "https://a.example/simple https://b.example/simple"
    assert environ["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert environ["UV_FIND_LINKS"] == "/srv/two,file:///srv/three"
    assert environ["UV_HTTP_TIMEOUT"] == "60"
    assert environ["SSL_CERT_FILE"] == "/etc/ssl/ca.pem"
    assert environ["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert environ["UV_NO_INDEX"] == "1"


def test_what_is_set_for_uv_itself_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine.example/simple")
    assert parse(LISTING).environ()["UV_DEFAULT_INDEX"] == "https://mine.example/simple"


def test_without_settings_nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("UV_")]:
        monkeypatch.delenv(name)
    assert not [name for name in parse("").environ() if name.startswith("UV_") and name != "UV_CACHE_DIR"]


def test_a_local_torch_wheel_is_seen_only_for_this_python(tmp_path: Path) -> None:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    settings = Settings(find_links=(tmp_path.as_uri(), "https://mirror.example/wheels"))
    (tmp_path / "torch-2.13.0+cpu-cp39-cp39-linux_x86_64.whl").touch()
    assert not settings.has_local_wheel("torch")
    (tmp_path / f"torch-2.13.0+cpu-{tag}-{tag}-linux_x86_64.whl").touch()
    assert settings.has_local_wheel("torch")
    assert settings.for_gpu().find_links == ("https://mirror.example/wheels",)  # the CPU build would win otherwise
