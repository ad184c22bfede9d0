"""The documents say what the code does: errors, options, metrics, links, and one README in two languages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infermesh.cli.serve_rerank import command as serve_rerank
from infermesh.cli.verbs import VERBS, command_of, load
from infermesh.errors import TABLE, MeshError
from services.gateway.front.rest_errors import error_headers
from services.gateway.loop import HoldMeter
from services.gateway.observe import Observe

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = [*READMES, ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def test_the_page_of_errors_is_the_table_of_errors() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d+) \| (\w+) \| (yes|no) \| (.+) \|$", _text("errors.md"), re.M)
    expected = []
    for reason, row in TABLE.items():
        again = all(name != b"x-should-retry" for name, _ in error_headers(MeshError(reason, "x")))
        expected.append((reason.value, row.grpc.name, str(row.http), row.kind, "yes" if again else "no"))
    assert [row[:5] for row in rows] == expected
    assert all(advice.strip() for *_, advice in rows)


def test_every_verb_and_every_option_is_in_the_page_of_configuration() -> None:
    text = _text("configuration.md")
    words = set(re.findall(r"--[a-z][a-z-]*", text))
    parameters = [option for verb in VERBS for option in load(verb).params]
    parameters += command_of(serve_rerank, "rerank").params
    options = {max(option.opts, key=len) for option in parameters if option.param_type_name == "option"}
    opposites = {word for option in parameters for word in option.secondary_opts}  # --no-preempt
    assert options - words == set()
    assert words - options - opposites == {"--help"}, "the page names an option that is not there"
    assert all(f"`{verb}" in text for verb in VERBS)


def test_every_metric_is_in_the_page_of_operations() -> None:
    observe = Observe()
    observe.metrics.watch_loop(HoldMeter())
    observe.metrics.watch_groups(list)
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in observe.metrics.registry.collect()
    }
    assert set(re.findall(r"infermesh_gateway_\w+", _text("operations.md"))) == families


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (_commands(page.read_text()) for page in READMES)
    assert english == chinese and len(english) > 25


def _commands(text: str) -> list[str]:
    """The lines of all fenced blocks without the remarks beside them, which are translated."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    lines = [re.split(r"(?<=\S) {2,}(?=[^\s-])", line)[0] for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.strip()]


def _text(name: str) -> str:
    return (DOCS / name).read_text()
