"""What a sampled draft brings an engine is known without sampling one: the law of the rounds, given the target's reply.

Accepted drafts are the reply's own tokens. Of a reply that the target drew, with p and q the target's and the draft's
probabilities of its tokens, the first i drafts behind a token stand with probability

    token by token    Π min(1, q_j / p_j)                  rejection sampling (arXiv 2211.17192)
    as a block        min(1, L_1, …, L_i),  L_i = Π q_j / p_j     block verification (arXiv 2403.10444)

and each round goes on behind the first that falls. The numbers are means over the draws of drafts: a training compares
drafts by them without noise, on the replies that it learns from or others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Rule = Literal["rejection", "block"]
RULES: tuple[Rule, ...] = ("rejection", "block")


def standing(log_ratios: Numbers, rule: Rule) -> Numbers:
    """Return [rows, positions]: the probability that the drafts up to each position stand.

    ``log_ratios`` [rows, positions] are log(q / p) of the reply's tokens behind each row; -inf where q is 0.
    """
    if rule == "rejection":
        chances: Numbers = np.exp(np.minimum(log_ratios, 0.0).cumsum(axis=1))
    else:
        chances = np.exp(np.minimum.accumulate(np.minimum(log_ratios.cumsum(axis=1), 0.0), axis=1))
    return chances


@dataclass
class ServedTally:
    """Counts expected rounds of replies, and by position how many drafts are judged and stand."""

    num_positions: int
    num_tokens: int = 0
    num_rounds: float = 0.0
    judged: Numbers = field(init=False)
    stood: Numbers = field(init=False)

    def __post_init__(self) -> None:
        self.judged, self.stood = np.zeros(self.num_positions), np.zeros(self.num_positions)

    def count(self, stands: Numbers) -> None:
        """Count a reply by ``standing`` of its rows: row r is the round whose root is the reply's token r.

        The reply has a token more than rows; its first is the prefill's. A round drafts no further than the reply.
        """
        num_rows = len(stands)
        visits = np.zeros(num_rows + self.num_positions + 1)  # the probability that a round begins at a row
        visits[0] = 1.0
        for row, chances in enumerate(stands):
            room = min(self.num_positions, num_rows - row)
            reached = np.concatenate(((1.0,), chances[:room]))
            self.judged[:room] += visits[row] * reached[:room]
            self.stood[:room] += visits[row] * reached[1:]
            visits[row + 1 : row + room + 2] += visits[row] * (reached - np.append(reached[1:], 0.0))
        self.num_tokens += num_rows
        self.num_rounds += float(visits[:num_rows].sum())

    @property
    def tokens_per_verify(self) -> float:
        return self.num_tokens / self.num_rounds if self.num_rounds else 0.0

    def summary(self) -> dict[str, object]:
        """Return the tally for JSON; ``conditional`` as of a Tally."""
        shares = (self.stood / np.maximum(self.judged, 1e-12)).round(4).tolist()
        return {"tokens_per_verify": round(self.tokens_per_verify, 4), "conditional": shares}
