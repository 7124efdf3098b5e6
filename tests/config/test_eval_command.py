"""``slime-spec eval``: what each kind of checkpoint stands for, what is evaluated, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from slime_spec.config.build import to_yaml
from slime_spec.config.eval_sets import eval_sets
from slime_spec.config.evaluation import EvalConfig
from slime_spec.config.tree import (
    Config,
    DraftTrainingConfig,
    MetricsConfig,
    RolloutConfig,
    RunConfig,
    SpeculativeConfig,
    TaskConfig,
    TrainerConfig,
)
from slime_spec.errors import ConfigError, each_of
from slime_spec.launch.cli import main
from slime_spec.launch.eval_arguments import EvalArguments, read_eval_arguments
from slime_spec.launch.evaluate import as_json, engines_folder, table
from slime_spec.metrics.evaluation import evaluation_metrics
from slime_spec.rl.evaluation import Evaluated
from slime_spec.types import GeneratedSample, Prompt, Sample, SpecCounters


def read(tmp_path: Path, *argv: str) -> EvalArguments:
    return read_eval_arguments(argv, tmp_path / "logs")


@pytest.fixture
def hf(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, of a run that trained, evaluated and saved."""
    folder = tmp_path / "run"
    config = Config(
        run=RunConfig(
            output_dir=str(folder), num_rollout=40, save_samples=True, save_debug_rollout_data="{rollout_id}"
        ),
        rollout=RolloutConfig(engine="fake", max_response_len=99),
        eval=EvalConfig(interval=10, prompt_data=("aime", "aime.jsonl"), n_samples_per_prompt=4),
        speculative=SpeculativeConfig(algorithm="LOOKUP"),
        trainer=TrainerConfig(save_interval=5, load="elsewhere"),
        metrics=MetricsConfig(use_wandb=True),
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    for step in (5, 10):
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:06d}" / "metadata.json").write_text("{}")
    return folder


def test_a_hugging_face_folder_is_generated_with_and_nothing_is_trained(tmp_path: Path, hf: str) -> None:
    asked = read(tmp_path, hf, "--prompt-data", "data/aime.jsonl", "--rm-type", "exact", "--n-samples-per-prompt", "3")
    config = asked.made.config
    assert (config.model.hf_checkpoint, config.run.mode, config.trainer.load) == (hf, "rollout_only", None)
    assert config.run.output_dir == str(tmp_path / "logs")
    assert config.evaluates
    (only,) = eval_sets(config)
    assert (only.name, only.config.task.prompt_data, only.config.task.reward) == ("aime", "data/aime.jsonl", "exact")
    assert only.config.rollout.n_samples_per_prompt == 3
    assert asked.made.notes == ()


def test_tasks_and_named_sets_are_evaluated_on_as_in_a_run(tmp_path: Path, hf: str) -> None:
    words = ("--task", "add10", "max4", "--eval-prompt-data", "a", "x.jsonl", "--n-samples-per-eval-prompt", "2")
    sets = eval_sets(read(tmp_path, hf, *words, "--n-samples-per-prompt", "5").made.config)
    assert [each.name for each in sets] == ["a", "add10", "max4"]
    assert {each.config.rollout.n_samples_per_prompt for each in sets} == {2}


def test_a_file_of_sets_is_instead_of_the_runs_own(tmp_path: Path, run: Path) -> None:
    (tmp_path / "sets.yaml").write_text("datasets: {gsm8k: {path: gsm8k.jsonl}}")
    config = read(tmp_path, str(run), "--eval-config", str(tmp_path / "sets.yaml")).made.config
    assert [each.name for each in eval_sets(config)] == ["gsm8k"]


def test_a_runs_export_is_evaluated_with_the_runs_settings_and_its_own_sets(tmp_path: Path, run: Path) -> None:
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    config = read(tmp_path, str(run)).made.config
    assert (config.model.hf_checkpoint, config.run.mode) == (str(run / "hf"), "rollout_only")
    assert (config.speculative.algorithm, config.rollout.max_response_len) == ("LOOKUP", 99)
    assert [each.name for each in eval_sets(config)] == ["aime"]
    assert (config.trainer.load, config.metrics.use_wandb, config.run.save_debug_rollout_data) == (None, False, None)
    other = read(tmp_path, str(run), "--task", "add10", "--speculative-algorithm", "NONE").made.config
    assert [each.name for each in eval_sets(other)] == ["add10"], "sets of the command line are instead of the run's"
    assert other.speculative.algorithm == "NONE"


def test_a_draft_that_the_run_trained_is_the_exports(tmp_path: Path, run: Path) -> None:
    base = Config(
        rollout=RolloutConfig(engine="fake"),
        speculative=SpeculativeConfig(algorithm="EAGLE3", draft_model_path="first"),
        draft_training=DraftTrainingConfig(enable=True),
        eval=EvalConfig(interval=1, tasks=("add10",)),
    )
    (run / "config.yaml").write_text(to_yaml(base))
    for name in ("hf", "draft"):
        (run / name).mkdir()
        (run / name / "config.json").write_text("{}")
    assert read(tmp_path, str(run)).made.config.speculative.draft_model_path == str(run / "draft")
    chosen = read(tmp_path, str(run), "--speculative-draft-model-path", "mine").made.config
    assert chosen.speculative.draft_model_path == "mine"


@pytest.mark.parametrize(("given", "step"), [("", 10), ("checkpoints", 10), ("checkpoints/step-000005", 5)])
def test_a_runs_checkpoint_is_loaded_by_a_trainer(tmp_path: Path, run: Path, given: str, step: int) -> None:
    (run / "checkpoints" / "latest").write_text("step-000010\n")
    config = read(tmp_path, str(run / given)).made.config
    assert config.run.mode == "train"
    assert config.trainer.load == str(run / (given or "checkpoints"))
    assert config.run.num_rollout == step + 1, "the checkpoint is not at its end, which would be said"
    assert (config.save_interval, config.rollout.max_response_len) == (None, 99)


def test_a_task_is_evaluated_whatever_data_and_logs_the_run_had(tmp_path: Path, run: Path) -> None:
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    data = TaskConfig(prompt_data="x.jsonl", input_key="question", reward="math", shuffle=False)
    base = Config(run=RunConfig(num_epoch=3), task=data, metrics=MetricsConfig(use_tensorboard=True))
    (run / "config.yaml").write_text(to_yaml(base))
    made = read(tmp_path, str(run), "--task", "add10").made
    assert made.config.task == TaskConfig()
    assert (made.config.metrics.use_tensorboard, made.config.run.num_epoch) == (False, None)
    assert not any("--num-epoch" in note for note in made.notes)


def test_an_early_checkpoint_of_a_run_whose_rate_warms_up_and_decays_is_evaluated(tmp_path: Path, run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-000005\n")
    rate = TrainerConfig(lr_decay_style="cosine", lr_warmup_steps=50)
    base = Config(run=RunConfig(num_rollout=400), trainer=rate, eval=EvalConfig(interval=1, tasks=("add10",)))
    (run / "config.yaml").write_text(to_yaml(base))
    assert read(tmp_path, str(run)).made.config.run.num_rollout == 6


REFUSED = [
    (["model", "--prompt-data-mix", "a=1:x.jsonl"], r"task\.prompt_data_mix: is of a training run.*NAME FILE"),
    ([], "CHECKPOINT: must come first"),
    (["--task", "add10"], "CHECKPOINT: must come first"),
    (["nowhere", "--task", "add10"], "CHECKPOINT: must be a Hugging Face checkpoint folder"),
    (["model"], "eval: needs prompts to evaluate on.*Pass --prompt-data FILE"),
    (["model", "--task", "add10", "--lr", "1"], r"trainer\.lr: belongs to a training run"),
    (["model", "--task", "add10", "--num-rollout", "1"], r"run\.num_rollout: belongs to a training run"),
    (["model", "--task", "add10", "--hf-checkpoint", "other"], r"model\.hf_checkpoint: CHECKPOINT names the model"),
    (["model", "--task", "add10", "--use-wandb"], r"metrics\.use_wandb: belongs to a training run"),
    (
        ["model", "--task", "add10", "--json", "nowhere/a.json"],
        "--json: must be a file in a folder that can be written",
    ),
    (["model", "--task", "add10", "--eval-tempereture", "1"], "is not a flag"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED)
def test_what_cannot_be_evaluated_is_refused(
    tmp_path: Path, hf: str, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, *argv)


def test_what_else_is_wrong_is_told_with_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").write_text('{"prompt": "a", "label": 1}\n')
    sets = ["here", str(tmp_path / "here.jsonl"), "gone", str(tmp_path / "gone.jsonl")]
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, str(tmp_path / "nowhere"), "--eval-prompt-data", *sets)
    told = [each.setting for each in each_of(refused.value)]
    assert told == ["CHECKPOINT", "eval.prompt_data"]
    assert "set gone: must be a readable file" in str(refused.value)
    assert "Pass --eval-prompt-data NAME FILE.jsonl, or --eval-task TASK." in str(refused.value)


def test_a_refusal_ends_the_command_with_2_and_leaves_no_folder(
    tmp_path: Path, hf: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert main(["eval", hf]) == 2
    assert capsys.readouterr().err.startswith("error: eval\n")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_logs_of_engines_are_kept_where_something_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with engines_folder() as folder:
            (folder / "engines").mkdir()
            raise ValueError(str(folder))

    with pytest.raises(ValueError) as failed:
        fail()
    folder = Path(str(failed.value))
    assert f"kept in {folder / 'engines'}" in capsys.readouterr().err
    assert folder.exists()
    shutil.rmtree(folder)
    with engines_folder() as other:
        (other / "engines").mkdir()
    assert not other.exists()


def evaluated(name: str, *rewards: float | None) -> Evaluated:
    spec = SpecCounters(num_rounds=2, num_proposed=6, histogram=(1, 1), num_drafted=6)
    response = GeneratedSample("g", 0, (5, 6, 7), (-1.0,) * 3, "stop", 0, 2, spec=spec)
    samples = [
        Sample(Prompt(i // 2, name, "?", (1,), "x"), replace(response, sample_index=i % 2), "", reward)
        for i, reward in enumerate(rewards)
    ]
    return Evaluated(name, evaluation_metrics(name, samples, 2), samples)


def test_the_table_has_a_row_of_each_set_and_the_file_the_same_numbers() -> None:
    both = [evaluated("a", 1.0, 0.0, 1.0, 1.0), evaluated("b", 0.0, None)]
    written = StringIO()
    Console(file=written, width=140).print(table("model", both))
    a, b = (line.split("│") for line in written.getvalue().splitlines() if "│ a " in line or "│ b " in line)
    assert [cell.strip() for cell in a[1:4]] == ["a", "4", "0.750"]
    assert [cell.strip() for cell in b[1:4]] == ["b", "2", "0.000"]
    assert "pass@2" in written.getvalue()
    told = json.loads(as_json("model", 20, both))
    assert (told["checkpoint"], told["step"], list(told["sets"])) == ("model", 20, ["a", "b"])
    assert told["sets"]["a"]["reward"] == told["sets"]["a"]["accuracy"] == 0.75
    assert told["sets"]["a"]["pass@2"] == 1.0
    assert told["sets"]["a"]["spec_accept_length"] == 1.5
    assert told["sets"]["b"]["num_excluded"] == 1
