"""These settings say what is generated each step, and by how many engines."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import CORES, INT32, MACHINES, MAX_WAIT_S, SAMPLES, setting
from slime_spec.engines import ENGINES
from slime_spec.sampling_bounds import MAX_TEMPERATURE


@dataclass(frozen=True)
class RolloutConfig:
    """Holds the settings of ``rollout``."""

    engine: str = setting(
        "embedded",
        "Engine that generates: embedded, or sglang (its own servers; fake: for tests).",
        flags=("--rollout-engine",),
        choices=tuple(ENGINES),
    )
    num_engines: int = setting(1, "Engine actors.", flags=("--rollout-num-engines",), minimum=1, maximum=MACHINES)
    max_engine_restarts_per_hour: int | None = setting(
        None,
        "Engine processes started anew within an hour in place of those that died or hung; at the next the run ends. "
        "Default: as many as there are engines, and at least 6.",
        minimum=0,
        maximum=MACHINES,
    )
    health_check_interval_s: float = setting(
        10.0,
        "Ask every engine's process this often (s) whether it lives.",
        flags=("--rollout-health-check-interval",),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    health_check_timeout_s: float = setting(
        120.0,
        "End an engine's process that has not answered for so long (s), and replace it. A long prefill does not delay "
        "an answer.",
        flags=("--rollout-health-check-timeout",),
        above=0.0,
        maximum=MAX_WAIT_S,
    )
    num_gpus_per_engine: int = setting(
        0,
        "GPUs of one engine; 0 runs it on the CPU.",
        flags=("--rollout-num-gpus-per-engine",),
        minimum=0,
        maximum=MACHINES,
    )
    num_cpus_per_engine: int = setting(
        2,
        "CPU cores, and compute threads, of one engine.",
        flags=("--rollout-num-cpus-per-engine",),
        minimum=1,
        maximum=CORES,
    )
    batch_size: int = setting(
        8, "Prompts per rollout step.", flags=("--rollout-batch-size",), minimum=1, maximum=SAMPLES
    )
    over_sampling_batch_size: int | None = setting(
        None,
        "Prompts in progress during a step, which ends when batch_size are complete; default: no more.",
        minimum=1,
        maximum=SAMPLES,
    )
    partial_rollout: bool = setting(
        False, "Keep what over-sampling leaves unfinished; the next step goes on with it, under its newer weights."
    )
    routing_replay: bool = setting(
        False,
        "Train with the experts that the engine chose for each token (R3): engines return them, routers replay them.",
        flags=("--use-rollout-routing-replay",),
    )
    n_samples_per_prompt: int = setting(8, "Samples per prompt (the GRPO group).", minimum=1, maximum=SAMPLES)
    max_prompt_len: int = setting(
        512, "Longest prompt, tokens.", flags=("--rollout-max-prompt-len",), minimum=1, maximum=INT32
    )
    max_response_len: int = setting(
        64, "Longest response, tokens.", flags=("--rollout-max-response-len",), minimum=1, maximum=INT32
    )
    max_context_len: int | None = setting(
        None,
        "Longest sequence over all turns of a sample, tokens; default: max_prompt_len + max_response_len.",
        flags=("--rollout-max-context-len",),
        minimum=1,
        maximum=INT32,
    )
    temperature: float = setting(
        1.0,
        "Sampling temperature; 0 is greedy.",
        flags=("--rollout-temperature",),
        minimum=0.0,
        maximum=MAX_TEMPERATURE,
    )
    top_p: float = setting(1.0, "Nucleus mass kept.", flags=("--rollout-top-p",), above=0.0, maximum=1.0)
    top_k: int = setting(
        -1, "Most likely tokens kept; -1 keeps all.", flags=("--rollout-top-k",), minimum=-1, maximum=INT32
    )
    min_p: float = setting(
        0.0, "Drop tokens below this share of the likeliest.", flags=("--rollout-min-p",), minimum=0.0, maximum=1.0
    )
    stop: tuple[str, ...] = setting((), "Stop strings.", flags=("--rollout-stop",))
    stop_token_ids: tuple[int, ...] = setting(
        (), "Stop tokens besides EOS.", flags=("--rollout-stop-token-ids",), minimum=0, maximum=INT32
    )

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest sequence that a rollout may make: prompt and response."""
        return self.max_context_len or self.max_prompt_len + self.max_response_len

    @property
    def longest_is(self) -> str:
        """Return how an error names ``longest``."""
        return "max_prompt_len + max_response_len" if self.max_context_len is None else "max_context_len"
