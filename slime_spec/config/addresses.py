"""This module parses addresses that a user writes: host:port, with an IPv6 host in brackets."""

from __future__ import annotations

from ipaddress import ip_address

from slime_spec.errors import ConfigError

HIGHEST_PORT = 65535
ANY_HOST = ("0.0.0.0", "::")


def parse_address(setting: str, address: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port; raises ConfigError for anything but HOST:PORT or [IPV6]:PORT."""
    remedy = "Write HOST:PORT, or [IPV6]:PORT."
    if "://" in address or "/" in address:
        raise ConfigError(setting, "must be an address without a scheme or a path", address, remedy)
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) <= HIGHEST_PORT:
        raise ConfigError(setting, f"must end in a port from 1 to {HIGHEST_PORT}", address, remedy)
    bracketed = host.startswith("[") and host.endswith("]")
    if (":" in host) != bracketed or (bracketed and not _is_ip(host[1:-1])) or host != host.strip():
        raise ConfigError(setting, "must have its IPv6 host in brackets", address, remedy)
    return host.strip("[]"), int(port)


def address_of(host: str, port: int) -> str:
    """Return the address that ``parse_address`` reads: ``address_of("::1", 30000)`` is ``[::1]:30000``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_ip(host) and ip_address(host).is_loopback)


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
