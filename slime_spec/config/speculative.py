"""The settings of speculation have SGLang's names and meanings, and RTP-LLM's where SGLang has none."""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.algorithms import EAGLE, EAGLE3, HISTORY, LOOKUP, NGRAM, NONE, Algorithm, find_algorithm, listed, names
from slime_spec.config.setting import DRAFTS, INT32, setting

UNQUANTIZED = "unquant"  # SGLang's word


@dataclass(frozen=True)
class SpeculativeConfig:
    """These settings control speculation; names and meanings are SGLang's, ``min/max_token_match`` are RTP-LLM's."""

    algorithm: str = setting(
        NONE.name,
        f"Speculation: {listed(names(lambda each: each.drafter is not None))}.",
        flags=("--sglang-speculative-algorithm",),
        choices=names(),
    )
    draft_model_path: str | None = setting(
        None, "Checkpoint folder of the draft.", flags=("--sglang-speculative-draft-model-path", "--sp-checkpoint-path")
    )
    draft_model_quantization: str | None = setting(
        None,
        "Quantise the draft's weights (never the target's): int8, or fp8 on a GPU that has it (Ada, Hopper); default: "
        "int8 on a CPU where num_steps is automatic, else unquant.",
        flags=("--sglang-speculative-draft-model-quantization",),
        choices=("int8", "fp8", UNQUANTIZED),
    )
    num_steps: int | None = setting(
        None,
        "Depth of a draft. Default, or auto: the embedded engine drafts as deep as pays, round by round; SGLang's own.",
        flags=("--sglang-speculative-num-steps",),
        is_automatic=True,
        minimum=1,
        maximum=DRAFTS,
    )
    eagle_topk: int | None = setting(
        None,
        "Branches per step; 1 drafts a chain.",
        flags=("--sglang-speculative-eagle-topk",),
        minimum=1,
        maximum=DRAFTS,
    )
    num_draft_tokens: int | None = setting(
        None,
        "Tokens verified per round, the root included; default: by algorithm.",
        flags=("--sglang-speculative-num-draft-tokens",),
        minimum=2,
        maximum=DRAFTS,
    )
    accept_threshold_single: float = setting(
        1.0,
        "Accept any drafted token this likely; below 1 the output distribution is bent (needs lossy).",
        flags=("--sglang-speculative-accept-threshold-single",),
        above=0.0,
        maximum=1.0,
    )
    accept_threshold_acc: float = setting(
        1.0,
        "Divide the acceptance uniform's threshold by this; below 1 the output distribution is bent (needs lossy).",
        flags=("--sglang-speculative-accept-threshold-acc",),
        above=0.0,
        maximum=1.0,
    )
    lossy: bool = setting(
        False, "Allow thresholds below 1, in rollout_only; every sample is marked.", flags=("--speculative-lossy",)
    )
    use_rejection_sampling: bool = setting(
        False,
        "Sample drafts and verify them by rejection sampling.",
        flags=("--sglang-speculative-use-rejection-sampling",),
    )
    use_block_verification: bool = setting(
        False,
        "Rejection sampling that judges a draft as one block (arXiv 2403.10444).",
        flags=("--sglang-speculative-use-block-verification",),
    )
    use_gumbel_coupling: bool = setting(
        False,
        "Draw tokens by races with noise that drafts share (embedded engine, CPU): drafts are sampled, and speculation "
        "changes no token of a seed.",
        flags=("--speculative-use-gumbel-coupling",),
    )
    draft_temperature: float | None = setting(
        None,
        "Temperature of sampled drafts over the request's own (embedded engine). Default, or auto: the engine chooses "
        "it by how much earlier drafts had in common with the policy; 1 where a seed's tokens would come to depend on "
        "that, which is under rejection sampling and block verification where a number of a draft is set.",
        flags=("--speculative-draft-temperature",),
        is_automatic=True,
        minimum=0.01,
        maximum=10.0,
    )
    token_map: str | None = setting(
        None, f"{EAGLE.name}: file of the hot token ids its head is cut to.", flags=("--sglang-speculative-token-map",)
    )
    draft_norm_output_convention: str = setting(
        "sglang",
        f"{EAGLE3.name}: what norm_output in the draft's config means: sglang (recurrence after the norm) or "
        "specforge.",
        flags=("--draft-norm-output-convention",),
        choices=("sglang", "specforge"),
    )
    history: bool | None = setting(
        None,
        f"Draft as {HISTORY.name} does before any draft model, where that promises as many tokens; default: where "
        f"num_steps is automatic. On SGLang, with {NGRAM.name}: feed its corpus with the same replies.",
        flags=("--speculative-history",),
    )
    min_token_match: int = setting(
        2,
        f"{LOOKUP.name}: shortest suffix that counts as a match.",
        flags=("--sp-min-token-match",),
        minimum=1,
        maximum=DRAFTS,
    )
    max_token_match: int = setting(
        4,
        f"{LOOKUP.name}: longest suffix tried.",
        flags=("--sp-max-token-match",),
        minimum=1,
        maximum=DRAFTS,
    )
    edit: bool = setting(
        False,
        f"{LOOKUP.name}: take the advice (or the prompt) for an earlier version of the reply and search it forward "
        "only.",
        flags=("--sp-edit",),
    )
    ngram_min_bfs_breadth: int = setting(
        1,
        f"{NGRAM.name}: least children of a node.",
        flags=("--sglang-speculative-ngram-min-bfs-breadth",),
        minimum=1,
        maximum=DRAFTS,
    )
    ngram_max_bfs_breadth: int = setting(
        10,
        f"{NGRAM.name}: most children of a node.",
        flags=("--sglang-speculative-ngram-max-bfs-breadth",),
        minimum=1,
        maximum=DRAFTS,
    )
    ngram_match_type: str = setting(
        "BFS",
        f"{NGRAM.name}: BFS takes the most recent continuations, PROB the most frequent.",
        flags=("--sglang-speculative-ngram-match-type",),
        choices=("BFS", "PROB"),
    )
    ngram_max_trie_depth: int = setting(
        18,
        f"{NGRAM.name}: longest n-gram kept.",
        flags=("--sglang-speculative-ngram-max-trie-depth",),
        minimum=2,
        maximum=DRAFTS,
    )
    ngram_capacity: int = setting(
        10_000_000,
        f"{NGRAM.name}: trie nodes kept.",
        flags=("--sglang-speculative-ngram-capacity",),
        minimum=1,
        maximum=INT32,
    )
    ngram_external_corpus_path: str | None = setting(
        None,
        f"{NGRAM.name}: jsonl file of texts or token ids to draft from besides the requests.",
        flags=("--sglang-speculative-ngram-external-corpus-path",),
    )
    ngram_external_sam_budget: int = setting(
        0,
        f"{NGRAM.name}: draft nodes taken from the external corpus per round.",
        flags=("--sglang-speculative-ngram-external-sam-budget",),
        minimum=0,
        maximum=DRAFTS,
    )
    ngram_external_corpus_max_tokens: int = setting(
        10_000_000,
        f"{NGRAM.name}: tokens of the external corpus read.",
        flags=("--sglang-speculative-ngram-external-corpus-max-tokens",),
        minimum=1,
        maximum=INT32,
    )

    @property
    def record(self) -> Algorithm:
        """Return what the algorithm is; raises ConfigError for a name that none has."""
        return find_algorithm(self.algorithm)

    @property
    def is_automatic(self) -> bool:
        """Return whether the engine decides, round by round, how much to draft: no number that it reads is set."""
        numbers = [name for name in ("num_steps", "num_draft_tokens") if name in self.record.reads]
        return self.record.speculates and all(getattr(self, name) is None for name in numbers)

    @property
    def samples_drafts(self) -> bool:
        """Return whether verification must know the distribution that a draft's tokens were drawn from."""
        return self.use_rejection_sampling or self.use_block_verification

    @property
    def draws_chains(self) -> bool:
        """Return whether a network's chains are drawn from its distribution: only chains can be."""
        return self.samples_drafts or self.use_gumbel_coupling
