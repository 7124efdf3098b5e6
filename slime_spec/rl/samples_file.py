"""The file samples.jsonl has every sample of a run as a person reads it, one line each."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from slime_spec.errors import ConfigError
from slime_spec.files import LineFile
from slime_spec.sglang.metadata import meta_info
from slime_spec.types import Sample

logger = logging.getLogger(__name__)


def append_samples(path: Path, rollout_id: int, samples: Sequence[Sample]) -> None:
    """Append one line per sample; a disk that refuses them costs the lines and a warning, never the run::

    {"rollout_id": 3, "prompt_id": 17, "task": "add10", "sample": 0, "prompt": "What is 2 + 3? ...", "reply": "5",
     "answer": "5", "reward": 1.0, "error": "", "meta_info": {...SGLang's fields...}}
    """
    # A task of the user's own may give any object as the answer, and a reward may raise any text.
    lines = [json.dumps(sample_row(rollout_id, sample), ensure_ascii=False, default=repr) for sample in samples]
    try:
        with LineFile(path) as file:
            file.append(*lines)
    except ConfigError as error:
        logger.warning("samples not written path=%s rollout_id=%d samples=%d: %s", path, rollout_id, len(lines), error)


def sample_row(rollout_id: int, sample: Sample) -> dict[str, object]:
    """Return a sample's line as plain data; see append_samples."""
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
