"""The experts that a server chose come with its samples, whole or in parts, and none that it cannot have chosen."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.sglang_engine.client import ProtocolError
from rollout.sglang_engine.fake import FakeServer
from rollout.sglang_engine.returned_experts import ReturnedExperts
from rollout.sglang_engine.sample import GrowingSample, Reading
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.preflight.routing import check_routing_replay
from slime_spec.routed_experts import Ids, RoutedExperts
from slime_spec.sglang.arguments import planned_places, server_flags
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.sglang.conftest import Connect
from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.tiny_policy import make_tiny_policy

PROMPT = (5, 6, 7)
LAYERS, CHOSEN, EXPERTS = 3, 2, 8  # of GLM's tiny checkpoint, whose first layer has no experts
Edit = Mapping[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_policy(tmp_path_factory.mktemp("routed") / "model")  # for its tokenizer
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    return make_tiny_checkpoint(folder, "Glm4MoeForCausalLM", vocab_size=257, eos_token_id=eos)


@pytest.fixture
def replaying(config: Config, folder: Path) -> Config:
    rollout = replace(config.rollout, routing_replay=True)
    return replace(
        config, model=ModelConfig(hf_checkpoint=str(folder)), speculative=SpeculativeConfig(), rollout=rollout
    )


def returning(**options: Any) -> FakeServer:
    server = FakeServer(**options)
    server.num_layers, server.num_chosen, server.num_experts = LAYERS, CHOSEN, EXPERTS
    return server


def chosen(text: tuple[int, ...]) -> Ids:
    """What the fake server chooses for a text's tokens but the last, in the layers that have experts."""
    ids = [
        [[(token + 7 * position + 3 * layer + place) % EXPERTS for place in range(CHOSEN)] for layer in (1, 2)]
        for position, token in enumerate(text[:-1])
    ]
    return np.array(ids, dtype=np.uint8)


def test_they_come_with_every_sample_of_the_layers_that_have_experts(connect: Connect, replaying: Config) -> None:
    on_fake = connect(returning(), replaying)
    for sample in on_fake.generate(20, num_samples=2):
        assert sample.routed_experts is not None
        assert np.array_equal(sample.routed_experts.ids, chosen((*PROMPT, *sample.token_ids)))
    assert all(body["return_routed_experts"] is True for body in on_fake.server.told("/generate"))


def test_nobody_asks_for_them_without_the_setting(connect: Connect, config: Config) -> None:
    on_fake = connect(returning(), config)
    assert [sample.routed_experts for sample in on_fake.generate(4)] == [None]
    assert "return_routed_experts" not in on_fake.server.told("/generate")[0]


def test_a_resumed_sample_keeps_those_that_made_its_logprobs(connect: Connect, replaying: Config) -> None:
    (whole,) = connect(returning(), replaying).generate(12)
    had = np.zeros((len(PROMPT) + 4 - 1, 2, CHOSEN), dtype=np.uint8)
    partial = replace(
        whole,
        token_ids=whole.token_ids[:4],
        logprobs=whole.logprobs[:4],
        finish_reason="abort",
        routed_experts=RoutedExperts.of(had),
    )
    request = GroupRequest("group", PROMPT, (0,), SamplingParams(max_new_tokens=12), (partial,))
    (resumed,) = connect(returning(), replaying).engine.generate(request)
    assert resumed.routed_experts is not None
    theirs = chosen((*PROMPT, *whole.token_ids))
    assert resumed.token_ids == whole.token_ids
    assert np.array_equal(resumed.routed_experts.ids, np.concatenate([had, theirs[len(had) :]]))


def reading(folder: Path) -> Reading:
    spec = ModelSpec.from_folder(folder)
    assert spec.experts is not None
    return Reading(0, 3, True, 257, experts=ReturnedExperts(spec.experts, spec.num_layers))


def chunk(tokens: list[int], reason: Edit | None, **meta: Any) -> dict[str, Any]:
    triples = [[-1.0, token, None] for token in tokens]
    known = {"completion_tokens": len(tokens), "output_token_logprobs": triples, "weight_version": "0"}
    return {"output_ids": tokens, "meta_info": {**known, "finish_reason": reason, **meta}}


def encoded(ids: Any) -> str:
    return b64encode(np.asarray(ids, dtype="<i4").tobytes()).decode()


LENGTH: Edit = {"type": "length", "length": 3}
ABORT: Edit = {"type": "abort", "message": "Abort"}


def test_what_a_part_that_broke_off_lacks_comes_with_the_next_part(folder: Path) -> None:
    sample = GrowingSample(GroupRequest("g", PROMPT, (1,), SamplingParams(max_new_tokens=5)), 0, reading(folder))
    sample.body("rid", "key")
    sample.part.take(chunk([9, 10], None))
    sample.break_off()
    sample.body("rid", "key")
    ids = np.arange(7 * LAYERS * CHOSEN).reshape(7, LAYERS, CHOSEN) % EXPERTS
    sample.part.take(chunk([11, 12, 13], LENGTH, routed_experts=encoded(ids)))
    finished = sample.finished(1.0, None)
    assert finished.token_ids == (9, 10, 11, 12, 13)
    assert finished.routed_experts is not None
    assert np.array_equal(finished.routed_experts.ids, ids[:, 1:])


@pytest.mark.parametrize(("num_rows", "num_read"), [(None, 0), (2, 2), (4, 4), (6, 4)])
def test_an_aborted_sample_has_those_that_came(folder: Path, num_rows: int | None, num_read: int) -> None:
    """A server that aborts a request may have generated more tokens than it sends."""
    sample = GrowingSample(GroupRequest("g", PROMPT, (1,), SamplingParams(max_new_tokens=5)), 0, reading(folder))
    sample.body("rid", "key")
    came = {} if num_rows is None else {"routed_experts": encoded(np.ones((num_rows, LAYERS, CHOSEN)))}
    sample.part.take(chunk([9, 10], ABORT, **came))
    finished: GeneratedSample = sample.finished(1.0, None)
    assert (finished.finish_reason, finished.token_ids) == ("abort", (9, 10))
    assert finished.routed_experts is not None
    assert finished.routed_experts.num_tokens == num_read


def test_tokens_behind_the_end_of_an_aborted_reply_take_their_experts_along(folder: Path) -> None:
    """SGLang ends an aborted request before it looks for the token that ends the reply, here 2."""
    reader = replace(reading(folder), eos_token_ids=frozenset({2}))
    sample = GrowingSample(GroupRequest("g", PROMPT, (1,), SamplingParams(max_new_tokens=5)), 0, reader)
    sample.body("rid", "key")
    sample.part.take(chunk([9, 2, 10], ABORT, routed_experts=encoded(np.ones((5, LAYERS, CHOSEN)))))
    finished = sample.finished(1.0, None)
    assert (finished.finish_reason, finished.token_ids) == ("stop", (9, 2))
    assert finished.routed_experts is not None
    assert finished.routed_experts.num_tokens == len(PROMPT) + 1


@pytest.mark.parametrize(
    ("came", "told"),
    [
        ({}, "routed_experts are 'None' where they were asked for: the server was started without --enable-return"),
        ({"routed_experts": 5}, "routed_experts are '5'"),
        ({"routed_experts": "?"}, "routed_experts are no base64"),
        ({"routed_experts": b64encode(b"12345").decode()}, "5 bytes, which are no int32 numbers"),
        ({"routed_experts": encoded(np.zeros((4, LAYERS, CHOSEN)))}, "have 24 numbers, and 5 tokens in 3 layers"),
        ({"routed_experts": encoded(np.zeros(31))}, "have 31 numbers"),
        ({"routed_experts": encoded(np.full((5, LAYERS, CHOSEN), 8))}, "name experts from 8 to 8 of 8"),
        ({"routed_experts": encoded(np.full((5, LAYERS, CHOSEN), -1))}, "name experts from -1 to -1 of 8"),
    ],
)
def test_what_cannot_be_true_is_refused(folder: Path, came: Edit, told: str) -> None:
    sample = GrowingSample(GroupRequest("g", PROMPT, (1,), SamplingParams(max_new_tokens=3)), 0, reading(folder))
    sample.body("rid", "key")
    with pytest.raises(ProtocolError) as refusal:
        sample.part.take(chunk([9, 10, 11], LENGTH, **came))
    assert told in str(refusal.value)


def test_a_server_that_returns_none_ends_the_sample_by_its_flags_name(connect: Connect, replaying: Config) -> None:
    with pytest.raises(RuntimeError, match="without --enable-return-routed-experts"):
        connect(FakeServer(), replaying).generate(4)


def on_gpu(config: Config) -> Config:
    return replace(config, rollout=replace(config.rollout, num_gpus_per_engine=1))


def test_a_server_without_a_gpu_is_refused_before_it_ends_at_its_start(replaying: Config) -> None:
    with pytest.raises(ConfigError, match="without a GPU a server ends at its start") as refusal:
        check_routing_replay(replaying, ModelSpec.from_folder(replaying.model.hf_checkpoint))
    assert refusal.value.remedy.startswith("Pass --rollout-engine embedded, or drop --use-rollout-routing-replay")


def test_a_running_server_that_does_not_return_them_is_refused(connect: Connect, replaying: Config) -> None:
    server = returning()
    server.server_args = {"enable_return_routed_experts": False}
    with pytest.raises(ConfigError, match="was started with --enable-return-routed-experts False"):
        connect(server, replaying)


def test_what_one_engine_overrides_is_refused_at_that_engine(
    connect: Connect, replaying: Config, tmp_path: Path
) -> None:
    overrides = tmp_path / "engines.yaml"
    overrides.write_text("0: {enable_hierarchical_cache: true}\n")
    with pytest.raises(ConfigError, match="lost its experts"):
        connect(returning(), replaying, overrides=str(overrides))


CHAIN: Edit = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
TREE: Edit = {"num_steps": 3, "eagle_topk": 2, "num_draft_tokens": 6}


@pytest.mark.parametrize(
    ("speculative", "flags", "rule", "remedy"),
    [
        (
            {"algorithm": "NEXTN", **TREE},
            {},
            "drafts must be chains, and eagle_topk is 2",
            "--speculative-eagle-topk 1",
        ),
        ({"algorithm": "NGRAM"}, {}, "NGRAM worker does not keep the experts", "--speculative-algorithm"),
        ({}, {"pp_size": 2}, "the last one's layers alone", "Drop --sglang-pp-size"),
        ({}, {"enable_hierarchical_cache": True}, "lost its experts", "Drop --sglang-enable-hierarchical-cache"),
        ({}, {"enable_return_routed_experts": False}, "return the experts they choose", "Drop --no-sglang"),
        ({}, {"chunked_prefill_size": -1}, "one chunk of prefill", "Drop --sglang-chunked-prefill-size"),
        ({"algorithm": "NEXTN", **CHAIN}, {"chunked_prefill_size": 16}, "verify 32 tokens at once", "size 32"),
    ],
)
def test_servers_that_would_return_other_experts_are_refused(
    replaying: Config, speculative: Edit, flags: Edit, rule: str, remedy: str
) -> None:
    config = on_gpu(replace(replaying, speculative=SpeculativeConfig(**speculative), sglang=dict(flags)))
    spec = ModelSpec.from_folder(config.model.hf_checkpoint)
    with pytest.raises(ConfigError) as refusal:
        check_routing_replay(config, spec)
    assert refusal.value.setting == "rollout.routing_replay"
    assert rule in refusal.value.rule
    assert remedy in refusal.value.remedy
    assert "drop --use-rollout-routing-replay" in refusal.value.remedy
    check_routing_replay(replace(config, rollout=replace(config.rollout, routing_replay=False)), spec)


def test_chains_of_a_draft_network_are_served_and_the_flag_is_implied(replaying: Config) -> None:
    config = on_gpu(replace(replaying, speculative=SpeculativeConfig(algorithm="NEXTN", **CHAIN)))
    check_routing_replay(config, ModelSpec.from_folder(config.model.hf_checkpoint))
    (place,) = planned_places(replaying, 0)
    assert server_flags(replaying, 0, place)["enable_return_routed_experts"] is True
    without = replace(replaying, rollout=replace(replaying.rollout, routing_replay=False))
    assert "enable_return_routed_experts" not in server_flags(without, 0, place)
