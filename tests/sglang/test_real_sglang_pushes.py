"""Pushes into the real SGLang, each transport: exactly the named side changes, a lost draft is noticed and mended."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from rollout.sglang_engine.client import ServerRefused
from slime_spec.errors import ConfigError, PushError
from slime_spec.sglang.served import DECISIVE, differences
from slime_spec.transports.server_group import ServerGroupTransport
from slime_spec.transports.server_ipc import ServerIpcTransport
from slime_spec.transports.to_servers import ToServers
from slime_spec.types import GeneratedSample
from slime_spec.weights.messages import Side
from slime_spec.weights.run import push_messages, run_push
from tests.support.pushes import disturbed
from tests.support.sglang_real import Models, Real, cpu_environment, greedy, on, started
from tests.support.slime_way import SlimeClient, Stored

pytestmark = [pytest.mark.long, pytest.mark.sglang_server]

NUM_TOKENS = 40
# Tensors that a draft shares with its target, so that the target's push changes them too.
SHARED = ("embed_tokens", "lm_head")
# Biases that most of these drafts do not have, tables of positions, and a reduced vocabulary's.
NOT_PUSHED = ("proj.bias", "rotary", "cos_sin", "d2t", "hot_token")
Sums = Mapping[str, str]


def changed(before: Sums, after: Sums) -> set[str]:
    assert before
    return {name for name, checksum in after.items() if checksum != before[name]}


def without(names: Mapping[str, object] | set[str], *parts: str) -> set[str]:
    return {name for name in names if not any(part in name for part in parts)}


@pytest.mark.parametrize("way", ["tensors", "disk"])
@on("EAGLE")
def test_beside_the_plug_in_a_client_that_names_no_side_updates_the_target_alone(
    real: Real, tmp_path: Path, way: str
) -> None:
    """As slime does; tests/sglang/test_plugin_real.py has every release and algorithm."""
    slime, stored = SlimeClient(real.engine.client.url), Stored.make(real.target_folder, tmp_path / "other")
    target, draft, drafted = real.checksums("target"), real.checksums("draft"), slime.drafted()
    slime.update(way, stored.other)
    assert changed(target, real.checksums("target")) == without(target, "rotary", "cos_sin")
    assert without(changed(draft, real.checksums("draft")), *SHARED) == set()
    assert slime.session()["is_open"] is False
    slime.update(way, stored.first)
    assert (real.checksums("target"), real.checksums("draft")) == (target, draft)
    assert slime.drafted() == drafted


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
@on("STANDALONE", "EAGLE", "EAGLE3", "NEXTN")
def test_a_push_changes_exactly_the_side_that_it_names(real: Real, transport: str) -> None:
    with real.another(transport=transport) as engine:
        target, draft = real.checksums("target"), real.checksums("draft")
        engine.push(engine.other_target(), 1, verify=True)
        assert changed(target, real.checksums("target")) == without(target, "rotary", "cos_sin")
        assert without(changed(draft, real.checksums("draft")), *SHARED) == set()
        target, draft = real.checksums("target"), real.checksums("draft")
        engine.push(disturbed(engine.draft_weights, 2), 2, "draft", verify=True)
        assert without(changed(target, real.checksums("target")), *SHARED) == set()
        assert without(draft, *SHARED, *NOT_PUSHED) <= changed(draft, real.checksums("draft"))
        assert {sample.weight_version for sample in engine.generate(4)} == {1}


@pytest.mark.parametrize("way", [ServerGroupTransport, ServerIpcTransport])
@on("STANDALONE", "EAGLE3", "NEXTN")
def test_a_push_straight_from_the_trainer_leaves_in_the_server_what_a_push_through_the_engine_leaves(
    real: Real, way: type[ToServers]
) -> None:
    other, draft = real.other_target(), disturbed(real.draft_weights, 2)
    real.push(other, 1)
    real.push(draft, 1, "draft")
    target_sums, draft_sums = real.checksums("target"), real.checksums("draft")
    transport = way(ranks_per_server=1)
    with real.another(to_server=way(ranks_per_server=1)) as engine:
        assert changed(target_sums, real.checksums("target"))

        def push(weights: dict[str, torch.Tensor], version: int, side: Side = "target") -> None:
            messages = push_messages(weights, version, side, 200_000, transport)
            run_push(messages, lambda each: [engine.engine.update_weights(each)], verify=True)

        push(engine.target_weights, 2)
        push(other, 3)
        assert real.checksums("target") == target_sums
        push(draft, 4, "draft")
        assert (real.checksums("target"), real.checksums("draft")) == (target_sums, draft_sums)
        assert {(sample.weight_version, sample.draft_version) for sample in engine.generate(4)} == {(3, 4)}
    transport.close()


@on("EAGLE3")
def test_a_bucket_that_the_server_refuses_ends_a_distributed_push_at_once(real: Real) -> None:
    """It never joins the broadcast, which would wait for it until a timeout."""
    with real.another(transport="distributed") as engine:
        loop, client = engine.engine.server.loop, engine.engine.client
        transport = engine.engine.weights.delivery._transport
        loop.call(transport.open(client))
        with pytest.raises(ServerRefused, match="begin_weight_update"):
            loop.call(transport.send(client, list(engine.target_weights.items()), {"selector": "target"}))
        loop.call(transport.close(client))
        engine.push(engine.other_target(), 3, verify=True)
        assert {sample.weight_version for sample in engine.generate(4)} == {3}


@on("NONE", "NGRAM", "NEXTN")
def test_an_update_from_disk_brings_what_tensors_bring(real: Real) -> None:
    real.push(real.other_target(), 4)
    sums, samples = real.checksums("target"), real.generate(NUM_TOKENS)
    real.reset()
    draft = real.checksums("draft") if real.algorithm == "NEXTN" else {}
    assert changed(real.checksums("target"), sums)
    with real.another(transport="disk") as engine:
        engine.push(engine.other_target(), 5, verify=True)
        assert real.checksums("target") == sums
        again = engine.generate(NUM_TOKENS)
        assert [sample.token_ids for sample in again] == [sample.token_ids for sample in samples]
        assert {sample.weight_version for sample in again} == {5}
        if draft:
            assert without(changed(draft, real.checksums("draft")), *SHARED) == set()


@on("EAGLE3")
def test_an_update_from_disk_that_would_kill_the_server_never_reaches_it(real: Real) -> None:
    before = real.checksums("target"), real.checksums("draft")
    with real.another(mode="rollout_only", transport="disk") as engine:
        with pytest.raises(PushError, match="loads the policy into the draft too"):
            engine.push(engine.other_target(), 6)
        assert (real.checksums("target"), real.checksums("draft")) == before
        assert {sample.weight_version for sample in engine.generate(4)} == {0}


@on("STANDALONE")
def test_a_draft_overwritten_by_others_is_noticed_after_a_push_and_sent_again(
    real: Real, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = real.accepted_per_round()
    with real.another(canary_prompts=3) as engine:
        engine.generate(4)  # whose prompts the canary keeps
        engine.push(engine.target_weights, 1)
        engine.push(engine.draft_weights, 1, "draft")
        assert "ALARM" not in caplog.text
        real.push(disturbed(real.draft_weights, 3), 9, "draft")
        assert engine.accepted_per_round() < 0.5 * fresh
        engine.push(engine.target_weights, 2)
        assert engine.accepted_per_round() == fresh
        assert "ALARM the draft was changed" in caplog.text
        assert engine.engine.stats().num_draft_resends == 1
        assert engine.engine.stats().speculates


@on("NONE")
def test_a_server_that_outlives_its_run_computes_the_next_runs_samples_with_its_weights_alone(
    real: Real, tmp_path: Path
) -> None:
    """Cases sglang/04-external: both runs push their version 1 in place, which keeps what the server has cached.

    The right logprobs are transformers', which has no cache of an earlier run.
    """
    with real.another() as first:
        first.push(first.other_target(seed=1), 1, pause_mode="in_place")
        theirs = first.generate(NUM_TOKENS)
        with real.another() as second:
            assert logprobs(second.generate(NUM_TOKENS)) == near(second.target_weights, real, tmp_path / "adopted")
            other = second.other_target(seed=2)
            second.push(other, 1, pause_mode="in_place")
            samples = second.generate(NUM_TOKENS)
            assert logprobs(samples) == near(other, real, tmp_path / "pushed")
            assert {sample.weight_version for sample in samples} == {1}
            assert [sample.token_ids for sample in samples] != [sample.token_ids for sample in theirs]


def logprobs(samples: list[GeneratedSample]) -> list[float]:
    return [logprob for sample in samples for logprob in sample.logprobs]


def near(weights: dict[str, torch.Tensor], real: Real, folder: Path) -> Any:
    """The logprobs of greedy decoding with these weights in transformers."""
    shutil.copytree(real.config.model.hf_checkpoint, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return pytest.approx([logprob for _, found in greedy(folder, NUM_TOKENS) for logprob in found], abs=2e-4)


@on("NONE")
def test_rollouts_alone_are_made_on_proved_weights_only(real: Real) -> None:
    """Case sglang/04-external: the server still has what somebody pushed, or is at the checkpoint's weights again."""
    real.push(real.other_target(), 7)
    with pytest.raises(ConfigError, match="it has other values of"), real.another(mode="rollout_only"):
        pass
    real.push(real.target_weights, 8)
    before = real.checksums("target")
    with real.another(mode="rollout_only") as engine:
        assert real.checksums("target") == before
        assert {sample.weight_version for sample in engine.generate(4)} == {0}


@on("EAGLE3", "NEXTN")
def test_a_run_that_trains_brings_an_external_server_to_its_checkpoints(real: Real) -> None:
    target, draft = real.checksums("target"), real.checksums("draft")
    real.push(real.other_target(), 7)
    real.push(disturbed(real.draft_weights, 3), 7, "draft")
    assert (real.checksums("target"), real.checksums("draft")) != (target, draft)
    with real.another():
        assert (real.checksums("target"), real.checksums("draft")) == (target, draft)


@on("EAGLE3")
def test_what_a_real_server_reports_of_itself_is_compared_with_the_run(real: Real) -> None:
    """Nothing differs from the run that started it; each of its flags that bends samples is compared."""
    reported = real.engine.server.loop.call(real.engine.client.get("/server_info"))
    assert not [each for each in differences(real.config, 0, reported) if each.is_decisive]
    assert set(DECISIVE) <= reported.keys()
    halved = replace(real.config, engine=replace(real.config.engine, dtype="float16"))
    deeper = replace(real.config, speculative=replace(real.config.speculative, num_steps=5))
    for config, dest in ((halved, "dtype"), (deeper, "speculative_num_steps")):
        assert [each.dest for each in differences(config, 0, reported) if each.is_decisive] == [dest]


@pytest.mark.parametrize(
    ("path", "signal_number"),
    [("/model_info", signal.SIGKILL), ("/end_weight_update", signal.SIGSTOP)],
    ids=["killed-after-the-delivery", "hangs-in-the-delivery"],
)
@on("STANDALONE")
def test_a_push_whose_server_is_lost_within_the_commit_is_on_its_successor(
    real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, signal_number: int
) -> None:
    """Cases sglang/02-dies-in-commit and sglang/01-hang; tests/sglang/test_fault_points.py has every call, on fakes."""
    client, supervisor, other = real.engine.client, real.engine.server.supervisor, real.other_target(seed=4)
    assert supervisor is not None
    asked, num_replaced = client._call, supervisor.num_replaced
    lost: list[str] = []

    async def call(method: str, called: str, body: Any, timeout_s: float) -> Any:
        if called == path and not lost:
            lost.append(called)
            process = supervisor.server._process
            assert process is not None
            for child in psutil.Process(process.pid).children(recursive=True):
                child.send_signal(signal_number)
            timeout_s = 5.0
        return await asked(method, called, body, timeout_s)

    monkeypatch.setattr(client, "_call", call)
    real.push(real.draft_weights, 5, "draft")
    assert real.push(other, 5, verify=True).verified
    assert (lost, supervisor.num_replaced) == ([path], num_replaced + 1)
    samples = real.generate(NUM_TOKENS)
    assert logprobs(samples) == near(other, real, tmp_path / "pushed")
    assert {(sample.weight_version, sample.draft_version) for sample in samples} == {(5, 5)}


@on("STANDALONE")
def test_a_draft_lost_in_an_offload_is_sent_again(real: Real, caplog: pytest.LogCaptureFixture) -> None:
    fresh = real.accepted_per_round()
    with real.another() as engine:
        engine.push(engine.draft_weights, 1, "draft")
        engine.engine.set_resident(False)
        real.push(disturbed(real.draft_weights, 3), 9, "draft")
        engine.engine.set_resident(True)
        assert "ALARM the draft did not survive" in caplog.text
        assert engine.accepted_per_round() == fresh


def test_speculation_is_given_up_under_alarm_where_no_draft_fits(
    models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server of its own, which ends without speculation: a target is pushed, and the draft stays the old one."""
    config = models.config("STANDALONE", tmp_path / "run", canary_prompts=3)
    with cpu_environment(), started(config) as engine:
        real = Real("STANDALONE", engine)
        real.generate(4)
        real.push(real.target_weights, 1)
        assert "ALARM" not in caplog.text
        other = real.other_target()
        shutil.copytree(models.target, tmp_path / "other")
        save_file(other, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
        real.push(other, 2, verify=True)
        assert "ALARM drafts are refused" in caplog.text
        assert "ALARM speculation is disabled" in caplog.text
        assert (engine.stats().speculates, engine.stats().num_restarts) == (False, 1)
        samples = real.generate(NUM_TOKENS)
        assert [sample.token_ids for sample in samples] == [ids for ids, _ in greedy(tmp_path / "other", NUM_TOKENS)]
        assert {(sample.weight_version, sample.draft_version, sample.spec.num_rounds) for sample in samples} == {
            (2, None, 0)
        }
        real.push(other, 3, "draft", verify=True)  # kept for a server that would speculate
        real.push(real.target_weights, 3, verify=True)
        assert {sample.weight_version for sample in real.generate(4)} == {3}
