"""The draft's shape says what one round drafts and verifies: SGLang's three numbers, resolved by its rules.

all three unset                 by algorithm and target: AUTO_TREE or AUTO_CHAIN
num_steps S                     a chain (eagle_topk 1) of S drafts, whatever num_draft_tokens says
S, eagle_topk K, N tokens       the best N - 1 of a pool of K + (S - 1) K^2 drafts, and the root
a trie of n-grams               N tokens in whatever shape the trie has; S and K are not used
a suffix looked up              a chain: S drafts, or N - 1

The embedded engine, with no number set, decides round by round: see ``embedded_shape`` and the controller
(slime_spec/speculation/controller.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import ConfigError


@dataclass(frozen=True)
class DraftShape:
    """Holds the shape of a draft: depth, branches per step, and tokens verified per round (root included).

    ``has_network`` says that the drafter caches keys and values of its own. Example: ``DraftShape(5, 4, 8, True)``
    """

    num_steps: int
    topk: int
    num_draft_tokens: int
    has_network: bool

    @property
    def headroom(self) -> int:
        """Return the KV positions that a round may write beyond the committed ones, in the target's or drafter's cache.

        The target writes the root and its nodes. A drafter writes the root and, at each step but the last (whose
        drafts it never reads), every branch; what it recomputes afterwards overwrites these positions.
        """
        drafted = 1 + (self.num_steps - 1) * self.topk if self.has_network else 0
        return max(self.num_draft_tokens, drafted)


def draft_shape(config: SpeculativeConfig, architecture: str) -> DraftShape:
    """Resolve checked settings for a target of ``architecture`` (config.json's name, e.g. LlamaForCausalLM)."""
    return DraftShape(*config.record.shape(config, architecture), has_network=config.record.has_weights)


def embedded_shape(config: SpeculativeConfig, architecture: str) -> DraftShape:
    """Return the shape in the embedded engine: that of ``draft_shape``, or the most that its controller may draft."""
    record = config.record
    if config.is_automatic and record.controlled is not None:
        return DraftShape(*record.controlled, has_network=record.has_weights)
    return draft_shape(config, architecture)


def forced_draft_tokens(config: SpeculativeConfig) -> int | None:
    """Return the num_draft_tokens that a chain's num_steps force instead of the setting.

    None where nothing is forced.
    """
    if config.num_steps is None or config.num_draft_tokens in (None, config.num_steps + 1):
        return None
    is_tree = config.record.has_numbers and (config.eagle_topk or 1) > 1
    is_chain = "num_steps" in config.record.reads and not is_tree
    return config.num_steps + 1 if is_chain else None


def tree_pool_size(num_steps: int, topk: int) -> int:
    """Count drafts that a tree's search scores: ``topk`` at the first step, ``topk`` children of every beam later."""
    return topk + (num_steps - 1) * topk**2


def check_shape(config: SpeculativeConfig) -> None:
    """Raise ConfigError where the three numbers of a draft model contradict each other."""
    if not config.record.has_numbers:
        return
    num_steps, topk, count = config.num_steps, config.eagle_topk, config.num_draft_tokens
    if num_steps is None:
        for name, value in (("eagle_topk", topk), ("num_draft_tokens", count)):
            if value is not None:
                raise ConfigError(
                    f"speculative.{name}",
                    "needs speculative.num_steps: the three numbers of a draft are set together or left to their "
                    "automatic values together",
                    value,
                    "Add --speculative-num-steps S, or leave all three out.",
                )
        return
    if topk is None or topk == 1:
        return
    pool = tree_pool_size(num_steps, topk)
    rule = f"must be from 2 to {pool + 1} for a tree of num_steps={num_steps} and eagle_topk={topk}: its root and "
    if count is None or count - 1 > pool:
        raise ConfigError(
            "speculative.num_draft_tokens",
            f"{rule}the {pool} drafts it scores",
            count,
            f"Pass --speculative-num-draft-tokens {min(pool + 1, 2 * num_steps + 1)}, or more steps or branches.",
        )
