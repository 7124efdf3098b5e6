"""A server's label for its weights is their version and, behind a router, the number of the server's engine.

Nothing else in a response says which server behind a router has generated it.

    3        version 3
    3@1      version 3, on engine 1's server
"""

from __future__ import annotations

from slime_spec.config.tree import Config


def label_suffix(config: Config, engine_index: int) -> str:
    """Return the part of this engine's labels that follows the version."""
    server = config.sglang_server
    return f"@{engine_index}" if server.router or server.router_addr is not None else ""


def version_number(label: object) -> int:
    """Return the version in a label; a server that was never pushed to may have a label of any text."""
    version = label.partition("@")[0] if isinstance(label, str) else ""
    return int(version) if version.isdigit() else 0


def engine_number(label: object) -> int | None:
    """Return the engine that the label names."""
    engine = label.partition("@")[2] if isinstance(label, str) else ""
    return int(engine) if engine.isdigit() else None
