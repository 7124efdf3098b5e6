"""WandbSink alone imports Weights & Biases; without an API key the run is kept offline, for `wandb sync`."""

from __future__ import annotations

import logging
import netrc
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse
from uuid import uuid4

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.metrics.jsonl import FILE, read_metrics
from slime_spec.metrics.summary import Row

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id.txt"
STEP = "step"  # the axis of every chart: wandb's own counts on where a resumed run repeats steps
CLOUD = "https://api.wandb.ai"
BEST = {"rollout/reward_mean": "max", "rollout/spec_accept_length": "max", "spec/net_speedup_est": "max"}
# Charts of several metrics, which wandb makes of no metric by itself: title -> pattern of the metrics.
PANELS = {
    "panels/acceptance_by_position": r"spec/accept_rate_cum_pos_\d+",
    "panels/accepted_length_and_break_even": r"rollout/spec_accept_length|spec/break_even_length",
    "panels/phases": r"perf/(rollout|train|draft_train|sync|draft_sync|step)_time",
}
MOST_POINTS = 10_000  # of a panel: what wandb keeps of a table
Mode = Literal["online", "offline", "disabled"]


class WandbSink:
    """Implements MetricSink. The run's id is kept in the run folder, so a resumed run goes on in the same wandb run.

    wandb takes no second value of one of its own steps. Where a resumed run repeats steps, they come after the earlier
    ones in wandb's count, and at the same place of the axis ``step``.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        asked = config.metrics
        id_file = folder / ID_FILE
        if not id_file.is_file():
            id_file.write_text(uuid4().hex[:8] + "\n")
        run_id, self._num_repeated = read_id(id_file)
        self._folder, self._last_step = folder, -1
        settings: dict[str, Any] = {"console": "off", "silent": True}
        if url := server_url(asked.wandb_host):
            settings["base_url"] = url
        try:
            self._run = wandb.init(
                entity=asked.wandb_team,
                project=asked.wandb_project,
                group=asked.wandb_group,
                name=config.run.name,
                id=run_id,
                resume="allow",
                mode=mode(asked.wandb_mode, os.environ, asked.wandb_host),
                dir=str(folder),
                config=asdict(config),
                settings=wandb.Settings(**settings),
            )
        except wandb.Error as error:
            raise ConfigError(
                "metrics.use_wandb", f"wandb could not start: {error}", asked.wandb_mode, "Pass --wandb-mode offline."
            ) from error
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)
        for name, summary in BEST.items():
            self._run.define_metric(name, step_metric=STEP, step_sync=True, summary=f"last,{summary}")

    @classmethod
    def open(cls, config: Config, folder: Path) -> WandbSink:
        return cls(config, folder)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._last_step = step
        self._run.log({STEP: step, **values}, step=step + self._num_repeated)

    def close(self) -> None:
        if self._last_step >= 0:
            self._log_panels()
        self._run.finish()

    def _log_panels(self) -> None:
        """Log the charts of several metrics, of all steps that metrics.jsonl has."""
        import wandb

        try:
            rows = read_metrics(self._folder / FILE)
        except ConfigError as error:
            logger.warning("wandb lacks its panels: %s", error)
            return
        for title, pattern in PANELS.items():
            names = sorted({name for row in rows for name in row if re.fullmatch(pattern, name)})
            shown = rows_of_panel(rows, len(names))
            points = {name: [(row[STEP], row[name]) for row in shown if row.get(name) is not None] for name in names}
            keys = [name for name in names if points[name]]
            if keys:
                xs, ys = ([[point[at] for point in points[name]] for name in keys] for at in (0, 1))
                chart = wandb.plot.line_series(xs=xs, ys=ys, keys=keys, title=title.partition("/")[2], xname=STEP)
                self._run.log({title: chart}, step=self._last_step + self._num_repeated)


def chart_over(axis: str, names: Iterable[str]) -> None:
    """Have the process's own wandb run, if there is one, draw metrics (``spec/*``) over another metric."""
    import wandb

    if wandb.run is not None:
        for name in names:
            wandb.define_metric(name, step_metric=axis)


def log_beside(step: int, values: Mapping[str, float]) -> None:
    """Add values to what somebody else logs of a step to the process's own wandb run, if there is one."""
    import wandb

    if wandb.run is not None:
        wandb.log(dict(values), step=step, commit=False)


def rows_of_panel(rows: Sequence[Row], num_lines: int) -> Sequence[Row]:
    """Return the rows, or of a long run every second, third, ... of them, the last one always: a panel has a limit."""
    every = max(1, ceil(len(rows) * num_lines / MOST_POINTS))
    return rows[::-every][::-1]


def read_id(path: Path) -> tuple[str, int]:
    """Return the wandb run's id, and how many steps its earlier launches logged that were repeated since."""
    run_id, _, num_repeated = path.read_text().strip().partition("\n")
    return run_id.strip(), int(num_repeated) if num_repeated.strip().isdecimal() else 0


def note_repeated(path: Path, num_steps: int) -> None:
    """Note in the id's file that so many steps more, which wandb has, will be logged again."""
    run_id, before = read_id(path)
    path.write_text(f"{run_id}\n{before + num_steps}\n")


def server_url(host: str | None) -> str | None:
    """Return the address of a wandb server; wandb.ai, which a browser opens, stands for its API's."""
    if host is None:
        return None
    url = host.rstrip("/")
    place = urlparse(url)
    if place.scheme not in ("http", "https") or not place.netloc:
        remedy = f"Pass --wandb-host {CLOUD}, or leave it out."
        raise ConfigError("metrics.wandb_host", "must be the URL of a wandb server", host, remedy)
    return CLOUD if place.netloc in ("wandb.ai", "www.wandb.ai", "app.wandb.ai") else url


def mode(asked: str | None, environment: Mapping[str, str], host: str | None = None) -> Mode:
    """Return the mode asked for, here or by WANDB_MODE.

    Else online where there is an API key for the server, offline where there is none.
    """
    url = server_url(host)
    wanted = asked or environment.get("WANDB_MODE")
    match wanted:
        case "online" | "offline" | "disabled":
            return wanted
        case None | "":
            return "online" if _has_api_key(environment, url) else "offline"
    raise ConfigError(
        "metrics.wandb_mode", "must be online, offline or disabled", wanted, "Pass --wandb-mode, or unset WANDB_MODE."
    )


def _has_api_key(environment: Mapping[str, str], url: str | None) -> bool:
    """Return whether wandb will find a key: in WANDB_API_KEY, or in the netrc file where `wandb login` puts it."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(url or environment.get("WANDB_BASE_URL", CLOUD)).netloc
    path = Path(environment.get("NETRC") or Path.home() / ".netrc")
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False
