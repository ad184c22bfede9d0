"""gRPC channel and server settings, in one place. The reasons are measured (docs/decisions/0003-transport.md)."""

from __future__ import annotations

Options = list[tuple[str, int | str]]

MAX_REQUEST_BYTES = 8 << 20
MAX_REPLY_BYTES = 64 << 20  # 2,048 vectors of 4,096 float32 are 32 MiB


def channel_options(*, wan: bool = False, **overrides: int | str) -> Options:
    """For a channel to a mesh process.

    Pings are what notices a frozen host: grpc-core answers to `http2.ping_timeout_ms`, not to `keepalive_timeout_ms`,
    since 1.60. Retries are the gateway's own. The environment's HTTP proxy is for the internet, not for the mesh.
    `wan` relaxes the pings from 1 s to 5 s. Overrides name an option without its `grpc.` prefix, `__` for a dot.
    """
    ping = 5000 if wan else 1000
    options: dict[str, int | str] = {
        "keepalive_time_ms": ping,
        "keepalive_timeout_ms": ping,
        "http2.ping_timeout_ms": ping,
        "keepalive_permit_without_calls": 1,
        "http2.max_pings_without_data": 0,
        "initial_reconnect_backoff_ms": 100,
        "min_reconnect_backoff_ms": 500,
        "max_reconnect_backoff_ms": 1000,
        "enable_retries": 0,
        "enable_http_proxy": 0,
        "use_local_subchannel_pool": 1,
        "max_send_message_length": MAX_REPLY_BYTES,
        "max_receive_message_length": MAX_REPLY_BYTES,
    }
    return _named(options, overrides)


def server_options(*, max_streams: int | None = None, **overrides: int | str) -> Options:
    """For a server. `max_streams` bounds the concurrent streams of a connection: 64–128 where clients connect (it is
    what stops a rapid-reset flood), at least 2 x max_running + 64 on instances (a low one starves health checks).
    """
    options: dict[str, int | str] = {
        "http2.min_ping_interval_without_data_ms": 250,
        "http2.max_ping_strikes": 0,
        "keepalive_permit_without_calls": 1,
        "max_receive_message_length": MAX_REQUEST_BYTES,
        "max_send_message_length": MAX_REPLY_BYTES,
        "max_metadata_size": 8192,
        "absolute_max_metadata_size": 16384,
        "so_reuseport": 0,
    }
    if max_streams is not None:
        options["max_concurrent_streams"] = max_streams
    return _named(options, overrides)


def _named(options: dict[str, int | str], overrides: dict[str, int | str]) -> Options:
    merged = options | {key.replace("__", "."): value for key, value in overrides.items()}
    return [(f"grpc.{key}", value) for key, value in merged.items()]
