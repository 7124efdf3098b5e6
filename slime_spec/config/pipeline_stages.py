"""This module says which of a model's layers each pipeline stage has, by Megatron's rule.

The first and the last stage may be given numbers of their own; the stages left share the layers left evenly:

    61 layers, 4 stages, 13 in the last    16, 16, 16, 13
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from slime_spec.config.tree import TrainerConfig
from slime_spec.errors import ConfigError

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
FIRST_FLAG, LAST_FLAG = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"


def stage_layers(num_layers: int, trainer: TrainerConfig) -> tuple[range, ...]:
    """Return the layers of each stage, numbered from 0; raises ConfigError where the numbers do not add up.

    ``stage_layers(5, TrainerConfig(pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=2))`` is
    ``(range(0, 3), range(3, 5))``.
    """
    num_stages = trainer.pipeline_model_parallel_size
    first, last = trainer.num_layers_in_first_pipeline_stage, trainer.num_layers_in_last_pipeline_stage
    given = [each for each in (first, last) if each is not None]
    num_left, layers_left = num_stages - len(given), num_layers - sum(given)
    _check(num_layers, trainer, given, num_left, layers_left)
    evenly = [layers_left // num_left] * num_left if num_left else []
    sizes = [*([] if first is None else [first]), *evenly, *([] if last is None else [last])]
    return tuple(range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0)))


def _check(num_layers: int, trainer: TrainerConfig, given: list[int], num_left: int, layers_left: int) -> None:
    num_stages = trainer.pipeline_model_parallel_size
    if not given:
        if num_layers % num_stages:
            raise ConfigError(
                "trainer.pipeline_model_parallel_size",
                f"must divide the model's layers ({num_layers}) where no stage has a number of its own",
                num_stages,
                f"Choose another --pipeline-model-parallel-size, or pass {LAST_FLAG} "
                f"{_fitting_last(num_layers, num_stages)}.",
            )
        return
    setting, value = (
        (LAST, trainer.num_layers_in_last_pipeline_stage)
        if trainer.num_layers_in_last_pipeline_stage is not None
        else (FIRST, trainer.num_layers_in_first_pipeline_stage)
    )
    if num_stages == 1:
        rule, remedy = "is of several pipeline stages, and there is one", "Leave it out."
    elif num_left and (layers_left < num_left or layers_left % num_left):
        rule = (
            f"must leave the other {num_left} of {num_stages} stages equal numbers of the model's {num_layers} layers, "
            f"and {layers_left} are left"
        )
        remedy = f"Pass {LAST_FLAG} {_fitting_last(num_layers, num_stages)} alone, or choose other numbers."
    elif not num_left and layers_left:
        rule = f"with {FIRST} ({trainer.num_layers_in_first_pipeline_stage}) must make up all {num_layers} layers"
        remedy = f"Leave {FIRST_FLAG} out: the first stage then has what the last one leaves."
    else:
        return
    raise ConfigError(f"trainer.{setting}", rule, value, remedy)


def _fitting_last(num_layers: int, num_stages: int) -> int:
    """Return the layers of a last stage beside equal others: as many as theirs, or the most below that, if any are."""
    others = max(1, num_stages - 1)
    of_each = -(-num_layers // num_stages)
    left = num_layers - of_each * others
    return left if left > 0 else num_layers - (of_each - 1) * others
