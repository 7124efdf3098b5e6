"""The groups of conf/: one file of each makes a run, and what a user says stands above them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slime_spec.config.tree import Config
from slime_spec.launch.compose import compose, composed
from slime_spec.launch.groups import choices

SMOLLM2_DRAFT = "builtin:smollm2-135m-eagle3"


def test_the_base_choices_are_the_trees_own_defaults() -> None:
    assert compose([]) == Config()
    assert compose(["experiment=null"]) == compose(["--config", "tiny", "experiment=null"]) == Config()


@pytest.mark.parametrize("model", choices("model"))
@pytest.mark.parametrize("cluster", choices("cluster"))
def test_every_model_composes_with_every_cluster_and_with_speculation_that_needs_no_draft_of_its_own(
    model: str, cluster: str
) -> None:
    for speculative in ("none", "ngram", "mtp"):
        config = compose([f"cluster={cluster}", f"model={model}", f"speculative={speculative}"])
        assert config.speculative == compose([f"speculative={speculative}"]).speculative
        assert config.rollout == compose([f"cluster={cluster}"]).rollout


@pytest.mark.parametrize(
    ("model", "draft"),
    [("llama3.1_8b", "models/sglang-EAGLE3-LLaMA3.1-Instruct-8B"), ("smollm2_135m", SMOLLM2_DRAFT)],
)
def test_a_speculation_drafts_with_the_draft_of_the_chosen_model(model: str, draft: str) -> None:
    spec = compose(["speculative=eagle3_tree", f"model={model}"]).speculative
    assert (spec.algorithm, spec.draft_model_path) == ("EAGLE3", draft)
    assert (spec.num_steps, spec.eagle_topk, spec.num_draft_tokens) == (5, 8, 32)


def test_every_model_is_a_checkpoint_of_its_own() -> None:
    folders = {compose([f"model={model}"]).model.hf_checkpoint for model in choices("model")}
    assert len(folders) == len(choices("model"))


def test_a_choice_on_the_command_line_replaces_the_experiments_wherever_it_stands() -> None:
    for argv in (
        ["speculative=eagle3_chain", "--config", "smollm2-135m"],
        ["experiment=smollm2-135m", "--rollout-stop", "a", "b", "speculative=eagle3_chain"],
    ):
        spec = compose(argv).speculative
        assert (spec.num_steps, spec.use_rejection_sampling, spec.draft_model_path) == (3, False, SMOLLM2_DRAFT)


def test_what_an_experiment_itself_sets_stands_above_groups_and_below_settings() -> None:
    argv = ["--config", "qwen3-30b-a3b-eagle3", "cluster=gpus8_colocate"]
    config = compose(argv)
    assert (config.rollout.num_engines, config.rollout.batch_size) == (2, 32)  # the cluster says eight engines
    assert config.engine.max_running_requests == 128  # the cluster says 48
    assert compose([*argv, "--sglang-max-running-requests", "7"]).engine.max_running_requests == 7


def test_given_is_what_somebody_set() -> None:
    made = composed(["--config", "smollm2-135m", "model=llama3.1_8b", "--lr", "1", "--sglang-page-size", "1"])
    assert {"trainer.lr", "sglang.page_size", "run.num_rollout", "speculative.use_rejection_sampling"} <= made.given
    assert {"engine.dtype", "engine.context_length"} <= made.given
    assert not {"run.seed", "engine.kv_cache_gb", "drafts.eagle3"} & made.given
    assert "engine.dtype" not in composed(["--config", "smollm2-135m"]).given


def test_the_main_job_in_bfloat16_is_the_main_job_in_another_dtype() -> None:
    job, made = compose(["--config", "smollm2-135m"]), compose(["--config", "smollm2-135m-bf16"])
    assert (job.engine.dtype, job.trainer.dtype) == ("float32", "float32")
    assert made == replace(
        job,
        run=replace(job.run, name="smollm2-135m-bf16"),
        engine=replace(job.engine, dtype="bfloat16"),
        trainer=replace(job.trainer, dtype="bfloat16"),
    )
