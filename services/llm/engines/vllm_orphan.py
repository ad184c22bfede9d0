"""vLLM's processes end with the service that started them, also when that was killed.

vLLM imports this in every worker process (its `worker_extension_cls`), which on one card is the engine's own process;
an engine whose worker is gone gives up by itself. Without it a killed service leaves an engine that holds the card's
memory until somebody finds it.
"""

from __future__ import annotations

import os
import select
import signal
import threading

LEADER = "INFERMESH_LEADER_PID"


class EndWithLeader:
    """The extension itself adds nothing to a worker; importing its module is what counts."""


def _watch(leader: int) -> None:
    try:
        gone = os.pidfd_open(leader)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    poll = select.poll()
    poll.register(gone, select.POLLIN)
    while not poll.poll():
        pass
    # Not an exit with clean-up: that waits for peers which are dying too.
    os.kill(os.getpid(), signal.SIGKILL)


if hasattr(os, "pidfd_open") and os.environ.get(LEADER, "").isdigit():
    threading.Thread(target=_watch, args=(int(os.environ[LEADER]),), daemon=True, name="end-with-leader").start()
