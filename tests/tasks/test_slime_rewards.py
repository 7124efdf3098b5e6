"""Functions written for slime: what they get, how they are called, and that slow coroutines wait side by side."""

from __future__ import annotations

import asyncio
import enum
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import slime_spec
from slime_spec.errors import ConfigError
from slime_spec.slime_sample import Sample, Status
from slime_spec.tasks.judge import GROUP, ONE, Judge, Reply, form_of
from slime_spec.types import GeneratedSample, Prompt

PROMPT = Prompt(3, "data", "2+3?", (1, 2), "5", label={"sum": 5}, metadata={"level": 2}, rendered="u:2+3?;a:")


def replies(*reasons: str) -> list[Reply]:
    return [
        Reply(PROMPT, GeneratedSample("3", index, (7, 8), (-0.5, -1.0), reason, 4, 2), "five")  # type: ignore[arg-type]
        for index, reason in enumerate(reasons)
    ]


def test_a_sample_has_what_slimes_users_read() -> None:
    (sample,) = (reply.for_slime() for reply in replies("length"))
    assert sample == Sample(
        group_index=3,
        index=0,
        prompt="u:2+3?;a:",
        tokens=[1, 2, 7, 8],
        response="five",
        response_length=2,
        label={"sum": 5},
        status=Status.TRUNCATED,
        metadata={"level": 2},
        rollout_log_probs=[-0.5, -1.0],
        weight_versions=["4"],
    )
    assert sample.status == sample.Status.TRUNCATED != sample.Status.COMPLETED


def test_slimes_own_statuses_are_equal_to_these() -> None:
    class Theirs(enum.Enum):  # as slime defines it, whose module a user's function imports
        COMPLETED = "completed"
        TRUNCATED = "truncated"

    (sample,) = (reply.for_slime() for reply in replies("stop"))
    assert sample.status == Status.COMPLETED
    assert sample.status == Status.COMPLETED
    assert sample.status != Status.TRUNCATED
    assert sample.status != "completed"


async def named_otherwise(args: Any, data: Any, **kwargs: Any) -> Any:
    return [1.0] * len(data) if isinstance(data, list) else 0.5


def test_the_group_flag_says_how_a_function_of_slimes_form_is_called() -> None:
    assert form_of(named_otherwise, "task.reward", "f") == ONE
    assert form_of(named_otherwise, "task.reward", "f", is_grouped=True) == GROUP
    given = {
        form: [each.reward for each in Judge(named_otherwise, form).verdicts(replies("stop", "stop"))]
        for form in (ONE, GROUP)
    }
    assert given == {ONE: [0.5, 0.5], GROUP: [1.0, 1.0]}
    with pytest.raises(ConfigError, match=r"as task\.group_rm asks for"):
        form_of(lambda prompt, reply: 0.0, "task.reward", "f", is_grouped=True)


def test_coroutines_of_a_group_wait_side_by_side_and_each_has_its_own_limit() -> None:
    """Each of the first four ends only once all four have begun; the fifth never ends."""
    begun = asyncio.Semaphore(0)

    async def reward(args: Any, sample: Sample) -> float:
        if sample.index == 4:
            await asyncio.Event().wait()
        begun.release()
        while begun._value < 4:
            await asyncio.sleep(0)
        if sample.index == 3:
            raise KeyError("verdict")
        return float(sample.index)

    judge = Judge(reward, ONE, args=SimpleNamespace(), limit_s=2.0)
    assert judge.takes_groups
    verdicts = judge.verdicts(replies(*["stop"] * 5))
    assert [verdict.reward for verdict in verdicts] == [0.0, 1.0, 2.0, None, None]
    assert verdicts[3].error.startswith("the reward raised KeyError: 'verdict'")
    assert verdicts[3].error.count("File ") == 1, "the traceback has other frames than the user's"
    assert verdicts[4].error == "the reward gave no answer within 2 s (--reward-timeout)"


def test_a_module_of_the_current_folder_is_found_by_the_installed_command_and_hides_no_library(tmp_path: Path) -> None:
    """An installed command's path begins with its own folder, not with the current one (as with python -P)."""
    (tmp_path / "rewards_of_mine.py").write_text("def f(prompt, reply): return 0.0\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('this is no torch')\n")
    code = (
        "import sys; sys.argv = ['slime-spec', 'help']\n"
        "from slime_spec.launch.cli import main; main()\n"
        "from slime_spec.tasks.rewards import load_reward\n"
        "import torch; print(load_reward('task.reward', 'rewards_of_mine.f').__name__, torch.ones(1).item())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(slime_spec.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("f 1.0\n"), done.stderr
