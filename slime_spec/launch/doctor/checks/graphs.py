"""CUDA graphs are captured for some batch sizes; a batch between two of them is padded, and that is where it broke."""

from __future__ import annotations

from slime_spec.launch.doctor.facts import DENSE_GRAPH_SIZES, Facts
from slime_spec.launch.doctor.finding import Severity, Sighting, trap

REWORKED = (0, 5, 13)  # graph runners whose masks have room for the whole padded batch (#23906)
WIDER = ("--sglang-cuda-graph-bs", *(str(size) for size in DENSE_GRAPH_SIZES))
WIDER_TEXT = "--sglang-cuda-graph-bs $(seq 1 32) $(seq 40 8 64) $(seq 80 16 160)"


def _flashinfer(facts: Facts) -> bool:
    draft = facts.flags.get("speculative_draft_attention_backend")
    return "flashinfer" in (facts.attention_backend, draft)


@trap(
    "flashinfer-graph-padding",
    "flashinfer plans for the padded batch of a CUDA graph read memory that is not theirs, in draft passes at batch "
    "sizes that were not captured; it shows after minutes, as an illegal memory access. Such batches occur whenever "
    "samples end one by one, which in a rollout is always.",
    "9888",
    "9521",
    "10892",
)
def flashinfer_graph_padding(facts: Facts) -> Sighting | None:
    if not (_flashinfer(facts) and facts.uses_graphs) or facts.graph_sizes_are_dense:
        return None
    return Sighting(
        Severity.ERROR if facts.release.version < REWORKED else Severity.WARNING,
        f"attention backend flashinfer with speculation, CUDA graphs, and gaps between captured batch sizes up to "
        f"{facts.config.engine.max_running_requests} (SGLang {facts.release.text})",
        f"Pass --sglang-attention-backend fa3 (or triton); to stay with flashinfer: {WIDER_TEXT}. Reproduce with "
        "--debug-rollout-only.",
        ("--sglang-attention-backend", "fa3"),
    )


@trap(
    "graph-padding-switch",
    "--disable-cuda-graph-padding was tried against the crashes of padded batches and does not help.",
    "9888",
    "9521",
)
def graph_padding_switch(facts: Facts) -> Sighting | None:
    if not facts.flags.get("disable_cuda_graph_padding"):
        return None
    return Sighting(
        Severity.WARNING,
        "--sglang-disable-cuda-graph-padding is given with speculation",
        f"Drop it; pass --sglang-attention-backend fa3 or triton, or {WIDER_TEXT}.",
    )


@trap(
    "tree-mask-padding",
    "The tree's attention mask of a verify pass had the size of the batch before padding, and the kernel read beyond "
    "it: an illegal memory access in target verify, first seen with MiMo.",
    "9481",
    "9687",
    "6309",
)
def tree_mask_padding(facts: Facts) -> Sighting | None:
    if facts.release.version >= REWORKED or facts.shape.topk == 1 or not facts.uses_graphs:
        return None
    if facts.attention_backend not in (None, "flashinfer") or facts.graph_sizes_are_dense:
        return None
    return Sighting(
        Severity.ERROR,
        f"SGLang {facts.release.text} verifies trees (topk {facts.shape.topk}) in padded CUDA graphs with attention "
        f"backend {facts.attention_backend or 'of its choice'}",
        f"Pass --sglang-attention-backend fa3, or {WIDER_TEXT}, or use SGLang 0.5.13 or newer.",
        ("--sglang-attention-backend", "fa3"),
    )
