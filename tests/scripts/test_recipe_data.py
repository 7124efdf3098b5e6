"""Recipes train on a file of problems, which they say in the plan; the built-in task runs where it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slime_spec.errors import ConfigError
from slime_spec.launch.compose import compose
from slime_spec.launch.groups import choices
from tests.support.launched import Ended, run_in_process
from tests.support.make_stand_ins import SCRIPTS, STAND_INS
from tests.support.tiny_policy import make_tiny_policy

# Small models, whose task is in their name or in the README.
ON_THE_TOY = {"smollm2-135m", "smollm2-135m-bf16", "smollm2-135m-longtail", "tiny"}
# Another reward than the recipes', for which no library is needed.
EXACT = ("--rm-type", "exact")


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two problems in the shape of dapo-math-17k.jsonl: messages, and the answer as text."""
    asked = "Solve the problem. The last line is Answer: $Answer.\n\nWhat is {}?"
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": asked.format(text)}], "label": label, "reward_model": {"style": "rule"}}
        for text, label in (("3 + 4", "7"), ("the value of 5 x 5", "25"))
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def configured(script: str, *arguments: str, **environ: str) -> dict[str, Any]:
    done = run_in_process(script, *arguments, environ={"SLIME_SPEC_COMMAND": "config", **environ})
    assert done.returncode == 0, done.stderr
    task: dict[str, Any] = yaml.safe_load(done.stdout)["task"]
    return task


def launched(script: str, made: Path, *arguments: str, **environ: str) -> Ended:
    """The launch on rollouts alone of a tiny model, on the embedded engine."""
    here = ("--debug-rollout-only", "--rollout-engine", "embedded", "--rollout-num-gpus-per-engine", "0")
    small = ("--rollout-num-engines", "1", "cluster.ray_address=null", "--sglang-dtype", "float32")
    return run_in_process(script, *here, *small, *arguments, environ={"MODEL_DIR": str(made), **environ})


@pytest.mark.parametrize("script", [*SCRIPTS, "run-smollm2-135M.sh"])
def test_a_script_takes_the_file_that_the_environment_names_with_the_reward_for_mathematics(script: str) -> None:
    model = "models/SmolLM2-135M-Instruct"
    task = configured(script, PROMPT_DATA="/data/problems.jsonl", MODEL_DIR=model)
    named = [task[name] for name in ("prompt_data", "input_key", "label_key", "reward")]
    assert named == ["/data/problems.jsonl", "prompt", "label", "math"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_behind_the_script_win_over_its_data(script: str) -> None:
    flags = ("--prompt-data", "mine.jsonl", "--input-key", "question", "--label-key", "answer", "--rm-type", "exact")
    task = configured(script, *flags, PROMPT_DATA="/data/problems.jsonl")
    named = [task[name] for name in ("prompt_data", "input_key", "label_key", "reward")]
    assert named == ["mine.jsonl", "question", "answer", "exact"]


def test_slimes_defaults_need_a_file_of_prompts() -> None:
    with pytest.raises(ConfigError, match=r"task\.names.*--prompt-data"):
        compose(["--config", "slime", "--n-samples-per-prompt", "8"])


@pytest.mark.parametrize("experiment", sorted({*choices("experiment")} - {"slime"}))
def test_an_experiment_has_the_built_in_task_only_where_it_is_small(experiment: str) -> None:
    task = compose(["--config", experiment]).task
    assert (task.prompt_data is None) == (experiment in ON_THE_TOY)
    if experiment not in ON_THE_TOY:
        assert (task.prompt_data, task.reward) == ("data/dapo-math-17k.jsonl", "math")


@pytest.mark.parametrize("named", [["data=arithmetic"], ["--task", "arithmetic"]])
def test_the_built_in_task_replaces_a_recipes_file_where_it_is_named(named: list[str]) -> None:
    assert compose(["--config", "mimo-7b-rl-mtp", *named]).task == compose([]).task


def test_a_file_replaces_the_tasks_of_an_experiment() -> None:
    task = compose(["--config", "smollm2-135m", "--prompt-data", "mine.jsonl"]).task
    assert (task.prompt_data, task.reward) == ("mine.jsonl", compose([]).task.reward)


def test_the_plan_says_which_data_and_reward_the_run_takes(problems: Path, tmp_path: Path) -> None:
    made = STAND_INS["glm4.5-air"](tmp_path).target
    done = launched("run-glm4.5-air-mtp.sh", made, *EXACT, "--dry-run", PROMPT_DATA=str(problems))
    told = " ".join(done.stdout.split())  # lines are wrapped
    assert f"prompts of {problems}, keys prompt and label, reward exact " in told
    assert "The last line is Answer: $Answer" in told, "the first prompt as the model reads it"
    assert done.stdout.rstrip().endswith("a launch would go on")
    toy = launched("run-glm4.5-air-mtp.sh", made, "data=arithmetic", "--dry-run")
    assert "prompts and rewards of the tasks arithmetic\n" in toy.stdout


def test_a_recipe_whose_file_is_missing_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    made = make_tiny_policy(tmp_path / "model", num_nextn_predict_layers=0)
    done = launched("run-mimo-7B-rl-mtp.sh", made, *EXACT, "speculative=none", "--output-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "task.prompt_data" in done.stderr
    assert "data/dapo-math-17k.jsonl" in done.stderr
    assert "PROMPT_DATA" in done.stderr
    assert "data=arithmetic" in done.stderr
    assert not (tmp_path / "run").exists()
