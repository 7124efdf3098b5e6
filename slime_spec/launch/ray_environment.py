"""Set the environment variables of Ray, before Ray is first imported."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from slime_spec.errors import ConfigError

TOKEN_FILE = Path.home() / ".ray" / "auth_token"
LOGS = "Ray's logs (/tmp/ray/session_latest/logs)"
# Where Ray, too, looks how this machine is seen from outside; nothing is sent there.
OUTSIDE = ((socket.AF_INET, "8.8.8.8"), (socket.AF_INET6, "2001:4860:4860::8888"))
LOOPBACK = "127.0.0.1"
ANSWER_S = 5.0
PRESTART = "RAY_prestart_worker_first_driver"


def prepare_ray_environment(joining: bool) -> None:
    """Demand a token in a private Ray (Ray makes the token); to a joined Ray, offer the existing token, if any.

    A private Ray whose machine is in no network, or does not answer at its own address, stays on the loopback address:
    Ray waits without end for a head that it cannot reach. Variables that are already set win.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not joining or TOKEN_FILE.exists() or "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if joining:
        return
    # Else the driver waits until a worker has started on each core, and this run's actors need workers of their own.
    os.environ.setdefault(PRESTART, "0")
    address = own_address()
    if address is not None and answers(address):
        return
    if not answers(LOOPBACK):
        rule = "must answer: this machine's processes find each other by it"
        raise ConfigError("the loopback address", rule, LOOPBACK, "Bring the interface up: ip link set lo up")
    # Whatever the name says, on Linux it makes the loopback address the only one.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def own_address() -> str | None:
    """Return the address at which a network sees this machine; None where it is in no network."""
    for family, host in OUTSIDE:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 53))  # a datagram socket only chooses its route
            return str(probe.getsockname()[0])
    return None


def answers(address: str) -> bool:
    """Return whether this machine can be reached by itself at one of its addresses."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with (
            socket.create_server((address, 0), family=family) as server,
            socket.create_connection(server.getsockname()[:2], timeout=ANSWER_S),
        ):
            return True
    except OSError:
        return False
