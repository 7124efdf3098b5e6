"""These checks are about CUDA graphs: a batch of a size not captured is padded, and padded batches crashed servers."""

from __future__ import annotations

from slime_spec.algorithms import EAGLE
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, trap
from slime_spec.sglang.releases import Ability, since

WIDER_TEXT = "--sglang-cuda-graph-bs $(seq 1 32) $(seq 40 8 64) $(seq 80 16 160)"


def _flashinfer(facts: Facts) -> bool:
    draft = facts.flags.get("speculative_draft_attention_backend")
    return "flashinfer" in (facts.attention_backend, draft)


@trap(
    "flashinfer-graph-padding",
    "flashinfer plans for the padded batch of a CUDA graph read memory that is not theirs, in draft passes at batch "
    "sizes that were not captured; it shows after minutes, as an illegal memory access. Such batches occur whenever "
    "samples end one by one, which in a rollout is always. 0.5.3 mended one cause (#10892); reports went on.",
    "9888",
    "9521",
    "10892",
    "12349",
    "24361",
)
def flashinfer_graph_padding(facts: Facts) -> Sighting | None:
    if not (_flashinfer(facts) and facts.uses_graphs) or facts.graph_sizes_are_dense:
        return None
    return Sighting(
        Severity.WARNING if facts.release.does("resets_padded_positions") else Severity.ERROR,
        f"attention backend flashinfer with speculation, CUDA graphs, and gaps between captured batch sizes up to "
        f"{facts.config.engine.max_running_requests} (SGLang {facts.release.text})",
        f"Pass --sglang-attention-backend fa3 (or triton); to stay with flashinfer: {WIDER_TEXT}. Reproduce with "
        "--debug-rollout-only.",
        (*_elsewhere(facts), "--sglang-attention-backend", "fa3"),
    )


def _elsewhere(facts: Facts) -> tuple[str, ...]:
    """Return the flags that set the other flashinfer backends to fa3."""
    names = ("decode_attention_backend", "speculative_draft_attention_backend")
    return tuple(
        word
        for name in names
        if facts.flags.get(name) == "flashinfer"
        for word in (f"--sglang-{name.replace('_', '-')}", "fa3")
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
        ("--no-sglang-disable-cuda-graph-padding",),
    )


@trap(
    "mask-padding",
    "The attention mask of a verify pass had the size of the batch before padding, and flashinfer's kernel read "
    f"beyond it: an illegal memory access in target verify, first seen with MiMo. Read in the wheels: {EAGLE.name}'s "
    "mask is padded from 0.5.7, the n-gram worker's from 0.5.14.",
    "9481",
    "9687",
    "6309",
    "24361",
)
def mask_padding(facts: Facts) -> Sighting | None:
    pads: Ability = "pads_ngram_mask" if facts.config.speculative.record.takes_corpus else "pads_verify_mask"
    if facts.release.does(pads) or not facts.uses_graphs:
        return None
    if facts.attention_backend not in (None, "flashinfer") or facts.graph_sizes_are_dense:
        return None
    return Sighting(
        Severity.ERROR if facts.attention_backend else Severity.WARNING,
        f"SGLang {facts.release.text} verifies drafts in padded CUDA graphs with attention backend "
        f"{facts.attention_backend or 'left to SGLang, which may be flashinfer'}",
        f"Pass --sglang-attention-backend fa3, or {WIDER_TEXT}, or use SGLang {since(pads)} or newer.",
        (*_elsewhere(facts), "--sglang-attention-backend", "fa3"),
    )
