"""What a gateway shows to instances instead of the operator's key: a pass for one address, good for minutes.

Instances are dialled where the registry says, and whoever may write to a registry may say anything there. So nothing is
shown to an address that would open another one: a pass is a JSON Web Token (RFC 7519), signed with HMAC-SHA256 under a
key derived from the operator's, whose audience is the address that it is shown to.

In direct mode gateways lend their callers passes of another key for one call each: they carry the relay of the attempt
that was reserved, so that nobody sends another one, and open nothing else.
"""

from __future__ import annotations

import hashlib
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

import jwt

from infermesh.errors import MeshError, Reason

SCHEME = "mesh"  # of `authorization`
LENT_SCHEME = "lease"
LIFE_S = 300.0
LENT_S = 60.0  # within which a caller has to begin
SKEW_S = 60.0  # by which two hosts' clocks may differ
MOST_KEPT = 4096  # passes


class Passes:
    """Makes and checks passes. `address`: where this process answers, host:port as it is registered; empty = nowhere
    yet. `clock`: Unix time [s] at which passes are made; they are checked by the clock of the host."""

    def __init__(self, operator_key: str, clock: Callable[[], float] = time.time) -> None:
        self._secret = hashlib.sha256(b"infermesh pass\0" + operator_key.encode()).digest()
        self._lending = hashlib.sha256(b"infermesh lease\0" + operator_key.encode()).digest()
        self._clock = clock
        self._made: dict[str, tuple[float, str]] = {}  # by address: when a new one is due
        self._known: dict[str, float] = {}  # checked ones: when they end
        self._spent: dict[str, float] = {}  # lent ones, by their relay: when they end
        self._sweep_at = MOST_KEPT
        self.address = ""

    def show(self, address: str, life_s: float = LIFE_S) -> str:
        """The `authorization` value for `address`. One that is asked for again is made anew at half its life."""
        now = self._clock()
        due, value = self._made.get(address, (0.0, ""))
        if now >= due:
            claims = {"aud": address, "iat": int(now), "exp": int(now + life_s)}
            value = f"{SCHEME} {jwt.encode(claims, self._secret, algorithm='HS256')}"
            if len(self._made) >= MOST_KEPT:
                self._made.clear()
            self._made[address] = (now + life_s / 2, value)
        return value

    def check(self, token: str) -> None:
        """Lets a pass through that was made for this process.

        Raises:
            MeshError: UNAUTHENTICATED, with the reason.
        """
        now = time.time()
        if now < self._known.get(token, 0.0):
            return
        claims = self._read(token, self._secret)
        if len(self._known) >= MOST_KEPT:
            self._known.clear()
        self._known[token] = float(claims["exp"])

    def lend(self, address: str, relay: bytes) -> str:
        """The `authorization` value for one call of `address` with this relay."""
        now = self._clock()
        claims = {"aud": address, "iat": int(now), "exp": int(now + LENT_S), "relay": b64encode(relay).decode()}
        return f"{LENT_SCHEME} {jwt.encode(claims, self._lending, algorithm='HS256')}"

    def spend(self, token: str) -> bytes:
        """The relay that a lent pass is for. It is good once.

        Raises:
            MeshError: UNAUTHENTICATED, with the reason.
        """
        claims = self._read(token, self._lending)
        mark = str(claims.get("relay", ""))  # has the attempt's number; a signature can be spelt in several ways
        if mark in self._spent:
            raise _refused("has been used: each call needs a Pick of its own")
        if len(self._spent) >= self._sweep_at:
            now = time.time() - SKEW_S
            self._spent = {mark: end for mark, end in self._spent.items() if end >= now}
            self._sweep_at = max(MOST_KEPT, 2 * len(self._spent))
        self._spent[mark] = float(claims["exp"])
        return b64decode(mark)

    def _read(self, token: str, secret: bytes) -> dict[str, Any]:
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                secret,
                algorithms=["HS256"],
                audience=self.address,
                leeway=SKEW_S,
                options={"require": ["aud", "iat", "exp"]},
            )
        except jwt.InvalidAudienceError:
            raise _refused(f"is for another address than {self.address or 'this one'}") from None
        except (jwt.ExpiredSignatureError, jwt.ImmatureSignatureError):
            raise _refused("is not good at this time; do the two hosts' clocks agree?") from None
        except jwt.InvalidTokenError:
            raise _refused("was not made with the operator's key of this process") from None
        return claims


def _refused(why: str) -> MeshError:
    return MeshError(Reason.UNAUTHENTICATED, f"this mesh pass {why}")
