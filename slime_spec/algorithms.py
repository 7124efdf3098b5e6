"""Each speculative algorithm is one record, which holds everything that differs between algorithms.

Adding an algorithm takes a record here and, for the embedded engine, a drafter. Other files ask the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slime_spec.errors import ConfigError

if TYPE_CHECKING:
    from slime_spec.config.speculative import SpeculativeConfig

DraftSource = Literal["text", "model", "head", "target"]
Numbers = tuple[int, int, int]  # num_steps, eagle_topk, num_draft_tokens
LOOKUP_DRAFT_TOKENS = 5
HISTORY_DRAFT_TOKENS = 8
NGRAM_DRAFT_TOKENS = 12
BLOCK_DRAFT_TOKENS = 16
# SGLang's automatic numbers, and the targets it drafts trees for.
AUTO_TREE: Numbers = (5, 4, 8)
AUTO_CHAIN: Numbers = (3, 1, 4)
# What a controller may choose from, where no numbers are given: chains up to seven drafts, of which it drafts fewer.
CONTROLLED_CHAIN: Numbers = (7, 1, 8)
TREE_ARCHITECTURES = ("LlamaForCausalLM", "Grok1ForCausalLM", "Grok1VForCausalLM")
# Settings of a draft model and its verification; each is an error with an algorithm that does not read it.
OF_DRAFT_MODEL = ("draft_model_path", "draft_model_quantization", "use_rejection_sampling", "use_block_verification")
_EVERY_ROUND = ("num_draft_tokens", "accept_threshold_single", "accept_threshold_acc", "lossy")
_THREE_NUMBERS = ("num_steps", "eagle_topk", *_EVERY_ROUND, "history")
_OF_THE_TRIE = (
    *("ngram_min_bfs_breadth", "ngram_max_bfs_breadth", "ngram_match_type", "ngram_max_trie_depth", "ngram_capacity"),
    *("ngram_external_corpus_path", "ngram_external_sam_budget", "ngram_external_corpus_max_tokens"),
)
_BLOCKS = (
    "captured layer ids or a mask token that are not those it was trained with; another target's draft; a draft as old "
    "as an earlier target"
)


@dataclass(frozen=True)
class Algorithm:
    """Holds everything in which one algorithm differs from the others.

    ``sources`` say where its draft may live: in the text, a whole model, a head over the target's features, the
    target's own checkpoint. ``families`` are the draft networks it runs, its own first. ``sglang`` is the name that
    SGLang's servers report, ``rtp_llm`` the --sp-type; None where the engine does not have it. ``drafter`` is the
    embedded engine's class. ``reads`` are the settings that have an effect, besides OF_DRAFT_MODEL. ``shape`` makes
    the three numbers of a round of the settings and the target's architecture; ``controlled`` are the embedded engine's
    where none are set. ``reads_replies``: it drafts from earlier replies to the same prompt, which the training loop
    then sends with requests.
    """

    name: str
    shape: Callable[[SpeculativeConfig, str], Numbers]
    sources: tuple[DraftSource, ...] = ()
    families: tuple[str, ...] = ()
    sglang: str | None = None
    rtp_llm: str | None = None
    drafter: str | None = None
    reads: tuple[str, ...] = ()
    likely_causes: str = ""  # causes of a draft that is never accepted
    reads_replies: bool = False
    controlled: Numbers | None = CONTROLLED_CHAIN  # the most that a controller lets a round draft; None: its own shape
    fills_rounds: bool = True  # False: SGLang pads rounds, and does not report by how much
    beside_dp_attention: bool = True  # SGLang: works with attention that is parallel over data

    @property
    def speculates(self) -> bool:
        return bool(self.sources)

    @property
    def has_weights(self) -> bool:
        """Return whether a network drafts, which a push may change."""
        return self.speculates and "text" not in self.sources

    @property
    def is_whole_model(self) -> bool:
        return "model" in self.sources

    @property
    def may_be_in_target(self) -> bool:
        return "target" in self.sources

    @property
    def drafts_with_mtp_layer(self) -> bool:
        """Return whether the target's own MTP layer drafts where no other draft is named."""
        return "mtp" in self.families

    @property
    def has_numbers(self) -> bool:
        """Return whether num_steps, eagle_topk and num_draft_tokens are set together."""
        return "eagle_topk" in self.reads

    @property
    def can_sample(self) -> bool:
        """Return whether drafts can be sampled, from a network's distribution."""
        return self.has_numbers or bool(self.families)

    @property
    def runs_as_eagle(self) -> bool:
        """Return whether a network over the target's features drafts step by step, in SGLang's EAGLE worker."""
        return bool(self.families) and self.has_numbers

    @property
    def has_own_head(self) -> bool:
        """Return whether its drafts bring an output head and a vocabulary of their own, which no token map cuts."""
        return "eagle3" in self.families

    @property
    def takes_advice(self) -> bool:
        return "edit" in self.reads

    @property
    def takes_corpus(self) -> bool:
        return "ngram_external_corpus_path" in self.reads


def names(asked: Callable[[Algorithm], bool] = lambda _: True) -> tuple[str, ...]:
    """Return the names of the algorithms for which ``asked`` is true."""
    return tuple(each.name for each in ALGORITHMS.values() if asked(each))


def listed(found: Iterable[str], last: str = "or") -> str:
    """Join the names for a sentence: "A, B or C"."""
    *most, end = found
    return f"{', '.join(most)} {last} {end}" if most else end


def find_algorithm(name: str) -> Algorithm:
    """Return the record of ``name``; raises ConfigError for a name that no algorithm has."""
    if name not in ALGORITHMS:
        raise ConfigError("speculative.algorithm", f"must be one of {', '.join(ALGORITHMS)}", name, "Choose one.")
    return ALGORITHMS[name]


def algorithm_of_family(family: str) -> Algorithm:
    """Return the algorithm whose own draft family this is."""
    return next(each for each in ALGORITHMS.values() if each.families[:1] == (family,))


def reported_as(name: str) -> str:
    """Return SGLang's reported name of the algorithm ``name``; an unknown name is returned unchanged."""
    return ALGORITHMS[name].sglang or name if name in ALGORITHMS else name


def _no_draft(config: SpeculativeConfig, architecture: str) -> Numbers:
    count = config.num_draft_tokens or 1
    return count - 1, 1, count


def _text_chain(config: SpeculativeConfig, architecture: str) -> Numbers:
    num_steps = config.num_steps or (config.num_draft_tokens or LOOKUP_DRAFT_TOKENS) - 1
    return num_steps, 1, num_steps + 1


def _history_chain(config: SpeculativeConfig, architecture: str) -> Numbers:
    num_steps = config.num_steps or (config.num_draft_tokens or HISTORY_DRAFT_TOKENS) - 1
    return num_steps, 1, num_steps + 1


def _trie(config: SpeculativeConfig, architecture: str) -> Numbers:
    count = config.num_draft_tokens or NGRAM_DRAFT_TOKENS
    return count - 1, config.ngram_max_bfs_breadth, count


def _block_chain(config: SpeculativeConfig, architecture: str) -> Numbers:
    """Return the numbers of a block drafter; a checkpoint whose blocks are shorter drafts fewer tokens."""
    count = config.num_draft_tokens or BLOCK_DRAFT_TOKENS
    return count - 1, 1, count


def _network_chain(config: SpeculativeConfig, architecture: str) -> Numbers:
    """Return the numbers of a network; the default is a chain."""
    if config.num_steps is None:
        return AUTO_CHAIN
    topk = config.eagle_topk or 1
    if topk == 1 or config.num_draft_tokens is None:
        return config.num_steps, topk, config.num_steps + 1
    return config.num_steps, topk, config.num_draft_tokens


def _network_tree(config: SpeculativeConfig, architecture: str) -> Numbers:
    """Return the numbers of a network; the default is a tree for some targets.

    Sampled drafts have no siblings: SGLang would choose a tree for a Llama target and then refuse it.
    """
    if config.num_steps is None and architecture in TREE_ARCHITECTURES and not config.draws_chains:
        return AUTO_TREE
    return _network_chain(config, architecture)


NONE = Algorithm("NONE", _no_draft, sglang="NONE", rtp_llm="none", drafter="rollout.embedded.drafters.none:NoneDrafter")
LOOKUP = Algorithm(
    "LOOKUP",
    _text_chain,
    sources=("text",),
    rtp_llm="deterministic",
    drafter="rollout.embedded.drafters.lookup:LookupDrafter",
    reads=("num_steps", *_EVERY_ROUND, "min_token_match", "max_token_match", "edit"),
    likely_causes="replies that do not repeat their prompt or advice; advice for another prompt",
)
HISTORY = Algorithm(
    "HISTORY",
    _history_chain,
    sources=("text",),
    drafter="rollout.embedded.drafters.history:HistoryDrafter",
    reads=("num_steps", *_EVERY_ROUND),
    likely_causes="groups whose samples all end at once, or have little in common",
    reads_replies=True,
)
NGRAM = Algorithm(
    "NGRAM",
    _trie,
    sources=("text",),
    sglang="NGRAM",
    drafter="rollout.embedded.drafters.ngram:NgramDrafter",
    reads=(*_EVERY_ROUND, *_OF_THE_TRIE),
    controlled=None,
    likely_causes="replies that resemble neither each other nor the corpus",
    fills_rounds=False,
    beside_dp_attention=False,
)
STANDALONE = Algorithm(
    "STANDALONE",
    _network_chain,
    sources=("model",),
    sglang="STANDALONE",
    rtp_llm="vanilla",
    drafter="rollout.embedded.drafters.standalone:StandaloneDrafter",
    reads=_THREE_NUMBERS,
    likely_causes="a draft model of another tokenizer with as many tokens; a damaged checkpoint",
    beside_dp_attention=False,
)
EAGLE = Algorithm(
    "EAGLE",
    _network_tree,
    sources=("head", "target"),
    families=("eagle", "mtp"),
    sglang="EAGLE",
    rtp_llm="eagle",
    drafter="rollout.embedded.drafters.eagle:EagleDrafter",
    reads=(*_THREE_NUMBERS, "token_map"),
    likely_causes=(
        "another target's draft; hidden states from before the final norm; a draft as old as an earlier target"
    ),
)
EAGLE3 = Algorithm(
    "EAGLE3",
    _network_tree,
    sources=("head",),
    families=("eagle3",),
    sglang="EAGLE3",
    rtp_llm="eagle3",
    drafter="rollout.embedded.drafters.eagle:Eagle3Drafter",
    reads=(*_THREE_NUMBERS, "draft_norm_output_convention"),
    likely_causes=(
        "a draft lm_head that is not in its file; d2t of the other convention (offset or absolute); captured layer ids "
        "that are not the ones it was trained on; another target's draft; a draft as old as an earlier target"
    ),
)
NEXTN = Algorithm(
    "NEXTN",
    _network_tree,
    sources=("target", "head"),
    families=("mtp", "eagle"),
    sglang="EAGLE",
    rtp_llm="mtp",
    drafter="rollout.embedded.drafters.eagle:NextNDrafter",
    reads=_THREE_NUMBERS,
    likely_causes=(
        "the halves of its projection in the wrong order (hidden state, embedding); an MTP layer that the trainer "
        "neither trains nor pushes"
    ),
)
DFLASH = Algorithm(
    "DFLASH",
    _block_chain,
    sources=("head",),
    families=("dflash",),
    sglang="DFLASH",
    drafter="rollout.embedded.drafters.block_drafter:BlockDrafter",
    beside_dp_attention=False,
    reads=(*_EVERY_ROUND, "history"),
    likely_causes=_BLOCKS,
)
DSPARK = Algorithm(
    "DSPARK",
    _block_chain,
    sources=("head", "target"),
    families=("dspark",),
    sglang="DSPARK",
    rtp_llm="dspark",
    drafter="rollout.embedded.drafters.block_drafter:BlockDrafter",
    reads=(*_EVERY_ROUND, "history"),
    likely_causes=_BLOCKS,
    beside_dp_attention=False,
)
ALGORITHMS: Mapping[str, Algorithm] = {
    each.name: each for each in (NONE, LOOKUP, HISTORY, NGRAM, STANDALONE, EAGLE, EAGLE3, NEXTN, DFLASH, DSPARK)
}
