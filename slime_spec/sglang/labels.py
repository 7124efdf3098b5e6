"""A server's label for its weights is their version and, behind a router, the number of the server's engine.

Nothing else in a response says which server behind a router has generated it.

    3        version 3
    3@1      version 3, on engine 1's server
    default  SGLang's own, of a server that nobody has given another
"""

from __future__ import annotations

import re

from slime_spec.config.tree import Config

UNNAMED = "default"
LABEL = re.compile(r"([0-9]{1,18})(?:@([0-9]{1,18}))?")


def label_suffix(config: Config, engine_index: int) -> str:
    """Return the part of this engine's labels that follows the version."""
    server = config.sglang_server
    return f"@{engine_index}" if server.router or server.router_addr is not None else ""


def version_number(label: object) -> int:
    """Return the version in a label; 0, the checkpoint's, where the server names none or has its own first label.

    Raises ValueError for any other text: somebody else has called the weights so, and nobody here knows them.
    """
    if label is None or label == UNNAMED:
        return 0
    return int(_parts(label)[0])


def engine_number(label: object) -> int | None:
    """Return the engine that the label names; raises ValueError as ``version_number`` does."""
    engine = None if label is None or label == UNNAMED else _parts(label)[1]
    return None if engine is None else int(engine)


def _parts(label: object) -> tuple[str, str | None]:
    found = LABEL.fullmatch(label) if isinstance(label, str) else None
    if found is None:
        raise ValueError(f"weight_version is {str(label)[:100]!r}, which this run has not given")
    return found[1], found[2]
