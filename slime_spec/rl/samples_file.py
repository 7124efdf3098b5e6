"""The file samples.jsonl has every sample of a run as a person reads it, one line each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from slime_spec.sglang.metadata import meta_info
from slime_spec.types import Sample


def append_samples(path: Path, rollout_id: int, samples: Sequence[Sample]) -> None:
    """Append one line per sample::

    {"rollout_id": 3, "prompt_id": 17, "task": "add10", "sample": 0, "prompt": "What is 2 + 3? ...", "reply": "5",
     "answer": "5", "reward": 1.0, "error": "", "meta_info": {...SGLang's fields...}}
    """
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(_row(rollout_id, sample), ensure_ascii=False) + "\n")


def _row(rollout_id: int, sample: Sample) -> dict[str, object]:
    return {
        "rollout_id": rollout_id,
        "prompt_id": sample.prompt.prompt_id,
        "task": sample.prompt.task,
        "sample": sample.response.sample_index,
        "prompt": sample.prompt.text,
        "reply": sample.text,
        "answer": sample.prompt.answer,
        "reward": sample.reward,
        "error": sample.error,
        "meta_info": meta_info(sample.response),
    }
