"""The guard of a mesh: a small process that outlives `up` and ends its children if `up` itself was killed.

It reads `+PID` and `-PID` lines on standard input. When the pipe closes, whoever is still on the list gets SIGTERM,
GRACE seconds, and then its session is killed. Run by path, with the standard library only:

    python -I -S deploy/launch/guard.py GRACE [FOLDER]

With FOLDER it steps out of its parent's family first, because a dying Ray worker kills its children, and removes that
folder at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import sessions  # type: ignore[import-not-found]


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the pipe, and not before
    grace_s, folder = float(sys.argv[1]), next(iter(sys.argv[2:]), "")
    if folder and os.fork():
        os._exit(0)
    children: dict[int, str] = {}
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            children[pid] = sessions.born(pid)
        else:
            children.pop(pid, None)
    # A number whose leader is another process by now is not ours any more.
    ours = [pid for pid, birth in children.items() if sessions.born(pid) in ("", birth)]
    for pid in ours:
        if sessions.born(pid):
            sessions.terminate(pid)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(sessions.born(pid) for pid in ours):
        time.sleep(0.05)
    for pid in ours:
        sessions.sweep(pid)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
