"""The ranks of a scheduler tell each other what went wrong: what is collective after that, all of them do or none."""

from __future__ import annotations

from typing import Any


def told_by_all(problem: str, group: Any) -> list[str]:
    """Returns the problems of all ranks of a group, each once; an empty text is none. All ranks must call it."""
    import torch

    problems = [problem]
    if (size := torch.distributed.get_world_size(group=group)) > 1:
        problems = [""] * size
        torch.distributed.all_gather_object(problems, problem, group=group)
    return sorted({each for each in problems if each})
