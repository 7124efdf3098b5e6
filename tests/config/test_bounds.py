"""Every number of the configuration has a least and a greatest value, every text a rule: case audit/60 and siblings."""

from __future__ import annotations

import pytest

from slime_spec.config.schema import Setting, settings
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import compose
from slime_spec.sglang.flags import sglang_flag

NUMBERS = [path for path, each in settings().items() if each.type in (int, float)]
TEXTS = [path for path, each in settings().items() if each.type is str]
LISTS = [path for path, each in settings().items() if each.is_tuple]


def accepts(setting: Setting, value: object) -> bool:
    """Whether the setting takes the value, in a list where it is one."""
    try:
        setting.check([value] if setting.is_tuple else value)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_has_a_least_and_a_greatest_value(path: str) -> None:
    setting = settings()[path]
    least = setting.minimum if setting.above is None else setting.above
    greatest = setting.maximum if setting.below is None else setting.below
    assert least is not None
    assert greatest is not None
    assert -1 <= least < greatest < (2**63 if setting.type is int else 1e38)
    number = setting.type
    assert accepts(setting, number(least)) is (setting.above is None)
    assert accepts(setting, number(greatest)) is (setting.below is None)
    for beyond in (least - 1, greatest * 2, 1e300, float("inf"), float("nan"), 10**30, -(10**400)):
        assert not accepts(
            setting, beyond if isinstance(beyond, float) else number(beyond) if abs(beyond) < 2**63 else beyond
        )


@pytest.mark.parametrize("path", TEXTS)
def test_a_text_is_not_empty_and_can_be_written_to_a_file(path: str) -> None:
    setting = settings()[path]
    assert accepts(setting, "") is (path == "task.system_prompt")
    assert not accepts(setting, "a\0b")
    assert not accepts(setting, "\ud800")


@pytest.mark.parametrize("path", LISTS)
def test_a_list_is_a_list_of_elements_that_each_keep_the_rule(path: str) -> None:
    setting = settings()[path]
    assert setting.check([]) == ()
    good: object = {str: "end", int: 7}[setting.type]
    assert setting.check([good, good]) == (good, good)
    for bad in ("", "\0") if setting.type is str else (-1, 2**31, 1.0, True):
        with pytest.raises(ConfigError):
            setting.check([good, bad])


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.adam_beta1=1.0"],
        ["trainer.adam_beta2=1"],
        ["trainer.adam_eps=1e-320"],
        ["--rollout-stop="],
        ["rollout.stop=[end,'']"],
        ["--rollout-stop-token-ids=-3"],
        ["--rollout-stop-token-ids", "1", "9" * 30],
        ["engine.kv_cache_gb=1e300"],
        ["--rollout-temperature", "1e39"],
        ["--rollout-temperature", "inf"],
        ["--lr", "1e38"],
        ["--lr", "1_0"],
        ["algorithm.kl_loss_coef=1e300"],
        ["algorithm.eps_clip_high=1e300"],
        ["cluster.actor_start_timeout_s=1e300"],
        ["run.seed=" + "9" * 30],
        ["--num-rollout", "9" * 25],
        ["--rollout-num-engines", "1000000000"],
        ["--sglang-max-running-requests", "1" + "0" * 12],
        ["--sglang-max-total-tokens", "1" + "0" * 18],
        ["speculative.ngram_max_bfs_breadth=1000000000"],
        ["sglang_server.port=65536"],
        ["--hf-checkpoint", ""],
        ["--sglang-page-size", "9" * 30],
        ["--sglang-forward-hooks", "[" * 100_000],
        ["--sglang-forward-hooks", '[{"a": NaN}]'],
    ],
)
def test_a_value_that_no_run_can_have_is_refused_at_the_command_line(words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(words)
    assert refused.value.remedy


@pytest.mark.parametrize("value", [[float("nan")], {"a": float("inf")}, ["\ud800"]])
def test_json_for_a_server_holds_finite_numbers_and_texts(value: object) -> None:
    with pytest.raises(ConfigError, match="finite"):
        sglang_flag("forward_hooks").check(value)
