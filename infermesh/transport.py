"""gRPC channel and server settings, and channels in the clear or over TLS, in one place. The reasons are measured
(docs/decisions/0003-transport.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

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


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose certificates are good for TLS. `ca_pem`: the authorities, None = grpc's own list or the file that
    GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names. `name`: whom a certificate must be for, empty = the host dialled."""

    ca_pem: bytes | None = None
    name: str = ""


def trust(ca_file: str | Path = "", name: str = "") -> Trust:
    """Raises OSError: the file cannot be read. ValueError: it holds no certificate."""
    if not ca_file:
        return Trust(name=name)
    pem = Path(ca_file).read_bytes()
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise ValueError(f"{ca_file} holds no certificate; a PEM file of the authority is needed")
    return Trust(pem, name)


def open_channel(address: str, options: Options, tls: Trust | None = None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(tls.ca_pem), [*options, *_override(tls)])


def open_aio_channel(address: str, options: Options, tls: Trust | None = None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(tls.ca_pem), [*options, *_override(tls)])


def _override(tls: Trust) -> Options:
    return [("grpc.ssl_target_name_override", tls.name)] if tls.name else []


def _named(options: dict[str, int | str], overrides: dict[str, int | str]) -> Options:
    merged = options | {key.replace("__", "."): value for key, value in overrides.items()}
    return [(f"grpc.{key}", value) for key, value in merged.items()]
