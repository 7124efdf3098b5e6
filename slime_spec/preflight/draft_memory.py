"""The memory of a draft in training, on the rank that holds it: what it keeps from step to step, and what a step adds.

    passes of the policy   the rows that the draft learns from, kept as they are computed
    updates of the draft   these rows, and for one update at a time its inputs, the target's head and logits

Not counted: what the draft's own layers save for the backward pass (but a block drafter's scores), and samples that are
on one data parallel rank more than on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.checkpoints.families.draft_format import DraftFormat
from slime_spec.config.draft_training import MAX_LOGITS_BYTES, loss_for, rows_of_reply
from slime_spec.config.tree import Config

FLOAT32_BYTES = 4
ADAM_STATES = 2
SCORE_BYTES = 4  # measured: 4 in bfloat16, 6.6 in float32
ITEMSIZES = {"float32": 4, "bfloat16": 2}
ARGMAX_AND_LOGSUMEXP_BYTES = 8 + FLOAT32_BYTES
# Tensors of logits that exist at once, in fp32, by loss: where a batch is computed whole at the first draft position,
# more of it by position; where it is computed in chunks. Measured by tests/preflight/test_draft_memory.py.
LOGITS_TENSORS = {
    "soft_ce": (7.1, 2.2, 6.1),
    "total_variation": (7.1, 2.2, 6.6),
    "log_acceptance": (7.1, 2.2, 6.6),
    "reverse_kl": (8.1, 3.2, 7.1),
    "lk_hybrid": (9.1, 4, 9.1),
    "top_k_soft_ce": (5.1, 1.3, 6.1),
    "cross_entropy": (5.1, 1.3, 6.1),
}


@dataclass(frozen=True)
class DraftSizes:
    """Holds a draft's sizes: of ``hidden_size`` the states that it reads, ``num_features`` of a token, its tokens."""

    family: str
    num_parameters: int
    hidden_size: int
    num_features: int
    vocab_size: int
    num_block_drafts: int = 0  # of a block drafter, whose rows are blocks
    num_heads: int = 0  # of all its layers

    @property
    def num_scores(self) -> int:
        """Return the scores that a block has with each token it sees; 0 of a draft that drafts by steps."""
        return (self.num_block_drafts + 1) * self.num_heads if self.num_block_drafts else 0

    @classmethod
    def of(
        cls, draft_format: DraftFormat, draft: Mapping[str, Any], target: Mapping[str, Any], num_parameters: int
    ) -> DraftSizes:
        """Read both config.json."""
        captured = 1 if draft_format.num_captured is None else max(1, draft_format.num_captured(draft))
        hidden = target["hidden_size"]
        vocab = draft.get("draft_vocab_size") or target["vocab_size"]
        heads = draft["num_hidden_layers"] * draft["num_attention_heads"]
        block = None if draft_format.num_block_drafts is None else draft_format.num_block_drafts(draft)
        return cls(draft_format.family, num_parameters, hidden, captured * hidden, vocab, block or 0, heads)


@dataclass(frozen=True)
class DraftMemory:
    """Holds the memory of a draft in training.

    ``replies_bytes`` are of the rows kept of ``num_replies``, from their pass until the draft has learned. One update
    has ``inputs_bytes``, the rows of the target's head in float32, and logits.
    """

    num_parameters: int
    num_replies: int
    replies_bytes: int
    inputs_bytes: int
    head_bytes: int
    logits_bytes: int
    scores_bytes: int = 0  # of a block drafter's attention, which every token of every block has over all it sees

    @property
    def state_bytes(self) -> int:
        """Return what it takes from step to step: weights, gradients and moments in float32."""
        return self.num_parameters * (2 + ADAM_STATES) * FLOAT32_BYTES

    @property
    def host_bytes(self) -> int:
        """Return what the host keeps of it where the trainer leaves its GPU."""
        return self.num_parameters * (1 + ADAM_STATES) * FLOAT32_BYTES

    @property
    def update_bytes(self) -> int:
        return self.inputs_bytes + self.head_bytes + self.logits_bytes + self.scores_bytes


def draft_memory(config: Config, sizes: DraftSizes) -> DraftMemory:
    """Return the memory of a draft that a run trains, where every reply is of the longest."""
    settings, rollout, trainer = config.draft_training, config.rollout, config.trainer
    ranks = trainer.world_size // (trainer.tensor_model_parallel_size * trainer.pipeline_model_parallel_size)
    num_samples = rollout.batch_size * rollout.n_samples_per_prompt
    of_batch = min(config.samples_per_step, num_samples)
    # A policy's optimizer step is followed by its share of the draft's.
    num_updates = -(-settings.num_optimizer_steps // -(-num_samples // of_batch))
    num_replies = -(-min(num_updates * settings.batch_size, of_batch) // ranks)
    in_update = min(num_replies, -(-settings.batch_size // ranks))
    num_fed = min(settings.max_length, rollout.longest - 1)
    num_rows = max(0, min(rows_of_reply(settings, sizes.num_block_drafts), rollout.max_response_len - 1))
    num_steps = sizes.num_block_drafts or settings.num_steps
    itemsize, hidden, features = ITEMSIZES[trainer.dtype], sizes.hidden_size, sizes.num_features
    # As the passes leave them; then by reply, and the features side by side.
    captured = 0 if features == hidden else features
    of_passes = num_fed * (2 * hidden + captured) * itemsize
    by_reply = (num_fed * (hidden + features) + num_rows * hidden) * itemsize
    in_fp32 = ((num_fed + 1) * features + num_fed * hidden) * FLOAT32_BYTES
    mask_bytes = hidden * FLOAT32_BYTES if sizes.num_block_drafts else 0
    return DraftMemory(
        num_parameters=sizes.num_parameters,
        num_replies=num_replies,
        replies_bytes=num_replies * (max(of_passes, by_reply) + num_rows * ARGMAX_AND_LOGSUMEXP_BYTES),
        inputs_bytes=in_update * (in_fp32 + num_rows * hidden * itemsize) + mask_bytes,
        head_bytes=sizes.vocab_size * hidden * FLOAT32_BYTES,
        logits_bytes=logits_bytes(loss_for(settings, sizes.family), in_update * num_rows, sizes.vocab_size, num_steps),
        scores_bytes=in_update * num_rows * sizes.num_scores * num_fed * SCORE_BYTES,
    )


def logits_bytes(loss: str, num_rows: int, vocab_size: int, num_steps: int, max_bytes: int = MAX_LOGITS_BYTES) -> int:
    """Return the most bytes of logits that an update of so many rows has at once."""
    whole, more, in_chunks = LOGITS_TENSORS[loss]
    of_row = vocab_size * FLOAT32_BYTES
    if num_rows * of_row <= max_bytes:
        return int((whole + more * (num_steps - 1)) * num_rows * of_row)
    return int(in_chunks * max(1, max_bytes // of_row) * of_row)
