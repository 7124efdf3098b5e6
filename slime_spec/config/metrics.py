"""These settings say where metrics go; metrics.jsonl is always written."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import setting


@dataclass(frozen=True)
class MetricsConfig:
    """Holds the settings of ``metrics``."""

    console: bool = setting(True, "Show progress on the terminal.", flags=("--console",))
    use_wandb: bool = setting(False, "Log to wandb (offline when there is no API key).")
    wandb_project: str = setting("slime_spec", "wandb project.")
    wandb_group: str | None = setting(None, "wandb group.")
    wandb_mode: str | None = setting(
        None, "online, offline or disabled; default: by the API key.", choices=("online", "offline", "disabled")
    )
