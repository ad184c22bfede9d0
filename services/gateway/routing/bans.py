"""Which instances the operator has banned: a map that gateways merge, whoever hears of what in whichever order.

Each gateway carries all the bans it knows in its own registration, and takes in those of the others (the later word
about an id wins, and of two of one moment the greater). So a ban needs no place of its own, holds while any gateway
that knows of it runs, and reaches the others as fast as any registration does. Pure; times are unix seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite

from infermesh.errors import MeshError, Reason
from registry.endpoint import unusable_id

MOST = 32  # Consul takes 64 keys of metadata
KEEP_LIFTED_S = 86_400.0  # so that a gateway that was cut off for a day brings no lifted ban back
LONGEST_VALUE = 512  # bytes, of Consul
KEY = "ban_"


@dataclass(frozen=True, slots=True, order=True)
class Ban:
    """`until` 0 = until it is lifted; `lifted` = it was."""

    at: float
    id: str
    by: str = ""
    why: str = ""
    until: float = 0.0
    lifted: bool = False

    def holds(self, now: float) -> bool:
        return not self.lifted and (not self.until or now < self.until)

    def text(self) -> str:
        """For people."""
        who = f"banned by {self.by}" if self.by else "banned"
        return f"{who}: {self.why}" if self.why else who


@dataclass(slots=True)
class Bans:
    known: dict[str, Ban] = field(default_factory=dict)

    def put(self, ban: Ban) -> None:
        """A word of an operator, spoken here.

        Raises:
            MeshError: FAILED_PRECONDITION: there are too many.
        """
        if ban.id not in self.known and len(self.known) >= MOST:
            lifted = [other for other in self.known.values() if not other.holds(ban.at)]
            if not lifted:
                raise MeshError(
                    Reason.FAILED_PRECONDITION, f"{MOST} instances are banned, which is the most; unban some"
                )
            del self.known[min(lifted).id]
        before = self.known.get(ban.id)
        at = ban.at if before is None else max(ban.at, before.at + 0.001)  # clocks differ; the newest word wins
        self.known[ban.id] = replace(ban, at=at)

    def merge(self, others: Iterable[Ban], now: float) -> bool:
        """Takes in what others know; forgets what is long over. Whether anything is new.

        Of too many, all gateways keep the same: those that hold, the oldest first (the others were put where nobody
        knew of these), then those that were lifted or ended last.
        """
        before = dict(self.known)
        for ban in others:
            mine = self.known.get(ban.id)
            if mine is None or ban > mine:
                self.known[ban.id] = ban
        for id, ban in list(self.known.items()):
            over = ban.at if ban.lifted else ban.until
            if not ban.holds(now) and now - over > KEEP_LIFTED_S:
                del self.known[id]
        if len(self.known) > MOST:
            ranks = {
                id: (not ban.holds(now), ban.at if ban.holds(now) else -ban.at, id) for id, ban in self.known.items()
            }
            self.known = {id: self.known[id] for id in sorted(ranks, key=ranks.__getitem__)[:MOST]}
        return before != self.known

    def holding(self, now: float) -> dict[str, str]:
        """Instance -> who banned it and why."""
        return {id: ban.text() for id, ban in sorted(self.known.items()) if ban.holds(now)}

    def metadata(self) -> dict[str, str]:
        """As a gateway registers them."""
        return {f"{KEY}{number}": encode(self.known[id]) for number, id in enumerate(sorted(self.known))}


def encode(ban: Ban) -> str:
    """As one value of metadata, which holds no unprintable characters; a long reason, and a long name, are cut."""
    given = {key: value for key, value in asdict(ban).items() if value}
    why, by = plain(ban.why), plain(ban.by)
    for words, name in ((len(why), 64), (100, 64), (40, 32), (0, 0)):
        given |= {"why": why[:words], "by": by[:name]}
        text = json.dumps(given, ensure_ascii=False, separators=(",", ":"))
        if len(text.encode()) <= LONGEST_VALUE:
            break
    return text


def plain(text: str) -> str:
    """With a blank for what cannot be printed: line ends, and the blanks that web pages and chats are full of."""
    return "".join(char if char.isprintable() else " " for char in text)


def decode(text: str) -> Ban | None:
    """None where it is not one: the registry is open to many."""
    try:
        given = json.loads(text)
        ban = Ban(**given)
        numbers = all(isinstance(value, int | float) and isfinite(value) for value in (ban.at, ban.until))
        texts = all(isinstance(value, str) for value in (ban.id, ban.by, ban.why))
        return ban if numbers and texts and isinstance(ban.lifted, bool) and not unusable_id(ban.id) else None
    except (ValueError, TypeError):
        return None


def from_metadata(extra: Mapping[str, str]) -> list[Ban]:
    found = [decode(value) for key, value in extra.items() if key.startswith(KEY)]
    return [ban for ban in found if ban is not None]
