"""NGRAM drafts trees, as SGLang does, from a trie of all requests' recent tokens and from an external corpus.

Every round inserts what a request has gained since (of its prompt only the last ``max_trie_depth`` tokens: this is no
prompt lookup), then drafts from the places where its latest tokens were seen before. The trie is shared by all
requests and outlives weight pushes, since stale statistics cost acceptance only.

As in SGLang: BFS takes the most recent continuations, PROB the most frequent; the corpus has ``external_sam_budget``
nodes of its own and is merged at the root. Not as there: an n-gram is counted once and not again in every round that
its window is still in sight; a tree that finds fewer tokens is a smaller tree, where SGLang pads it with token 0, a
real sibling that then is emitted too often; what trie and corpus both propose costs one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rollout.embedded.draft import Draft
from rollout.embedded.drafters.growth import DraftTree, Growth
from rollout.embedded.drafters.suffixes import SuffixArray
from rollout.embedded.drafters.trie import Suffixes, Trie
from rollout.embedded.drafting import DraftContext, WeightlessDrafter
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.speculation.corpus import read_corpus


class NgramDrafter(WeightlessDrafter):
    """Drafts trees from what followed the latest tokens before, in any request or in ``corpus``."""

    def __init__(self, config: SpeculativeConfig, corpus: SuffixArray | None = None) -> None:
        self._trie = Trie(config.ngram_max_trie_depth, config.ngram_capacity)
        self._growth = Growth(
            match_type=config.ngram_match_type,
            min_breadth=config.ngram_min_bfs_breadth,
            max_breadth=config.ngram_max_bfs_breadth,
            max_match=config.ngram_max_trie_depth - 1,
        )
        self._corpus, self._corpus_nodes = corpus, config.ngram_external_sam_budget if corpus is not None else 0
        self._suffixes: dict[int, Suffixes] = {}

    @classmethod
    def with_corpus(cls, config: Config, vocab_size: int) -> NgramDrafter:
        """Return the drafter with the configured external corpus, tokenised as the target's texts are.

        Raises ConfigError.
        """
        speculative = config.speculative
        path = speculative.ngram_external_corpus_path
        if path is None:
            return cls(speculative)
        tokenizer = Tokenizer.load(config.model.hf_checkpoint)
        encode = partial(tokenizer.encode, special=False)
        documents = read_corpus(path, encode, speculative.ngram_external_corpus_max_tokens, vocab_size)
        # A path of the tree may be as long as an anchor and all of the corpus's nodes together.
        longest = speculative.ngram_max_trie_depth + speculative.ngram_external_sam_budget
        return cls(speculative, SuffixArray(documents, longest))

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [self._propose(context) for context in contexts]

    def forget(self, request_key: int) -> None:
        self._suffixes.pop(request_key, None)

    def _propose(self, context: DraftContext) -> Draft:
        suffixes = self._suffixes.get(context.request_key)
        if suffixes is None:
            suffixes = self._suffixes[context.request_key] = Suffixes(epoch=self._trie.epoch)
        trie, token_ids = self._trie, context.token_ids
        trie.insert(suffixes, token_ids)
        tree = DraftTree(context.max_draft_tokens, context.max_depth)
        of_corpus = min(self._corpus_nodes, tree.max_nodes)
        if of_corpus < tree.max_nodes:
            self._growth.grow(tree, trie, trie.anchors(suffixes, token_ids), tree.max_nodes - of_corpus)
        if self._corpus is not None and of_corpus:
            anchors = self._corpus.anchors(token_ids[-self._trie.max_depth :])
            self._growth.grow(tree, self._corpus, anchors, len(tree.token_ids) + of_corpus)
        return tree.draft()
