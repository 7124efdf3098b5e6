"""The file eval/step_N.jsonl in a run's folder has one evaluation: a line of each set, then one of each sample."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from slime_spec.files import write_whole
from slime_spec.rl.evaluation import Evaluated
from slime_spec.rl.samples_file import sample_row

logger = logging.getLogger(__name__)


def write_evaluation(path: Path, step: int, evaluated: Sequence[Evaluated], with_samples: bool) -> None:
    """Write one evaluation; a disk that refuses the file costs the file and a warning, never the run::

    {"step": 20, "set": "aime", "metrics": {"eval/aime": 0.31, "eval/aime/pass@1": 0.31, ...}}
    {"step": 20, "set": "aime", "prompt_id": 17, "sample": 0, "prompt": ..., ...as in samples.jsonl}
    """
    text = "".join(f"{line}\n" for line in _lines(step, evaluated, with_samples))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        logger.warning("evaluation not written path=%s step=%d: %s", path, step, error)


def _lines(step: int, evaluated: Sequence[Evaluated], with_samples: bool) -> Iterator[str]:
    for each in evaluated:
        yield json.dumps({"step": step, "set": each.name, "metrics": dict(each.metrics)})
    for each in evaluated if with_samples else ():
        for sample in each.samples:
            row = {"step": step, "set": each.name, **sample_row(step, sample)}
            del row["rollout_id"]  # of training
            # A task of the user's own may give any object as the answer, and a reward may raise any text.
            yield json.dumps(row, ensure_ascii=False, default=repr)
