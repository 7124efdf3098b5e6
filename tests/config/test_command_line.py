"""Flags and overrides are two spellings of the same tree."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from config_strategies import names, texts
from hypothesis import given
from hypothesis import settings as run_with
from omegaconf import OmegaConf

from slime_spec.config.build import to_yaml
from slime_spec.config.schema import settings
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import read_arguments
from slime_spec.launch.cli import main
from slime_spec.launch.compose import compose, laid_over
from slime_spec.launch.compose import composed as all_composed
from slime_spec.launch.flags import REFUSED, flags


def refusal(*argv: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        compose(argv)
    return caught.value


def composed(command_line: str) -> Config:
    return compose(command_line.split())


@pytest.mark.parametrize(
    ("flag_style", "hydra_style"),
    [
        ("--config smollm2-135m --lr 1e-6", "experiment=smollm2-135m trainer.lr=1e-6"),
        ("--task add10 max4 --seed=7", "task.names=[add10,max4] run.seed=7"),
        ("--task add10 trainer.lr=1", "trainer.lr=1 task.names=add10"),
        ("--no-colocate --offload=off --use-wandb", "cluster.colocate=no cluster.offload=0 metrics.use_wandb=True"),
        ("--rollout_top_k -1 --rollout-stop-token-ids 1 2", "rollout.top_k=-1 rollout.stop_token_ids=[1,2]"),
        ("--debug-rollout-only", "run.mode=rollout_only"),
        (
            "--sp_type deterministic --gen_num_per_cycle 4",
            "speculative.algorithm=LOOKUP speculative.num_steps=4",
        ),
        (
            "--sp-min-token-match 1 --sp-max-token-match=3",
            "speculative.min_token_match=1 speculative.max_token_match=3",
        ),
        ("--speculative-num-draft-tokens 9", "speculative.num_draft_tokens=9"),
        ("--sglang-speculative-num-draft-tokens 9", "speculative.num_draft_tokens=9"),
        ("--sglang-context-length 8Ki --sglang-dtype bfloat16", "engine.context_length=8192 engine.dtype=bfloat16"),
        ("--sglang-cuda-graph-bs 1 2 3 --sglang-tp-size 2", "sglang.cuda_graph_bs_decode=[1,2,3] sglang.tp_size=2"),
        ("--sglang-disable-radix-cache", "engine.disable_radix_cache=true"),
        ("--sglang-disable-overlap-schedule", "sglang.disable_overlap_schedule=true"),
        ("--speculative-attention-mode decode", "sglang.speculative_attention_mode=decode"),
        (
            "--speculative-algorithm EAGLE3 --speculative-draft-model d --speculative-num-steps 5 "
            "--speculative-eagle-topk 4 --speculative-num-draft-tokens 8",
            "speculative.algorithm=EAGLE3 speculative.draft_model_path=d speculative.num_steps=5 "
            "speculative.eagle_topk=4 speculative.num_draft_tokens=8",
        ),
        (
            "--sp_type eagle3 --sp_checkpoint_path d --sp_quantization INT8 --gen_num_per_cycle 3",
            "speculative.algorithm=EAGLE3 speculative.draft_model_path=d speculative.draft_model_quantization=int8 "
            "speculative.num_steps=3",
        ),
        ("--sp-type vanilla --sp-checkpoint-path d", "speculative.algorithm=STANDALONE speculative.draft_model_path=d"),
        ("--sp-type mtp", "speculative.algorithm=NEXTN"),
        (
            "--sglang-speculative-algorithm NEXTN --sglang-speculative-use-rejection-sampling "
            "--speculative-use-block-verification",
            "speculative.algorithm=NEXTN speculative.use_rejection_sampling=true "
            "speculative.use_block_verification=true",
        ),
        (
            "--sp-type deterministic --sp-edit --prompt-data d.jsonl --advice-key draft",
            "speculative.algorithm=LOOKUP speculative.edit=true task.prompt_data=d.jsonl task.advice_key=draft",
        ),
        ("--disable-grpo-std-normalization", "algorithm.normalize_std=false"),
        ("--wandb-group null --eps-clip 2e-1", "metrics.wandb_group=null algorithm.eps_clip=0.2"),
    ],
)
def test_both_spellings_mean_the_same_tree(flag_style: str, hydra_style: str) -> None:
    config = compose(flag_style.split())
    assert config == compose(hydra_style.split())
    assert config != compose(["--run-name", "anything else"])


def test_no_two_settings_share_a_flag_and_all_are_spelled_with_hyphens() -> None:
    names = [name for setting in settings().values() for name in setting.flags]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*", name) for name in [*names, *flags()])


@pytest.mark.parametrize("path", settings())
def test_every_setting_has_a_flag_that_sets_it_to_a_value_of_its_own(path: str) -> None:
    setting = settings()[path]
    text = {str: "text", int: "1", float: str((setting.above or 0) + 0.5), bool: "false"}[setting.type]
    text = setting.choices[-1] if setting.choices else str(int(setting.minimum or 1)) if setting.type is int else text
    for flag in setting.flags:
        assert read_arguments([f"{flag}={text}"]) == read_arguments([f"{path}={text}"])
        assert list(read_arguments([f"{flag}={text}"]).settings) == [path]


SLIME_FLAGS = [
    "--hf-checkpoint",
    "--rollout-batch-size",
    "--n-samples-per-prompt",
    "--rollout-max-response-len",
    "--rollout-max-prompt-len",
    "--rollout-temperature",
    "--rollout-top-p",
    "--rollout-top-k",
    "--num-rollout",
    "--colocate",
    "--offload",
    "--offload-rollout",
    "--debug-rollout-only",
    "--debug-train-only",
    "--save-debug-rollout-data",
    "--load-debug-rollout-data",
    "--use-wandb",
    "--wandb-project",
    "--wandb-group",
    "--wandb-mode",
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--lr",
    "--lr-warmup-iters",
    "--adam-beta1",
    "--adam-beta2",
    "--weight-decay",
    "--clip-grad",
    "--eps-clip",
    "--eps-clip-high",
    "--kl-loss-coef",
    "--save",
    "--load",
    "--save-interval",
    "--prompt-data",
    "--input-key",
    "--label-key",
    "--tool-key",
    "--rm-type",
    "--custom-rm-path",
    "--apply-chat-template",
    "--seed",
    "--advantage-estimator",
    "--global-batch-size",
    "--max-tokens-per-gpu",
    "--rollout-stop",
    "--rollout-num-gpus-per-engine",
    "--update-weights-interval",
    "--train-backend",
]


@pytest.mark.parametrize("flag", SLIME_FLAGS)
def test_slimes_spelling_exists(flag: str) -> None:
    """Case flags-of-slime: these are taken as slime's run scripts spell them."""
    assert flag in flags()


def test_several_ranks_within_a_sequence_are_refused_with_the_reason() -> None:
    """Case flags-of-slime: 23 scripts pass the flag, 1 among its values."""
    error = refusal("--context-parallel-size", "2")
    assert (error.setting, error.value) == ("--context-parallel-size", "2")
    assert "ranks that share a sequence would need each other's" in error.remedy
    assert "--recompute-activations" in error.remedy
    assert compose(["--context-parallel-size", "1"]) == compose([])


def test_a_choice_with_one_value_is_no_setting() -> None:
    assert "trainer.backend" not in settings()
    assert "is not a setting" in refusal("trainer.backend=megatron").rule


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_of_a_feature_that_is_not_built_is_refused_with_a_way_out(flag: str) -> None:
    error = refusal(flag, "1")
    assert error.setting == flag
    assert error.remedy
    assert flag not in flags()


def test_slimes_flag_for_its_mtp_layer_trains_the_draft_whatever_it_is() -> None:
    """Case flags-of-slime: with the two flags that its scripts pass beside it."""
    assert composed("--enable_mtp_training --sp-type mtp --sp-checkpoint-path d").draft_training.enable
    assert composed("--enable-draft-training --sp-type eagle3 --sp-checkpoint-path d").draft_training.enable
    settings = composed("--enable-mtp-training --mtp-num-layers 1 --mtp-loss-scaling-factor 0.2").draft_training
    assert (settings.mtp_num_layers, settings.loss_scale) == (1, 0.2)


@pytest.mark.parametrize("flag", ["--sp-quantization", "--speculative-draft-model-quantization"])
def test_an_unknown_quantisation_lists_the_known(flag: str) -> None:
    assert "must be one of int8, fp8" in refusal("--sp-type", "mtp", flag, "int4").rule


def test_the_last_spelling_of_a_setting_wins() -> None:
    assert composed("--lr 0.1 trainer.lr=0.2 --lr=0.3").trainer.lr == 0.3
    assert composed("--lr 0.1 --lr=0.3 trainer.lr=0.2").trainer.lr == 0.2
    assert composed("--colocate --no-colocate").cluster.colocate is False
    assert composed("--task a b --task c").task.names == ("c",)
    assert composed("--config tiny --config smollm2-135m").run.name == "smollm2-135m"
    assert composed("--sp-type none --speculative-algorithm LOOKUP").speculative.algorithm == "LOOKUP"


def test_settings_on_the_command_line_win_over_the_experiment_wherever_it_stands() -> None:
    assert composed("--num-rollout 5 --config tiny").run.num_rollout == 5
    assert composed("--config tiny").run.num_rollout == 2


def test_a_debug_mode_can_be_switched_off_again_and_only_itself() -> None:
    assert composed("--debug-rollout-only --no-debug-rollout-only").run.mode == "train"
    saved = "--debug-train-only --no-debug-rollout-only --load-debug-rollout-data x.pt"
    assert composed(saved).run.mode == "train_only"
    assert composed("--debug-rollout-only=false").run.mode == "train"


def test_both_debug_modes_at_once_are_a_contradiction() -> None:
    assert "--debug-train-only" in refusal("--debug-rollout-only", "--debug-train-only").setting
    assert "--debug-train-only" in refusal("--debug-train-only", "--debug-rollout-only=true").setting


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        ("--rolout-batch-size 8", "--rollout-batch-size"),
        ("--sglang-cuda-graf-bs 1", "--sglang-cuda-graph-bs"),
        ("--num_rollouts 3", "--num-rollout"),
        ("--sp-typ eagle", "--sp-type"),
        ("trainer.lrr=1", "trainer.lr"),
        ("trianer.lr=1", "trainer.lr"),
        ("lr=1e-6", "trainer.lr"),
        ("sglang.tp_sise=2", "tp_size"),
        ("experiment=tinny", "tiny"),
        ("--config smollm2-135", "smollm2-135m"),
        ("speculative=eagle3-tre", "eagle3_tree"),
        ("model=llama3.1-8b", "llama3.1_8b"),
        ("cluster=gpu8_colocate", "gpus8_colocate"),
        ("--sp-type determinstic", "deterministic"),
        ("--speculative-algorithm lookup", "LOOKUP"),
        ("--sglang-schedule-policy lpn", "lpm"),
        ("lr", "--lr"),
    ],
)
def test_a_misspelling_is_refused_with_the_right_spelling(argv: str, suggestion: str) -> None:
    assert f"Did you mean {suggestion}" in refusal(*argv.split()).remedy


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "fast"], "a finite number"),
        (["--lr", "nan"], "finite number"),
        (["--lr"], "needs a value"),
        (["--lr", "--seed", "1"], "needs a value"),
        (["--seed", "1_000"], "whole number"),
        (["--seed", "-1"], "at least 0"),
        (["--colocate=maybe"], "true or false"),
        (["--debug-rollout-only=maybe"], "true or false"),
        (["--no-colocate=true"], "takes no value"),
        (["--no-lr"], "is not a flag"),
        (["-x"], "is not a flag"),
        (["--colocate", "false"], "neither a --flag nor a path=value"),
        (["+trainer.lr=1"], "closed"),
        (["~trainer.lr"], "neither"),
        (["trainer=1"], "is not a setting"),
        (["task.names=[a,"], "must be a list"),
        (["task.names=[a],[b]"], "one list"),
        (["task.names=[1,2]"], "each text"),
        (["--gen-num-per-cycle", "0"], "at least 1"),
        (["speculative=null"], "none"),
        (["cluster=[cpu,gpus8_colocate]"], "must be one of cpu"),
        (["drafts.eagle3=d"], "is not a setting"),
        (["--rollout-stop-token-ids", "1", "x"], "whole number"),
        (["sglang.speculative_num_draft_tokens=4"], "is set as speculative.num_draft_tokens"),
    ],
)
def test_a_wrong_value_is_refused_in_words(argv: list[str], words: str) -> None:
    assert words in str(refusal(*argv))


def test_an_unknown_algorithm_lists_the_known_ones() -> None:
    rule = refusal("--speculative-algorithm", "MEDUSA").rule
    assert all(name in rule for name in ("NONE", "LOOKUP", "EAGLE3"))


@run_with(deadline=None, max_examples=400)
@given(texts, names)
def test_any_text_survives_being_laid_over_the_files_of_conf(text: str, item: str) -> None:
    values = {"run.name": text, "rollout.stop": (item, text), "sglang.forward_hooks": ({item: text},)}
    data = laid_over(OmegaConf.create({"run": {"name": "of a file"}}), values)
    assert data["run"]["name"] == text
    assert data["rollout"]["stop"] == [item, text]
    assert data["sglang"]["forward_hooks"] == [{item: text}]


@run_with(deadline=None, max_examples=100)
@given(texts.filter(lambda text: text != "???"))  # which OmegaConf takes for a value that is yet to come
def test_an_interpolation_of_conf_sees_the_value_laid_over_what_it_points_at(text: str) -> None:
    layers = OmegaConf.create({"task": {"reward": "${run.name}", "system_prompt": "of ${run.name}"}})
    task = laid_over(layers, {"run.name": text})["task"]
    assert (task["reward"], task["system_prompt"]) == (text, f"of {text}")
    assert laid_over(layers, {})["task"]["reward"] == "default"


def test_a_value_replaces_what_a_file_sets_and_is_not_merged_into_it() -> None:
    layers = OmegaConf.create({"sglang": {"model_loader_extra_config": {"a": 1}}})
    data = laid_over(layers, {"sglang.model_loader_extra_config": {"b": 2}})
    assert data["sglang"] == {"model_loader_extra_config": {"b": 2}}


@run_with(deadline=None, max_examples=25)
@given(texts, names)
def test_a_flags_text_reaches_the_config_as_typed(system_prompt: str, stop: str) -> None:
    config = compose([f"--system-prompt={system_prompt}", f"--rollout-stop={stop}"])
    assert config.task.system_prompt == system_prompt
    assert config.rollout.stop == (stop,)


def test_quotes_around_a_hydra_value_are_not_part_of_it() -> None:
    assert compose(["run.name='a, b'"]).run.name == "a, b"
    assert compose(["run.name=a=b"]).run.name == "a=b"
    assert compose(["metrics.wandb_group='null'"]).metrics.wandb_group == "null"
    assert compose(['rollout.stop=["a,b", c]']).rollout.stop == ("a,b", "c")


def test_a_setting_changes_nothing_but_itself() -> None:
    base = compose([])
    assert compose(["--lr", "0.5"]) == replace(base, trainer=replace(base.trainer, lr=0.5))


def test_epochs_of_a_file_stay_though_the_file_has_steps_too_and_the_command_lines_steps_win(tmp_path: Path) -> None:
    """A printed configuration has every setting: its number of steps was nobody's wish."""
    printed = tmp_path / "mine.yaml"
    printed.write_text(to_yaml(composed("--prompt-data x.jsonl --num-epoch 3")))
    assert compose([f"experiment={printed}"]).run.num_epoch == 3
    assert compose([f"experiment={printed}", "--num-epoch", "5"]).run.num_epoch == 5
    assert compose([f"experiment={printed}", "--num-rollout", "7"]).run == replace(
        compose([f"experiment={printed}"]).run, num_epoch=None, num_rollout=7
    )


@pytest.mark.parametrize("order", ["--custom-rm-path mod:fn --rm-type math", "--rm-type math --custom-rm-path mod:fn"])
def test_of_two_rewards_the_function_is_it_as_in_slime_and_a_note_says_so(order: str) -> None:
    made = all_composed(["--prompt-data", "x.jsonl", *order.split()])
    assert made.config.task.reward == "mod:fn"
    assert "--custom-rm-path mod:fn is the reward, and --rm-type has no effect." in made.notes


def test_a_file_and_slimes_numbers_of_gpus_that_say_otherwise_are_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("rollout: {num_engines: 3, engine: sglang}\ncluster: {colocate: false}\n")
    error = refusal(f"experiment={mine}", "--rollout-num-gpus", "8")
    assert (error.setting, error.value) == ("rollout.num_engines", 3)
    mine.write_text("engine: {max_running_requests: 32}\nrollout: {engine: sglang}\n")
    assert compose([f"experiment={mine}", "--sglang-server-concurrency", "512"]).engine.max_running_requests == 32


def test_a_task_replaces_the_data_of_a_users_own_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("task: {prompt_data: x.jsonl, reward: math, input_key: question}\n")
    assert compose([f"experiment={mine}", "--task", "max4"]).task == compose(["--task", "max4"]).task


def test_tune_and_eval_hand_a_key_of_wandb_on_and_keep_it_out_of_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tune measured has its command line in it, which a report shows."""
    monkeypatch.setenv("WANDB_API_KEY", "")
    seen: list[list[str]] = []

    def tuned(argv: list[str], show: object) -> int:
        seen.append(argv)
        return 0

    monkeypatch.setattr("slime_spec.launch.tune.run_tune_command", tuned)
    assert main(["tune", "--quick", "--wandb-key", "secret", "--lr", "1e-6"]) == 0
    assert seen == [["--quick", "--lr", "1e-6"]]
    assert os.environ["WANDB_API_KEY"] == "secret"


def test_functions_that_saved_rollouts_have_no_use_for_are_told_and_advantages_under_a_kl_refused() -> None:
    saved = ("--debug-train-only", "--load-debug-rollout-data", "{rollout_id}.pt")
    made = all_composed([*saved, "--dynamic-sampling-filter-path", "nonzero_std"])
    assert any("functions that generate, filter or log have no effect" in note for note in made.notes)
    error = refusal(*saved, "--custom-reward-post-process-path", "mod:f", "--kl-coef", "0.1")
    assert error.setting == "custom.reward_post_process"


def test_a_dual_clip_beside_cispo_is_told_to_have_no_effect() -> None:
    words = ["--advantage-estimator", "cispo", "--eps-clip", "1.0", "--eps-clip-c", "3.0"]
    assert any("--eps-clip-c has no effect" in note for note in all_composed(words).notes)
