"""Judge a draft's acceptance in an engine, on replies that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.loss import total_variation
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.served import RULES, Rule, ServedTally, standing
from slime_spec.draft.training.unrolled import Objective, unrolled_loss
from slime_spec.draft.unroll import make_unroll


@dataclass
class Tally:
    """Counts the results of one kind of reply; lists have an entry per draft position.

    ``tried`` and ``accepted`` are over the rounds an engine would run that drafts the likeliest tokens, ``served`` over
    those of one that samples them from the draft's own distribution, by rule. ``hits`` and ``overlap`` (Σ min(p, q))
    are SpecForge's ``acc`` and ``acceptance_rate``: over every row, teacher-forced.
    """

    num_positions: int
    num_sequences: int = 0
    num_rounds: int = 0
    num_tokens: int = 0
    tried: list[int] = field(init=False)
    accepted: list[int] = field(init=False)
    num_rows: list[int] = field(init=False)
    hits: list[int] = field(init=False)
    overlap: list[float] = field(init=False)
    served: dict[Rule, ServedTally] = field(init=False)

    def __post_init__(self) -> None:
        self.served = {rule: ServedTally(self.num_positions) for rule in RULES}
        for name in ("tried", "accepted", "num_rows", "hits", "overlap"):
            setattr(self, name, [0] * self.num_positions)

    @property
    def tokens_per_verify(self) -> float:
        """Return tokens per round, the bonus included; the reply's first token, the prefill's, is not counted."""
        return self.num_tokens / max(1, self.num_rounds)

    @property
    def shares(self) -> dict[str, list[float]]:
        """Return shares by position; ``conditional`` is the share accepted, given that all earlier drafts were."""
        return {
            "conditional": _shares(self.accepted, self.tried),
            "acc": _shares(self.hits, self.num_rows),
            "acceptance_rate": _shares(self.overlap, self.num_rows),
        }

    def summary(self) -> dict[str, object]:
        """Return the tally for JSON."""
        return {
            "sequences": self.num_sequences,
            "tokens_per_verify": round(self.tokens_per_verify, 4),
            **self.shares,
            "served": {rule: tally.summary() for rule, tally in self.served.items()},
        }


def _shares(parts: Sequence[float], wholes: Sequence[int]) -> list[float]:
    return [round(part / max(1, whole), 4) for part, whole in zip(parts, wholes, strict=True)]


@torch.no_grad()
def judge(
    model: DraftModel,
    batches: Iterable[tuple[Sequence[str], Callable[[], TrainBatch]]],
    num_positions: int,
) -> dict[str, Tally]:
    """Return a tally per kind of reply: ``batches`` are (kind of each sequence, loader of the batch).

    A round drafts a chain of argmax tokens, each from the drafts before it. A draft is accepted where it is the reply's
    token, whether that was argmax or sampled: exactly what greedy verification, or the target-only walk, accepts. What
    sampled drafts would bring is expected of replies at temperature 1 (served.py); others it says less of.
    """
    tallies: dict[str, Tally] = {}
    objective = Objective(total_variation, num_positions, 1.0)
    for kinds, load in batches:
        batch = load()
        lengths = _accepted_lengths(model, batch, num_positions).tolist()
        forced = unrolled_loss(model, batch, objective).quality
        for b, kind in enumerate(kinds):
            tally = tallies.setdefault(kind, Tally(num_positions))
            _count_rounds(tally, lengths[b], int(batch.reply_lens[b]))
            for step in range(num_positions):
                tally.num_rows[step] += int(forced.valid[b, :, step].sum())
                tally.hits[step] += int(forced.hits[b, :, step].sum())
                tally.overlap[step] += float(forced.overlap[b, :, step].sum())
            log_ratios = forced.log_ratios[b, : int(batch.reply_lens[b]) - 1].double().cpu().numpy()
            for rule, served in tally.served.items():
                served.count(standing(log_ratios, rule))
    return tallies


def _count_rounds(tally: Tally, accepted_lengths: Sequence[int], reply_len: int) -> None:
    """Walk the reply as an engine does: its first token is the prefill's, a round adds accepted drafts and a bonus."""
    tally.num_sequences += 1
    tally.num_tokens += reply_len - 1
    root = 0
    while root < reply_len - 1:
        room = reply_len - 1 - root  # tokens still to come
        accepted = min(accepted_lengths[root], room)
        tally.num_rounds += 1
        for position in range(min(tally.num_positions, room, accepted + 1)):
            tally.tried[position] += 1
            tally.accepted[position] += position < accepted
        root += accepted + 1


def _accepted_lengths(model: DraftModel, batch: TrainBatch, num_positions: int) -> torch.Tensor:
    """Return [batch, rows]: how many of the ``num_positions`` chained drafts of every possible round are accepted."""
    unroll = make_unroll(model.network, model.embed, batch.starts, batch.num_rows)
    head_input = unroll.first(batch.features, batch.token_ids)
    standing = torch.ones_like(batch.valid(0))
    lengths = torch.zeros_like(standing, dtype=torch.int64)
    for step in range(num_positions):
        drafted = model.target_ids(model.logits(head_input).argmax(-1))
        standing = standing & batch.valid(step) & (drafted == batch.replies_from(step + 1))
        lengths += standing
        if step + 1 < num_positions:
            head_input = unroll.next(drafted)
    return lengths
