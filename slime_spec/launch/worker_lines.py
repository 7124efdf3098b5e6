"""What a run's actors write to their output comes into the run's log, too; Ray alone shows it on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from slime_spec.launch.ray_environment import LOGS
from slime_spec.metrics.console import SHOWN

logger = logging.getLogger(__name__)

HANDLER = "slime_spec_run_log"


@contextmanager
def worker_lines_logged() -> Iterator[None]:
    """Log the lines of the actors of this process's job for the length of the block; Ray is started already."""
    from ray._private import ray_logging

    # Not of Ray's public interface, which has none for this.
    dispatcher = getattr(ray_logging, "global_worker_stdstream_dispatcher", None)
    if dispatcher is None:
        logger.warning("this Ray does not hand on what actors write: it is in %s", LOGS)
        yield
        return
    dispatcher.add_handler(HANDLER, log_lines)
    try:
        yield
    finally:
        dispatcher.remove_handler(HANDLER)


def log_lines(data: Mapping[str, Any]) -> None:
    """Log lines as Ray hands them on: ``{"lines": ["..."], "pid": 4711, "ip": "10.0.0.7", "actor_name": "Rank"}``."""
    who = data.get("actor_name") or data.get("task_name") or "worker"
    for line in data.get("lines", ()):
        logger.info("%s pid=%s ip=%s %s", who, data.get("pid"), data.get("ip"), line, extra=SHOWN)
