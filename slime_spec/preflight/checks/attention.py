"""These checks are about attention backends: not every backend can verify trees, and not every backend can draft."""

from __future__ import annotations

from slime_spec.algorithms import listed, names
from slime_spec.preflight.facts import Facts
from slime_spec.preflight.finding import Severity, Sighting, on_sglang, trap

PAGED_TREES = ("fa3", "triton", "flashinfer")
# Backends that cannot express a tree and set the page size themselves (0.5.21: _mla_backend_page_constraints).
OWN_PAGE_SIZE = {"flashmla": 64, "trtllm_mla": 64, "cutedsl_mla": 64, "tokenspeed_mla": 64}
DRAFT_BACKENDS = (
    *("flashinfer", "triton", "intel_amx", "intel_xpu", "aiter", "fa3", "fa4", "flashmla", "trtllm_mha", "trtllm_mla"),
    *("cutedsl_mla", "tokenspeed_mla", "dsa", "nsa", "ascend", "dsv4", "compressed", "qsa"),
)
ON_CPU = ("intel_amx", "torch_native", "flex_attention")
CANNOT_VERIFY = ("torch_native", "flex_attention")
DOCS = "https://docs.sglang.ai/advanced_features/attention_backend.html"


@trap(
    "cpu-backend",
    "On a CPU SGLang has two attention backends; with one for GPUs the server ends while loading.",
    "https://docs.sglang.io/platforms/cpu_server.html",
    applies=on_sglang,
)
def cpu_backend(facts: Facts) -> Sighting | None:
    if facts.on_gpu or facts.config.sglang_server.external_addrs or facts.attention_backend in (None, *ON_CPU):
        return None
    return Sighting(
        Severity.ERROR,
        f"servers on the CPU with attention backend {facts.attention_backend}",
        "Pass --sglang-attention-backend intel_amx.",
        ("--sglang-attention-backend", "intel_amx"),
    )


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


@trap(
    "draft-backend",
    "A draft's passes take the target's attention backend unless they have their own, and need one that knows them; "
    "the server refuses any other.",
    DOCS,
)
def draft_backend(facts: Facts) -> Sighting | None:
    own = facts.flags.get("speculative_draft_attention_backend")
    backend = own or facts.attention_backend
    if facts.draft is None or backend in (None, *DRAFT_BACKENDS) or (own is None and backend in CANNOT_VERIFY):
        return None
    return Sighting(
        Severity.ERROR,
        f"--speculative-draft-attention-backend {own}" if own else f"drafts with attention backend {backend}",
        f"Pass --speculative-draft-attention-backend {'fa3' if facts.on_gpu else 'intel_amx'}.",
        ("--speculative-draft-attention-backend", "fa3" if facts.on_gpu else "intel_amx"),
    )


@trap(
    "tree-page-size",
    "A tree's branches share the last page of their prefix, which few backends can express with pages of several "
    "tokens; the others refuse to start. Some backends set the page size themselves, whatever is asked for.",
    DOCS,
)
def tree_page_size(facts: Facts) -> Sighting | None:
    backend = facts.flags.get("attention_backend")
    page_size = OWN_PAGE_SIZE.get(str(backend), facts.page_size)
    if page_size == 1 or facts.shape.topk == 1:
        return None
    is_trie = facts.config.speculative.record.takes_corpus
    able = ("flashinfer",) if is_trie else PAGED_TREES
    if backend in able:
        return None
    name = "--speculative-ngram-max-bfs-breadth" if is_trie else "--speculative-eagle-topk"
    is_forced = backend in OWN_PAGE_SIZE
    return Sighting(
        Severity.ERROR if backend else Severity.WARNING,
        f"page size {page_size}, {facts.shape.topk} branches and attention backend {backend or 'left to SGLang'}",
        f"Pass {'' if is_forced else '--sglang-page-size 1, or '}{name} 1, or "
        f"--sglang-attention-backend {' or '.join(able)}.",
        ("--sglang-attention-backend", able[0]) if is_forced else ("--sglang-page-size", "1"),
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
    f"{listed(names(lambda each: not each.beside_dp_attention), 'and')} do not work with attention that is parallel "
    "over data; the server refuses.",
    "https://docs.sglang.ai/advanced_features/speculative_decoding.html",
)
def dp_attention(facts: Facts) -> Sighting | None:
    algorithm = facts.config.speculative.record
    if not facts.flags.get("enable_dp_attention") or algorithm.beside_dp_attention:
        return None
    return Sighting(
        Severity.ERROR,
        f"--sglang-enable-dp-attention with {algorithm.name}",
        f"Pass --no-sglang-enable-dp-attention, or draft with {listed(names(lambda each: each.runs_as_eagle))}.",
        ("--no-sglang-enable-dp-attention",),
    )
