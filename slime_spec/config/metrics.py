"""These settings say where metrics go; metrics.jsonl is always written."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import INT32, setting


@dataclass(frozen=True)
class MetricsConfig:
    """Holds the settings of ``metrics``."""

    console: bool = setting(True, "Show progress on the terminal.", flags=("--console",))
    report_interval: int = setting(
        10,
        "Write report.html into the run folder every so many steps, and at the end; 0: never.",
        flags=("--report-interval",),
        minimum=0,
        maximum=INT32,
    )
    use_tensorboard: bool = setting(False, "Write event files for TensorBoard (the extra tensorboard).")
    tensorboard_dir: str | None = setting(None, "Put the event files here instead of tensorboard/ in the run folder.")
    use_wandb: bool = setting(False, "Log to wandb (offline when there is no API key).")
    wandb_project: str = setting("slime_spec", "wandb project.")
    wandb_group: str | None = setting(None, "wandb group.")
    wandb_team: str | None = setting(None, "wandb team or user (entity); default: that of the API key.")
    wandb_host: str | None = setting(None, "URL of a wandb server; default: WANDB_BASE_URL, else wandb's own.")
    wandb_mode: str | None = setting(
        None, "online, offline or disabled; default: by the API key.", choices=("online", "offline", "disabled")
    )
