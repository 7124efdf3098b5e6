"""Choose the replies of a step that a draft learns from, and find their rows in packed microbatches.

A reply that is longer than a draft learns from at once takes part with a window of its rows; what is before the window,
as far as the draft sees, is then its prompt:

    [ prompt | reply ................................ ]
    [ not seen | prompt' ..... | window | not fed     ]
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

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
    fed = {index: len(sample.token_ids) - sample.prompt_len - 1 for index, sample in enumerate(samples)}
    able = [index for index, num_rows in fed.items() if num_rows > 0]
    slots: dict[int, list[int]] = {}
    for slot in range(count if able else 0):
        if slot % len(able) == 0:
            order = rng.sample(able, len(able))
        slots.setdefault(order[slot % len(able)], []).append(slot)
    chosen = []
    for index, places in slots.items():
        num_rows = min(fed[index], max_rows)
        chosen.append(ChosenReply(tuple(places), index, rng.randint(0, fed[index] - num_rows), num_rows))
    return chosen


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
