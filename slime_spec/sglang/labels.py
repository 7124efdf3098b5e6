"""What a server is told to call its weights: their version, and behind a router the engine whose server it is.

Nothing else in a response says which of the servers behind a router has generated it.

    3        version 3
    3@1      version 3, on engine 1's server
"""

from __future__ import annotations

from slime_spec.config.tree import Config


def label_suffix(config: Config, engine_index: int) -> str:
    """What follows the version in this engine's labels."""
    server = config.sglang_server
    return f"@{engine_index}" if server.router or server.router_addr is not None else ""


def version_number(label: object) -> int:
    """Our versions are whole numbers; a server that was never pushed to may call its own anything."""
    version = label.partition("@")[0] if isinstance(label, str) else ""
    return int(version) if version.isdigit() else 0


def engine_number(label: object) -> int | None:
    """The engine that the label names."""
    engine = label.partition("@")[2] if isinstance(label, str) else ""
    return int(engine) if engine.isdigit() else None
