"""Train a draft inside an RL run, on replies of the step's rollout as the policy's own forward pass has seen them.

Replies have slots: of a step's updates, the u-th learns from slots u·batch_size … (u + 1)·batch_size - 1. A reply may
have several. Ranks that hold the same draft may hold different replies: they make the same updates together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from slime_spec.checkpoints.draft_tensors import DraftCheckpoint
from slime_spec.draft.build import load_network, network_tensors
from slime_spec.draft.ranks import ONE_RANK, DraftRanks
from slime_spec.draft.training.batch import TrainBatch, padded
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.served import RULES, ServedTally, standing
from slime_spec.draft.training.trainer import DraftTrainer, TrainSettings
from slime_spec.draft.training.unrolled import Unrolled, num_learned
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.errors import TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeenReply:
    """Holds what a pass of the policy knew of a reply of m + 1 tokens behind its prompt; n tokens were fed to it.

    ``token_ids`` [n + 1]: the last is predicted and not fed. Of the n fed tokens ``embeddings`` [n, hidden] and
    ``features`` [n, width]. Of the m fed tokens behind the prompt: ``final`` [m, hidden] after the final norm, and of
    the logits, at the rollout's temperature, ``argmax`` and ``logsumexp`` [m].
    """

    slots: tuple[int, ...]
    token_ids: torch.Tensor
    embeddings: torch.Tensor
    features: torch.Tensor
    final: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor

    @property
    def prompt_len(self) -> int:
        return len(self.features) - len(self.final)


@dataclass
class DraftSums:
    """Adds up the replies of a step, each by what the draft was before the first update that learned from it.

    ``by_position`` [3, positions] sums Σ min(p, q), right argmaxes, and the rows that both are of. ``rounds`` are the
    expected rounds, by rule of verification, in which an engine that samples its drafts generates ``num_tokens``.
    """

    by_position: torch.Tensor
    rounds: torch.Tensor = field(default_factory=lambda: torch.zeros(len(RULES), dtype=torch.float64))
    num_tokens: int = 0
    loss: float = 0.0

    def add(self, unrolled: Unrolled, batch: TrainBatch, new: Sequence[bool]) -> None:
        """Count a batch's loss, and those of its replies that are ``new``."""
        quality = unrolled.quality
        by_row = torch.stack([quality.overlap, quality.hits.float(), quality.valid.float()])[:, list(new)]
        self.by_position += by_row.double().sum(dim=(1, 2)).cpu()
        self.loss += float(unrolled.loss.detach())
        log_ratios = quality.log_ratios.double().cpu().numpy()
        tallies = [ServedTally(log_ratios.shape[-1]) for _ in RULES]
        for of_reply, reply_len, is_new in zip(log_ratios, batch.reply_lens.tolist(), new, strict=True):
            for rule, tally in zip(RULES, tallies, strict=True):
                if is_new:
                    tally.count(standing(of_reply[: reply_len - 1], rule))
        self.rounds += torch.tensor([tally.num_rounds for tally in tallies])
        self.num_tokens += tallies[0].num_tokens

    def packed(self) -> torch.Tensor:
        """Return all sums as one tensor, which may be added to other ranks'."""
        rest = torch.tensor([self.num_tokens, self.loss], dtype=torch.float64)
        return torch.cat([self.by_position.flatten(), self.rounds, rest])

    @classmethod
    def unpacked(cls, values: torch.Tensor) -> DraftSums:
        by_position, rounds, rest = values.split([len(values) - len(RULES) - 2, len(RULES), 2])
        return cls(by_position.view(3, -1), rounds, int(rest[0]), float(rest[1]))


@dataclass(frozen=True)
class LearnedStep:
    """Reports a step's updates on one rank: its sums, the gradients' norms before clipping, updates left out."""

    sums: DraftSums
    grad_norms: tuple[float, ...]
    num_skipped: int


class OnlineDraft:
    """Owns the draft of a run, in fp32 on ``device``. Example::

        draft = OnlineDraft(load_draft(folder, spec), settings, temperature=1.0, device=torch.device("cpu"))
        learned = draft.learn(replies, num_updates=4, target_head=head[draft.token_ids])

    ``ranks`` train it together; each calls ``learn`` with replies of its own, or none.
    """

    def __init__(
        self,
        checkpoint: DraftCheckpoint,
        settings: TrainSettings,
        temperature: float,
        device: torch.device,
        ranks: DraftRanks = ONE_RANK,
    ) -> None:
        network = load_network(checkpoint.spec, checkpoint.tensors, ranks).to(device)
        self._device = device
        self.token_ids = hot_token_ids(checkpoint)
        empty = torch.empty(0, checkpoint.spec.block.hidden_size, device=device)
        vocabulary = DraftVocabulary(self.token_ids, checkpoint.spec.block.vocab_size)
        model = self._idle = DraftModel(network, empty, empty, vocabulary, temperature)
        self._ranks = ranks
        self.trainer = DraftTrainer(model, settings, None, ranks)

    @property
    def is_spread(self) -> bool:
        """Return whether this rank has a part of the draft alone."""
        return self.trainer.model.network.is_spread

    def learn(
        self,
        replies: Sequence[SeenReply],
        num_updates: int,
        target_head: torch.Tensor,
        mask_embedding: torch.Tensor | None = None,
    ) -> LearnedStep:
        """Make the updates; an update whose gradient is not finite is left out, and the draft stays as it was.

        ``replies`` are this rank's; ``target_head`` [draft vocab, hidden] are the head's rows of ``token_ids``;
        ``mask_embedding`` [1, hidden] is what a block drafter's masks are.
        """
        settings = self.trainer.settings
        assert mask_embedding is not None or not self.trainer.model.network.spec.block_size, "a block has masks"
        sums = DraftSums(torch.zeros(3, settings.num_steps, dtype=torch.float64))
        grad_norms: list[float] = []
        for update in range(num_updates):
            mine = [reply for reply in replies if update in {slot // settings.batch_size for slot in reply.slots}]
            if not mine and self.is_spread:
                mine = [self._nothing()]
            batch = self._batch(mine, target_head, mask_embedding) if mine else None
            num_rows = torch.zeros(settings.num_steps, dtype=torch.int64, device=self._device)
            if batch is not None:
                num_rows += num_learned(self.trainer.model, batch, settings.objective)
            self._ranks.add_up([num_rows])
            try:
                made = self.trainer.update(batch, num_rows)
            except TrainingError as error:
                logger.warning("left out an update of the draft: %s", error)
                continue
            grad_norms.append(made.grad_norm)
            if made.unrolled is not None and batch is not None:
                firsts = [min(reply.slots, default=-1) // settings.batch_size for reply in mine]
                sums.add(made.unrolled, batch, [first == update for first in firsts])
        self.trainer.model = self._idle  # the policy's tensors are of one step
        self.trainer.drop_gradients()
        return LearnedStep(sums, tuple(grad_norms), num_updates - len(grad_norms))

    def _nothing(self) -> SeenReply:
        """Return a reply of which nothing is learned, for a rank that computes other ranks' rows alone."""
        spec = self.trainer.model.network.spec
        empty = torch.zeros(0, dtype=torch.int64, device=self._device)
        states = torch.zeros(1, spec.feature_size, device=self._device)
        return SeenReply(
            slots=(),
            token_ids=torch.zeros(2, dtype=torch.int64, device=self._device),
            embeddings=torch.zeros(1, spec.block.hidden_size, device=self._device),
            features=states,
            final=states[:0, : spec.target_hidden_size],
            argmax=empty,
            logsumexp=empty.float(),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights that this rank has by the names of ``draft_shapes``; they share the network's memory."""
        return network_tensors(self.trainer.model.network)

    def state(self) -> dict[str, Any]:
        """Return what ``load_state`` resumes from, bit for bit."""
        return self.trainer.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.trainer.load_state(state)

    def _batch(
        self, replies: Sequence[SeenReply], target_head: torch.Tensor, mask_embedding: torch.Tensor | None
    ) -> TrainBatch:
        """Pad the replies, and have the model know the embeddings of their tokens alone."""
        model = self.trainer.model
        token_ids = [reply.token_ids for reply in replies]
        own = model.network.own_embedding
        if own is None:
            embeddings, ids = [reply.embeddings for reply in replies], [ids[:-1] for ids in token_ids]
            if mask_embedding is not None:
                embeddings.append(mask_embedding)
                ids.append(torch.tensor([model.network.spec.mask_token_id], device=self._device))
            known = torch.cat([each.float() for each in embeddings])
            rows = torch.zeros(model.vocabulary.vocab_size, dtype=torch.int64, device=self._device)
            rows[torch.cat(ids)] = torch.arange(len(known), device=self._device)
            model = replace(model, embedding=known, embedding_rows=rows)
        else:
            model = replace(model, embedding=own)
        self.trainer.model = replace(model, target_head=target_head)
        return TrainBatch(
            token_ids=padded(token_ids),
            # The last token has no features, and nothing reads them.
            features=padded([torch.nn.functional.pad(reply.features, (0, 0, 0, 1)) for reply in replies]).float(),
            starts=torch.tensor([reply.prompt_len - 1 for reply in replies], device=self._device),
            reply_lens=torch.tensor([len(reply.final) + 1 for reply in replies], device=self._device),
            final=padded([reply.final for reply in replies]),
            argmax=padded([reply.argmax for reply in replies]),
            logsumexp=padded([reply.logsumexp for reply in replies]),
        )


def hot_token_ids(checkpoint: DraftCheckpoint) -> torch.Tensor:
    """Return the target's ids of the tokens that the draft can name, ascending: its head's rows, or all."""
    ids = checkpoint.hot_token_ids
    return torch.arange(checkpoint.spec.block.vocab_size) if ids is None else ids
