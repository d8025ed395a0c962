"""Which network interface the ranks of several hosts talk over.

gloo binds to the address that the host's own name resolves to, unless ``GLOO_SOCKET_IFNAME`` names an interface. On
many machines (Debian's /etc/hosts, containers) that is a loopback address, and the other hosts then connect to
themselves. The interface whose route leads to ``MASTER_ADDR`` is the right one, since all ranks meet there.
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError

VARIABLE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


def world_size() -> int:
    """Ranks that torchrun started; 1 without it.

    Raises:
        UserError: ``WORLD_SIZE`` is no number.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise UserError(
            f"WORLD_SIZE={given}",
            rule="it is the number of ranks",
            remedy="unset it, or start with torchrun, which sets it",
            key="WORLD_SIZE",
        )
    return int(given)


def check_launcher() -> None:
    """Check the other numbers that a launcher sets, where they are set.

    Raises:
        UserError: one is no number.
    """
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        given = os.environ.get(name, "0")
        if not given.isdecimal():
            raise UserError(
                f"{name}={given}",
                rule="it is a number",
                remedy="unset it, or start with torchrun, which sets it",
                key=name,
            )


def choose_interface() -> str | None:
    """Set ``GLOO_SOCKET_IFNAME`` for a run of several hosts where nobody has.

    Returns:
        What was chosen and why, for the log; None where there is nothing to choose.

    Raises:
        UserError: MASTER_ADDR is no known host, or its route does not tell the interface.
    """
    world, local = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    master = os.environ.get("MASTER_ADDR", "")
    if local in (0, world) or not master or VARIABLE in os.environ:
        return None
    address = address_towards(master, int(os.environ.get("MASTER_PORT", "29500")))
    name = interface_of(address, interfaces())
    os.environ[VARIABLE] = name
    return f"gloo uses the interface {name} ({address}), which leads to {master}; set {VARIABLE} to use another"


def address_towards(host: str, port: int) -> str:
    """This host's own address on the way to ``host``; no packet is sent.

    Raises:
        UserError: the name is not known, or there is no route.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR is {host}, which this host cannot reach ({error.strerror or error})",
            rule="all ranks meet at the first host",
            remedy="give its address or a name that every host knows (torchrun --master-addr or --local-addr)",
            key="MASTER_ADDR",
        ) from None


def interface_of(address: str, known: Mapping[str, tuple[str, ...]]) -> str:
    """The interface that has an address.

    Args:
        address: this host's address on the way to the first one. On the first host itself it may be a loopback
            address, where its own name stands for one; then the only other interface is meant, if there is any.
        known: interface -> its addresses.

    Raises:
        UserError: several could be meant, or none has that address.
    """
    others = {name: own for name, own in known.items() if not any(map(_is_loopback, own))}
    named = [name for name, own in others.items() if address in own]
    if _is_loopback(address):
        named = list(others) if others else [name for name, own in known.items() if address in own][:1]
    if len(named) != 1:
        raise UserError(
            f"this host would reach the first one from {address}",
            rule="gloo needs the network interface that the hosts share",
            remedy=f"set {VARIABLE} to one of: {', '.join(others) or 'none is up'}",
            key=VARIABLE,
        )
    return named[0]


def interfaces() -> dict[str, tuple[str, ...]]:
    """Interface -> its addresses, for those that have one; Linux alone."""
    import fcntl

    out: dict[str, tuple[str, ...]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, name.encode()[:15].ljust(256, b"\0"))
                out[name] = (socket.inet_ntoa(answer[20:24]),)
    with contextlib.suppress(OSError):  # the kernel has no IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, _, _, name = line.split()
            out[name] = (*out.get(name, ()), socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return out


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
