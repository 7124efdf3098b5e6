"""Plain data to Config and back: strict one way, without loss the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_strategies import configs, names, texts, values
from hypothesis import HealthCheck, given
from hypothesis import settings as run_with

from slime_spec.config.build import from_dict, to_dict, to_yaml
from slime_spec.config.schema import settings
from slime_spec.config.tree import Config
from slime_spec.config.yaml_file import read_yaml
from slime_spec.errors import ConfigError
from slime_spec.launch.compose import compose, file_settings
from slime_spec.launch.groups import EXPERIMENT, GROUPS, choices, conf_dir
from tests.support.refused_launches import BROKEN_FILES

relaxed = run_with(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def test_no_data_is_the_trees_own_defaults() -> None:
    assert from_dict({}) == Config()
    assert from_dict(to_dict(Config())) == Config()


def test_every_default_obeys_its_own_type_choices_and_bounds() -> None:
    for path, setting in settings().items():
        assert setting.check(setting.default) == setting.default, path
        assert setting.help.endswith("."), path


@run_with(relaxed, max_examples=30)
@given(configs())
def test_any_config_survives_the_way_to_plain_data_and_to_yaml(config: Config) -> None:
    assert from_dict(to_dict(config)) == config
    assert from_dict(read_yaml(to_yaml(config), "mine.yaml")) == config


@run_with(relaxed, max_examples=25)
@given(names, texts, values(settings()["rollout.stop"]), values(settings()["metrics.wandb_group"]))
def test_the_yaml_of_a_run_reloads_to_an_equal_config(
    tmp_path_factory: pytest.TempPathFactory, name: str, system: str, stop: tuple[str, ...], group: str | None
) -> None:
    config = from_dict(
        {
            "run": {"name": name},
            "task": {"system_prompt": system},
            "rollout": {"stop": stop},
            "metrics": {"wandb_group": group},
            "sglang": {"cuda_graph_bs_decode": [1, 2], "served_model_name": name, "forward_hooks": [{"a": system}]},
        }
    )
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(to_yaml(config))
    assert compose(["--config", str(path)]) == config


def test_every_file_in_conf_is_the_base_or_a_choice_of_a_group() -> None:
    files = {str(path.relative_to(conf_dir())) for path in conf_dir().rglob("*") if path.is_file()}
    assert files == {"config.yaml"} | {f"{group}/{name}.yaml" for group in GROUPS for name in choices(group)}


@pytest.mark.parametrize("experiment", choices(EXPERIMENT))
def test_every_shipped_config_composes_and_its_yaml_reloads_to_it(experiment: str, tmp_path: Path) -> None:
    # slime's defaults name no prompts, and a group of one sample, which teaches nothing.
    needed = ["--prompt-data", "prompts.jsonl", "--n-samples-per-prompt", "8"] if experiment == "slime" else []
    config = compose(["--config", experiment, *needed])
    assert config != compose([])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert compose([f"experiment={path}"]) == config


@pytest.mark.parametrize(
    ("data", "setting", "words"),
    [
        ({"trainer": {"lrr": 1.0}}, "trainer.lrr", "trainer.lr"),
        ({"trainr": {"lr": 1.0}}, "trainr", "trainer"),
        ({"trainer": 3}, "trainer", "group of settings"),
        ({"trainer": {"lr": "fast"}}, "trainer.lr", "a finite number"),
        ({"trainer": {"lr": True}}, "trainer.lr", "a finite number"),
        ({"trainer": {"lr": float("nan")}}, "trainer.lr", "a finite number"),
        ({"trainer": {"lr": None}}, "trainer.lr", "a finite number"),
        ({"trainer": {"dtype": "bfloat61"}}, "trainer.dtype", "bfloat16"),
        ({"rollout": {"batch_size": 2.0}}, "rollout.batch_size", "whole number"),
        ({"rollout": {"n_samples_per_prompt": 0}}, "rollout.n_samples_per_prompt", "at least 1"),
        ({"rollout": {"top_p": 0.0}}, "rollout.top_p", "above 0"),
        ({"rollout": {"top_p": 1.5}}, "rollout.top_p", "at most 1"),
        ({"rollout": {"stop": "end"}}, "rollout.stop", "list"),
        ({"rollout": {"stop_token_ids": [1, "2"]}}, "rollout.stop_token_ids", "whole number"),
        ({"cluster": {"colocate": 1}}, "cluster.colocate", "true or false"),
    ],
)
def test_wrong_data_is_refused_by_setting_rule_and_remedy(data: dict[str, object], setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert caught.value.setting == setting
    assert words in str(caught.value)
    assert caught.value.remedy


def test_a_whole_number_is_a_number() -> None:
    config = from_dict({"trainer": {"lr": 1}})
    assert config.trainer.lr == 1.0
    assert type(config.trainer.lr) is float


@pytest.mark.parametrize(("text", "setting"), BROKEN_FILES)
def test_a_broken_config_file_is_refused_by_name(text: str, setting: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        file_settings(path)
    assert caught.value.setting.removeprefix(f"{tmp_path}/") == setting


def test_a_hand_written_file_may_say_1e_6_and_hold_dollars(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("trainer:\n  lr: 1e-6\nrun:\n  name: ${x\n")
    assert compose(["--config", str(path)]) == compose(["--lr", "0.000001", "--run-name", "${x"])


def test_a_file_may_say_a_date_without_quotes_and_repeat_a_value_by_an_alias(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "task:\n  chat_date: 2025-01-31\nrun: {name: &name mine}\nmetrics: {wandb_group: *name, console: on}\n"
    )
    config = compose(["--config", str(path)])
    assert (config.task.chat_date, config.metrics.wandb_group, config.metrics.console) == ("2025-01-31", "mine", True)


def test_a_config_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        compose(["--config", str(tmp_path / "none.yaml")])
