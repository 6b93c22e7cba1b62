"""Addresses and ports of this machine."""

from __future__ import annotations

import contextlib
import socket


def join_address(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def hold_port(address: str) -> socket.socket:
    """Reserves a free port of an address for jax, while the socket is open.

    The socket is bound and does not listen. The kernel gives its port to nobody else, except to a
    socket of the same user that also sets SO_REUSEPORT, as gRPC does.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    if hasattr(socket, "SO_REUSEPORT"):
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind((address, 0))
    return held


def connect_to(host: str, port: int, timeout: float = 2.0) -> socket.socket:
    """Connects to a host; blocks for as long as the resolver does, and `timeout` per address.

    Raises:
        OSError: it does not answer, or the name does not resolve; the text says which.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"the name {host} does not resolve: {reason}") from error
    failure = OSError(f"the name {host} has no address")
    for address in dict.fromkeys(str(entry[4][0]) for entry in found):
        try:
            return socket.create_connection((address, port), timeout)
        except OSError as error:
            failure = error
    raise failure


def own_address(host: str) -> str:
    """The address at which others reach this machine as `host`; empty if unknown.

    A name that resolves to a loopback address (as Debian's installer writes into /etc/hosts) does
    so on this machine only.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ""
    addresses = [str(entry[4][0]) for entry in found]
    if host in ("localhost", "127.0.0.1", "::1"):
        return addresses[0]
    for address in addresses:
        if not address.startswith("127.") and address != "::1" and _is_here(address):
            return address
    return ""


def _is_here(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
