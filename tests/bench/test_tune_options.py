"""The command line of ``slime-spec tune``, its prompts and its candidates: what is refused, what is understood."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slime_spec.bench.tune.candidates import by_rule, configured, draft_candidates, text_candidates
from slime_spec.bench.tune.options import QUICK, read_options
from slime_spec.bench.tune.workload import read_workload
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.launch.cli import main
from slime_spec.launch.compose import compose
from tests.support.tiny_policy import make_tiny_policy


def config_of(policy: Path, *flags: str) -> Config:
    return compose(["--hf-checkpoint", str(policy), *flags])


@pytest.mark.parametrize(
    ("argv", "setting", "says"),
    [
        (["--rollout-engine", "fake"], "rollout.engine", "embedded or sglang"),
        (
            ["--rollout-engine", "sglang", "--rollout-external-engine-addrs", "127.0.0.1:1"],
            "sglang_server.external_addrs",
            "starts servers of its own",
        ),
        (
            [
                *("--rollout-engine", "sglang", "--rollout-num-gpus-per-engine", "4", "--num-gpus-per-node", "2"),
                *("--sglang-weight-transport", "distributed", "--no-colocate"),
            ],
            "rollout.num_gpus_per_engine",
            "this machine alone",
        ),
        (["--chart", "/nowhere/tune.svg"], "--chart", "folder that is there"),
        (["--batch-sizes", "0"], "--batch-sizes", "at least 1"),
        (["--batch-sizes", "four"], "slime-spec tune", "four"),
        (["--rounds", "1"], "--rounds", "at least 2"),
        (["--new-tokens", "2"], "--new-tokens", "at least 8"),
        (["--assume-accept", "9"], "--assume-accept", "at most 8"),
        (["--assume-accept", "1"], "--assume-accept", "above 1"),
        (["--json", "/nowhere/tune.json"], "--json", "folder that is there"),
        (["--drfat", "x"], "--drfat", "Did you mean"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_read(argv: list[str], setting: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_options(argv)
    assert refused.value.setting == setting
    assert says in str(refused.value)


def test_flags_of_train_describe_the_run_and_the_commands_own_stand_among_them() -> None:
    argv = ["--config", "smollm2-135m", "--draft", "a", "trainer.lr=1e-6", "--rollout-top-k", "-1", "--draft", "b"]
    options = read_options([*argv, "--batch-sizes", "8", "2", "--assume-accept", "2.5", "3", "--no-push"])
    assert options.drafts == ("a", "b")
    assert (options.config.rollout.n_samples_per_prompt, options.config.trainer.lr) == (8, 1e-6)
    assert options.batch_sizes == (2, 8)
    assert options.assumed_lengths == (2.5, 3.0)
    assert not options.pushes


def test_batches_are_the_usual_ones_up_to_a_whole_rollout() -> None:
    assert read_options(["--config", "smollm2-135m"]).batch_sizes == (1, 4, 16, 64)
    small = ["--rollout-batch-size", "2", "--n-samples-per-prompt", "3"]
    assert read_options(small).batch_sizes == (1, 4, 6)
    assert read_options([*small, "--sglang-max-running-requests", "5"]).batch_sizes == (1, 4, 5)


def test_quick_is_a_smaller_default_that_single_flags_still_change() -> None:
    options = read_options(["--config", "smollm2-135m", "--quick", "--rounds", "5"])
    assert (options.num_new_tokens, options.seconds) == (QUICK["num_new_tokens"], QUICK["seconds"])
    assert (options.num_rounds, options.batch_sizes) == (5, (1, 4, 64))


def test_help_names_the_commands_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--draft", "--prompts", "--assume-accept", "--quick", "--no-push"))


def test_a_runs_samples_are_prompts_with_the_replies_that_the_run_had(policy: Path, tmp_path: Path) -> None:
    rows = [
        {"rollout_id": step, "prompt": prompt, "reply": reply}
        for step, prompt, reply in ((0, "2+3", "five"), (0, "4+4", ""), (1, "2+3", "5"))
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    workload = read_workload(config_of(policy), tmp_path, num_new_tokens=10)
    first, second = workload.prompts
    assert bytes(first.token_ids).decode("latin1") != bytes(second.token_ids).decode("latin1")
    assert [(len(each.token_ids), each.weight_version) for each in first.earlier] == [(4, 0), (1, 1)]
    assert second.earlier == ()
    assert workload.has_earlier
    assert workload.params.max_new_tokens == 10


def test_a_jsonl_has_prompts_that_are_texts_or_chats_under_the_key_of_the_run(policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"ask": "hello"}\n{"ask": [{"role": "user", "content": "bye"}]}\n{"ask": "hello"}\n')
    workload = read_workload(config_of(policy), file, 10, key="ask")
    assert [len(prompt.token_ids) for prompt in workload.prompts] == [6, 4]  # the template adds a colon
    assert not workload.has_earlier


@pytest.mark.parametrize(
    ("line", "says"),
    [('{"text": "x"}', "--prompt-key"), ('{"prompt": 3}', "list of messages"), ('{"prompt": "' + "x" * 600, "JSON")],
)
def test_a_line_that_is_no_prompt_is_refused_with_its_place(policy: Path, tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError) as refused:
        read_workload(config_of(policy), file, 10)
    assert f"{file}:2" in str(refused.value)
    assert says in str(refused.value)


def test_prompts_that_are_not_there_or_all_too_long_are_refused(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder with samples"):
        read_workload(config_of(policy), tmp_path, 10)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "longer than four"}\n')
    with pytest.raises(ConfigError, match="at most 4 tokens"):
        read_workload(config_of(policy, "--rollout-max-prompt-len", "4"), file, 10)


def test_every_repetition_asks_for_other_replies_and_every_side_for_the_same(policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(9)))
    workload = read_workload(config_of(policy, "--n-samples-per-prompt", "4"), file, 10)
    assert workload.waves(6, 1) == workload.waves(6, 1)
    (wave,) = workload.waves(6, 1)
    assert [len(request.seeds) for request in wave] == [4, 2]
    assert {request.seeds for request in wave}.isdisjoint(request.seeds for request in workload.waves(6, 2)[0])
    assert [[len(request.seeds) for request in wave] for wave in workload.waves(1, 0)] == [[1]] * 4
    assert {request.params.max_new_tokens for request in workload.waves(6, 1, 3)[0]} == {3}


def test_a_drafts_own_algorithm_is_found_by_its_config(policy: Path, draft: Path) -> None:
    target = ModelSpec.from_folder(policy)
    found = draft_candidates(config_of(policy), [str(draft), str(policy)], target)
    assert [each.settings.algorithm for each in found] == ["EAGLE3", "STANDALONE"]
    assert [each.name for each in found] == ["EAGLE3 draft", "STANDALONE policy"]


def test_a_draft_for_another_target_is_refused(draft: Path, tmp_path: Path) -> None:
    other = make_tiny_policy(tmp_path / "other", hidden_size=32, num_attention_heads=2)
    with pytest.raises(ConfigError, match="hidden_size"):
        draft_candidates(config_of(other), [str(draft)], ModelSpec.from_folder(other))


def test_the_runs_own_draft_is_a_candidate_with_its_numbers_left_to_the_engine(policy: Path, draft: Path) -> None:
    flags = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft)]
    tree = ["--speculative-num-steps", "3", "--speculative-eagle-topk", "2", "--speculative-num-draft-tokens", "6"]
    config = config_of(policy, *flags, *tree)
    (found,) = draft_candidates(config, [], ModelSpec.from_folder(policy))
    assert found.settings.is_automatic
    own = configured(config)
    assert own is not None
    assert compose([*own.flags()]).speculative == config.speculative
    assert configured(config_of(policy, *flags)) is None


def test_flags_of_a_candidate_make_its_settings_again(policy: Path, draft: Path) -> None:
    config = config_of(policy)
    (found,) = draft_candidates(config, [str(draft)], ModelSpec.from_folder(policy))
    rules = {each.rule: each for each in by_rule(found, config)}
    assert list(rules) == ["target_only", "gumbel", "block"]
    assert [each.changes_tokens for each in rules.values()] == [False, True, True]
    for each in rules.values():
        assert compose([*each.flags()]).speculative == each.settings
        fixed = replace(each.settings, num_steps=3, eagle_topk=1, draft_model_quantization="int8")
        assert compose([*each.flags(depth=3)]).speculative == fixed, "rounded as where the engine decides"
        assert each.alone.settings == replace(each.settings, history=False)
        assert compose([*each.alone.flags()]).speculative == each.alone.settings
        assert each.alone.flags(depth=3) == each.flags(depth=3)
    for text in text_candidates(has_texts=True):
        assert compose([*text.flags()]).speculative.algorithm == text.name


def test_greedy_sampling_has_one_rule_and_one_sample_a_prompt_no_drafter_of_replies(policy: Path, draft: Path) -> None:
    config = config_of(policy, "--rollout-temperature", "0", "--debug-rollout-only")
    (found,) = draft_candidates(config, [str(draft)], ModelSpec.from_folder(policy))
    assert [each.rule for each in by_rule(found, config)] == ["target_only"]
    assert "HISTORY" not in [each.name for each in text_candidates(has_texts=False)]
    assert "HISTORY" in [each.name for each in text_candidates(has_texts=True)]
