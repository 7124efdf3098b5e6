"""A checkpoint folder goes through what a launch does with it: checks, readers of both engines, the model's load."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from slime_spec.bench.robustness.damage import Damage, Files
from slime_spec.bench.robustness.fuzzer import NanAnswer
from slime_spec.checkpoints.end_of_text import ReplyEnds
from slime_spec.checkpoints.model_files import TargetFiles, draft_files
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, RolloutConfig, SpeculativeConfig, TrainerConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import Composed
from slime_spec.launch.preflight import look
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams

PROMPT = tuple(range(40, 60))
NUM_TOKENS = 6


class Scratch:
    """Holds the files of whole folders in memory, and writes damaged copies of them to one place."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def written(self, files: Files, damage: Damage) -> Path:
        """Write a folder with damaged files; the one before is gone."""
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True)
        for name, data in files.items():
            if name not in damage.files:
                (self._place / name).write_bytes(data)
        damage.put(self._place)
        return self._place


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def config_of(target: Path, speculative: SpeculativeConfig | None = None) -> Config:
    """Return a small run of the embedded engine."""
    return Config(
        model=ModelConfig(hf_checkpoint=str(target)),
        rollout=RolloutConfig(max_prompt_len=200, max_response_len=50, batch_size=1, n_samples_per_prompt=2),
        engine=EngineConfig(kv_cache_gb=0.002, max_running_requests=2),
        speculative=speculative or SpeculativeConfig(),
        trainer=TrainerConfig(num_cpus_per_rank=1),
    )


def launched(config: Config) -> tuple[int, ...] | None:
    """Return the greedy tokens of a launch that starts, None where it is refused.

    Every reader is asked, also after another has refused. Raises NanAnswer for a logprob that is no number.
    """
    folder = config.model.hf_checkpoint
    cores: list[GenerationCore] = []
    steps: tuple[Callable[[], object], ...] = (
        lambda: look(Composed(config, (), frozenset())).checked().close(),
        lambda: draft_files(config, TargetFiles.read(folder)),
        lambda: ReplyEnds.read(folder),
        lambda: cores.append(Assembly(config).core(0, perf_counter)),
    )
    refused = 0
    for step in steps:
        try:
            step()
        except ConfigError as error:
            str(error).encode()  # as the command line shows it: a value may be anything that a file holds
            refused += 1
    return None if refused else _greedy_tokens(cores[0])


def _greedy_tokens(core: GenerationCore) -> tuple[int, ...]:
    samples: list[GeneratedSample] = []
    params = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    core.add(GroupRequest("damaged", PROMPT, (1,), params), samples.append)
    while core.has_work:
        core.step()
    (sample,) = samples
    if not all(map(math.isfinite, sample.logprobs)):
        raise NanAnswer(f"the logprobs are {sample.logprobs}")
    return tuple(sample.token_ids)
