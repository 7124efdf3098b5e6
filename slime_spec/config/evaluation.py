"""These settings say on what prompts a run is evaluated, when, and how their replies are sampled."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import INT32, SAMPLES, setting
from slime_spec.sampling_bounds import MAX_TEMPERATURE


@dataclass(frozen=True)
class EvalConfig:
    """Holds the settings of ``eval``; those of sampling and prompts without a value are the run's own."""

    interval: int | None = setting(
        None,
        "Evaluate before the first step, every so many steps and at the end. Default: never.",
        flags=("--eval-interval",),
        minimum=1,
        maximum=INT32,
    )
    prompt_data: tuple[str, ...] = setting(
        (),
        "Sets of prompts as NAME FILE NAME FILE ...; a FILE as in prompt_data (jsonl, parquet, FILE@[0:100]).",
        flags=("--eval-prompt-data",),
    )
    tasks: tuple[str, ...] = setting(
        (), "Tasks to evaluate on, each a set: built-in names or module:attribute.", flags=("--eval-task",)
    )
    config: str | None = setting(
        None, "YAML file of sets as slime's (eval: defaults, datasets), instead of NAME FILE.", flags=("--eval-config",)
    )
    num_prompts: int = setting(
        64, "Problems of each of tasks.", flags=("--eval-num-prompts",), minimum=1, maximum=SAMPLES
    )
    skip_before_train: bool = setting(
        False, "Do not evaluate before the first step.", flags=("--skip-eval-before-train",)
    )
    n_samples_per_prompt: int = setting(
        1, "Samples per prompt of evaluations.", flags=("--n-samples-per-eval-prompt",), minimum=1, maximum=SAMPLES
    )
    max_prompt_len: int | None = setting(
        None,
        "Longest prompt of evaluations, tokens. Default: rollout.max_prompt_len.",
        flags=("--eval-max-prompt-len",),
        minimum=1,
        maximum=INT32,
    )
    max_response_len: int | None = setting(
        None,
        "Longest response of evaluations, tokens. Default: rollout.max_response_len.",
        flags=("--eval-max-response-len",),
        minimum=1,
        maximum=INT32,
    )
    temperature: float | None = setting(
        None,
        "Sampling temperature of evaluations; 0 is greedy. Default: rollout.temperature.",
        flags=("--eval-temperature",),
        minimum=0.0,
        maximum=MAX_TEMPERATURE,
    )
    top_p: float | None = setting(
        None,
        "Nucleus mass kept in evaluations. Default: rollout.top_p.",
        flags=("--eval-top-p",),
        above=0.0,
        maximum=1.0,
    )
    top_k: int | None = setting(
        None,
        "Most likely tokens kept in evaluations; -1 keeps all. Default: rollout.top_k.",
        flags=("--eval-top-k",),
        minimum=-1,
        maximum=INT32,
    )
    input_key: str | None = setting(
        None, "Key of the prompt in eval.prompt_data. Default: task.input_key.", flags=("--eval-input-key",)
    )
    label_key: str | None = setting(
        None, "Key of the answer in eval.prompt_data. Default: task.label_key.", flags=("--eval-label-key",)
    )
    tool_key: str | None = setting(
        None, "Key of the tools in eval.prompt_data. Default: task.tool_key.", flags=("--eval-tool-key",)
    )
    reward: str | None = setting(
        None,
        "Reward of eval.prompt_data: a built-in name, or your own as module:function. Default: task.reward.",
        flags=("--eval-rm-type", "--eval-custom-rm-path"),
    )
    reward_key: str | None = setting(
        None,
        "Key of the number in the dict that a reward of your own gives. Default: task.reward_key.",
        flags=("--eval-reward-key",),
    )

    @property
    def has_sets(self) -> bool:
        """Return whether there is a set to evaluate on."""
        return bool(self.prompt_data or self.tasks or self.config)
