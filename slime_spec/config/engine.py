"""These settings are the flags `--sglang-<flag>` that the embedded engine understands too, and its own."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.setting import INT32, SAMPLES, setting

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """Holds the settings of ``engine``."""

    dtype: str = setting(
        "float32", "Weights and compute dtype of the engine.", flags=("--sglang-dtype",), choices=DTYPES
    )
    context_length: int | None = setting(
        None,
        "Longest sequence, tokens; default: the model's.",
        flags=("--sglang-context-length",),
        minimum=2,
        maximum=INT32,
    )
    max_running_requests: int = setting(
        64,
        "Sequences decoded at once.",
        flags=("--sglang-max-running-requests",),
        minimum=1,
        maximum=SAMPLES,
    )
    max_total_tokens: int | None = setting(
        None,
        "KV cache bound, tokens; default: from kv_cache_gb.",
        flags=("--sglang-max-total-tokens",),
        minimum=2,
        maximum=10**12,
    )
    kv_cache_gb: float = setting(1.0, "KV cache bound, GB, where max_total_tokens is not set.", above=0.0, maximum=1e6)
    disable_radix_cache: bool = setting(
        False,
        "Compute every prompt from its first token on; default: what prompts begin alike with is computed once.",
        flags=("--sglang-disable-radix-cache",),
    )
    cost_probe_interval: int = setting(
        128,
        "Embedded: time a plain decode step once in this many rounds with drafts, for spec/net_speedup_est; 0: never.",
        minimum=0,
        maximum=INT32,
    )
    cuda_graphs: bool = setting(
        True, "Embedded, on a GPU: run passes in fused kernels and captured graphs; false: operator by operator."
    )
