"""Folders of runs that a report reads, written as a run writes them, with values that are easy to compute by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from slime_spec.algorithms import EAGLE3
from slime_spec.config.build import to_yaml
from slime_spec.config.tree import Config, DraftTrainingConfig, RunConfig, SpeculativeConfig

NONE_CONFIG = Config(run=RunConfig(num_rollout=4))
FROZEN = replace(NONE_CONFIG, speculative=SpeculativeConfig(algorithm=EAGLE3.name, draft_model_path="drafts/mine"))
ONLINE = replace(FROZEN, draft_training=DraftTrainingConfig(enable=True))

Row = Mapping[str, float | None]


def row(step: int, **more: float | None) -> dict[str, float | None]:
    """A step's metrics: every kind of chart has something to draw."""
    return {
        "step": step,
        "rollout/reward_mean": 0.25 + step / 8,
        "rollout/reward_mean/add10": 0.25 + step / 8,
        "rollout/response_len_mean": 30.0 - step,
        "rollout/response_len_max": 40.0,
        "rollout/weight_version_max": float(step),
        "rollout/spec_accept_length": 2.0 + step / 4,
        "spec/break_even_length": 2.5,
        "spec/net_speedup_est": 0.9 + step / 10,
        "spec/net_speedup_err": 0.05,
        "spec/verify_rounds": 100.0 * (step + 1),
        "spec/accept_rate_cum_pos_0": 0.5 + step / 10,
        "spec/accept_rate_cum_pos_1": 0.25 + step / 10,
        "spec/accept_length_by_version/7": 3.5,
        "train/train_rollout_logprob_abs_diff": 1e-6 * (step + 1),
        "train/grad_norm": 1.5,
        "train/draft_loss": 1.0 / (step + 1),
        "train/draft_accept_pos_0": 0.75,
        "perf/rollout_time": 2.0,
        "perf/train_time": 5.0,
        "perf/draft_train_time": 1.0,
        "perf/sync_time": 0.5,
        "perf/step_time": 8.0,
        "sync/seconds": 0.25,
        "sync/bytes": 538060032.0,
        "sync/checksum_ok": 1.0,
        "engine/restarts": 0.0,
        **{name.replace("__", "/"): value for name, value in more.items()},
    }


def sample(step: int, prompt_id: int, index: int = 0, **more: object) -> dict[str, object]:
    meta = {"completion_tokens": 7, "spec_verify_ct": 3, "spec_accept_length": 7 / 3}
    fields = {
        "task": "add10",
        "sample": index,
        "prompt": f"What is {prompt_id} + 1?",
        "reply": f"{step}",
        "answer": "5",
    }
    return {"rollout_id": step, "prompt_id": prompt_id, **fields, "reward": 1.0, "error": "", "meta_info": meta, **more}


def run_folder(
    path: Path, rows: Sequence[Row], config: Config = NONE_CONFIG, samples: Sequence[Mapping[str, object]] = ()
) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "command.txt").write_text("cd /work\nslime-spec train\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    if samples:
        (path / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    return path
