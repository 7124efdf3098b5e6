"""Rewards of a user's own: their forms, what they may give, and what they cannot do to the run.

The functions are those of cases reports/04 (a reward that never counts) and reports/11 (one that hangs or exits).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.schema import by_flag
from slime_spec.config.tree import Config, RolloutConfig, TaskConfig
from slime_spec.errors import ConfigError
from slime_spec.tasks import reward_processes
from slime_spec.tasks.judge import GROUP, ONE, OURS, Judge, Reply, RewardName, form_of
from slime_spec.tasks.reward_processes import RewardProcesses
from slime_spec.tasks.source import PromptSource
from slime_spec.types import GeneratedSample, Prompt, Sample

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the token ids of the tests' tokenizer
PROMPT = Prompt(prompt_id=4, task="data", text="What is 2+3?", token_ids=(1, 2), answer="5")
SOURCE = """
import asyncio, os, subprocess, sys, time
from slime_spec.interfaces import Problem

def plain(prompt, reply): return float(reply == prompt.answer)
async def awaited(prompt, reply):
    await asyncio.sleep(0)
    return float(reply == prompt.answer)
def as_dict(prompt, reply): return {"score": float(reply == prompt.answer), "acc": 0.25}
async def slime_one(args, sample, **kwargs):
    assert (sample.prompt, sample.tokens[:2], sample.label) == ("What is 2+3?", [1, 2], "5")
    assert sample.response_length == len(sample.tokens) - 2 == len(sample.response)
    assert sample.status.value == "completed" and args.n_samples_per_prompt == 3
    return {"score": float(sample.response == sample.label)}
async def slime_group(args, samples, **kwargs):
    return [float(sample.response == sample.label) + len(samples) * 10 for sample in samples]
class Callable:
    def __call__(self, prompt, reply): return float(reply == prompt.answer)
instance = Callable()

def hangs(prompt, reply):
    if reply == "x":
        child = subprocess.Popen(["sleep", "1000"])
        open(os.environ["PIDS"], "a").write(f"{os.getpid()} {child.pid} ")
        time.sleep(1000)
    return 1.0
def exits(prompt, reply): sys.exit(3)
def ends_its_process(prompt, reply): os._exit(7)
def text(prompt, reply): return "1.0"
def wrong_key(prompt, reply): return {"acc": 1.0}
async def short_list(args, samples, **kwargs): return [1.0] * (len(samples) + 1)
def raises(prompt, reply): return {"5": 1.0}[reply]
def three(prompt, reply, label): return 1.0
def huge(prompt, reply): return -1.7e308  # the sum of two is no float
def long_text(prompt, reply): return "x" * 100_000
def tells_its_process(prompt, reply):
    open(os.environ["PIDS"], "a").write(f"{os.getpid()} ")
    return 1.0
class Task:
    def __init__(self, name, reward): self.name, self.reward = name, reward
    def problem(self, index, seed): return Problem("What is 2+3?", "5")
fine, wrong = Task("fine", tells_its_process), Task("wrong", text)
def verl(data_source, solution_str, ground_truth, extra_info=None): return float(solution_str == ground_truth)
"""
# What each gives more than 1 for the right reply and 0 for another: the group's form shows its group's size.
RIGHT = {"plain": 0, "awaited": 0, "as_dict": 0, "slime_one": 0, "slime_group": 30, "instance": 0, "verl": 0}


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))


def response(index: int, text: str, finish_reason: str = "stop") -> GeneratedSample:
    ids = tuple(ALPHABET.index(character) for character in text)
    return GeneratedSample("4", index, ids, (-0.1,) * len(text), finish_reason, 0, 1)  # type: ignore[arg-type]


@contextmanager
def source_of(tokenizer: Tokenizer, folder: Path, reward: str, **task: object) -> Iterator[PromptSource]:
    path = folder / "data.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT.text, "label": 5}) + "\n")
    config = Config(
        task=TaskConfig(prompt_data=str(path), reward=f"own_rewards:{reward}", **{"reward_processes": 2, **task}),  # type: ignore[arg-type]
        rollout=RolloutConfig(n_samples_per_prompt=3),
    )
    with closing(PromptSource(config, tokenizer)) as source:
        yield source


def scored(source: PromptSource, *texts: str) -> list[Sample]:
    return source.score(PROMPT, [response(index, text) for index, text in enumerate(texts)])()


@pytest.mark.parametrize("reward", RIGHT)
def test_a_reward_is_called_as_what_it_is(reward: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with source_of(tokenizer, tmp_path, reward) as source:
        replies = [response(0, "5"), response(1, "6"), response(2, "", "abort"), response(3, "5")]
        samples = source.score(PROMPT, replies)()
    extra = RIGHT[reward]
    assert [sample.reward for sample in samples] == [1.0 + extra, 0.0 + extra, None, 1.0 + extra]
    assert [sample.response.sample_index for sample in samples] == [0, 1, 2, 3]


def test_the_key_of_a_dict_is_a_setting(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with source_of(tokenizer, tmp_path, "as_dict", reward_key="acc") as source:
        assert [sample.reward for sample in scored(source, "5")] == [0.25]


@pytest.mark.parametrize(
    ("reward", "rule"),
    [
        ("text", "must be a finite number, it was '1.0'"),
        ("long_text", "must be a finite number, it was 'x{299}…"),
        ("huge", r"must be a number between -1e\+30 and 1e\+30, it was -1.7e\+308"),
        ("wrong_key", r"must have the key 'score' \(--reward-key\), it has 'acc'"),
        ("short_list", r"must be a list of 1 rewards, it was \[1.0, 1.0\]"),
        ("three", r"must name a function reward\(prompt, reply\) -> float, or slime's"),
    ],
)
def test_a_reward_that_can_never_count_is_refused_at_the_start(
    reward: str, rule: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rule) as raised, source_of(tokenizer, tmp_path, reward):
        pass
    assert raised.value.setting == "task.reward"


def test_a_reward_that_raises_on_an_empty_reply_is_told_and_goes_on(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with source_of(tokenizer, tmp_path, "raises") as source:
        assert "reward failed on an empty reply" in caplog.text
        assert 'return {"5": 1.0}[reply]' in caplog.text
        good, bad = scored(source, "5", "6")
    assert (good.reward, bad.reward) == (1.0, None)
    assert bad.error.startswith("the reward raised KeyError: '6'\nTraceback")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [("exits", "the reward raised SystemExit: 3"), ("ends_its_process", "the reward's process ended with exit code 7")],
)
def test_a_reward_that_ends_its_process_costs_its_sample_each_time(
    reward: str, reason: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with source_of(tokenizer, tmp_path, reward) as source:
        samples = scored(source, "5", "6", "7")
    assert [sample.error.partition("\n")[0] for sample in samples] == [reason] * 3


def test_a_reward_that_hangs_is_killed_with_what_it_started_and_the_others_are_scored(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with source_of(tokenizer, tmp_path, "hangs", reward_timeout_s=1.0) as source:
        samples = scored(source, "x", "5", "x", "6")
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    hung = "the reward gave no answer within 1 s (--reward-timeout)"
    assert [(sample.reward, sample.error) for sample in samples] == [(None, hung), (1.0, ""), (None, hung), (1.0, "")]
    assert len(pids) == 4
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_is_scored_for_long_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with closing(RewardProcesses(RewardName("own_rewards:hangs"), 1, limit_s=1.0, say_every_s=0.3)) as processes:
        (verdict,) = processes.verdicts([Reply(PROMPT, response(3, "x"), "x")]).result()
    assert verdict.reward is None
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "still scoring task=data prompt_id=4 sample=3 for_s=0 limit_s=1" in said


def test_the_processes_end_with_the_driver(tmp_path: Path) -> None:
    """A driver that is killed in the middle of a call leaves no process of a reward."""
    pid = os.fork()
    if pid == 0:  # the driver: it is killed while the reward hangs
        processes = RewardProcesses(RewardName("own_rewards:hangs"), 1, limit_s=600.0)
        processes.verdicts([Reply(PROMPT, response(0, "x"), "x")])
        time.sleep(600)
    pids = wait_for(tmp_path / "pids")
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    wait_for_the_end_of(pids)


def test_a_task_that_is_refused_ends_the_processes_of_the_tasks_before_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = TaskConfig(names=("own_rewards:fine", "own_rewards:wrong"), reward_processes=1)
    with pytest.raises(ConfigError, match="must be a finite number"):
        PromptSource(Config(task=task), tokenizer)
    (pid,) = map(int, (tmp_path / "pids").read_text().split())
    wait_for_the_end_of([pid])


def test_a_process_that_starts_while_all_are_ended_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would wait for the driver's end, and the driver, at its exit, for the process."""
    is_starting, may_start, ended = threading.Event(), threading.Event(), []

    class Slow:
        def __init__(self, reward: RewardName) -> None:
            is_starting.set()
            assert may_start.wait(60)

        def ask(self, replies: list[Reply]) -> None: ...

        def answer(self, *_: object) -> str:
            return ""

        def end(self) -> None:
            ended.append(self)

    monkeypatch.setattr(reward_processes, "_Process", Slow)
    processes = RewardProcesses(RewardName("own_rewards:plain"), 1, limit_s=60.0)
    answer = processes.verdicts([Reply(PROMPT, response(0, "5"), "5")])
    assert is_starting.wait(60)
    closing = threading.Thread(target=processes.close)
    closing.start()
    closing.join(0.2)  # it does not end before the start has
    may_start.set()
    closing.join()
    answer.result()
    assert len(ended) == 1


def wait_for_the_end_of(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(is_running(each) for each in pids):
        assert time.monotonic() < deadline, "a reward's process goes on"
        time.sleep(0.05)


def wait_for(path: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(each) for each in path.read_text().split()]


def test_the_form_is_read_from_the_parameters() -> None:
    def ours(prompt, reply, *, limit=3): ...  # type: ignore[no-untyped-def]
    def any_two(*both): ...  # type: ignore[no-untyped-def]
    def one(args, sample): ...  # type: ignore[no-untyped-def]
    def group(args, samples, **kwargs): ...  # type: ignore[no-untyped-def]

    assert [form_of(each, "task.reward", "f") for each in (ours, any_two, max, one, group)] == [
        OURS,
        OURS,
        OURS,
        ONE,
        GROUP,
    ]


def test_a_coroutines_loop_outlives_the_call() -> None:
    loops = []

    async def reward(prompt: Prompt, reply: str) -> float:
        import asyncio

        loops.append(asyncio.get_running_loop())
        return 1.0

    judge = Judge(reward)
    for _ in range(2):
        assert judge.verdicts([Reply(PROMPT, response(0, "5"), "5")])[0].reward == 1.0
    assert loops[0] is loops[1]


def test_slimes_args_have_every_setting_by_its_flags() -> None:
    args = by_flag(Config())
    assert args["rollout_batch_size"] == Config().rollout.batch_size
    assert args["rm_type"] == args["custom_rm_path"] == "last_integer"
