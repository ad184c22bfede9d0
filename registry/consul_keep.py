"""Being known to Consul: registers, and stays registered until told to leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from tenacity import RetryCallState

from registry.consul_wire import Away, Calls, Check, Refused, assertion, is_loopback, service_name
from registry.endpoint import Endpoint
from registry.patience import jitter, patiently
from registry.port import RegistryError, check_registrable

log = logging.getLogger("infermesh.registry.consul")

DEPARTURE_S: Final = 3.0  # how long a departure may take in all
# How long a leaving instance is listed as critical, so that watchers see a departure, not a loss: longer than a busy
# watcher's pause between two queries (`consul_watch.Pace`), with room for a loaded Consul.
GOODBYE_S: Final = 0.8


class _Hold:
    """One registration that is being kept alive."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.superseded = False
        self.task: asyncio.Task[None] | None = None
        self.trouble = ""

    def note(self, trouble: str) -> None:
        """Says each trouble once, not every second."""
        if trouble and trouble != self.trouble:
            log.warning("%s: %s", self.endpoint.id, trouble)
        self.trouble = trouble

    async def end(self) -> None:
        if self.task:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


class Keeper:
    """All registrations of this process. `reassert_s`: how often each is looked after."""

    def __init__(self, calls: Calls, prefix: str, consul_host: str, check: Check, reassert_s: float) -> None:
        self._calls = calls
        self._prefix = prefix
        self._consul_host = consul_host
        self._check = check
        self._reassert_s = reassert_s
        self._holds: dict[str, _Hold] = {}

    async def register(self, endpoint: Endpoint) -> None:
        check_registrable(endpoint)
        if before := self._holds.pop(endpoint.id, None):
            await before.end()
        hold = _Hold(endpoint)
        try:
            await self._put(endpoint)
            await self._warn_of_loopback(endpoint)
        except Refused as error:
            raise RegistryError(f"{endpoint.id} cannot be registered: {error}") from error
        except Away as error:
            hold.note(f"Consul is out of reach ({error}); will register as soon as it is back")
        self._holds[endpoint.id] = hold
        hold.task = asyncio.create_task(self._keep(hold), name=f"consul-keep-{endpoint.id}")

    async def renew(self, endpoint: Endpoint) -> None:
        check_registrable(endpoint)
        hold = self._holds.get(endpoint.id)
        if hold is None:
            raise RegistryError(f"{endpoint.id} is not registered; call register first")
        hold.endpoint = endpoint
        if not hold.superseded:
            try:
                await self._put(endpoint)
            except (Away, Refused) as error:
                hold.note(f"the change waits: {error}")  # the keeper finds the difference at its next look

    async def deregister(self, id: str) -> None:
        hold = self._holds.pop(id, None)
        if hold is None:
            return
        await hold.end()
        if hold.superseded:
            return
        try:
            async with asyncio.timeout(DEPARTURE_S):
                if assertion(await self._calls.held(id), hold.endpoint) == "superseded":
                    return  # somebody else lives under this id now; theirs to remove
                with contextlib.suppress(Away, Refused):
                    await self._calls.close_door(id)
                    await asyncio.sleep(GOODBYE_S)
                await self._calls.remove(id)
        except (Away, Refused, TimeoutError) as error:
            log.warning("%s: not removed from Consul (%s); its check will do it", id, error or type(error).__name__)

    async def close(self) -> None:
        for hold in self._holds.values():
            await hold.end()
        self._holds.clear()

    async def _put(self, endpoint: Endpoint) -> None:
        await self._calls.put(service_name(self._prefix, endpoint.kind), endpoint, self._check)

    async def _keep(self, hold: _Hold) -> None:
        """Looks every now and then whether we are still listed: an agent that restarted has forgotten us."""

        def note(state: RetryCallState) -> None:
            if state.outcome and (error := state.outcome.exception()):
                hold.note(f"not sure to be registered: {error}")

        while not hold.superseded:
            await asyncio.sleep(jitter(self._reassert_s))
            try:
                # Refused as well: an operator may mend the token, and then we are back without a restart.
                await patiently((Away, Refused), note)(self._look, hold)
            except Exception:
                log.exception("%s: looking after the registration failed; it goes on", hold.endpoint.id)

    async def _look(self, hold: _Hold) -> None:
        todo = assertion(await self._calls.held(hold.endpoint.id), hold.endpoint)
        if todo == "superseded":
            hold.superseded = True
            hold.note("another process has registered this id after us; we stay out. Give each its own --id")
            return
        if todo == "register":
            await self._put(hold.endpoint)
            log.info("%s: registered again", hold.endpoint.id)
        hold.note("")

    async def _warn_of_loopback(self, endpoint: Endpoint) -> None:
        """A local agent may belong to a cluster of many hosts, which cannot dial our loopback address."""
        if not (is_loopback(endpoint.host) and is_loopback(self._consul_host)):
            return
        with contextlib.suppress(Away, Refused):
            agent = await self._calls.agent_address()
            if agent and not is_loopback(agent):
                log.warning(
                    "%s registers %s, but its Consul agent is known to others as %s: other hosts cannot dial it; "
                    "start with --advertise %s:%d if there are any",
                    *(endpoint.id, endpoint.address, agent, agent, endpoint.port),
                )
