"""This module finds free ports that most likely stay free until a server that was just launched binds them."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from slime_spec.errors import ConfigError

# Ports are chosen between those that Ray gives its workers and those that the system gives outgoing connections: a
# server binds its port many seconds after the choice, and a connection must not have taken it by then.
PORTS_FROM = 20000
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
MIN_CHOICE = 1000  # ports; where the system's range leaves fewer, the system chooses


def _probe(host: str) -> socket.socket:
    """Return a socket that can be bound to ``host``."""
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def free_port(host: str, count: int = 1) -> int:
    """Return the first of ``count`` free ports in a row of ``host``.

    Raises ConfigError for a host that is none of this node's addresses.
    """
    while True:
        first = _any_port(host)
        if all(_is_free(host, port) for port in range(first, first + count)):
            return first


def _any_port(host: str) -> int:
    """Return where to look for a free port: not by the seeded generator, which every process would follow alike."""
    systems = _port_of_the_system(host)  # its error is the one to raise for a wrong host
    end = int(EPHEMERAL_PORTS.read_text().split()[0]) if EPHEMERAL_PORTS.exists() else PORTS_FROM
    return random.SystemRandom().randrange(PORTS_FROM, end) if end - PORTS_FROM >= MIN_CHOICE else systems


def _port_of_the_system(host: str) -> int:
    with _probe(host) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ConfigError(
                "sglang_server.host",
                f"must be an address of the node: {error.strerror}",
                host,
                "Leave out --sglang-host, or pass 0.0.0.0 and --sglang-api-key.",
            ) from None
        port: int = probe.getsockname()[1]
        return port


def _is_free(host: str, port: int) -> bool:
    with _probe(host) as probe:
        try:
            probe.bind((host, port))
        except (OSError, OverflowError):
            return False
    return True


def check_port(host: str, port: int, setting: str = "sglang_server.port") -> None:
    """Raise ConfigError where the port cannot be bound, before minutes of loading end in the same error."""
    with _probe(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                setting, f"must be free on {host}: {error.strerror}", port, "Pass another --sglang-port, or 0."
            ) from None
