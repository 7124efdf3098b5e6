"""These settings name functions of the user's own that take part in a rollout."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import MAX_WAIT_S, SAMPLES, setting


@dataclass(frozen=True)
class CustomConfig:
    """Holds the settings of ``custom``; a function is named module.function or module:function."""

    generate: str | None = setting(
        None,
        "Function generate(args, sample, sampling_params) that makes a sample: several turns, tools, loss masks.",
        flags=("--custom-generate-function-path",),
    )
    generate_timeout_s: float = setting(
        600.0,
        "Longest call of custom.generate, seconds; a longer call costs its sample.",
        flags=("--custom-generate-timeout",),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    generate_concurrency: int = setting(
        512,
        "Samples that custom.generate makes at once.",
        flags=("--custom-generate-concurrency",),
        minimum=1,
        maximum=SAMPLES,
    )
    sample_hooks: tuple[str, ...] = setting(
        (),
        "Functions hook(args, sample) that change each sample before its reward, in turn; the flag may be repeated.",
        flags=("--rollout-sample-hook-path",),
    )
    dynamic_filter: str | None = setting(
        None,
        "nonzero_std, or a function filter(args, samples): groups that it drops are replaced by other prompts'.",
        flags=("--dynamic-sampling-filter-path",),
    )
    sample_filter: str | None = setting(
        None,
        "Function filter(args, groups) that sets remove_sample on samples that shall not count in the loss.",
        flags=("--rollout-sample-filter-path",),
    )
    reward_post_process: str | None = setting(
        None,
        "Function (args, samples) -> (raw rewards, advantages) in place of the group's normalisation.",
        flags=("--custom-reward-post-process-path",),
    )
    rollout: str | None = setting(
        None,
        "Function rollout(args, rollout_id, data_source, evaluation=False) that makes a whole step's samples.",
        flags=("--rollout-function-path",),
    )
    buffer_filter: str | None = setting(
        None,
        "Function filter(args, rollout_id, buffer, num_samples) that takes groups out of those that a rollout function "
        "added for later. Default: the first.",
        flags=("--buffer-filter-path",),
    )
    rollout_log: str | None = setting(
        None,
        "Function log(rollout_id, args, samples, extra_metrics, rollout_time) that sees each step's samples.",
        flags=("--custom-rollout-log-function-path",),
    )
    eval_log: str | None = setting(
        None,
        "Function log(rollout_id, args, data, extra_metrics) that sees each evaluation's samples, by set.",
        flags=("--custom-eval-rollout-log-function-path",),
    )

    @property
    def makes_samples(self) -> bool:
        """Return whether functions take part in making each sample."""
        return self.generate is not None or bool(self.sample_hooks)
