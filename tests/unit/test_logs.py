"""What stands on standard error is JSON, whoever said it."""

from __future__ import annotations

import json
import subprocess
import sys

SAY = """
import logging, structlog
from services.chassis.logs import configure_logs
configure_logs("info", instance="llm-a")
structlog.get_logger("x").info("serving", port=1)
logging.getLogger("infermesh.registry.consul").warning("Consul is out of reach (%s)", "refused\\n")
logging.getLogger("library").info("not of interest")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("library").exception("it broke")
"""


def test_every_line_is_json_with_level_time_and_who_speaks() -> None:
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, timeout=60, check=True)
    own, registry, broken = map(json.loads, done.stderr.splitlines())
    assert (own["event"], own["level"], own["port"]) == ("serving", "info", 1)
    assert (registry["level"], registry["logger"]) == ("warning", "infermesh.registry.consul")
    assert registry["event"] == "Consul is out of reach (refused\n)"
    assert broken["level"] == "error" and "ZeroDivisionError" in broken["exception"]
    assert {line["instance"] for line in (own, registry, broken)} == {"llm-a"}
    assert all(line["timestamp"].endswith("Z") for line in (own, registry, broken))
