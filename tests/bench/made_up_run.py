"""A run folder with numbers that are easy to reckon with."""

from __future__ import annotations

import json
from pathlib import Path

from slime_spec.config.build import to_yaml
from slime_spec.config.tree import Config, RunConfig

REWARDS = (0.1, 0.2, 0.1, 0.2, 0.15, 0.4, 0.5, 0.6, 0.7, 0.6, 0.8, 0.55)


def steps(logprob_abs_diff: float | None = 3e-6) -> list[dict[str, float | None]]:
    """First five rewards average 0.15, last five 0.65; step i has 10 * (i + 1) rounds of accept length i + 1."""
    return [
        {
            "step": i,
            "rollout/reward_mean": reward,
            "train/train_rollout_logprob_abs_diff": logprob_abs_diff,
            "rollout/spec_accept_length": float(i + 1),
            "spec/verify_rounds": 10.0 * (i + 1),
            "perf/tokens_per_s": 100.0 + i,
        }
        for i, reward in enumerate(REWARDS)
    ]


def write_run(folder: Path, seed: int, rows: list[dict[str, float | None]] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(Config(run=RunConfig(seed=seed))))
    lines = [json.dumps(row) for row in (steps() if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder
