"""All that is wrong is told at once: a check that needs no other's result is made whatever the other refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_spec.bench.robustness.tiny import make_target
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import composed
from slime_spec.launch.preflight import look

# Flags whose file is missing -> the setting and a word of the complaint.
MISSING = {
    "--prompt-data /no/prompts.jsonl": ("task.prompt_data", "/no/prompts.jsonl"),
    "--eval-interval 1 --eval-prompt-data one /no/one.jsonl two /no/two.jsonl": ("eval.prompt_data", "/no/two.jsonl"),
    "--ref-load /no/reference --use-kl-loss": ("trainer.ref_load", "/no/reference"),
    "--load /no/checkpoints": ("trainer.load", "/no/checkpoints"),
    "--custom-rm-path no_such_module.reward": ("task.reward", "no_such_module"),
    "--custom-generate-function-path no_such_agent.generate": ("custom.generate", "no_such_agent"),
    "--rollout-sample-hook-path no_such_hook.hook": ("custom.sample_hooks", "no_such_hook"),
    "--sglang-speculative-algorithm EAGLE3 --sglang-speculative-draft-model-path /no/draft": (
        "speculative.draft_model_path",
        "/no/draft",
    ),
}
BASE = ["task.names=[]", "--apply-chat-template=false", "--rollout-batch-size", "2", "--n-samples-per-prompt", "2"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"), LLAMA)


def refusals(*words: str) -> list[ConfigError]:
    looked = look(composed([*BASE, *words]))
    looked.close()
    assert looked.inputs is None
    return list(looked.refusals)


@pytest.mark.parametrize("has_target", [True, False], ids=["with its checkpoint", "without its checkpoint"])
def test_what_is_missing_is_told_together_with_a_missing_checkpoint_and_without(target: Path, has_target: bool) -> None:
    words = " ".join(MISSING).split()
    checkpoint = str(target) if has_target else "/no/policy"
    told = [(each.setting, str(each)) for each in refusals("--hf-checkpoint", checkpoint, *words)]
    for setting, word in MISSING.values():
        assert [text for name, text in told if name == setting and word in text], f"{setting} {word} is not told"
    assert any(name == "model.hf_checkpoint" for name, _ in told) != has_target
    assert len({text for _, text in told}) == len(told), "a complaint comes once"
    assert sum("no_such_module" in text for _, text in told) == 1, "the run's reward is not each set's"


def test_a_missing_evaluation_and_a_missing_checkpoint_are_told_together(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "1 + 1 =", "label": "2"}) + "\n")
    told = refusals(
        *("--hf-checkpoint", "/no/policy", "--prompt-data", str(data)),
        *("--eval-interval", "1", "--eval-prompt-data", "held_out", "/no/held_out.jsonl"),
    )
    assert [each.setting for each in told] == ["model.hf_checkpoint", "eval.prompt_data"]


def test_a_sets_own_reward_is_told_as_the_evaluations(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "1 + 1 =", "label": "2"}) + "\n")
    evaluation = ("--eval-interval", "1", "--eval-prompt-data", "own", str(data), "--eval-rm-type", "no_such_eval.f")
    told = refusals("--hf-checkpoint", "/no/policy", "--prompt-data", str(data), *evaluation)
    assert [each.setting for each in told] == ["model.hf_checkpoint", "eval.reward"]


def test_a_set_without_what_training_reads_is_no_mistake_beside_a_missing_checkpoint(tmp_path: Path) -> None:
    data, held = tmp_path / "prompts.jsonl", tmp_path / "held.jsonl"
    data.write_text(json.dumps({"prompt": "1 + 1 =", "label": "2", "extra_info": {"level": 1}}) + "\n")
    held.write_text(json.dumps({"prompt": "1 + 2 =", "label": "3"}) + "\n")
    words = ("--hf-checkpoint", "/no/policy", "--metadata-key", "extra_info", "--eval-interval", "1")
    with_set = refusals(*words, "--prompt-data", str(data), "--eval-prompt-data", "held", str(held))
    assert [each.setting for each in with_set] == ["model.hf_checkpoint"]
    of_training = refusals(*words, "--prompt-data", str(held), "--eval-prompt-data", "held", str(held))
    assert [each.setting for each in of_training] == ["model.hf_checkpoint", "task.metadata_key"]


@pytest.mark.parametrize("has_target", [True, False], ids=["with its checkpoint", "without its checkpoint"])
def test_tools_that_no_row_has_are_a_mistake_of_who_asks_for_them_and_not_of_slimes_defaults(
    tmp_path: Path, target: Path, has_target: bool
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"input": "1 + 1 =", "label": "2"}) + "\n")
    slimes = ("--config", "slime", "--hf-checkpoint", str(target) if has_target else "/no/policy")

    def told(*words: str) -> list[str]:
        looked = look(composed([*slimes, "--prompt-data", str(data), "--n-samples-per-prompt", "2", *words]))
        looked.close()
        return [each.setting for each in looked.refusals if each.setting.startswith("task.")]

    assert told() == []
    assert told("--tool-key", "tools") == ["task.tool_key"]
    assert told("--tool-key", "functions") == ["task.tool_key"]
