"""A process's own certificate, for gRPC and HTTP: read at the start, and again when its files change, so that renewing
it needs no restart."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import structlog
from pydantic import BaseModel, ConfigDict, model_validator

LOOK_S = 10.0
log = structlog.get_logger("tls")


class TlsSettings(BaseModel):
    """`tls_cert_file`: PEM, the certificate and what leads to its authority; both files, or neither."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None

    @model_validator(mode="after")
    def _both(self) -> TlsSettings:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file: one is nothing without the other")
        return self

    def certificate(self) -> Certificate | None:
        """Raises ValueError: the files cannot be read, or do not belong together."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return Certificate(self.tls_cert_file, self.tls_key_file)


class Certificate:
    """Raises ValueError where it cannot be used; later, what cannot be used is logged and the one before stays."""

    def __init__(self, cert_file: Path, key_file: Path) -> None:
        self._files = (cert_file, key_file)
        try:
            self._stamp = self._stamps()
            self._pair = self._read()
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"--tls-cert-file {cert_file}, --tls-key-file {key_file}: {_why(error)}") from None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # of the HTTP door
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.load_cert_chain(*self._files)

    def credentials(self) -> grpc.ServerCredentials:
        def current() -> Any:
            return grpc.ssl_server_certificate_configuration([self._pair])

        return grpc.dynamic_ssl_server_credentials(current(), current)

    async def watch(self) -> None:
        """Notices changed files, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            with suppress(OSError):  # between two renames a file may be away
                if self._stamps() != self._stamp:
                    self.read_again()

    def read_again(self) -> None:
        try:
            stamp = self._stamps()
            pair = self._read()
            self.context.load_cert_chain(*self._files)
        except (OSError, ssl.SSLError) as error:
            log.error("the new certificate cannot be used; the one before stays", why=_why(error))
            return
        self._stamp, self._pair = stamp, pair
        log.info("certificate renewed", file=str(self._files[0]))

    def _stamps(self) -> list[tuple[int, int]]:
        return [(found.st_mtime_ns, found.st_ino) for found in (file.stat() for file in self._files)]

    def _read(self) -> tuple[bytes, bytes]:
        """(key, chain), once they are known to belong together."""
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files)
        cert, key = self._files
        return key.read_bytes(), cert.read_bytes()


def _why(error: OSError) -> str:
    if not isinstance(error, ssl.SSLError):
        return error.strerror or str(error)
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return f"no PEM certificate and key ({error.reason or str(error)})"
