"""These checks are about dtypes: one server computes target and draft in one dtype."""

from __future__ import annotations

from slime_spec.checkpoints.families import family_of
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, on_sglang, trap

HALF_ONLY = ("fa3", "fa4", "flashinfer", "flashmla", "trtllm_mha", "trtllm_mla", "cutedsl_mla")
DTYPE = "engine.dtype"


def _half(facts: Facts) -> str:
    """Return the 16-bit dtype to serve in: the draft's, unless the target's activations overflow it."""
    draft = facts.draft.dtype if facts.draft else None
    if draft in ("float16", "bfloat16") and not family_of(facts.target.architecture).overflows_float16:
        return draft
    return "bfloat16"


@trap(
    "draft-dtype",
    "The draft reads the target's hidden states, so one server computes both in one dtype. Left to each checkpoint's "
    "own, they clash in the first draft pass.",
    "3662",
)
def draft_dtype(facts: Facts) -> Sighting | None:
    draft, target = facts.draft, facts.target
    if draft is None or None in (draft.dtype, target.dtype) or draft.dtype == target.dtype or DTYPE in facts.given:
        return None
    dtype = _half(facts)
    return Sighting(
        Severity.ERROR if facts.on_gpu else Severity.WARNING,
        f"the draft is {draft.dtype}, the target {target.dtype}, and --sglang-dtype is not given "
        f"({facts.config.engine.dtype} is passed)",
        f"Pass --sglang-dtype {dtype}.",
        ("--sglang-dtype", dtype),
    )


@trap(
    "float32-attention",
    "Attention kernels for GPUs take 16-bit inputs only, and float32 weights need twice the memory.",
    "https://docs.sglang.ai/advanced_features/attention_backend.html",
    applies=on_sglang,
)
def float32_attention(facts: Facts) -> Sighting | None:
    backend = facts.attention_backend
    if not facts.on_gpu or facts.config.engine.dtype != "float32" or backend not in (None, *HALF_ONLY):
        return None
    how = "given" if DTYPE in facts.given else "the default"
    chosen = f"backend {backend}" if backend else "a backend that SGLang chooses (fa3 or flashinfer)"
    dtype = _half(facts)
    return Sighting(
        Severity.ERROR if backend else Severity.WARNING,
        f"engine.dtype is float32 ({how}) with attention {chosen}",
        f"Pass --sglang-dtype {dtype}.",
        ("--sglang-dtype", dtype),
    )


@trap(
    "float16-range",
    "float16 ends at 65504; activations of models trained in bfloat16 may exceed it, and become infinite.",
    "3662",
    applies=on_sglang,
)
def float16_range(facts: Facts) -> Sighting | None:
    if facts.config.engine.dtype != "float16" or facts.target.dtype != "bfloat16":
        return None
    is_known = family_of(facts.target.architecture).overflows_float16
    return Sighting(
        Severity.ERROR if is_known else Severity.INFO,
        f"a bfloat16 {facts.target.architecture} is served in float16",
        "Pass --sglang-dtype bfloat16, which the draft is then cast to."
        if is_known
        else "Nothing to do where train/rollout logprobs agree; else pass --sglang-dtype bfloat16.",
        ("--sglang-dtype", "bfloat16") if is_known else (),
    )
