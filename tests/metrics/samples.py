"""Samples with what a test wants to say about them."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from slime_spec.types import GeneratedSample, Prompt, Sample, SpecCounters


def sample(
    prompt_id: int = 0,
    reward: float | None = 1.0,
    length: int = 4,
    histogram: tuple[int, ...] = (),
    num_drafts: int = 3,
    finish_reason: str = "stop",
    task: str = "add10",
    version: int = 0,
    latency_s: float = 0.0,
    index: int = 0,
    num_empty_rounds: int = 0,
) -> Sample:
    num_rounds = sum(histogram)
    response = GeneratedSample(
        group_id=str(prompt_id),
        sample_index=index,
        token_ids=tuple(range(length)),
        logprobs=tuple(-0.1 * i for i in range(length)),
        finish_reason=finish_reason,  # type: ignore[arg-type]
        weight_version=version,
        num_prompt_tokens=5,
        spec=SpecCounters(
            num_rounds=num_rounds,
            num_proposed=num_rounds * num_drafts,
            histogram=histogram,
            num_drafted=(num_rounds - num_empty_rounds) * num_drafts,
            num_empty_rounds=num_empty_rounds,
        ),
        e2e_latency_s=latency_s,
    )
    prompt = Prompt(prompt_id, task, "What is 2 + 3?", (1, 2, 3, 4, 5), "5")
    return Sample(prompt, response, "5", reward, "" if reward is not None else "the reward raised KeyError: 'x'")


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """A disk with room for files of so many bytes: RLIMIT_FSIZE stands for ENOSPC."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
