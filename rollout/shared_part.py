"""``shared_part`` makes the part that all engines of a run share, as their EngineKind declares it."""

from __future__ import annotations

from slime_spec.config.tree import Config
from slime_spec.engines import kind_of
from slime_spec.interfaces import SharedPart, load
from slime_spec.site import Site


class NothingShared:
    """Implements SharedPart for engines that share nothing."""

    def __init__(self, config: Config) -> None:
        self.engine_config = config

    def start(self) -> None:
        pass

    def wait_until_ready(self) -> None:
        pass

    def stop(self) -> None:
        pass


def shared_part(config: Config, site: Site) -> SharedPart:
    """Make the shared part of this run's engines, not yet started; ``site`` is where it will run."""
    path = kind_of(config).shared_part
    made: SharedPart | None = None if path is None else load(path)(config, site)
    return made or NothingShared(config)
