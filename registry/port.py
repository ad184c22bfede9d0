"""The Registry protocol: what the rest of infermesh asks of Consul or of the embedded registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from registry.endpoint import Endpoint, Rejected, to_metadata, undialable, unusable_id


class RegistryError(Exception):
    """The registry cannot be reached or has refused; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One usable line of the directory. `passing`: the registry's own opinion, one voice among several."""

    endpoint: Endpoint
    passing: bool = True


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole directory at one moment, sorted by id; never a difference.

    `stale`: the registry is out of reach, this is the last known set.
    `young`: the registry began less than 3 s ago and may still be filling.
    """

    entries: tuple[Entry, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    stale: bool = False
    young: bool = False


class Registry(Protocol):
    """Implementations keep trying by themselves: only `register` tells of a failure, and only of one that waiting
    cannot mend (a refused token, an unusable endpoint)."""

    async def register(self, endpoint: Endpoint) -> None:
        """Makes the endpoint known, or replaces what is known of its id, and keeps it known (re-asserting after a
        restart of the registry) until `deregister`. Returns once it is in the directory or, when the registry is out of
        reach, at once: it is then registered as soon as it can be.

        Raises:
            RegistryError: refused for good.
        """
        ...

    async def renew(self, endpoint: Endpoint) -> None:
        """Changes the metadata of a registered endpoint (a new speed, say)."""
        ...

    async def deregister(self, id: str) -> None:
        """Leaves now. Never raises; a registry out of reach forgets by itself."""
        ...

    def watch(self, kinds: tuple[str, ...] = ()) -> AsyncIterator[Snapshot]:
        """Snapshots for ever: the first as soon as anything is known (stale and empty if nothing can be), then one
        after every change. `kinds` empty = all."""
        ...

    async def close(self) -> None:
        """Ends watches and stops keeping registrations; does not deregister."""
        ...


def check_registrable(endpoint: Endpoint) -> None:
    """Raises RegistryError for an endpoint that no registry should carry."""
    try:
        to_metadata(endpoint)
    except ValueError as error:
        raise RegistryError(f"{endpoint.id} cannot be registered: {error}") from error
    if fault := unusable_id(endpoint.id) or undialable(endpoint.host, endpoint.port):
        raise RegistryError(f"{endpoint.id} cannot be registered: {fault}")
