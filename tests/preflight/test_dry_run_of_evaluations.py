"""What a launch, its dry run and the doctor say of evaluations before anything starts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.compose import composed
from slime_spec.launch.preflight import look
from tests.support.tiny_policy import make_tiny_policy


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("job")
    (folder / "held.jsonl").write_text("".join(f'{{"prompt": "say {i}", "label": "{i}"}}\n' for i in range(7)))
    return [
        *("--config", "tiny", "--hf-checkpoint", str(make_tiny_policy(folder / "policy"))),
        *("--output-dir", str(folder / "run"), "--eval-interval", "5", "--eval-prompt-data"),
        *("held", str(folder / "held.jsonl"), "gone", str(folder / "gone.jsonl")),
    ]


def test_a_dry_run_says_each_set(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sampling = ("--n-samples-per-eval-prompt", "4", "--eval-temperature", "0.6", "--eval-max-response-len", "100")
    assert main(["train", *job[:-2], "--eval-task", "add10", *sampling, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    line = "evaluated every 5 steps: {} prompts x 4 samples, at most 128 + 100 tokens, temperature 0.6"
    assert line.format("held, 7") in shown
    assert line.format("add10, 64") in shown


def test_everything_wrong_with_the_sets_is_said_at_once(job: list[str]) -> None:
    made = composed([*job, "--eval-task", "no_task"])
    with closing(look(made)) as looked, pytest.raises(ConfigError) as refused:
        looked.checked()
    assert "set gone: must be a readable file" in str(refused.value)
    assert "set no_task: must be one of" in str(refused.value)


def test_files_of_sets_are_looked_for_without_the_checkpoint_too(job: list[str], tmp_path: Path) -> None:
    absent = ["--hf-checkpoint", str(tmp_path / "nowhere"), "--prompt-data", str(tmp_path / "none.jsonl")]
    with closing(look(composed([*job, *absent]))) as looked, pytest.raises(ConfigError) as refused:
        looked.checked()
    told = str(refused.value)
    assert all(each in told for each in ("nowhere", "none.jsonl", "set gone: must be a readable file"))
    assert "set held" not in told


def test_an_evaluation_beyond_the_models_context_is_refused_by_its_own_flags(job: list[str]) -> None:
    made = composed([*job[:-2], "--eval-max-response-len", "500"])
    with closing(look(made)) as looked, pytest.raises(ConfigError, match="Lower --eval-max-prompt-len or --eval-max"):
        looked.checked()


def test_a_run_that_evaluates_nothing_reads_no_set(job: list[str]) -> None:
    with closing(look(composed([*job, "--eval-interval", "null"]))) as looked:
        assert looked.checked().eval_prompts == ()


def test_a_set_of_a_run_without_steps_needs_no_prompts_of_the_run(job: list[str], tmp_path: Path) -> None:
    made = composed([*job[:-2], "--prompt-data", str(tmp_path / "absent.jsonl")])
    with closing(look(made, takes_prompts=False)) as looked:
        inputs = looked.checked()
        assert inputs.prompts is None
        assert [each.name for each in inputs.eval_prompts] == ["held"]
