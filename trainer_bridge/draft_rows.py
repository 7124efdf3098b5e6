"""Choose the replies of a step that a draft learns from, and find their rows in packed microbatches.

A reply that is longer than a draft learns from at once takes part with a window of its rows; what is before the window,
as far as the draft sees, is then its prompt:

    [ prompt | reply ................................ ]
    [ not seen | prompt' ..... | window | not fed     ]

A draft learns from a run of tokens that count in the loss (TrainSample.loss_mask), as from a reply: an engine drafts no
tool's result, so that there is nothing to learn for it, and acceptance on its tokens would be no engine's. What comes
before the run, results included, is its prompt: an engine's draft sees it as well.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from slime_spec.types import TrainSample
from trainer_bridge.packing import MicrobatchPlan


@dataclass(frozen=True)
class ChosenReply:
    """Names a reply: its sample, the place of its window in the reply (``num_rows`` fed tokens from ``first`` on).

    ``slots`` are its places among the step's lessons, over all ranks: several where there are fewer replies than slots.
    """

    slots: tuple[int, ...]
    sample_index: int
    first: int
    num_rows: int


@dataclass(frozen=True)
class ReplyRows:
    """Places a chosen reply in a microbatch: ``fed`` [n] are rows of the packed tokens, ``logits`` [m] of the logits.

    ``token_ids`` [n + 1] are what was fed and the token after it.
    """

    slots: tuple[int, ...]
    token_ids: tuple[int, ...]
    fed: torch.Tensor
    logits: torch.Tensor


def choose_replies(samples: Sequence[TrainSample], count: int, max_rows: int, seed: str) -> list[ChosenReply]:
    """Fill ``count`` slots with samples that have a token to draft, and choose a window of each; drawn from ``seed``.

    None comes twice before all have come as often.
    """
    rng = random.Random(seed)
    runs = {index: _run(sample, rng) for index, sample in enumerate(samples)}
    able = [index for index, run in runs.items() if len(run) > 1]
    slots: dict[int, list[int]] = {}
    for slot in range(count if able else 0):
        if slot % len(able) == 0:
            order = rng.sample(able, len(able))
        slots.setdefault(order[slot % len(able)], []).append(slot)
    chosen = []
    for index, places in slots.items():
        run, num_fed = runs[index], len(runs[index]) - 1
        num_rows = min(num_fed, max_rows)
        chosen.append(ChosenReply(tuple(places), index, run.start + rng.randint(0, num_fed - num_rows), num_rows))
    return chosen


def _run(sample: TrainSample, rng: random.Random) -> range:
    """Return the whole reply, or one of its runs of tokens that count, drawn by the rows that they would give."""
    if not sample.loss_mask:
        return range(len(sample.token_ids) - sample.prompt_len)
    runs, start = [], 0
    for counts, tokens in groupby(sample.loss_mask):
        stop = start + len(list(tokens))
        if counts:
            runs.append(range(start, stop))
        start = stop
    rows = [len(run) - 1 for run in runs]
    return rng.choices(runs, rows)[0] if sum(rows) else runs[0]


def reply_rows(
    samples: Sequence[TrainSample], plan: MicrobatchPlan, chosen: Sequence[ChosenReply], max_length: int
) -> tuple[ReplyRows, ...]:
    """Return the chosen replies that are in the microbatch of ``plan``, laid out as ``build_microbatch`` does.

    Of each, the draft sees the last ``max_length`` tokens up to its window's end.
    """
    of_sample = {each.sample_index: each for each in chosen}
    found = []
    start = logits_start = 0
    for segment in plan:
        prompt = range(start, start + segment.prompt_len)
        start = prompt.stop
        for index, response_len in zip(segment.sample_indices, segment.response_lens, strict=True):
            if reply := of_sample.get(index):
                stop = reply.first + reply.num_rows
                fed = [*prompt, *range(start, start + stop)][-max_length:]
                # The first logits of a response are its prompt's last row's.
                logits = range(logits_start + 1 + reply.first, logits_start + 1 + stop)
                token_ids = samples[index].token_ids[: segment.prompt_len + stop + 1][-max_length - 1 :]
                found.append(ReplyRows(reply.slots, token_ids, torch.tensor(fed), torch.tensor(logits)))
            start += response_len - 1
            logits_start += response_len
    return tuple(found)
