"""Speculative settings that contradict each other are refused; those that have no effect are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_spec.config.checks import check, notes
from slime_spec.config.speculation import (
    FORGED_ACCEPTANCE,
    check_environment,
    draft_quantization,
    feeds_corpus,
    fronts_history,
    reads_replies,
    settings_read,
)
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import compose, composed
from slime_spec.sglang.arguments import speculative_flags
from tests.support.refused_launches import EAGLE3, NGRAM, SPECULATIVE_CONTRADICTIONS

SGLANG_NGRAM = "--rollout-engine sglang --speculative-algorithm NGRAM"
FED = "--speculative-algorithm NGRAM --speculative-history"
LOSSY = "--debug-rollout-only --speculative-lossy --speculative-algorithm LOOKUP"


@pytest.mark.parametrize(("argv", "setting", "remedy"), SPECULATIVE_CONTRADICTIONS)
def test_a_speculative_contradiction_is_refused_with_the_way_out(argv: str, setting: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(argv.split())
    assert caught.value.setting == f"speculative.{setting}"
    assert remedy in caught.value.remedy


def test_a_texts_advice_needs_lookup() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["--prompt-data", "d.jsonl", "--advice-key", "draft", "--speculative-algorithm", "NGRAM"])
    assert caught.value.setting == "task.advice_key"
    assert "LOOKUP" in caught.value.remedy


@pytest.mark.parametrize(
    "argv",
    [
        "--speculative-algorithm NEXTN",
        "--speculative-algorithm EAGLE",
        f"{EAGLE3} --speculative-num-steps 2 --speculative-eagle-topk 3 --speculative-num-draft-tokens 13",
        f"{EAGLE3} --speculative-num-steps 3 --speculative-use-rejection-sampling",
        f"{EAGLE3} --speculative-use-rejection-sampling --speculative-use-block-verification",
        f"{EAGLE3} --speculative-use-gumbel-coupling",
        f"{EAGLE3} --speculative-use-gumbel-coupling --speculative-draft-temperature 0.5",
        f"{EAGLE3} --speculative-draft-temperature auto",
        f"{EAGLE3} --speculative-use-gumbel-coupling --speculative-num-steps 3",
        f"{EAGLE3} --sp-quantization INT8",
        f"{EAGLE3} --sp-quantization FP8 --rollout-num-gpus-per-engine 1 --no-colocate",
        f"{LOSSY} --speculative-accept-threshold-acc 0.9",
        f"{NGRAM} --speculative-ngram-capacity 18",
        f"{NGRAM} --speculative-ngram-external-corpus-path c.jsonl --speculative-ngram-external-sam-budget 11",
        "--prompt-data d.jsonl --advice-key draft --speculative-algorithm LOOKUP",
    ],
)
def test_its_legal_neighbour_is_accepted_without_a_note(argv: str) -> None:
    is_sglangs = "--rollout-engine sglang" in argv  # the embedded engine has no automatic shape to tell of
    is_sampled = "--speculative-use" in argv and "num-steps" not in argv
    expected = ["Sampled drafts are chains"] if is_sampled and is_sglangs else []
    assert [note.partition(":")[0] for note in notes(compose(argv.split()))] == expected


@pytest.mark.parametrize("argv", ["", NGRAM])
def test_races_draw_tokens_without_a_draft_model_too(argv: str) -> None:
    made = compose([*argv.split(), "--speculative-use-gumbel-coupling"])
    assert made.speculative.use_gumbel_coupling
    assert list(notes(made)) == []


@pytest.mark.parametrize("argv", [EAGLE3, f"{NGRAM} --speculative-use-gumbel-coupling"])
def test_a_draft_temperature_is_told_to_have_no_effect_where_nothing_is_sampled(argv: str) -> None:
    (note,) = notes(compose(f"{argv} --speculative-draft-temperature 0.5".split()))
    assert "draft_temperature=0.5 has no effect" in note


def test_a_tree_that_races_do_not_draw_is_told() -> None:
    tree = "--speculative-num-steps 2 --speculative-eagle-topk 3 --speculative-num-draft-tokens 13"
    (note,) = notes(compose(f"{EAGLE3} --speculative-use-gumbel-coupling {tree}".split()))
    assert "likeliest tokens all the same" in note


@pytest.mark.parametrize("name", settings_read())
def test_a_setting_of_another_algorithm_is_named_as_without_effect(name: str) -> None:
    values = {"ngram_match_type": "PROB", "draft_norm_output_convention": "specforge", "lossy": True, "edit": True}
    value = values.get(name, 1 if isinstance(getattr(SpeculativeConfig(), name), float) else 3)
    if name.startswith("accept_threshold"):
        value = 0.5
    config = Config(speculative=SpeculativeConfig(**{name: value}))
    check(config)
    assert list(notes(config)) == [f"speculative.{name} has no effect with speculative.algorithm=NONE."]


def test_a_forced_number_of_draft_tokens_is_told() -> None:
    argv = f"{EAGLE3} --speculative-num-steps 3 --speculative-num-draft-tokens 8"
    (note,) = notes(compose(argv.split()))
    assert "num_draft_tokens=8 became 4" in note


def test_a_lossy_switch_without_a_threshold_is_told() -> None:
    (note,) = notes(compose(LOSSY.split()))
    assert "speculative.lossy has no effect" in note


def test_sglangs_forged_acceptance_is_refused_by_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORGED_ACCEPTANCE, "3")
    with pytest.raises(ConfigError) as caught:
        compose([])
    assert caught.value.setting == FORGED_ACCEPTANCE
    for harmless in ({}, {FORGED_ACCEPTANCE: "-1"}, {FORGED_ACCEPTANCE: ""}):
        check_environment(harmless)


def test_history_is_for_draft_models_and_says_so_beside_others() -> None:
    behind = composed(["--config", "smollm2-135m", "--speculative-history"])
    assert behind.config.speculative.history
    assert reads_replies(behind.config)
    assert not any("history" in note for note in behind.notes)
    alone = composed(["--speculative-algorithm", "NGRAM", "--speculative-history"])
    assert "speculative.history has no effect with speculative.algorithm=NGRAM." in alone.notes
    assert not reads_replies(alone.config)
    assert reads_replies(composed(["--speculative-algorithm", "HISTORY"]).config)


def test_an_n_gram_server_of_sglang_is_fed_with_replies_where_history_is_asked_for() -> None:
    def chosen(*flags: str) -> tuple[bool, bool, object]:
        config = composed([*SGLANG_NGRAM.split(), *flags]).config
        nodes = speculative_flags(config.speculative, "target").get("speculative_ngram_external_sam_budget")
        return feeds_corpus(config), reads_replies(config), nodes

    fed = composed([*SGLANG_NGRAM.split(), "--speculative-history"])
    assert not any("history" in note for note in fed.notes)
    assert chosen() == (False, False, None)
    assert chosen("--speculative-history") == (True, True, 5)
    assert chosen("--speculative-history", "--speculative-num-draft-tokens", "2") == (True, True, 1)
    assert chosen("--speculative-history", "--speculative-ngram-external-sam-budget", "8") == (True, True, 8)


@pytest.mark.parametrize(
    ("flags", "setting", "rule", "remedy"),
    [
        ("--speculative-algorithm HISTORY", "algorithm", "SGLang has no HISTORY", "NGRAM --speculative-history"),
        (
            "--speculative-algorithm NEXTN --speculative-history",
            "history",
            "NGRAM alone",
            "--speculative-algorithm NGRAM",
        ),
        (
            f"{FED} --rollout-num-gpus-per-engine 2 --no-colocate",
            "history",
            "one GPU",
            "--rollout-num-gpus-per-engine 1",
        ),
        (f"{FED} --sglang-router", "history", "a router sends them anywhere", "Drop the router"),
        (f"{FED} --speculative-ngram-external-sam-budget 12", "ngram_external_sam_budget", "1 to", "budget 5"),
    ],
)
def test_history_that_no_server_can_draft_from_is_refused(flags: str, setting: str, rule: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(["--rollout-engine", "sglang", *flags.split()])
    assert caught.value.setting == f"speculative.{setting}"
    assert rule in caught.value.rule
    assert remedy in caught.value.remedy


def test_where_the_engine_decides_it_drafts_from_replies_first_and_in_int8() -> None:
    def chosen(*flags: str) -> tuple[bool, bool, str | None]:
        config = composed(["--config", "smollm2-135m", *flags]).config
        return fronts_history(config), reads_replies(config), draft_quantization(config)

    three, on_gpu = ("--speculative-num-steps", "3"), ("--rollout-num-gpus-per-engine", "1", "--no-colocate")
    assert chosen() == (True, True, "int8")
    assert chosen(*three) == (False, False, None)
    assert chosen(*three, "--speculative-history", "--sp-quantization", "INT8") == (True, True, "int8")
    assert chosen("speculative.history=false", "--sp-quantization", "UNQUANT") == (False, False, None)
    assert chosen("--debug-rollout-only", *on_gpu) == (True, True, None)
    assert chosen("--rollout-engine", "sglang") == (False, False, None)
    assert chosen("--speculative-algorithm", "NONE", "speculative.draft_model_path=null") == (False, False, None)


@pytest.mark.parametrize("algorithm", ["NGRAM", "LOOKUP", "HISTORY", "NONE"])
def test_another_algorithm_leaves_out_the_experiments_draft_and_says_so(algorithm: str) -> None:
    made = composed(["--config", "smollm2-135m", "--speculative-algorithm", algorithm])
    speculative = made.config.speculative
    assert speculative.algorithm == algorithm
    assert (speculative.draft_model_path, speculative.use_rejection_sampling) == (None, False)
    for name in ("draft_model_path", "use_rejection_sampling"):
        assert f"speculative.{name} is not used by {algorithm}: left out." in made.notes


def test_the_experiments_draft_stays_with_an_algorithm_that_has_one() -> None:
    made = composed(["--config", "smollm2-135m", "--no-speculative-use-rejection-sampling"])
    assert made.config.speculative.draft_model_path == "builtin:smollm2-135m-eagle3"
    assert not [note for note in made.notes if "left out" in note]


def test_a_draft_from_the_command_line_is_refused_also_over_an_experiments() -> None:
    argv = ["--config", "smollm2-135m", *NGRAM.split(), "--speculative-draft-model-path", "d"]
    with pytest.raises(ConfigError, match="leave the path out"):
        compose(argv)


def test_a_files_draft_is_left_out_as_an_experiments_is(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("speculative: {algorithm: NGRAM, draft_model_path: d}")
    made = composed(["--config", str(file)])
    assert made.config.speculative.draft_model_path is None
    assert made.notes[0] == "speculative.draft_model_path is not used by NGRAM: left out."


def test_sglangs_algorithms_with_a_draft_of_their_own_take_its_path() -> None:
    argv = "--rollout-engine sglang --speculative-algorithm DFLASH --speculative-draft-model-path d"
    made = composed(argv.split())
    assert made.config.speculative.draft_model_path == "d"
