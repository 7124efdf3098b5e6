"""Pushes into servers of both contracts: what each side is told, and what is refused before the server hears of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rollout.sglang_engine.contract import Contract
from rollout.sglang_engine.fake import FakeServer
from slime_spec.config.tree import Config, SpeculativeConfig
from slime_spec.errors import ConfigError, PushError
from slime_spec.transports.torch_handles import check_torch
from slime_spec.types import GroupRequest, SamplingParams
from slime_spec.weights.messages import CancelPush, CommitPush, PreparePush
from tests.sglang.conftest import Checkpoints, Connect, OnFake
from tests.support.pushes import push_of
from tests.support.sglang_checkpoints import make_target
from tests.support.tiny_drafts import make_tiny_mimo

UPDATES = "/update_weights_from_tensor"


def paths(on_fake: OnFake) -> list[str]:
    """The calls of a push, in order, repetitions of a bucket as one."""
    kept: list[str] = []
    for path, _ in on_fake.server.calls:
        if path not in ("/weights_checker", "/get_weights_by_name", "/health") and kept[-1:] != [path]:
            kept.append(path)
    return kept


def test_a_target_push_is_one_session_of_the_target_in_a_paused_server(
    connect: Connect, checkpoints: Checkpoints
) -> None:
    on_fake = connect()
    on_fake.server.rows = {name: tensor[:2].tolist() for name, tensor in checkpoints.target_weights().items()}
    drafts_pushed = on_fake.server.sums["draft"]
    report = on_fake.push(push_of(checkpoints.target_weights(), 3), verify=True)
    assert (report.version, report.verified) == (3, True)
    assert paths(on_fake) == [
        "/pause_generation",
        "/begin_weight_update",
        UPDATES,
        "/end_weight_update",
        "/continue_generation",
    ]
    updates = on_fake.server.told(UPDATES)
    assert len(updates) > 2
    assert {body["selector"] for body in updates} == {"target"}
    assert on_fake.server.told("/begin_weight_update") == [{"selector": "target"}]
    assert [body.get("weight_version") for body in updates] == [None] * (len(updates) - 1) + ["3"]
    assert [body["flush_cache"] for body in updates] == [False] * (len(updates) - 1) + [True]
    assert on_fake.server.sums["draft"] == drafts_pushed
    (sample,) = on_fake.generate(8)
    assert (sample.weight_version, sample.draft_version) == (3, 0)


def test_a_draft_push_names_the_draft_and_leaves_the_version_alone(connect: Connect, checkpoints: Checkpoints) -> None:
    on_fake = connect()
    report = on_fake.push(push_of(checkpoints.draft_weights(), 5, "draft"), verify=True)
    assert report.verified
    updates = on_fake.server.told(UPDATES)
    assert {body["selector"] for body in updates} == {"draft"}
    assert all("weight_version" not in body for body in updates)
    assert on_fake.server.sums["target"] == 0
    (sample,) = on_fake.generate(8)
    assert (sample.weight_version, sample.draft_version) == (0, 5)


def test_a_draft_whose_layer_goes_by_its_other_name_is_taken_too(connect: Connect, checkpoints: Checkpoints) -> None:
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in checkpoints.draft_weights().items()}
    assert connect().push(push_of(renamed, 1, "draft")).num_tensors == len(renamed)


def test_the_older_contract_keeps_target_tensors_from_the_draft(connect: Connect, checkpoints: Checkpoints) -> None:
    on_fake = connect(FakeServer("0.5.20", contract="0.5.20"))
    on_fake.push(push_of(checkpoints.target_weights(), 1))
    updates = on_fake.server.told(UPDATES)
    assert all(body["disable_draft_model"] is True and "selector" not in body for body in updates)
    assert on_fake.server.sums["draft"] == 0
    with pytest.raises(PushError, match="no way to update the draft alone"):
        on_fake.push(push_of(checkpoints.draft_weights(), 1, "draft"))


def test_the_oldest_contract_would_overwrite_the_draft_and_is_refused(
    connect: Connect, checkpoints: Checkpoints, config: Config
) -> None:
    on_fake = connect(FakeServer("0.5.9", contract="0.5.9"))
    with pytest.raises(PushError, match="would overwrite it"):
        on_fake.push(push_of(checkpoints.target_weights(), 1))
    assert on_fake.server.told(UPDATES) == []
    plain = connect(FakeServer("0.5.9", contract="0.5.9"), replace(config, speculative=SpeculativeConfig()))
    plain.push(push_of(checkpoints.target_weights(), 1))
    assert plain.server.weight_version == "1"


def test_the_contract_is_read_from_the_servers_answers_where_it_hides_its_description(connect: Connect) -> None:
    new, old = connect(FakeServer(hides_openapi=True)), connect(FakeServer("0.5.9", "0.5.9", hides_openapi=True))
    assert new.engine.weights.delivery._contract == Contract("selector", has_checksums=True)
    assert old.engine.weights.delivery._contract == Contract("none", has_checksums=False)


def spoiled(weights: dict[str, torch.Tensor], **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    merged = {**weights, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return {name: tensor for name, tensor in merged.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head__weight": torch.zeros(300, 48)}, r"lm_head.weight has shape \(300, 48\)"),
        ({"model__norm__weight": None}, "lacks model.norm.weight"),
        ({"model__extra": torch.zeros(3)}, "does not know: model.extra"),
        ({"model__norm__weight": torch.zeros(48, dtype=torch.int64)}, "model.norm.weight is int64"),
    ],
)
def test_a_payload_that_would_kill_the_server_is_refused_before_it_is_sent(
    connect: Connect, checkpoints: Checkpoints, changes: dict[str, Any], message: str
) -> None:
    on_fake = connect()
    with pytest.raises(PushError, match=message):
        on_fake.push(push_of(spoiled(checkpoints.target_weights(), **changes), 1))
    assert on_fake.server.told(UPDATES) == on_fake.server.told("/pause_generation") == []
    assert on_fake.generate(4)[0].weight_version == 0


def test_a_drafts_vocabulary_cannot_be_pushed(connect: Connect, checkpoints: Checkpoints) -> None:
    tables = {**checkpoints.draft_weights(), "d2t": torch.zeros(61, dtype=torch.int64)}
    with pytest.raises(PushError, match="d2t cannot be pushed"):
        connect().push(push_of(tables, 1, "draft"))


def test_a_session_that_somebody_left_open_is_ended_first(connect: Connect, checkpoints: Checkpoints) -> None:
    on_fake = connect()
    on_fake.server.session = "all"
    on_fake.push(push_of(checkpoints.target_weights(), 1))
    assert on_fake.server.weight_version == "1"
    assert on_fake.server.session is None


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_push_that_pauses_the_engines_pauses_once_and_flushes_only_where_that_works(
    connect: Connect, checkpoints: Checkpoints, mode: str
) -> None:
    on_fake = connect(FakeServer(delay_s=0.01))
    running = on_fake.engine.generate(GroupRequest("running", (5, 6, 7), (1,), SamplingParams(max_new_tokens=100)))
    time.sleep(0.1)
    on_fake.push(push_of(checkpoints.target_weights(), 2), pause_mode=mode)
    assert on_fake.server.told("/pause_generation") == [{"mode": mode}]
    assert on_fake.server.told(UPDATES)[-1]["flush_cache"] is (mode == "retract")
    (sample,) = running
    assert [version for _, version in sample.version_spans] == [0, 2]


def test_prefixes_of_older_weights_are_never_reused(connect: Connect, checkpoints: Checkpoints) -> None:
    on_fake = connect()
    on_fake.generate(3)
    on_fake.push(push_of(checkpoints.target_weights(), 1))
    on_fake.generate(3)
    before, after = (body["extra_key"] for body in on_fake.server.told("/generate"))
    assert before != after


def test_messages_outside_a_push_are_refused_and_a_cancelled_push_leaves_nothing(
    connect: Connect, checkpoints: Checkpoints
) -> None:
    on_fake = connect()
    for message in (PreparePush(1, ""), CommitPush(1, "")):
        with pytest.raises(PushError, match="outside a push"):
            on_fake.engine.update_weights(message)
    begin, bucket, *_ = push_of(checkpoints.target_weights(), 1)
    on_fake.engine.update_weights(begin)
    on_fake.engine.update_weights(bucket)
    assert on_fake.engine.update_weights(CancelPush(1)).version == 0
    assert on_fake.server.told(UPDATES) == []


def test_an_update_from_disk_is_refused_where_the_draft_has_its_own_weights(
    connect: Connect, checkpoints: Checkpoints, config: Config
) -> None:
    with pytest.raises(PushError, match="the server dies of it"):
        connect(transport="disk").push(push_of(checkpoints.target_weights(), 1))
    plain = connect(base=replace(config, speculative=SpeculativeConfig(algorithm="NGRAM")), transport="disk")
    plain.push(push_of(checkpoints.target_weights(), 4))
    (body,) = plain.server.told("/update_weights_from_disk")
    assert body["weight_version"] == "4"
    assert {"config.json", "model.safetensors"} <= set(body["files"])
    assert not Path(body["model_path"]).exists()


def test_mtp_layers_in_a_target_push_go_to_the_draft_side(connect: Connect, config: Config, tmp_path: Path) -> None:
    folder = make_tiny_mimo(tmp_path / "mimo", vocab_size=257, num_hidden_layers=4)
    mimo = replace(
        config,
        model=replace(config.model, hf_checkpoint=str(folder)),
        speculative=SpeculativeConfig(algorithm="NEXTN"),
    )
    weights = load_file(folder / "model.safetensors")
    on_fake = connect(base=mimo)
    on_fake.push(push_of(weights, 1))
    assert on_fake.server.told("/begin_weight_update") == [{"selector": "target"}, {"selector": "draft"}]
    assert on_fake.server.weight_version == "1"
    assert on_fake.server.session is None
    without = {name: tensor for name, tensor in weights.items() if "mtp" not in name}
    on_fake.push(push_of(without, 2))
    assert [body["selector"] for body in on_fake.server.told("/begin_weight_update")] == ["target", "draft", "target"]


def test_a_tied_head_need_not_be_pushed(connect: Connect, config: Config, tmp_path: Path) -> None:
    folder = make_target(tmp_path / "tied", tie_word_embeddings=True)
    tied = replace(
        config, model=replace(config.model, hf_checkpoint=str(folder)), speculative=SpeculativeConfig(algorithm="NGRAM")
    )
    weights = {name: t for name, t in load_file(folder / "model.safetensors").items() if name != "lm_head.weight"}
    assert connect(base=tied).push(push_of(weights, 1)).version == 1


def test_tensor_handles_need_the_same_torch() -> None:
    check_torch(torch.__version__.partition("+")[0])
    check_torch(None)
    with pytest.raises(ConfigError, match="transport distributed"):
        check_torch("2.9.1")


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_other_values_in_the_server_fail_the_verification(
    connect: Connect, checkpoints: Checkpoints, num_replicas: int
) -> None:
    on_fake, weights = connect(), checkpoints.target_weights()
    shown = {name: tensor[:2].tolist() for name, tensor in weights.items()}
    on_fake.server.rows = {name: rows if num_replicas == 1 else [rows] * num_replicas for name, rows in shown.items()}
    assert on_fake.push(push_of(weights, 1), verify=True).verified
    first = next(iter(weights))
    shown[first][0][0] += 1.0
    with pytest.raises(PushError, match=f"other values of {first}"):
        on_fake.push(push_of(weights, 2), verify=True)


def test_projections_that_sglang_cuts_out_wrongly_are_not_asked_for(connect: Connect, checkpoints: Checkpoints) -> None:
    """It takes hidden_size / num_attention_heads for a head's size, whatever config.json says."""
    on_fake, weights = connect(), checkpoints.target_weights()
    kv = {name: tensor for name, tensor in weights.items() if ".k_proj." in name or ".v_proj." in name}
    wrong = {name: torch.zeros_like(tensor[:2]).tolist() for name, tensor in kv.items()}
    on_fake.server.rows = {name: tensor[:2].tolist() for name, tensor in weights.items()} | wrong
    assert kv
    assert on_fake.push(push_of(weights, 1), verify=True).verified


def test_weights_that_the_server_does_not_show_are_not_called_verified(
    connect: Connect, checkpoints: Checkpoints
) -> None:
    on_fake = connect()
    assert on_fake.server.rows == {}
    assert not on_fake.push(push_of(checkpoints.target_weights(), 1), verify=True).verified
