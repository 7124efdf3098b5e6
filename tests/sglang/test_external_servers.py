"""Servers that someone else started: used where they serve this run's model, and refused where they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.external import check_served
from rollout.sglang_engine.fake import FakeServer, serving
from slime_spec.checkpoints.model_files import TargetFiles
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.ports import free_port
from slime_spec.site import Site
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from slime_spec.weights.messages import BeginPush, PauseGeneration, PushMessage, PushReply
from slime_spec.weights.run import run_push
from tests.sglang.conftest import Checkpoints, Connect, OnFake, rows_of
from tests.support.fp8_checkpoints import PUBLISHED, store_in_fp8
from tests.support.pushes import DirectTransport, other_weights, push_of
from tests.support.sglang_checkpoints import make_target
from tests.support.tiny_drafts import edit_config


def told(model: dict[str, Any] | None = None, **server_args: Any) -> FakeServer:
    """A server that says this of itself."""
    server = FakeServer()
    server.model, server.server_args = model or {}, server_args
    return server


def test_a_server_of_the_same_model_is_used_wherever_its_folder_is(connect: Connect, checkpoints: Checkpoints) -> None:
    architecture = json.loads((checkpoints.target / "config.json").read_text())["architectures"]
    there = {"model_path": "/a/folder/of/another/machine", "architectures": architecture}
    assert len(connect(told(there, speculative_algorithm="EAGLE3")).generate()) == 1
    assert len(connect(told({"model_path": str(checkpoints.target)})).generate()) == 1


def test_a_server_of_another_architecture_is_refused(connect: Connect) -> None:
    with pytest.raises(ConfigError, match=r"architecture Qwen2ForCausalLM where that has LlamaForCausalLM"):
        connect(told({"model_path": "/elsewhere", "architectures": ["Qwen2ForCausalLM"]}))


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 128), ("num_hidden_layers", 7)])
def test_a_server_of_another_size_is_refused_where_its_folder_can_be_read(
    connect: Connect, tmp_path: Path, name: str, value: int
) -> None:
    other = edit_config(make_target(tmp_path / "other"), **{name: value})
    with pytest.raises(ConfigError, match=f"has {name} {value} where that has"):
        connect(told({"model_path": str(other)}))


def test_a_server_that_speculates_otherwise_is_refused(connect: Connect, config: Config) -> None:
    with pytest.raises(ConfigError, match="was started with --speculative-algorithm NGRAM"):
        connect(told(speculative_algorithm="NGRAM"))
    with pytest.raises(ConfigError, match="pass --speculative-algorithm NONE"):
        connect(told(speculative_algorithm=None))
    eagle = replace(config, speculative=replace(config.speculative, algorithm="EAGLE"))
    connect(told(speculative_algorithm="EAGLE"), eagle)


def test_a_server_that_is_not_there_is_refused(connect: Connect, config: Config) -> None:
    with pytest.raises(ConfigError, match="must answer"):
        connect(external_addrs=(f"127.0.0.1:{free_port('127.0.0.1')}",))


def cache_keys(on_fake: OnFake) -> set[str]:
    """The keys under which the server has cached prefixes."""
    return {body["extra_key"] for body in on_fake.server.told("/generate")}


def test_no_two_weights_share_a_key_of_the_servers_prefix_cache(
    connect: Connect, checkpoints: Checkpoints, config: Config
) -> None:
    """Case sglang/04-external: a server that outlives its run keeps what it has cached, and versions begin anew."""
    server = FakeServer(delay_s=0.01)
    with serving(server) as address:
        told: list[set[str]] = []
        for seed in (1, 2):
            on_fake = connect(server, external_addrs=(address,))
            for version in (0, 1, 1):  # nothing pushed yet, a push, and a repeated push of other weights
                server.calls.clear()
                if version:
                    weights = other_weights(checkpoints.target, seed=10 * seed + len(told))
                    on_fake.push(push_of(weights, version), pause_mode="in_place")
                    assert not any(body["flush_cache"] for body in server.told("/update_weights_from_tensor"))
                on_fake.generate(4)
                on_fake.generate(4)
                told.append(cache_keys(on_fake))
    assert [len(keys) for keys in told] == [1] * 6, "requests for the same weights share what is cached"
    assert len(set[str]().union(*told)) == 6


def test_a_request_that_waits_for_the_end_of_a_pause_does_not_use_what_older_weights_cached(
    connect: Connect, checkpoints: Checkpoints
) -> None:
    on_fake = connect()
    on_fake.generate(4)
    messages = push_of(checkpoints.target_weights(), 1)
    waiting: list[Iterable[GeneratedSample]] = []

    def deliver(message: PushMessage) -> list[PushReply]:
        if isinstance(message, BeginPush):
            request = GroupRequest("waits", (5, 6, 7), (1,), SamplingParams(max_new_tokens=4))
            waiting.append(on_fake.engine.generate(request))
        return [on_fake.engine.update_weights(message)]

    run_push(messages, deliver, pause_mode="in_place")
    (sample,) = waiting[0]
    assert sample.weight_version == 1
    on_fake.generate(4)
    assert len(cache_keys(on_fake)) == len(on_fake.server.told("/generate")) == 3


def test_the_engines_of_one_run_share_what_their_router_has_cached(config: Config, checkpoints: Checkpoints) -> None:
    """A router may send a request of one engine to another engine's server."""
    keys = []
    for index in range(2):
        server = FakeServer()
        server.rows = rows_of(checkpoints.target)
        with serving(server) as address:
            settings = replace(config.sglang_server, external_addrs=(address,) * 2)
            engine = SglangEngine(replace(config, sglang_server=settings), index, DirectTransport(), Site(run="a run"))
            engine.start()
            keys.append(engine.weights.cache_key)
            engine.stop()
    assert keys[0] == keys[1]


DECISIVE = {
    "dtype": ("float16", "engine.dtype"),
    "context_length": (32, "engine.context_length"),
    "quantization": ("fp8", "sglang.quantization"),
    "kv_cache_dtype": ("fp8_e5m2", "sglang.kv_cache_dtype"),
    "load_format": ("dummy", "sglang.load_format"),
    "skip_tokenizer_init": (True, "sglang.skip_tokenizer_init"),
    "enable_deterministic_inference": (True, "sglang.enable_deterministic_inference"),
    "speculative_num_steps": (5, "speculative.num_steps"),
    "speculative_eagle_topk": (4, "speculative.eagle_topk"),
    "speculative_accept_threshold_single": (0.5, "speculative.accept_threshold_single"),
    "speculative_draft_model_path": ("/of/another/machine/other-draft", "speculative.draft_model_path"),
}


@pytest.mark.parametrize("dest", DECISIVE)
def test_a_server_whose_samples_would_be_others_is_refused_by_the_flag(connect: Connect, dest: str) -> None:
    """Case sglang/04-external."""
    value, setting = DECISIVE[dest]
    with pytest.raises(ConfigError, match=f"started with --{dest.replace('_', '-')} {value}") as error:
        connect(told(**{dest: value}))
    assert error.value.setting == setting


def test_a_draft_of_another_shape_is_refused_wherever_its_folder_can_be_read(
    connect: Connect, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    other = edit_config(shutil.copytree(checkpoints.eagle3, tmp_path / "eagle3"), draft_vocab_size=32)
    with pytest.raises(ConfigError, match="was started with --speculative-draft-model-path"):
        connect(told(speculative_draft_model_path=str(other)))


def test_a_server_that_says_the_same_in_its_own_words_is_used(connect: Connect, checkpoints: Checkpoints) -> None:
    same = {
        "dtype": "float",
        "context_length": 4096,
        "quantization": None,
        "kv_cache_dtype": "auto",
        "load_format": "safetensors",
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": 3,
        "speculative_draft_model_path": "/of/another/machine/eagle3",
        "max_running_requests": 2048,
    }
    assert len(connect(told(**same)).generate()) == 1


def test_a_flag_of_the_run_that_bends_nothing_is_only_said_to_differ(
    connect: Connect, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    connect(told(attention_backend="triton"), replace(config, sglang={"attention_backend": "fa3"}))
    assert "has --attention-backend triton, not fa3" in caplog.text


def training(config: Config) -> Config:
    return replace(config, run=replace(config.run, mode="train"))


def adopted(server: FakeServer, config: Config, address: str) -> SglangEngine:
    settings = replace(config.sglang_server, external_addrs=(address,))
    engine = SglangEngine(replace(config, sglang_server=settings), 0, DirectTransport())
    engine.start()
    return engine


HERE, ELSEWHERE = "here", "/a/folder/of/another/machine"


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (True, None, "has loaded quantization_config None"),
        (False, [128, 128], "has loaded quantization_config {"),
        (True, [64, 64], "has loaded quantization_config {"),
        (True, ELSEWHERE, "has loaded a folder that is not here"),
        (True, HERE, None),
        (False, ELSEWHERE, None),
    ],
)
def test_a_server_that_has_loaded_another_form_of_the_weights_is_not_pushed_to(
    ours: bool, theirs: object, says: str | None, config: Config, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    target = shutil.copytree(checkpoints.target, tmp_path / "target")
    model = Path(ELSEWHERE)
    if theirs is None or isinstance(theirs, list):
        model = shutil.copytree(target, tmp_path / "theirs")
        described = None if theirs is None else {**PUBLISHED, "weight_block_size": theirs}
        edit_config(model, quantization_config=described)
    if ours:
        store_in_fp8(target, (128, 128))
    model = target if theirs == HERE else model
    of_run = replace(config, model=replace(config.model, hf_checkpoint=str(target)))
    files, told_by_server = TargetFiles.read(str(target)), {"model_path": str(model)}
    check_served("http://server", of_run, files, told_by_server)  # serves rollouts alone, whatever its form
    if says is None:
        check_served("http://server", training(of_run), files, told_by_server)
        return
    with pytest.raises(ConfigError, match="must have loaded weights in the form of --hf-checkpoint") as refused:
        check_served("http://server", training(of_run), files, told_by_server)
    assert says in refused.value.rule


def test_a_run_that_trains_pushes_policy_and_draft_before_the_first_sample(config: Config) -> None:
    """Case sglang/04-external: an earlier run has pushed its version 7."""
    server = FakeServer()
    server.weight_version = "7"
    with serving(server) as address:
        engine = adopted(server, training(config), address)
        assert [body["selector"] for body in server.told("/begin_weight_update")] == ["target", "draft"]
        (sample,) = engine.generate(GroupRequest("g", (5, 6, 7), (1,), SamplingParams(max_new_tokens=8)))
        assert (sample.weight_version, sample.version_spans) == (engine.stats().weight_version, ()) == (0, ())
        assert (sample.draft_version, engine.weights.draft_version) == (0, 0)
        engine.stop()


def test_a_run_that_trains_refuses_a_model_of_another_shape_before_it_pushes(
    config: Config, checkpoints: Checkpoints
) -> None:
    """A tensor of another shape would end the server."""
    server = FakeServer()
    server.rows = {
        name: [[*row, 0.0] for row in rows] for name, rows in rows_of(checkpoints.target).items() if is_matrix(rows)
    }
    with serving(server) as address:
        with pytest.raises(ConfigError, match="has rows of"):
            adopted(server, training(config), address)
        assert server.told("/update_weights_from_tensor") == []


def is_matrix(rows: Any) -> bool:
    return isinstance(rows[0], list)


@pytest.mark.parametrize("shows", ["other values", "nothing"])
def test_rollouts_alone_refuse_a_server_that_does_not_prove_its_weights(
    config: Config, checkpoints: Checkpoints, shows: str
) -> None:
    """Case sglang/04-external: rollouts alone push no policy."""
    server = FakeServer()
    if shows == "other values":
        other = checkpoints.target_weights()
        server.rows = {name: tensor[:2].tolist() for name, tensor in other.items()}
    rule = {"other values": "it has other values of", "nothing": "must show that it has the policy's weights"}[shows]
    with serving(server) as address:
        with pytest.raises(ConfigError, match=rule) as error:
            adopted(server, config, address)
        assert "--rollout-external-engine-addrs" in error.value.remedy
        assert server.told("/update_weights_from_tensor") == []


@pytest.mark.parametrize("label", ["7", "step-100"])
def test_rollouts_alone_call_proved_weights_version_0_and_push_the_draft(
    config: Config, checkpoints: Checkpoints, label: str
) -> None:
    server = FakeServer()
    server.weight_version, server.rows = label, rows_of(checkpoints.target)
    with serving(server) as address:
        engine = adopted(server, config, address)
        assert len(server.told("/get_weights_by_name")) > 10
        assert [body["selector"] for body in server.told("/begin_weight_update")] == ["draft"]
        (sample,) = engine.generate(GroupRequest("g", (5, 6, 7), (1,), SamplingParams(max_new_tokens=8)))
        assert (sample.weight_version, engine.stats().weight_version) == (0, 0)
        assert server.weight_version == "0"
        engine.stop()


def test_no_sample_is_of_weights_that_somebody_else_has_named(connect: Connect) -> None:
    on_fake = connect()
    on_fake.server.weight_version = "step-100"
    with pytest.raises(RuntimeError, match="weight_version is 'step-100', which this run has not given"):
        on_fake.generate(8)


def test_a_draft_that_an_older_server_does_not_take_is_said_to_be_its_own(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    on_fake = connect(FakeServer("0.5.20", contract="0.5.20"))
    assert on_fake.server.sums["draft"] == 0
    assert "the draft of an external server is what that has loaded" in caplog.text


def test_a_server_that_a_run_has_left_paused_goes_on(config: Config, checkpoints: Checkpoints) -> None:
    server = FakeServer()
    server.rows = rows_of(checkpoints.target)
    with serving(server) as address:
        first = adopted(server, config, address)
        first.update_weights(PauseGeneration(1, "in_place"))
        first.stop()
        engine = adopted(server, config, address)
        (sample,) = engine.generate(GroupRequest("g", (5, 6, 7), (1,), SamplingParams(max_new_tokens=8)))
        assert len(sample.token_ids) == 8
        engine.stop()
