"""EvalPrompts are the prompts of one evaluation set, tokenised once, with what scores their replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.eval_sets import EvalSet, as_of_evaluation
from slime_spec.config.tree import RolloutConfig
from slime_spec.errors import ConfigError, each_of, raise_all
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.tasks.source import PromptSource, check_data
from slime_spec.types import GeneratedSample, Prompt


@dataclass(frozen=True)
class EvalPrompts:
    """Holds a set's prompts in order; ``rollout`` says how their replies are sampled, from ``seed`` on. Example::

    prompts = EvalPrompts.load(EvalSet("aime", config), tokenizer)
    samples = prompts.score(prompts.prompts[0], responses)()
    """

    name: str
    prompts: tuple[Prompt, ...]
    rollout: RolloutConfig
    seed: int
    source: PromptSource

    @classmethod
    def load(cls, eval_set: EvalSet, tokenizer: Tokenizer) -> EvalPrompts:
        """Read a set; raises ConfigError, in the words of eval.*, for data, a task or a reward that cannot work."""
        config = eval_set.config
        try:
            source = PromptSource(config, tokenizer, may_lack=eval_set.may_lack)
            try:
                prompts = source.rows() if eval_set.num_problems is None else source.take(eval_set.num_problems, 0)
            except BaseException:
                source.close()
                raise
        except ConfigError as error:
            raise as_of_evaluation(error, eval_set.name) from None
        return cls(eval_set.name, prompts, config.rollout, config.run.seed, source)

    def take(self, n: int, start_prompt_id: int) -> tuple[Prompt, ...]:
        """Return n of the set's prompts, from one on; see PromptSource."""
        return self.prompts[start_prompt_id : start_prompt_id + n]

    @property
    def text(self) -> str:
        """Return the set in words: ``aime, 30 prompts x 16 samples, at most 512 + 8192 tokens, temperature 1``."""
        rollout = self.rollout
        return (
            f"{self.name}, {len(self.prompts)} prompts x {rollout.n_samples_per_prompt} samples, at most "
            f"{rollout.max_prompt_len} + {rollout.max_response_len} tokens, temperature {rollout.temperature:g}"
        )

    def score(self, prompt: Prompt, responses: Sequence[GeneratedSample]) -> PendingSamples:
        """Begin to score a prompt's responses; see PromptSource."""
        return self.source.score(prompt, responses)

    def close(self) -> None:
        """End the processes of rewards."""
        self.source.close()


def check_set(eval_set: EvalSet, runs_reward: str) -> None:
    """Raise ConfigError as EvalPrompts.load, as far as no tokenizer is needed to know; not of the run's own reward."""
    try:
        with_reward = eval_set.config.task.reward != runs_reward
        check_data(eval_set.config, with_reward, eval_set.may_lack)
    except ConfigError as error:
        raise_all(as_of_evaluation(each, eval_set.name) for each in each_of(error))
