"""One replica: a process that holds one copy of a model and computes one batch after the other.

Started as `python -P -m services.chassis.encoding.replica FD` with one end of a socket pair; when the other end closes,
for whatever reason, it ends. It ignores SIGTERM and SIGINT, since its service decides when it stops.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import warnings

from services.chassis.encoding.encoder import EncoderFactory, LoadPlan, StartAgain
from services.chassis.encoding.rows import HEAD_BYTES, Head, Kind, pack_result, pack_text, unpack_batch, unpack_head

START_AGAIN = 75  # exit code: launch me once more, nothing is wrong


def serve(link: socket.socket, build: EncoderFactory) -> int:
    """Loads the model that the SETUP frame names and answers batches until the service leaves."""
    plan = LoadPlan.model_validate_json(_receive(link)[1])
    try:
        encoder = build(plan, lambda line: link.sendall(pack_text(Kind.PROGRESS, line)))
    except StartAgain:
        return START_AGAIN
    except Exception as error:
        link.sendall(pack_text(Kind.FAILED, f"{type(error).__name__}: {error}"))
        return 1
    link.sendall(pack_text(Kind.READY, encoder.facts.model_dump_json()))
    while True:
        head, body = _receive(link)
        try:
            answer = pack_result(head.serial, encoder.compute(unpack_batch(head, body)))
        except Exception as error:
            answer = pack_text(Kind.FAILED, f"{type(error).__name__}: {error}", head.serial)
        link.sendall(answer)


def _receive(link: socket.socket) -> tuple[Head, bytes]:
    head = unpack_head(_exactly(link, HEAD_BYTES))
    return head, _exactly(link, head.size)


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = link.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(data)


def main(fd: int) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # tracing a model for export warns about every branch in it
    from services.chassis.encoding.model import load

    with socket.socket(fileno=fd) as link:
        try:
            return serve(link, load)
        except (EOFError, ConnectionError):
            return 0


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # inference runtimes may hang or crash in their exit handlers; there is nothing left to save
