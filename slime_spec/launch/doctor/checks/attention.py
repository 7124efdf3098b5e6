"""Which attention backends can verify trees, and which can draft."""

from __future__ import annotations

from slime_spec.launch.doctor.facts import Facts
from slime_spec.launch.doctor.finding import Severity, Sighting, trap

PAGED_TREES = ("flashinfer", "fa3", "triton")
DRAFT_BACKENDS = (
    *("flashinfer", "triton", "intel_amx", "intel_xpu", "aiter", "fa3", "fa4", "flashmla", "trtllm_mha", "trtllm_mla"),
    *("cutedsl_mla", "dsa", "nsa", "ascend", "dsv4"),
)
CANNOT_VERIFY = ("torch_native", "flex_attention")
DOCS = "https://docs.sglang.ai/advanced_features/attention_backend.html"


@trap(
    "verify-backend",
    "These backends have no verify pass: the server starts, and ends at the first drafted token.",
    DOCS,
)
def verify_backend(facts: Facts) -> Sighting | None:
    backend = facts.attention_backend
    if backend not in CANNOT_VERIFY:
        return None
    instead = "fa3" if facts.on_gpu else "intel_amx"
    return Sighting(
        Severity.ERROR,
        f"attention backend {backend} with speculation",
        f"Pass --sglang-attention-backend {instead}.",
        ("--sglang-attention-backend", instead),
    )


@trap("draft-backend", "A draft's passes need a backend that knows them; the server refuses any other.", DOCS)
def draft_backend(facts: Facts) -> Sighting | None:
    backend = facts.flags.get("speculative_draft_attention_backend")
    if facts.draft is None or backend in (None, *DRAFT_BACKENDS):
        return None
    return Sighting(
        Severity.ERROR,
        f"--speculative-draft-attention-backend {backend}",
        "Pass --speculative-draft-attention-backend fa3, or leave it out.",
        ("--speculative-draft-attention-backend", "fa3"),
    )


@trap(
    "tree-page-size",
    "A tree's branches share the last page of their prefix, which few backends can express; the others refuse.",
    DOCS,
)
def tree_page_size(facts: Facts) -> Sighting | None:
    if facts.page_size == 1 or facts.shape.topk == 1:
        return None
    is_ngram = facts.config.speculative.algorithm == "NGRAM"
    able = ("flashinfer",) if is_ngram else PAGED_TREES
    if facts.attention_backend in able:
        return None
    name = "--speculative-ngram-max-bfs-breadth" if is_ngram else "--speculative-eagle-topk"
    return Sighting(
        Severity.ERROR,
        f"page size {facts.page_size}, {facts.shape.topk} branches and attention backend "
        f"{facts.attention_backend or 'of SGLang’s choice'}",
        f"Pass --sglang-page-size 1, or {name} 1, or --sglang-attention-backend {' or '.join(able)}.",
        ("--sglang-page-size", "1"),
    )


@trap("trtllm-chain", "trtllm_mha verifies chains only; the server refuses a tree.", DOCS)
def trtllm_chain(facts: Facts) -> Sighting | None:
    backends = [facts.flags.get(name) for name in ("attention_backend", "decode_attention_backend")]
    if "trtllm_mha" not in backends or facts.shape.topk == 1:
        return None
    return Sighting(
        Severity.ERROR,
        f"attention backend trtllm_mha with topk {facts.shape.topk}",
        "Pass --speculative-eagle-topk 1, or --sglang-attention-backend flashinfer.",
        ("--speculative-eagle-topk", "1"),
    )


@trap(
    "dp-attention",
    "STANDALONE and NGRAM do not work with attention that is parallel over data; the server refuses.",
    "https://docs.sglang.ai/advanced_features/speculative_decoding.html",
)
def dp_attention(facts: Facts) -> Sighting | None:
    algorithm = facts.config.speculative.algorithm
    if not facts.flags.get("enable_dp_attention") or algorithm not in ("STANDALONE", "NGRAM"):
        return None
    return Sighting(
        Severity.ERROR,
        f"--sglang-enable-dp-attention with {algorithm}",
        "Pass --no-sglang-enable-dp-attention, or draft with EAGLE, EAGLE3 or NEXTN.",
        ("--no-sglang-enable-dp-attention",),
    )
