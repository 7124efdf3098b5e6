"""Data files and their configurations, as a test wants them."""

from __future__ import annotations

import json
from pathlib import Path

from slime_spec.config.tree import Config, RolloutConfig, RunConfig, TaskConfig


def config(task: TaskConfig, seed: int = 0, max_prompt_len: int = 200) -> Config:
    return Config(run=RunConfig(seed=seed), task=task, rollout=RolloutConfig(max_prompt_len=max_prompt_len))


def jsonl(path: Path, *lines: str) -> TaskConfig:
    path.write_text("".join(line + "\n" for line in lines))
    return TaskConfig(prompt_data=str(path))


def row(prompt: object, label: object) -> str:
    return json.dumps({"prompt": prompt, "label": label})
