"""Resuming is as if there had been no interruption, under any layout; a failed write harms nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from slime_spec.config.tree import Config
from slime_spec.errors import CheckpointError
from slime_spec.interfaces import RunState
from slime_spec.types import DraftUpdateRecord
from tests.trainer.trainer_support import make_policy, run_ranks, tiny_config, tiny_samples
from trainer_bridge.checkpoint_folder import (
    begin_checkpoint,
    has_checkpoint,
    publish_checkpoint,
    resolve_checkpoint,
    saved_step,
    tidy,
)

STATE = RunState(
    *(7, 56, 6),
    unfinished_prompt_ids=(51, 54),
    is_ahead=True,
    draft_updates=DraftUpdateRecord(num_updates=3, accept_length=2.5, fresh=2.6, cost_s=1.25),
)
BEFORE = [tiny_samples(seed) for seed in (1, 2)]
AFTER = [tiny_samples(seed) for seed in (3, 4)]
TP2 = {"world_size": 2, "tensor_model_parallel_size": 2}
PP2 = {"world_size": 2, "pipeline_model_parallel_size": 2}
UNEVEN = {**PP2, "num_layers_in_first_pipeline_stage": 3}
SPLIT = {"world_size": 2, "use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"), "Qwen3ForCausalLM", tied=True)


def resumed_from(config: Config, checkpoints: Path) -> Config:
    return replace(config, trainer=replace(config.trainer, load=str(checkpoints)))


@pytest.mark.parametrize(
    "layout",
    [
        *({}, PP2, SPLIT, {**SPLIT, "optimizer_cpu_offload": True}),
        *({**SPLIT, "dtype": "bfloat16", "optimizer_cpu_offload": True}, {"dtype": "bfloat16"}),
    ],
    ids=[
        *("1x1", "PP2", "distributed optimizer", "distributed optimizer on the host"),
        *("distributed optimizer of bfloat16 on the host", "bfloat16"),
    ],
)
def test_a_resumed_run_repeats_the_uninterrupted_ones_next_steps_exactly(
    layout: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(folder, {**layout, "lr_warmup_steps": 4})
    world_size = config.trainer.world_size
    uninterrupted = run_ranks(world_size, "save_and_continue", config, BEFORE, AFTER, str(tmp_path), STATE)[0]
    state, reports = run_ranks(world_size, "resume", resumed_from(config, tmp_path), AFTER)[0]
    assert state == STATE
    assert reports == uninterrupted


@pytest.mark.parametrize(
    ("before", "after"),
    [(TP2, {}), (SPLIT, {}), (TP2, SPLIT), (UNEVEN, PP2), (TP2, UNEVEN)],
    ids=[
        "two tensor ranks on one",
        "a distributed optimizer on one rank",
        "tensor ranks on a distributed optimizer",
        "uneven stages on even ones",
        "tensor ranks on uneven stages",
    ],
)
def test_a_checkpoint_resumes_with_another_layout(
    before: dict[str, object], after: dict[str, object], folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(folder, before)
    saved = run_ranks(2, "save_and_continue", config, BEFORE, AFTER, str(tmp_path), STATE)[0]
    config = resumed_from(tiny_config(folder, after), tmp_path)
    state, reports = run_ranks(config.trainer.world_size, "resume", config, AFTER)[0]
    assert state == STATE
    for got, expected in zip(reports, saved, strict=True):
        assert got.loss == pytest.approx(expected.loss, abs=1e-5)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


def test_a_write_that_fails_names_the_folder_and_leaves_the_previous_checkpoint(folder: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    (problem,) = run_ranks(1, "save_onto_a_full_disk", tiny_config(folder), str(checkpoints))
    assert str(checkpoints) in problem
    assert "GB free" in problem
    assert "previous checkpoint is intact" in problem
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-000001"]
    state, _ = run_ranks(1, "resume", resumed_from(tiny_config(folder), checkpoints), [])[0]
    assert state == RunState(1, 8, 1)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a checkpoint"):
        resolve_checkpoint(tmp_path)


def test_a_folder_has_a_checkpoint_from_its_first_whole_one_on(tmp_path: Path) -> None:
    """Case reports/06: a run that loads from where it saves starts anew while nothing was saved."""
    assert not has_checkpoint(tmp_path / "absent")
    (begin_checkpoint(tmp_path, "step-000012") / "metadata.json").write_text("whole")
    (tmp_path / ".lock").touch()
    assert not has_checkpoint(tmp_path)
    publish_checkpoint(tmp_path, "step-000012")
    assert has_checkpoint(tmp_path)
    assert saved_step(resolve_checkpoint(tmp_path)) == 12


def test_a_run_that_was_killed_before_its_first_latest_resumes_from_its_first_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "step-000002", "whole")
    (tmp_path / "latest").unlink()
    assert has_checkpoint(tmp_path)
    assert resolve_checkpoint(tmp_path).name == "step-000002"


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("first", "second"):
        folder = begin_checkpoint(tmp_path, "step-000003")
        (folder / "metadata.json").write_text(text)
        publish_checkpoint(tmp_path, "step-000003")
    assert (resolve_checkpoint(tmp_path) / "metadata.json").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000003"]


def test_an_interrupted_write_is_never_the_latest(tmp_path: Path) -> None:
    (begin_checkpoint(tmp_path, "step-000001") / "metadata.json").write_text("whole")
    publish_checkpoint(tmp_path, "step-000001")
    (begin_checkpoint(tmp_path, "step-000002") / "metadata.json").write_text("half")
    assert resolve_checkpoint(tmp_path).name == "step-000001"


def write_checkpoint(root: Path, name: str, text: str) -> None:
    (begin_checkpoint(root, name) / "metadata.json").write_text(text)
    publish_checkpoint(root, name)


def test_a_crash_between_the_renames_of_a_step_saved_again_leaves_the_old_one_the_latest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "step-000003", "old")
    (begin_checkpoint(tmp_path, "step-000003") / "metadata.json").write_text("new")
    (tmp_path / "step-000003").rename(tmp_path / ".step-000003.replaced")
    assert (resolve_checkpoint(tmp_path) / "metadata.json").read_text() == "old"
    assert (resolve_checkpoint(tmp_path / "step-000003") / "metadata.json").read_text() == "old"
    begin_checkpoint(tmp_path, "step-000004")
    assert (tmp_path / "step-000003" / "metadata.json").read_text() == "old"
    write_checkpoint(tmp_path, "step-000003", "newer")
    assert (resolve_checkpoint(tmp_path) / "metadata.json").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000003"]


def test_a_crash_before_the_replaced_folder_was_deleted_does_not_stop_the_next_save(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "step-000003", "new")
    left_over = tmp_path / ".step-000003.replaced"
    left_over.mkdir()
    (left_over / "metadata.json").write_text("old")
    assert (resolve_checkpoint(tmp_path) / "metadata.json").read_text() == "new"
    write_checkpoint(tmp_path, "step-000003", "newer")
    assert (resolve_checkpoint(tmp_path) / "metadata.json").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000003"]


def test_tidying_touches_only_the_left_overs_that_are_named(tmp_path: Path) -> None:
    for name in (".hf.unfinished", ".other.unfinished", "hf"):
        (tmp_path / name).mkdir()
    tidy(tmp_path, "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.unfinished", "hf"]


def test_a_resumed_run_applies_its_own_hyperparameters_to_the_checkpoints_moments(folder: Path, tmp_path: Path) -> None:
    run_ranks(1, "save_and_continue", tiny_config(folder), BEFORE, [], str(tmp_path), STATE)
    chosen = {"lr": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_eps": 1e-6, "weight_decay": 0.25}
    fresh = run_ranks(1, "resumed_hyperparameters", tiny_config(folder, chosen))[0]
    resumed = run_ranks(1, "resumed_hyperparameters", resumed_from(tiny_config(folder, chosen), tmp_path))[0]
    assert {group["betas"] for group in resumed} == {(0.8, 0.99)}
    assert {(group["lr"], group["eps"]) for group in resumed} == {(3e-4, 1e-6)}
    assert 0.25 in {group["weight_decay"] for group in resumed}
    assert [group.pop("steps") for group in fresh] == [1] * len(fresh)
    assert [group.pop("steps") for group in resumed] == [len(BEFORE) + 1] * len(resumed)
    assert resumed == fresh


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoints = tmp_path_factory.mktemp("saved")
    run_ranks(1, "save_and_continue", tiny_config(folder), BEFORE, [], str(checkpoints), STATE)
    return checkpoints / "step-000007"


@pytest.mark.parametrize("damaged", ["common.pt", ".metadata", "metadata.json", "*.distcp"])
@pytest.mark.parametrize("damage", ["truncated", "emptied"])
def test_a_damaged_checkpoint_is_refused_naming_its_folder(
    damaged: str, damage: str, saved: Path, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    for path in copy.glob(damaged):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    (problem,) = run_ranks(1, "told_by_loading", resumed_from(tiny_config(folder), copy))
    assert str(copy) in problem
    assert "whole checkpoint" in problem


def test_a_checkpoint_of_another_model_is_refused_naming_its_folder(saved: Path, tmp_path: Path) -> None:
    other = make_policy(tmp_path, "Qwen3ForCausalLM", tied=True, hidden_size=64)
    (problem,) = run_ranks(1, "told_by_loading", resumed_from(tiny_config(other), saved))
    assert str(saved) in problem
    assert "of this model" in problem
