"""WandbSink alone imports Weights & Biases; without an API key the run is kept offline, for `wandb sync`."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse
from uuid import uuid4

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError

ID_FILE = "wandb_id.txt"
Mode = Literal["online", "offline", "disabled"]


class WandbSink:
    """Implements MetricSink. The run's id is kept in the run folder, so a resumed run goes on in the same wandb run."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        asked = config.metrics
        id_file = folder / ID_FILE
        run_id = id_file.read_text().strip() if id_file.is_file() else uuid4().hex[:8]
        id_file.write_text(run_id + "\n")
        try:
            self._run = wandb.init(
                project=asked.wandb_project,
                group=asked.wandb_group,
                name=config.run.name,
                id=run_id,
                resume="allow",
                mode=mode(asked.wandb_mode, os.environ),
                dir=str(folder),
                config=asdict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ConfigError(
                "metrics.use_wandb", f"wandb could not start: {error}", asked.wandb_mode, "Pass --wandb-mode offline."
            ) from error

    @classmethod
    def open(cls, config: Config, folder: Path) -> WandbSink:
        return cls(config, folder)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def mode(asked: str | None, environment: Mapping[str, str]) -> Mode:
    """Return the mode asked for, here or by WANDB_MODE.

    Else online where there is an API key, offline where there is none.
    """
    wanted = asked or environment.get("WANDB_MODE")
    match wanted:
        case "online" | "offline" | "disabled":
            return wanted
        case None | "":
            return "online" if _has_api_key(environment) else "offline"
    raise ConfigError(
        "metrics.wandb_mode", "must be online, offline or disabled", wanted, "Pass --wandb-mode, or unset WANDB_MODE."
    )


def _has_api_key(environment: Mapping[str, str]) -> bool:
    """Return whether wandb will find a key: in WANDB_API_KEY, or in the netrc file where `wandb login` puts it."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    path = Path(environment.get("NETRC") or Path.home() / ".netrc")
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False
