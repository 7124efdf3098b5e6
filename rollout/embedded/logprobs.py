"""A record gathers, beside the samples of a group, what few requests ask for: logprobs of the prompt, of other tokens.

group.record ◄── Prefiller: logprobs of prompt tokens, chunk by chunk (the model's own: temperature 1, no bias)
             ◄── core: a Beside for each generated token              (as sampled: bias, penalties, temperature)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch

from slime_spec.errors import GenerationError

Ranked = tuple[tuple[float, int], ...]
"""((logprob, token id), …), the likeliest token first"""

MOST_RANKED = 20  # likeliest tokens that a request may ask for, as OpenAI has it
MOST_TOKEN_IDS = 1024  # whose logprobs a request may ask for at each place
MOST_KEPT = 1 << 26  # kept token ids of one group: a nucleus may be the vocabulary at every place
ROWS_AT_ONCE = 64  # of logits: a whole prompt's would take gigabytes


@dataclass(frozen=True)
class Wanted:
    """Says what is wanted at each place beside the token's logprob.

    ``num_ranked`` counts likeliest tokens, ``token_ids`` are tokens whose logprobs are wanted; ``kept`` asks which
    tokens top-k, top-p and min-p kept, at generated tokens alone.
    """

    num_ranked: int = 0
    token_ids: tuple[int, ...] = ()
    kept: bool = False

    def __bool__(self) -> bool:
        return bool(self.num_ranked or self.token_ids or self.kept)


class Beside(NamedTuple):
    """Holds what was wanted at one generated token.

    ``of_ids`` are the logprobs of the wanted ids, -inf for an impossible one. ``kept`` are the ids that the filters
    kept, the likeliest first, and the token itself; ``kept_logprob`` is the token's logprob among them.
    """

    ranked: Ranked = ()
    of_ids: tuple[float, ...] = ()
    kept: Sequence[int] = ()
    kept_logprob: float = 0.0


class LogprobRecord:
    """Gathers for one group; the engine's thread only appends, so that other threads may read what they know is there.

    ``prompt[i]`` is the logprob of prompt token i + 1, for nothing comes before the first; ``prompt_ranked[i]`` are the
    likeliest tokens there, ``prompt_of_ids[i]`` the logprobs of the wanted ids. ``beside[sample_index][i]`` belongs to
    the sample's token i.
    """

    def __init__(self, wanted: Wanted = Wanted(), of_prompt: bool = False) -> None:
        self.wanted, self.of_prompt = wanted, of_prompt
        self.prompt: list[float] = []
        self.prompt_ranked: list[Ranked] = []
        self.prompt_of_ids: list[tuple[float, ...]] = []
        self.beside: defaultdict[int, list[Beside]] = defaultdict(list)
        self._num_kept = 0

    def add(self, sample_index: int, beside: Sequence[Beside]) -> None:
        """Take what is beside further tokens of a sample; raises GenerationError where the group keeps too much."""
        self._num_kept += sum(len(each.kept) for each in beside)
        if self._num_kept > MOST_KEPT:
            raise GenerationError(
                f"top-k, top-p and min-p kept more than {MOST_KEPT} token ids in the replies to one prompt; where they "
                "are returned, ask for fewer or shorter replies, or for a lower top_p"
            )
        self.beside[sample_index] += beside

    def read_prompt(
        self, start: int, hidden: torch.Tensor, prompt: Sequence[int], logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Take the states of the prompt's positions ``start ..``; those of KV that is recomputed are known already."""
        known = len(self.prompt) - start
        assert known >= 0, "a prompt is computed from its first token on, nothing of it is copied"
        targets = prompt[start + known + 1 : start + len(hidden) + 1]
        states = hidden[known : known + len(targets)]
        for first in range(0, len(targets), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            logprobs = logits(states[part]).log_softmax(-1)
            token_ids = torch.tensor(targets[part], device=logprobs.device)
            self.prompt += logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
            self.prompt_ranked += ranked(logprobs, self.wanted.num_ranked)
            self.prompt_of_ids += of_ids(logprobs, self.wanted.token_ids)


def ranked(logprobs: torch.Tensor, count: int) -> list[Ranked]:
    """Return the ``count`` likeliest tokens of each row; tokens that are impossible are left out."""
    values, token_ids = logprobs.topk(min(count, logprobs.shape[1]))
    pairs = zip(values.tolist(), token_ids.tolist(), strict=True)
    return [tuple(pair for pair in zip(*row, strict=True) if isfinite(pair[0])) for row in pairs]


def of_ids(logprobs: torch.Tensor, token_ids: Sequence[int]) -> list[tuple[float, ...]]:
    """Return each row's logprobs of these tokens."""
    chosen = logprobs[:, torch.tensor(token_ids, dtype=torch.long, device=logprobs.device)]
    return [tuple(row) for row in chosen.tolist()]
