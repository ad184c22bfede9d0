"""Stopping vLLM so that no process of it is left."""

from __future__ import annotations

from typing import Any

import psutil
import structlog

STOP_S = 3.0  # for the engine to go by itself; it has nothing to save, and its exit alone can take longer than a drain
log = structlog.get_logger("vllm")


def stop(engine: Any) -> None:
    """Blocks, so it runs in a thread. The processes of the engine's processes are waited for, too."""
    mine = [child for child in psutil.Process().children(recursive=True) if not _is_bookkeeper(child)]
    engine.shutdown(timeout=STOP_S)
    _, left = psutil.wait_procs(mine, timeout=STOP_S)
    for process in left:
        log.warning("killing a process of the engine that does not stop", pid=process.pid)
        process.kill()
    psutil.wait_procs(left, timeout=STOP_S)
    # vLLM stops itself once more when it is collected; at the interpreter's end, that fails with a trace.
    engine.shutdown = lambda: None


def _is_bookkeeper(process: psutil.Process) -> bool:
    """Python's resource tracker, which belongs to this process and ends with it."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
