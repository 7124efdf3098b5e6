"""These checks are about the number of sequences that one server decodes at once, and the memory that is left."""

from __future__ import annotations

from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, trap

MOST_CAPTURED = 160  # the widest batch that the recommended CUDA graphs cover


@trap(
    "running-requests-unset",
    "SGLang's own default with speculation is 48, without it hundreds, and this project always passes its own (64): "
    "the number decides how large verify batches get, so it should be chosen, not inherited.",
    "https://docs.sglang.ai/advanced_features/speculative_decoding.html",
)
def running_requests_unset(facts: Facts) -> Sighting | None:
    if "engine.max_running_requests" in facts.given:
        return None
    wanted = str(min(MOST_CAPTURED, facts.samples_per_engine))
    return Sighting(
        Severity.WARNING,
        f"--sglang-max-running-requests is not given ({facts.config.engine.max_running_requests} is passed); a rollout "
        f"has {facts.samples_per_engine} samples per engine",
        f"Pass --sglang-max-running-requests {wanted}.",
        ("--sglang-max-running-requests", wanted),
    )


@trap(
    "running-requests-small",
    "Samples beyond this limit wait: a rollout then takes several waves, each as long as its longest sample.",
    "https://docs.sglang.ai/advanced_features/hyperparameter_tuning.html",
)
def running_requests_small(facts: Facts) -> Sighting | None:
    limit, samples = facts.config.engine.max_running_requests, facts.samples_per_engine
    num_waves = -(-samples // limit)
    if num_waves < 2 or limit >= MOST_CAPTURED:
        return None
    wanted = str(min(MOST_CAPTURED, samples))
    return Sighting(
        Severity.WARNING,
        f"at most {limit} of an engine's {samples} samples run at once: {num_waves} waves a rollout",
        f"Pass --sglang-max-running-requests {wanted}, or more engines.",
        ("--sglang-max-running-requests", wanted),
    )


@trap(
    "memory-fraction",
    "Up to 0.5.13 SGLang sizes the KV cache without the draft's weights; its KV and the verify graphs come on top in "
    "every version, and servers with a draft run out of memory at the default.",
    "6875",
    "28855",
    "https://github.com/THUDM/slime/issues/1022",
    "https://github.com/THUDM/slime/issues/693",
)
def memory_fraction(facts: Facts) -> Sighting | None:
    if not facts.on_gpu or facts.draft is None or "mem_fraction_static" in facts.flags:
        return None
    return Sighting(
        Severity.WARNING,
        "--sglang-mem-fraction-static is not given, with a draft model",
        "Pass --sglang-mem-fraction-static 0.8, and lower it where the server runs out of memory.",
        ("--sglang-mem-fraction-static", "0.8"),
    )
