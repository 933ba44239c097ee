"""Ranks on one machine behind links of a chosen rate, so that slow interconnects can be measured.

`emulated_links(ranks, rate)` gives each rank a network namespace of its own, joined by a veth pair
to one Linux bridge in a hub namespace; the host's own network is left alone. Each link is shaped in
both directions by tc's token bucket (tbf). Only bandwidth is emulated: the delay stays that of one
machine, tens of microseconds. No packet is dropped, as on a lossless fabric.

The rate counts Ethernet frames: 99 % of it is payload. A link that was idle passes its first
millisecond's worth of bytes at once (`_BURST`), so a transfer takes at least
``(bytes - burst) / rate``.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_lowbit.benchmark.collectives.ranks import Ranks, endings_unwind, meeting, undisturbed
from megatron_lowbit.errors import LowbitError

_SUBNET = "10.213.77"
_LINK = "link0"  # every rank's interface: namespaces keep the equal names apart
_PORT = 29500
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}

# Jumbo frames: headers take 0.7 % of the rate, against 4.4 % at 1500 bytes, where a bf16 all-reduce
# of 4 MiB by 4 ranks at 1gbit took 57 ms instead of 51 on a 2-core machine.
_MTU = 9000
# Seconds of the rate that tbf passes at once. Half of it made 4 ranks at 1gbit 30 % slower on a
# busy machine: tokens are lost whenever the bucket's timer fires late.
_BURST = 1e-3
# Bytes a queue may hold, for each rank that can send to it: twice the largest TCP send buffer
# (tcp_wmem, 4 MB), so that many senders to one receiver cause no loss and no stalls.
_QUEUE = 8 << 20
# Always in the kernel, and on a queue without loss it keeps the link full. The host's default may
# be BBR, which slows down to probe the link: p90 / p10 of that all-reduce 1.18 instead of 1.05.
_CONGESTION = "reno"
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # bits, from linux/capability.h


def parse_rate(text: str) -> int:
    """Read a link rate such as ``100mbit``, ``1gbit`` or ``2.5gbit``; bits a second.

    Raises:
        LowbitError: `text` is not a number above zero followed by kbit, mbit or gbit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", text.strip().lower())
    rate = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if rate < 1:
        raise LowbitError(f"{text!r} is no link rate: write it like 100mbit, 1gbit or 2.5gbit")
    return rate


class Links(Ranks):
    """Starts each rank in a network namespace of its own; made by `emulated_links`.

    The rate is bits a second of each link, in each of its two directions.
    """

    def __init__(self, ranks: int, rate: int) -> None:
        super().__init__(ranks)
        self.rate = rate
        prefix = f"lowbit-{os.getpid()}"  # two runs at a time must not meet
        self.hub = f"{prefix}-hub"
        self.spaces = [f"{prefix}-{rank}" for rank in range(ranks)]

    def build(self) -> None:
        """Make the hub, its bridge, and one shaped link per rank."""
        _ip("netns", "add", self.hub)
        _ip("-n", self.hub, "link", "add", "bridge", "mtu", str(_MTU), "type", "bridge")
        _ip("-n", self.hub, "link", "set", "bridge", "up")
        for rank, space in enumerate(self.spaces):
            self._join(rank, space)

    def remove(self) -> None:
        """Kill what still runs in the namespaces and delete those that exist."""
        existing = {line.split()[0] for line in _ip("netns", "list").splitlines()}
        for space in existing.intersection([*self.spaces, self.hub]):
            for pid in _ip("netns", "pids", space).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "delete", space)

    def _join(self, rank: int, space: str) -> None:
        port, mtu = f"port{rank}", ["mtu", str(_MTU)]
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        peer = ["peer", "name", _LINK, *mtu, "netns", space]
        _ip("-n", self.hub, "link", "add", port, *mtu, "type", "veth", *peer)
        _ip("-n", self.hub, "link", "set", port, "master", "bridge", "up")
        _ip("-n", space, "address", "add", f"{_address(rank)}/24", "dev", _LINK)
        # No IPv6 address: its discovery would use the link, and Gloo is to find one address only.
        _ip("-n", space, "link", "set", _LINK, "addrgenmode", "none", "up")
        route = [f"{_SUBNET}.0/24", "dev", _LINK, "src", _address(rank)]
        _ip("-n", space, "route", "replace", *route, "congctl", _CONGESTION)
        self._shape(space, _LINK)
        self._shape(self.hub, port)

    def _shape(self, space: str, device: str) -> None:
        """Limit what `device` sends: the rank's end is its way out, the bridge's end its way in."""
        burst = max(round(self.rate / 8 * _BURST), 2 * _MTU)  # tbf drops frames above it
        bucket = ["rate", f"{self.rate}bit", "burst", f"{burst}b"]
        bucket += ["limit", f"{_QUEUE * self.ranks}b"]
        _command("tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf", *bucket)

    def _prefix(self, rank: int) -> list[str]:
        return ["ip", "netns", "exec", self.spaces[rank]]

    def _meeting(self) -> dict[str, str]:
        # There is no name server in a namespace, and torch would warn about that on every rank.
        quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
        return meeting(_address(0), _PORT, _LINK) | quiet


@contextlib.contextmanager
def emulated_links(ranks: int, rate: int) -> Iterator[Links]:
    """Yield `ranks` joined by links of `rate` bits a second in each direction; remove them after.

    The namespaces go, and what still runs in them is killed, on errors, Ctrl-C, SIGTERM and SIGHUP
    too; only SIGKILL leaves them behind (``ip netns delete lowbit-PID-...`` removes one).

    Raises:
        LowbitError: no root rights or no iproute2, or the kernel lacks veth, bridge or tbf.
    """
    links = Links(ranks, rate)
    _require_rights()
    with endings_unwind():
        try:
            links.build()
            yield links
        finally:
            with undisturbed():
                links.remove()


def _require_rights() -> None:
    """Raise one error, before anything is created, if links cannot be made here."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        tools = " and ".join(missing)
        raise LowbitError(
            f"emulated links need {tools}, not found on PATH: install iproute2 (Linux), or measure "
            "without links"
        )
    if os.geteuid() != 0:
        raise LowbitError(
            f"emulated links need root, and this is user {os.geteuid()}: run as root, or measure "
            "without links"
        )
    held = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    bits = int(held[1], 16) if held else -1
    lacking = [name for name, bit in _CAPABILITIES.items() if not bits >> bit & 1]
    if lacking:
        raise LowbitError(
            f"emulated links need {' and '.join(lacking)}, which this root user lacks: start the "
            "container with --privileged, or measure without links"
        )


def _ip(*arguments: str) -> str:
    return _command("ip", *arguments)


def _command(*argv: str) -> str:
    """Run a tool of iproute2; its stdout."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise LowbitError(f"cannot emulate links here: {' '.join(argv)}: {reason}")
    return done.stdout


def _address(rank: int) -> str:
    return f"{_SUBNET}.{rank + 1}"
