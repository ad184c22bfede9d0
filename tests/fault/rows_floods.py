"""Row 57: floods of HTTP/2 frames that carry no request."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time

from tests.fault.load import quantile
from tests.fault.matrix import Ground, Measured, Row
from tests.fault.rows_abuse import PREFACE, _frame, _grown, _headers, _read_all, abused

FIRST = _headers(1)  # a call that is never finished
FLOODS = {
    "PING": _frame(6, 0, 0, bytes(8)) * 100,
    "SETTINGS": _frame(4, 0, 0, struct.pack(">HI", 4, 65535)) * 100,
    "empty DATA": _frame(0, 0, 1, b"") * 100,
    "CONTINUATION": _frame(9, 0, 1, b"\x00\x01a\x01b" * 20) * 100,
    "WINDOW_UPDATE": _frame(8, 0, 0, struct.pack(">I", 1)) * 100,
    "WINDOW_UPDATE of 0": _frame(8, 0, 0, bytes(4)) * 100,
}
OPENED = {"empty DATA": FIRST, "CONTINUATION": FIRST[:4] + b"\x00" + FIRST[5:]}  # without END_HEADERS


async def control_floods(ground: Ground) -> Measured:
    """Each kind for as long as the gateway takes it, at most a few seconds, on one connection after the other."""
    async with abused(ground) as (mesh, load, gateway):
        calm = quantile((told.seconds for told in load.done), 0.99)
        before = gateway.memory_info().rss
        host, _, port = mesh.grpc.rpartition(":")
        told, at = [], time.monotonic()
        for name, frames in FLOODS.items():
            until, sent, closed = time.monotonic() + ground.seconds(2), 0, 0
            while time.monotonic() < until:
                reader, writer = await asyncio.open_connection(host, int(port))
                drain = asyncio.create_task(_read_all(reader))
                with contextlib.suppress(ConnectionError):
                    writer.write(PREFACE + _frame(4, 0, 0, b"") + OPENED.get(name, b""))
                    while time.monotonic() < until and not drain.done():
                        writer.write(frames)
                        await writer.drain()
                        sent += 100
                        await asyncio.sleep(0.002)  # who floods shares its loop with those who are measured
                closed += drain.done()
                writer.transport.abort()
                await drain
            told.append(f"{name} {sent / ground.seconds(2) / 1000:.0f}k a second, {closed} times closed")
        late = quantile((one.seconds for one in load.between(at, time.monotonic())), 0.99)
        grown, alive = _grown(gateway, before), not mesh.gateways[0].ended
    text = f"{'; '.join(told)}; {load}, p99 {late:.2f} s ({calm:.2f} s before), gateway {grown:+.0f} MB"
    return Measured(alive and not load.failures and late < calm + 0.5 and grown < 100, text)


ROWS = (
    Row(
        57,
        "floods of PING, SETTINGS, DATA, CONTINUATION, WINDOW_UPDATE",
        "closed or carried, others' p99 at most 0.5 s more on 2 cores, less than 100 MB",
        control_floods,
    ),
)
