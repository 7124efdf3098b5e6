"""Where a step's samples come from: the engines, or a saved rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.interfaces import Engines, RunState
from slime_spec.rl.requests import group_requests
from slime_spec.types import GeneratedSample, Prompt, Sample

Progress = Callable[[int, int], None]  # (samples finished, samples wanted)


class RolloutSource(Protocol):
    """Gives one step's scored samples."""

    def samples(self, state: RunState, progress: Progress) -> list[Sample]: ...


class GeneratedRollouts:
    """Samples from the engines.

    ``take_prompts(n, start)`` gives the n prompts from an id on; ``score(prompt, response)`` attaches the reward.
    """

    def __init__(
        self,
        config: Config,
        engines: Engines,
        take_prompts: Callable[[int, int], Sequence[Prompt]],
        score: Callable[[Prompt, GeneratedSample], Sample],
    ) -> None:
        self._config, self._engines, self._take_prompts, self._score = config, engines, take_prompts, score

    def samples(self, state: RunState, progress: Progress) -> list[Sample]:
        """Generate and score one step, in (prompt, sample) order whatever order the engines finished in."""
        prompts = self._take_prompts(self._config.rollout.batch_size, state.next_prompt_id)
        by_group = {str(prompt.prompt_id): prompt for prompt in prompts}
        config = self._config
        edit = config.speculative.edit and config.speculative.algorithm == "LOOKUP"
        requests = group_requests(prompts, config.rollout, config.run.seed, edit)
        wanted = sum(len(request.seeds) for request in requests)
        scored: list[Sample] = []
        progress(0, wanted)
        for response in self._engines.generate(requests):
            scored.append(self._score(by_group[response.group_id], response))
            progress(len(scored), wanted)
        return sorted(scored, key=lambda sample: (sample.prompt.prompt_id, sample.response.sample_index))


class SavedRollouts:
    """Samples of an earlier run, for train_only; ``load(rollout_id)`` reads one step's."""

    def __init__(self, load: Callable[[int], list[Sample]]) -> None:
        self._load = load

    def samples(self, state: RunState, progress: Progress) -> list[Sample]:
        loaded = self._load(state.rollout_id)
        if num_lossy := sum(sample.response.lossy for sample in loaded):
            raise ConfigError(
                "run.load_debug_rollout_data",
                f"{num_lossy} samples of rollout {state.rollout_id} were verified lossily and have no policy's law",
                "lossy",
                "Generate them again without --speculative-lossy.",
            )
        progress(len(loaded), len(loaded))
        return loaded
