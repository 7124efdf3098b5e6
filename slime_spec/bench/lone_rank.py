"""Benchmarks run the only rank of a trainer in their own process, where its CPU time can be measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slime_spec.config.tree import Config
from slime_spec.ports import free_port
from trainer_bridge.megatron.rank import TrainerRank

LOOPBACK = "127.0.0.1"


@contextmanager
def lone_rank(config: Config) -> Iterator[TrainerRank]:
    """Provide the loaded rank; its process groups end with the block, and the process's threads are as before."""
    threads = torch.get_num_threads()
    rank = TrainerRank(config, 0, f"tcp://{LOOPBACK}:{free_port(LOOPBACK)}")
    try:
        rank.load()
        yield rank
    finally:
        rank.close()
        torch.set_num_threads(threads)


def beside(rank: TrainerRank, config: Config) -> TrainerRank:
    """Return another loaded rank in the process groups of the first, whose block ends both.

    Its configuration has the same model, algorithm, temperature and layout.
    """
    other = copy.copy(rank)
    other.config = config
    other.load()
    return other
