"""docs/agents.md as a user follows it: its files, its command, on the embedded engine and on a real SGLang server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from slime_spec.metrics.jsonl import read_metrics
from slime_spec.rl.rollout_data import load_rollout
from slime_spec.slime_sample import Sample
from tests.support.sglang_checkpoints import make_target
from tests.support.sglang_real import CPU, START_TIMEOUT_S, sglang_python
from tests.support.tiny_models import load_reference
from tests.support.tiny_policy import make_tiny_policy

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
RUN_TIMEOUT_S = 500


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found is not None
    return found[1]


def follow(folder: Path, *arguments: str, **environment: str) -> Path:
    """Write the page's files, run its command with other ``arguments`` after it; the run's folder."""
    saved = ("--save-debug-rollout-data", str(folder / "step_{rollout_id}.pt"))
    run_command(folder, block("bash"), *saved, *arguments, **environment)
    return folder / "calculator-run"


def run_command(folder: Path, command: str, *arguments: str, **environment: str) -> None:
    """Run a command of the page in a folder with the page's files, other ``arguments`` after it."""
    (folder / "calculator.py").write_text(block("python"))
    (folder / "sums.jsonl").write_text(block("json"))
    (folder / "chats.jsonl").write_text(block("jsonl"))
    name, *rest = shlex.split(command.replace("\\\n", " "))
    assert name == "slime-spec"
    done = subprocess.run(
        [str(Path(sys.executable).parent / "slime-spec"), *rest, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def check_first_step(folder: Path, policy: Path, tolerance: float) -> None:
    """The first step's logprobs are those of one forward pass of transformers over each whole sequence."""
    model = load_reference(policy)
    samples = load_rollout(str(folder / "step_{rollout_id}.pt"), 0)
    assert len(samples) == 8
    assert len({each.response.token_ids for each in samples}) > 1
    for sample in samples:
        response, ids = sample.response, sample.prompt.token_ids + sample.response.token_ids
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[:-1]
        at_once = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[-len(response.token_ids) :, 0].tolist()
        assert 0 < sum(response.loss_mask) < len(response.loss_mask)
        for counts, got, expected in zip(response.loss_mask, response.logprobs, at_once, strict=True):
            assert got == (pytest.approx(expected, abs=tolerance) if counts else 0.0)
        assert response.turns is not None
        assert response.turns.num_turns == 2
        assert response.turns.num_generated_tokens == sum(response.loss_mask)


def check_steps(run: Path, tolerance: float) -> list[dict[str, float]]:
    metrics = read_metrics(run / "metrics.jsonl")
    assert len(metrics) == 2
    for step, row in enumerate(metrics):
        assert row["rollout/turns_mean"] == 2
        assert row["rollout/num_excluded"] == 0
        assert 0 < row["rollout/loss_token_share"] < 1
        assert row["rollout/num_tokens"] == row["train/num_tokens"]
        assert row["rollout/weight_version_min"] == row["rollout/weight_version_max"] == step
        assert row["sync/weight_version"] == step + 1
        assert row["train/train_rollout_logprob_abs_diff"] < tolerance
    return metrics


def test_the_calculator_calculates_and_its_reward_reads_the_last_answer() -> None:
    calculator = ModuleType("calculator")
    exec(block("python"), calculator.__dict__)
    for text, value in (("2 + 3", 5), ("so 10-4*2 is", 12), ("7, then 6 * 7", 42), ("no 5 numbers", None)):
        assert calculator.calculate(text) == value
    right, wrong = (Sample(label="12", metadata={"answer": text}) for text in ("3 + 9 = 12", "12 or 13"))
    rewards = [asyncio.run(calculator.reward(SimpleNamespace(), each)) for each in (right, wrong)]
    assert rewards == [1.0, 0.0]


def test_the_pages_run_on_a_tiny_policy_trains_on_two_turns(tmp_path: Path) -> None:
    """The policy's tokens are bytes, and its replies noise: rewards of the page are 0, so another judges."""
    policy = make_tiny_policy(tmp_path / "policy")
    tiny = ("--config", "tiny", "--hf-checkpoint", str(policy), "--speculative-algorithm", "LOOKUP")
    run = follow(
        tmp_path,
        *tiny,
        *("--sp-min-token-match", "1", "--speculative-num-steps", "4", "--lr", "1e-3"),
        *("--custom-rm-path", "tests.support.rewards:variety", "trainer.metrics_of_all_samples=true"),
    )
    check_first_step(tmp_path, policy, 2e-4)
    metrics = check_steps(run, 1e-4)
    assert all(row["train/grad_norm"] > 0 for row in metrics)
    assert sum(row["spec/verify_rounds"] for row in metrics) > 0
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert all("I see no calculation" in row["reply"] or "The calculator says" in row["reply"] for row in rows)
    assert all(row["meta_info"]["num_turns"] == 2 for row in rows)


def check_whole_run(folder: Path) -> None:
    """Two steps of filtered groups, three evaluations by the same function, and a page that shows them."""
    *steps, end = read_metrics(folder / "whole-run" / "metrics.jsonl")
    assert len(steps) == 2
    assert [row["eval/held_out/weight_version"] for row in (*steps, end)] == [0, 1, 2]
    for row in (*steps, end):
        assert (row["eval/held_out/num_samples"], row["eval/held_out/num_excluded"]) == (8, 0)
        assert row["eval/held_out/pass@1"] <= row["eval/held_out/pass@4"]
    for step, row in enumerate(steps):
        assert row["rollout/turns_mean"] == 2
        samples = [each for each in saved_samples(folder) if each["rollout_id"] == step]
        groups: dict[int, set[float]] = {}
        for each in samples:
            groups.setdefault(each["prompt_id"], set()).add(each["reward"])
        assert len(groups) == 2
        assert all(len(rewards) > 1 for rewards in groups.values())
    page = (folder / "whole-run.html").read_text()
    assert "eval/held_out" in page
    assert any(each["prompt"] in page for each in saved_samples(folder))


def saved_samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "whole-run" / "samples.jsonl").read_text().splitlines()]


def whole_run(folder: Path, *arguments: str) -> None:
    """Run the two commands of the page's second example."""
    training, report = block("sh").replace("\\\n", " ").strip().splitlines()
    run_command(folder, training, *arguments)
    run_command(folder, report)
    check_whole_run(folder)


def test_the_whole_run_on_a_tiny_policy(tmp_path: Path) -> None:
    """Messages, an evaluation by the function, a filter, a report; its replies are noise, which another judges."""
    policy = make_tiny_policy(tmp_path / "policy")
    tiny = ("--config", "tiny", "--hf-checkpoint", str(policy), "--speculative-algorithm", "LOOKUP")
    sizes = ("--rollout-max-prompt-len", "256", "--rollout-max-context-len", "480")
    whole_run(tmp_path, *tiny, *sizes, "--custom-rm-path", "tests.support.rewards:variety")


@pytest.mark.long
@pytest.mark.proves("slime_spec", "rollout", "trainer_bridge", "conf", "docs/agents.md")
@pytest.mark.real_model
def test_the_whole_run_as_it_stands_on_the_real_model(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    whole_run(tmp_path, "--no-save-final")


@pytest.mark.long
@pytest.mark.proves("slime_spec", "rollout", "trainer_bridge", "conf", "docs/agents.md")
@pytest.mark.real_model
def test_the_pages_command_runs_as_it_stands_on_the_real_model(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    run = follow(tmp_path, "trainer.metrics_of_all_samples=true", "--no-save-final")
    check_first_step(tmp_path, ROOT / "models" / "SmolLM2-135M-Instruct", 1e-3)
    check_steps(run, 1e-3)


@pytest.mark.long
@pytest.mark.proves("slime_spec", "rollout", "trainer_bridge", "conf", "docs/agents.md")
@pytest.mark.sglang_server
@pytest.mark.parametrize("algorithm", ["NONE", "STANDALONE"])
def test_the_pages_run_on_a_real_server_reuses_the_first_turns_prefix(tmp_path: Path, algorithm: str) -> None:
    policy = make_target(tmp_path / "policy")
    drafting = ("--speculative-algorithm", algorithm)
    if algorithm != "NONE":
        drafting += ("--speculative-draft-model-path", str(policy), "--speculative-num-steps", "3")
        drafting += ("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
    run = follow(
        tmp_path,
        *("--config", "tiny", "--hf-checkpoint", str(policy), *drafting),
        *("--rollout-engine", "sglang", "--sglang-python", sglang_python(), "--sglang-attention-backend", "intel_amx"),
        *("--sglang-mem-fraction-static", "0.3", "--sglang-max-total-tokens", "4096", "--sglang-sleep-on-idle"),
        *("--sglang-max-running-requests", "8", "--sglang-start-timeout", str(START_TIMEOUT_S)),
        *("--custom-rm-path", "tests.support.rewards:variety", "trainer.metrics_of_all_samples=true"),
        PYTHONPATH=f"{CPU}{os.pathsep}{ROOT}",
        SGLANG_USE_CPU_ENGINE="1",
        OMP_NUM_THREADS="1",
    )
    if algorithm == "NONE":  # a server on a CPU verifies greedily, and then all samples of a prompt are the same
        check_first_step(tmp_path, policy, 1e-3)
    metrics = check_steps(run, 1e-3)
    assert all((row["spec/verify_rounds"] > 0) == (algorithm != "NONE") for row in metrics)
    if algorithm == "NONE":
        # What the second turn finds: the prompt and the first turn, but for its last token, which was never fed.
        for sample in load_rollout(str(tmp_path / "step_{rollout_id}.pt"), 0):
            num_first = sample.response.loss_mask.index(0)
            assert sample.response.cached_tokens >= len(sample.prompt.token_ids) + num_first - 1
    assert metrics[-1]["rollout/cached_prompt_share"] > 0
