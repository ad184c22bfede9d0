"""Another host on this machine: a network namespace at the end of a veth pair, with iptables between it and us.

with Host() as host:
    child = children.start("llm", "--listen", f"{host.there}:0", …, prefix=host.enter)
    host.drop(), host.drop(incoming=False), host.lose(0.1), host.reject(), host.heal()
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

_numbers = itertools.count(1)


def why_not() -> str:
    """Why namespaces cannot be had here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "iptables") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (apt-get install iproute2 iptables)"
    probe = f"imp{os.getpid() % 10_000}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else ""


class Host:
    """`here` is our address on the way to it, `there` its own. Every fault is on its side, and `heal` ends them all."""

    def __init__(self) -> None:
        number = next(_numbers)
        # Names are at most 15 characters, and several test processes may run at once.
        tag = f"{os.getpid() % 10_000}x{number}"
        self.name = f"im{tag}"
        self._ours, self._theirs = f"ia{tag}", f"ib{tag}"
        network = f"10.{77 + os.getpid() % 100}.{number % 250}"
        self.here, self.there = f"{network}.1", f"{network}.2"
        self.etc = Path("/etc/netns") / self.name

    @property
    def enter(self) -> list[str]:
        """What a command line begins with to run over there."""
        return ["ip", "netns", "exec", self.name]

    def __enter__(self) -> Host:
        try:
            _run("ip", "netns", "add", self.name)
            _run("ip", "link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self.name)
            _run("ip", "address", "add", f"{self.here}/24", "dev", self._ours)
            _run("ip", "link", "set", self._ours, "up")
            for words in (
                ("address", "add", f"{self.there}/24", "dev", self._theirs),
                ("link", "set", self._theirs, "up"),
                ("link", "set", "lo", "up"),
            ):
                _run(*self.enter, "ip", *words)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for words in (("ip", "link", "del", self._ours), ("ip", "netns", "del", self.name)):
            subprocess.run(words, capture_output=True, check=False)
        shutil.rmtree(self.etc, ignore_errors=True)

    def drop(self, *, incoming: bool = True, outgoing: bool = True) -> None:
        """A black hole: nothing comes back, not even a refusal."""
        self._rule(incoming, outgoing, "-j", "DROP")

    def lose(self, share: float) -> None:
        """Each packet is lost by chance, in both directions."""
        self._rule(True, True, "-m", "statistic", "--mode", "random", "--probability", f"{share:g}", "-j", "DROP")

    def reject(self) -> None:
        """Every packet of TCP is answered by a reset."""
        self._rule(True, False, "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")

    def heal(self) -> None:
        _run(*self.enter, "iptables", "-F")

    def _rule(self, incoming: bool, outgoing: bool, *rule: str) -> None:
        for chain, wanted in (("INPUT", incoming), ("OUTPUT", outgoing)):
            if wanted:
                _run(*self.enter, "iptables", "-A", chain, *rule)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")
