"""JSON logs on stderr. Prompts, answers and keys never go there."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure_logs(level: str = "info", **bound: object) -> None:
    """Sets up logging, once, in a composition root. `bound` (instance id, kind) stands in every line."""
    threshold = getattr(logging, level.upper())
    common: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    json = structlog.processors.JSONRenderer(default=str)
    structlog.configure(
        processors=[*common, json],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**bound)
    theirs = logging.StreamHandler(sys.stderr)  # of libraries, and of the registry, which knows no structlog
    theirs.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, json],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *common],
        )
    )
    logging.basicConfig(level=max(threshold, logging.WARNING), handlers=[theirs])
