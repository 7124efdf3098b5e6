"""Every flag of Megatron-LM is known: it has a meaning here, no effect that is told, or a refusal with a remedy."""

from __future__ import annotations

import json

import pytest

from slime_spec.errors import ConfigError
from slime_spec.launch.arguments import read_arguments
from slime_spec.launch.compose import composed
from slime_spec.launch.flags import find_flag, flags, refusal_of
from slime_spec.launch.slime.megatron import (
    FATES,
    TABLE,
    fates,
    num_values_of_megatron,
    refused_of_megatron,
    without_effect_of_megatron,
)

GROUPS: dict[str, dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8"))
NAMED = [name for fate in FATES for name in fate.names.split()]
TITLES = [title for fate in FATES for title in fate.titles]


def test_the_table_of_fates_names_what_the_table_of_facts_has_and_each_once() -> None:
    assert sorted(TITLES) == sorted(GROUPS)
    assert len(NAMED) == len(set(NAMED))
    assert set(NAMED) <= set(num_values_of_megatron())
    assert not set(NAMED) & set(flags()), "a flag with a meaning of its own needs no fate"


def test_no_flag_is_unknown_and_each_refusal_has_a_remedy() -> None:
    unknown = []
    for name in num_values_of_megatron():
        if (refusal := refusal_of(name)) is not None and name not in flags():
            assert all(refusal)
            continue
        try:
            find_flag(name)
        except ConfigError:
            unknown.append(name)
    assert unknown == []
    assert len(fates()) > 850
    assert refused_of_megatron().keys() | without_effect_of_megatron().keys() == fates().keys()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--overlap-grad-reduce", "memory or time"),
        ("--manual-gc-interval 10", "memory or time"),
        ("--recompute-modules core_attn mlp", "memory or time"),
        ("--no_persist_layer_norm", "memory or time"),
        ("--window-size 128,0", "config.json"),
        ("--log-interval 1", "its own metrics"),
        ("--ckpt-format torch_dist", "written in one form"),
    ],
)
def test_a_flag_without_effect_is_told_with_its_values(words: str, reason: str) -> None:
    (note,) = composed(words.split()).notes
    assert note.startswith("No effect, as ")
    assert reason in note
    assert note.endswith(f": {words.replace('_', '-') if words.startswith('--no_') else words}.")


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--train-iters", "--num-rollout"),
        ("--no-load-optim", "--hf-checkpoint"),
        ("--use-megatron-fsdp", "--use-distributed-optimizer"),
        ("--data-path", "--prompt-data"),
        ("--tokenizer-model", "--apply-chat-template-kwargs"),
        ("--muon-momentum", "adam"),
        ("--wandb-entity", "--wandb-team"),
        ("--moe-enable-routing-replay", "--use-rollout-routing-replay"),
        ("--fp8-param-gather", "--train-dtype bfloat16"),
        ("--grpo-group-size", "Leave it out"),
    ],
)
def test_a_flag_that_changes_the_result_is_refused_with_what_to_do(flag: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments([flag, "1", "--lr", "1e-6"])
    assert (caught.value.setting, caught.value.rule) != (flag, "is not a flag")
    assert remedy in caught.value.remedy


def test_an_own_flag_with_a_megatron_name_keeps_its_meaning_and_none_is_suggested() -> None:
    assert composed(["--weight-decay", "0.5"]).config.trainer.weight_decay == 0.5
    with pytest.raises(ConfigError) as caught:
        read_arguments(["--manual-gcc"])
    assert "Did you mean" not in caught.value.remedy
