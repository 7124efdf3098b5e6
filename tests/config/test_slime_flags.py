"""Every flag of slime's launch scripts is accepted, has no effect that it is told of, or is refused with a remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from slime_spec.bench.robustness.tiny import make_target
from slime_spec.checkpoints.families.llama import LLAMA
from slime_spec.errors import ConfigError
from slime_spec.launch import train
from slime_spec.launch.arguments import Reading, read_arguments, read_each
from slime_spec.launch.cli import main
from slime_spec.launch.compose import Composed, composed
from slime_spec.launch.flags import REFUSED, find_flag, flags, refusal_of
from slime_spec.launch.preflight import look
from slime_spec.launch.slime.miles import REFUSED_OF_MILES
from slime_spec.launch.slime.model_shape import NAMES, check_model_shape
from slime_spec.launch.slime.refused import REFUSED_OF_SLIME
from slime_spec.launch.slime.together import MEANINGS
from slime_spec.launch.slime.without_effect import WITHOUT_EFFECT

# Facts: the flags that slime's scripts and examples pass (THUDM/slime, 2026), with values that they pass.
LINES = (Path(__file__).parent / "flags_of_slime.txt").read_text(encoding="utf-8").splitlines()


def made_of(command_line: str) -> Composed:
    return composed(command_line.split())


# Every argument that slime itself defines, with its default (None where it has none); of miles those beyond slime's.
HERE = Path(__file__).parent
SLIMES = dict(line.split(" ", 1) for line in (HERE / "arguments_of_slime.txt").read_text(encoding="utf-8").splitlines())
MILES = (HERE / "arguments_of_miles.txt").read_text(encoding="utf-8").split()


def reading(line: str) -> Reading:
    (only,) = read_each(line.split())
    return only


def test_no_flag_of_slimes_scripts_is_unknown() -> None:
    unknown = {line.split()[0] for line in LINES} - set(flags()) - set(REFUSED)
    negated = {name for name in unknown if name.startswith("--no-") and name.replace("--no-", "--", 1) in flags()}
    assert unknown - negated == set()


def is_known(name: str) -> bool:
    """Whether a flag has a meaning, no effect, or a refusal with a remedy."""
    refusal = refusal_of(name)
    if refusal is not None:
        assert all(refusal), f"{name} is refused without a reason or a remedy"
        return True
    try:
        find_flag(name)
    except ConfigError:
        return False
    return True


# What sglang_router adds to slime's parser (0.3.2), some of it.
ROUTER = ["--router-policy", "--router-cache-threshold", "--router-retry-max-retries", "--router-api-key"]


@pytest.mark.parametrize("names", [SLIMES, MILES, ROUTER], ids=["slime", "miles", "sglang_router"])
def test_every_argument_of_its_parser_is_known(names: Iterable[str]) -> None:
    assert [name for name in names if not is_known(name)] == []
    assert not is_known("--made-up")


@pytest.mark.parametrize("line", LINES)
def test_a_flag_of_slimes_is_read_with_its_values_or_refused_with_a_remedy(line: str) -> None:
    """Case flags-of-slime."""
    read = reading(line)
    assert list(read.words) == line.split()
    if read.error is not None:
        assert "is not a flag" not in read.error.rule
        assert read.error.remedy


def test_no_flag_is_treated_twice() -> None:
    kinds = (set(WITHOUT_EFFECT), set(NAMES), set(MEANINGS), set(REFUSED_OF_SLIME), set(REFUSED_OF_MILES))
    assert sum(map(len, kinds)) == len(set().union(*kinds))
    assert not set(REFUSED) & set(flags())


NOTHING = composed([])
WITH_VALUES = [(name, each.values[0] if each.values else "1") for name, each in WITHOUT_EFFECT.items()]


@pytest.mark.parametrize(("flag", "value"), WITH_VALUES)
def test_a_flag_without_effect_is_told_with_its_reason_and_changes_nothing(flag: str, value: str) -> None:
    is_switch = WITHOUT_EFFECT[flag].num_values == "0"
    made = composed([flag] if is_switch else [flag, value])
    assert (made.config, made.given) == (NOTHING.config, NOTHING.given)
    shown = flag if is_switch or flag == "--wandb-key" else f"{flag} {value}"
    assert made.notes == (f"No effect, as {WITHOUT_EFFECT[flag].reason}: {shown}.",)


@pytest.mark.parametrize("flag", [name for name, each in WITHOUT_EFFECT.items() if each.values])
def test_another_value_of_it_is_refused_with_the_values_that_there_are(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"must be {WITHOUT_EFFECT[flag].values[0]}") as caught:
        read_arguments([flag, "another"])
    assert (caught.value.setting, caught.value.value) == (flag, "another")
    assert caught.value.remedy


def test_flags_without_effect_are_told_in_a_line_for_each_reason() -> None:
    notes = made_of("--optimizer adam --swiglu --num-layers 30 --train-backend megatron --hidden_dropout=0").notes
    assert notes == (
        "No effect, as it is what this project does anyway: --optimizer adam, --train-backend megatron, "
        "--hidden-dropout 0.",
        "No effect, as the model's shape is read from its config.json: --swiglu, --num-layers 30.",
    )


def test_what_cannot_be_switched_off_says_so() -> None:
    with pytest.raises(ConfigError, match="cannot be switched off"):
        read_arguments(["--use-dynamic-batch-size=false"])
    with pytest.raises(ConfigError, match="cannot be switched off"):
        read_arguments(["--no-use-dynamic-batch-size"])


@pytest.mark.parametrize(
    ("slimes", "ours"),
    [
        (
            "--actor-num-nodes 4 --actor-num-gpus-per-node 8 --rollout-num-gpus-per-engine 4 --colocate",
            "trainer.num_gpus=32 trainer.world_size=32 rollout.num_engines=8 rollout.num_gpus_per_engine=4",
        ),
        (
            "--actor-num-nodes 2 --actor-num-gpus-per-node 4 --rollout-num-gpus 6 --rollout-num-gpus-per-engine 2",
            "trainer.num_gpus=8 trainer.world_size=8 cluster.num_gpus_per_node=4 cluster.colocate=false "
            "rollout.num_engines=3 rollout.num_gpus_per_engine=2",
        ),
        (
            "--actor-num-gpus-per-node 4 --rollout-num-gpus 2 --colocate --debug-rollout-only",
            "--debug-rollout-only trainer.num_gpus=4 trainer.world_size=4 rollout.num_engines=2 "
            "rollout.num_gpus_per_engine=1",
        ),
        (
            "--actor-num-nodes 4 --actor-num-gpus-per-node 8 --rollout-num-gpus-per-engine 16 --colocate",
            "trainer.num_gpus=32 trainer.world_size=32 rollout.num_engines=2 rollout.num_gpus_per_engine=16 "
            "sglang_server.transport=distributed",
        ),
        (
            "--actor-num-nodes 1 --actor-num-gpus-per-node 0 --rollout-num-gpus-per-engine 0 --rollout-engine embedded "
            "--colocate",
            "trainer.num_gpus=0 trainer.world_size=1 rollout.num_gpus_per_engine=0 --rollout-engine embedded",
        ),
        ("--sglang-server-concurrency 100", "--sglang-max-running-requests 100"),
        ("--sglang-server-concurrency 100 --sglang-max-running-requests 7", "--sglang-max-running-requests 7"),
        ("--sglang-router-ip 10.0.0.1 --sglang-router-port 3000", "--sglang-router-addr 10.0.0.1:3000"),
        ("--recompute-granularity full --bf16", "trainer.recompute=true trainer.dtype=bfloat16"),
        (
            "--sglang-nsa-decode-backend flashmla_kv --sglang-mamba-scheduler-strategy extra_buffer",
            "sglang.dsa_decode_backend=flashmla_kv sglang.mamba_radix_cache_strategy=extra_buffer",
        ),
    ],
)
def test_flags_of_slime_mean_the_settings_that_they_make_together(slimes: str, ours: str) -> None:
    sglang = ["--rollout-engine", "sglang"]
    assert composed([*sglang, *slimes.split()]).config == composed([*sglang, *ours.split()]).config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--rollout-num-gpus 6 --rollout-num-gpus-per-engine 4", "must be a multiple"),
        ("--rollout-num-gpus 0", "at least that"),
        ("--actor-num-nodes 2 --actor-num-gpus 3", "is 3 by its own flag or file, and 16 by --actor-num-nodes"),
        ("--sglang-router-ip 10.0.0.1", "needs its other half"),
        ("--actor-num-nodes two", "must be a whole number"),
        ("--recompute-granularity selective", "must be full"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(argv: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        composed(argv.split())


SHAPE = {"num_hidden_layers": 30, "hidden_size": 576, "num_key_value_heads": 3, "text_config": {"vocab_size": 49152}}


def test_numbers_of_the_models_shape_are_held_to_its_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    given = {"--num-layers": ("30",), "--hidden-size": ("576",), "--vocab-size": ("49152",), "--swiglu": ("true",)}
    check_model_shape(given, str(tmp_path))
    check_model_shape({"--num-layers": ("31",)}, str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="2 mistakes") as caught:
        check_model_shape(
            given | {"--num-layers": ("31",), "--vocab-size": ("9",), "--num-experts": ("8",)}, str(tmp_path)
        )
    assert "--num-layers: must be 30" in str(caught.value)
    assert "--vocab-size: must be 49152" in str(caught.value)


def test_the_preflight_compares_the_models_shape_too(tmp_path: Path) -> None:
    """A script of another model than its checkpoint would go unseen."""
    checkpoint = make_target(tmp_path / "target", LLAMA)
    argv = ["--hf-checkpoint", str(checkpoint), "--num-layers", "999", "--num-experts", "8", "--hidden-size", "7"]
    looked = look(composed(argv))
    looked.close()
    named = [error.setting for error in looked.refusals]
    assert named[:2] == ["--num-layers", "--hidden-size"]
    assert "--num-experts" not in named


def test_a_key_of_wandb_goes_to_its_variable_and_not_into_the_runs_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "before")
    ran: list[list[str]] = []
    monkeypatch.setattr(train, "run", lambda made, argv: ran.append(argv) or 0)
    assert main(["train", "--wandb-key", "secret", "--lr", "1e-6", "--wandb-key=", "--use-wandb"]) == 0
    assert ran[0][-4:] == ["train", "--lr", "1e-6", "--use-wandb"]
    assert os.environ["WANDB_API_KEY"] == "secret"
    assert "secret" not in capsys.readouterr().err


def test_all_mistakes_of_a_command_line_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        made_of("--lrr 1 2 --seed x --use-opd --num-rollout 0 trainer.lr=fast --optimizer sgd --lr 1e-6 loose")
    first, *lines = str(caught.value).splitlines()
    assert first == "7 mistakes"
    named = [line.split(":")[0].strip() for line in lines]
    assert named == ["--lrr", "run.seed", "--use-opd", "run.num_rollout", "trainer.lr", "--optimizer", "loose"]
    assert (caught.value.setting, caught.value.value) == ("--lrr", "--lrr")


def test_the_doctor_tells_each_mistake_as_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--lrr", "1", "--seed", "x", "--json"]) == 2
    told = capsys.readouterr().out
    assert "--lrr" in told
    assert "run.seed" in told


def test_all_contradictions_of_a_configuration_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        made_of("--rollout-top-k 0 --global-batch-size 7 --chat-date yesterday")
    assert {line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]} == {
        "rollout.top_k",
        "trainer.global_batch_size",
        "task.chat_date",
    }


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("run: {seed: x, sed: 1}\ntrainer: {lr: 7}\nsglang: {page_size: x, page_sise: 1}\n")
    with pytest.raises(ConfigError, match="3 mistakes") as caught:
        composed(["--config", str(file)])
    assert all(name in str(caught.value) for name in ("run.seed", "run.sed", "trainer.lr"))


@pytest.mark.parametrize("name", ["--eval-interval-s", "--wandb-keys", "--use-opds", "--rollout-top-n", "--spec-x"])
def test_a_suggestion_is_near_in_meaning_and_never_refused(name: str) -> None:
    """Case flags-of-slime: --eval-interval was answered by --save-interval, --use-kl-los by a refused flag."""
    with pytest.raises(ConfigError) as caught:
        read_arguments([name, "1"])
    suggested = [word.rstrip("?") for word in caught.value.remedy.split() if word.startswith("--") and word[-1] == "?"]
    assert not set(suggested) & set(REFUSED)
    assert suggested == (["--wandb-key"] if name == "--wandb-keys" else [])
