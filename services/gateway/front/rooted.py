"""One server span above the requests that serve one of a caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from services.gateway.upstream.calls import Call, Watcher
from services.gateway.upstream.failures import word


@contextmanager
def rooted(watcher: Watcher, call: Call) -> Iterator[Call]:
    """The call as its parts are to see it: below a span of its own, where spans are kept."""
    root = watcher.root(call)
    if root is None:
        yield replace(call, entrance=None)
        return
    try:
        yield replace(call, trace=root.headers, entrance=None)
    except BaseException as error:
        root.ended(word(error))
        raise
    root.ended(word(None))
