"""A record gathers, beside the samples of a group, what few requests ask for: logprobs of the prompt, likeliest tokens.

group.record ◄── Prefiller: logprobs of prompt tokens, chunk by chunk (the model's own: temperature 1, no bias)
             ◄── core: the likeliest tokens at each generated token   (as sampled: bias, penalties, temperature)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import isfinite

import torch

Ranked = tuple[tuple[float, int], ...]
"""((logprob, token id), …), the likeliest token first"""

MOST_RANKED = 20  # likeliest tokens that a request may ask for, as OpenAI has it
ROWS_AT_ONCE = 64  # of logits: a whole prompt's would take gigabytes


class LogprobRecord:
    """Gathers for one group; the engine's thread only appends, so that other threads may read what they know is there.

    ``prompt[i]`` is the logprob of prompt token i + 1, for nothing comes before the first; ``prompt_ranked[i]`` are the
    likeliest tokens there. ``ranked[sample_index][i]`` are those at the sample's token i.
    """

    def __init__(self, num_ranked: int = 0, of_prompt: bool = False) -> None:
        self.num_ranked, self.of_prompt = num_ranked, of_prompt
        self.prompt: list[float] = []
        self.prompt_ranked: list[Ranked] = []
        self.ranked: defaultdict[int, list[Ranked]] = defaultdict(list)

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
            self.prompt_ranked += ranked(logprobs, self.num_ranked)


def ranked(logprobs: torch.Tensor, count: int) -> list[Ranked]:
    """Return the ``count`` likeliest tokens of each row; tokens that are impossible are left out."""
    values, token_ids = logprobs.topk(min(count, logprobs.shape[1]))
    pairs = zip(values.tolist(), token_ids.tolist(), strict=True)
    return [tuple(pair for pair in zip(*row, strict=True) if isfinite(pair[0])) for row in pairs]
