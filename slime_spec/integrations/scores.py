"""Samples of another framework are scored by this project's rewards, where the plug-in's settings name one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from slime_spec.integrations.answers import ABORTED, prompt_and_reply
from slime_spec.tasks.judge import Judging, Reply, RewardName
from slime_spec.types import GeneratedSample, Prompt


async def score(samples: Sequence[Any], name: str, args: Any) -> None:
    """Give each finished sample without a reward its reward; raises RuntimeError where the reward gives none."""
    unscored = [each for each in samples if each.reward is None and each.status.value != ABORTED]
    if not unscored:
        return
    judge = _judge(name, getattr(args, "rollout_seed", 0))
    verdicts = await asyncio.to_thread(judge.verdicts, [_reply(each) for each in unscored])
    for sample, verdict in zip(unscored, verdicts, strict=True):
        if verdict.reward is None:
            raise RuntimeError(f"slime_spec.reward {name}: {verdict.error}")
        sample.reward = verdict.reward


@cache
def _judge(name: str, seed: int) -> Judging:
    return RewardName(name, args={"seed": seed}).load()


def _reply(sample: Any) -> Reply:
    token_ids, reply_ids = prompt_and_reply(sample)
    metadata = sample.metadata if isinstance(sample.metadata, Mapping) else {}
    answer = "" if sample.label is None else str(sample.label)
    text = str(sample.prompt)
    prompt = Prompt(sample.index or 0, "", text, token_ids, answer, label=sample.label, metadata=metadata)
    response = GeneratedSample("", sample.index or 0, reply_ids, (), "stop", 0, len(token_ids))
    return Reply(prompt, response, sample.response, own=sample)
