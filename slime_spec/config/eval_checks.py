"""These checks refuse evaluations that cannot be made, and note settings of evaluations without effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from slime_spec.config.eval_sets import PAIRS, eval_sets, given_flags
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.types import is_greedy


def check_evaluation(config: Config) -> None:
    """Raise ConfigError for the first contradiction; the file of --eval-config is read later, by the preflight."""
    asked = config.eval
    if asked.interval is not None and not asked.has_sets:
        rule = "needs prompts to evaluate on"
        raise ConfigError("eval.interval", rule, asked.interval, f"{PAIRS} Or pass --eval-task NAME.")
    if asked.config is not None and asked.prompt_data:
        rule = "a run's sets are named in a file or on the command line"
        raise ConfigError("eval.config", rule, asked.config, "Drop --eval-config, or drop --eval-prompt-data.")
    if asked.top_k == 0:
        raise ConfigError("eval.top_k", "keeps no token at all", 0, "Pass --eval-top-k -1 to keep every token.")
    eval_sets(replace(config, eval=replace(asked, config=None)))


def evaluation_notes(config: Config) -> Iterator[str]:
    """Yield a note where settings of evaluations have no effect."""
    if config.evaluates:
        yield from _note_on_greedy_samples(config)
        return
    flags = given_flags(config)
    if config.run.mode == "train_only" and config.eval.interval is not None:
        yield "A run without engines evaluates nothing, and --eval-interval has no effect."
    elif flags:
        yield f"Nothing is evaluated without --eval-interval: {', '.join(flags)} {_have(flags)} no effect."


def _note_on_greedy_samples(config: Config) -> Iterator[str]:
    asked, rollout = config.eval, config.rollout
    temperature = rollout.temperature if asked.temperature is None else asked.temperature
    top_k = rollout.top_k if asked.top_k is None else asked.top_k
    if asked.n_samples_per_prompt > 1 and (is_greedy(temperature) or top_k == 1):
        yield f"Evaluations are greedy, and the {asked.n_samples_per_prompt} samples of each prompt are all the same."


def _have(flags: list[str]) -> str:
    return "has" if len(flags) == 1 else "have"
