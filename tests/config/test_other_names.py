"""Names of verl's and TRL's settings are answered with our flags, which exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import read_arguments
from slime_spec.launch.compose import compose
from slime_spec.launch.flags import is_flag
from slime_spec.launch.others.names import ALL_BELOW, counterpart_of, counterparts
from tests.scripts.test_generated_docs import script

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "coming-from-verl-and-trl.md"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+(?![\w-])")
# Facts: the settings of verl's trainers (2026), and the fields of TRL's GRPOConfig beside transformers' own.
OF_VERL = (HERE / "settings_of_verl.txt").read_text(encoding="utf-8").split()
OF_TRL = {*(HERE / "settings_of_trl.txt").read_text(encoding="utf-8").split(), *TrainingArguments.__dataclass_fields__}
# Names of its recipes, its trainer's arguments, its scripts and its earlier releases.
BESIDES = {
    "verl": {"algorithm.filter_groups.enable"},
    "TRL": {"model_name_or_path", "dataset_name", "reward_funcs", "peft_config", "max_prompt_length"},
}


def test_every_name_is_one_of_the_other_trainer() -> None:
    unknown = []
    for name, each in counterparts().items():
        if each.trainer == "verl":
            is_theirs = any(
                path.startswith(name[:-1]) if name.endswith(ALL_BELOW) else path == name for path in OF_VERL
            )
        else:
            is_theirs = name in OF_TRL
        if is_theirs == (name in BESIDES[each.trainer]):
            unknown.append(name)
    assert unknown == []
    assert len(counterparts()) > 150


def test_every_flag_of_the_tables_and_of_the_page_is_a_flag() -> None:
    in_tables = {flag for each in counterparts().values() for flag in (*each.flags, *FLAG.findall(each.note))}
    prose, *_ = PAGE.read_text(encoding="utf-8").partition("## verl's names")
    in_prose = set(FLAG.findall(prose))
    assert len(in_prose) > 4
    assert len(in_tables) > 60
    assert [flag for flag in sorted(in_tables | in_prose) if not is_flag(flag)] == []


def test_the_page_has_every_name() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert script("make_other_names_doc").with_tables(page) == page, "run: python scripts/make_other_names_doc.py"
    assert "| `num_generations` | `--n-samples-per-prompt` |" in page


@pytest.mark.parametrize(
    ("words", "rule", "remedy"),
    [
        ("--num_generations 8", "is TRL's num_generations", "Pass --n-samples-per-prompt."),
        ("--max-completion-length=5", "is TRL's max_completion_length", "Pass --rollout-max-response-len."),
        ("--num_iterations 2", "has no counterpart: each sample is trained on once", "Leave it out."),
        ("actor_rollout_ref.rollout.n=8", "is verl's actor_rollout_ref.rollout.n", "Pass --n-samples-per-prompt."),
        ("+data.train_files=x.parquet", "is verl's data.train_files", "Pass --prompt-data."),
        ("algorithm.adv_estimator=grpo", "is verl's algorithm.adv_estimator", "Pass --advantage-estimator"),
        ("critic.optim.lr=1e-5", "is verl's critic.*, which has no counterpart", "Leave it out."),
        ("actor_rollout_ref.ref.fsdp_config.param_offload=True", "verl's actor_rollout_ref.ref.*", "Leave it out."),
    ],
)
def test_a_name_of_theirs_is_refused_with_ours(words: str, rule: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments([*words.split(), "--lr", "1e-6"])
    assert rule in caught.value.rule
    assert remedy in caught.value.remedy


def test_a_mistyped_name_of_theirs_is_understood_and_an_own_flag_comes_first() -> None:
    with pytest.raises(ConfigError, match="is not a flag") as caught:
        read_arguments(["--num_generation", "8"])
    assert "If TRL's num_generations is meant: pass --n-samples-per-prompt." in caught.value.remedy
    with pytest.raises(ConfigError) as caught:
        read_arguments(["--rolout-batch-size", "8"])
    assert "Did you mean --rollout-batch-size?" in caught.value.remedy


def test_a_setting_of_the_same_name_keeps_its_own_meaning() -> None:
    assert counterpart_of("algorithm.gamma") is None
    assert compose(["algorithm.gamma=0.5"]).algorithm.gamma == 0.5
    assert compose(["--seed", "3"]).run.seed == 3


def test_the_run_of_the_page_is_what_the_other_two_say() -> None:
    """64 prompts of 8 samples, in steps of 16 x 8 = 128 samples: four steps a rollout."""
    command = re.search(r"```bash\nslime-spec config (.*)\n```", PAGE.read_text(encoding="utf-8"))
    assert command is not None
    config = compose(command[1].split())
    num_samples = config.rollout.batch_size * config.rollout.n_samples_per_prompt
    assert (num_samples, num_samples // config.samples_per_step) == (512, 4)
