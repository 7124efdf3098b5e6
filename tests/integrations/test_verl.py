"""verl's rollouts are counted by the manager class that its configuration names."""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from verl.experimental.agent_loop import agent_loop
from verl.workers.rollout import replica
from verl.workers.rollout.sglang_rollout import async_sglang_server

from slime_spec.errors import ConfigError
from slime_spec.integrations import verl, verl_servers
from slime_spec.integrations.tally import Tally

LOADED = "slime_spec.integrations.verl.AgentLoopManager"


class Section(SimpleNamespace):
    """A part of verl's configuration, which is read by attribute and by ``get``."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(verl_servers, "REPLICAS", replicas := [])
    monkeypatch.setattr(verl, "REPLICAS", replicas)
    monkeypatch.setattr(replica.RolloutReplicaRegistry, "_registry", {"sglang": replica._load_sglang})
    yield
    verl._manager.cache_clear()
    verl_servers.counting_replica.cache_clear()


def answer(rounds: int, correct: int, version: str) -> dict[str, Any]:
    meta = {"spec_verify_ct": rounds, "spec_num_correct_drafts": correct, "spec_num_proposed_drafts": 3 * rounds}
    meta |= {"completion_tokens": rounds + correct, "weight_version": version, "finish_reason": {"type": "stop"}}
    return {"output_ids": [1, 2], "meta_info": {**meta, "spec_correct_drafts_histogram": [rounds - correct, correct]}}


def loaded() -> Any:
    module, _, attribute = LOADED.rpartition(".")
    assert module == verl.__name__
    return getattr(verl, attribute)


def config_of(answers: list[dict[str, Any]], name: str = "sglang", algorithm: str = "EAGLE") -> Section:
    rollout = Section(name=name, answers=answers, engine_kwargs={"sglang": {"speculative_algorithm": algorithm}})
    return Section(actor_rollout_ref=Section(rollout=rollout), trainer=Section())


def manager_of(answers: list[dict[str, Any]], name: str = "sglang") -> Any:
    return loaded()(config=config_of(answers, name))


def prompts(num: int, **meta_info: Any) -> Any:
    return SimpleNamespace(ids=[[7]] * num, meta_info=meta_info)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, dict[str, float]]]:
    """What is reported, in order."""
    made: list[tuple[int | None, dict[str, float]]] = []
    monkeypatch.setattr(verl, "report", lambda step, metrics: made.append((step, dict(metrics))))
    return made


def test_a_steps_acceptance_is_that_of_its_servers_answers(
    steps: list[tuple[int | None, dict[str, float]]],
) -> None:
    manager = manager_of([answer(4, 3, "1"), answer(2, 0, "1"), answer(4, 4, "2"), answer(1, 1, "2")])
    assert manager.generate_sequences(prompts(2, global_steps=5)) == [[1, 2], [1, 2]]
    manager.generate_sequences(prompts(1, global_steps=6))
    manager.generate_sequences(prompts(1, global_steps=6, validate=True))
    assert [step for step, _ in steps] == [5, 6, None]
    first, second, _ = (metrics for _, metrics in steps)
    assert first["rollout/spec_accept_rate"] == 3 / 18
    assert first["rollout/spec_accept_length"] == 9 / 6
    assert first["spec/accept_rate_pos_0"] == 3 / 6
    assert second["rollout/spec_accept_length"] == 8 / 4


def test_a_step_is_told_of_in_the_log_and_beside_what_verl_logs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    beside: dict[int, Any] = {}
    monkeypatch.setattr("slime_spec.metrics.wandb.log_beside", beside.__setitem__)
    manager_of([answer(4, 3, "1")]).generate_sequences(prompts(1, global_steps=5))
    assert beside[5]["rollout/spec_accept_length"] == 7 / 4
    assert "acceptance of the rollout step=5" in caplog.text
    assert "rollout/spec_accept_length=1.7500" in caplog.text


def test_rounds_that_nobody_can_read_are_an_alarm(caplog: pytest.LogCaptureFixture) -> None:
    odd = answer(3, 1, "1")
    odd["meta_info"] = {"spec_verify_ct": 3, "spec_hits": 1, "finish_reason": {"type": "stop"}}
    manager_of([odd]).generate_sequences(prompts(1, global_steps=1))
    assert "ALARM acceptance is not known" in caplog.text


def test_other_engines_are_left_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    manager = manager_of([answer(1, 1, "1")], name="vllm")
    assert manager.generate_sequences(prompts(1)) == [[1, 2]]
    assert "acceptance is counted on SGLang alone rollout=vllm" in caplog.text
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = verl.Other


def test_a_manager_that_is_awaited_counts_for_callers_that_await_and_that_do_not(
    steps: list[tuple[int | None, dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_loop, "AgentLoopManager", agent_loop.AwaitedManager)
    manager = loaded().create(config_of([answer(4, 3, "1"), answer(2, 0, "1"), answer(4, 4, "2")]), worker_group=None)
    assert manager.generate_sequences(prompts(2, global_steps=5)) == [[1, 2], [1, 2]]

    async def awaits() -> Any:
        return await manager.generate_sequences(prompts(1, global_steps=6))

    assert asyncio.run(awaits()) == [[1, 2]]
    assert [step for step, _ in steps] == [5, 6]
    assert [metrics["rollout/spec_accept_length"] for _, metrics in steps] == [9 / 6, 8 / 4]


def client_of(config: Section, **kind: bool) -> Any:
    """What verl's LLMServerManager does before a manager is made, with one server."""
    made = replica.RolloutReplicaRegistry.get("sglang")(0, config.actor_rollout_ref.rollout, None, **kind)
    made.launch_servers()
    return made._server_handle


def register() -> None:
    """What verl does with VERL_USE_EXTERNAL_MODULES, as it is imported."""
    sys.modules.pop("slime_spec.integrations.verl_register", None)
    importlib.import_module("slime_spec.integrations.verl_register")


def test_servers_that_run_already_count_where_they_were_registered(
    steps: list[tuple[int | None, dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_loop, "AgentLoopManager", agent_loop.ClientManager)
    config = config_of([answer(4, 3, "1"), answer(2, 0, "1"), answer(4, 4, "2")])
    register()
    client_of(config, is_reward_model=True)
    client_of(config, is_teacher_model=True)
    manager = loaded().create(config=config, llm_client=client_of(config))
    assert manager.generate_sequences(prompts(2, global_steps=5)) == [[1, 2], [1, 2]]
    manager.generate_sequences(prompts(1, global_steps=5, validate=True))
    assert [step for step, _ in steps] == [5, None]
    assert [metrics["rollout/spec_accept_length"] for _, metrics in steps] == [9 / 6, 8 / 4]


def test_a_step_of_batches_that_are_only_begun_is_told_of_when_another_begins(
    steps: list[tuple[int | None, dict[str, float]]],
) -> None:
    config = config_of([answer(4, 3, "1"), answer(2, 0, "1"), answer(4, 4, "2"), answer(5, 1, "2")])
    register()
    manager = verl.AgentLoopManagerTQ.create(config=config, llm_client=client_of(config))

    def begin(num: int, **beside: Any) -> None:
        manager.generate_sequences({"ids": [[7]] * num, **beside})
        for each in manager.running:
            each.get()
        manager.running.clear()

    begin(1, global_steps=0, validate=True)
    begin(1, global_steps=1)
    begin(1, global_steps=1)  # as filters make a trainer do
    begin(1, global_steps=2)
    assert [step for step, _ in steps] == [None, 1]
    assert [metrics["rollout/spec_accept_length"] for _, metrics in steps] == [7 / 4, (2 + 8) / (2 + 4)]


def test_servers_that_run_already_and_do_not_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of([])
    with pytest.raises(ConfigError, match=r"Export VERL_USE_EXTERNAL_MODULES=slime_spec\.integrations"):
        verl.AgentLoopManagerTQ.create(config=config, llm_client=client_of(config))
    other = config_of([answer(1, 1, "1")], name="vllm")
    left_alone = verl.AgentLoopManagerTQ.create(config=other, llm_client=client_of(other))
    left_alone.generate_sequences({"ids": [[7]]})
    assert [each.get() for each in left_alone.running] == [[1, 2]]


def test_a_manager_for_another_trainer_or_another_verl_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_loop, "AgentLoopManager", agent_loop.ClientManager)
    config = config_of([])
    config.trainer = Section(use_v1=True)
    with pytest.raises(ConfigError, match=r"Name slime_spec\.integrations\.verl\.AgentLoopManagerTQ"):
        loaded().create(config=config, llm_client=None)
    monkeypatch.delattr("verl.trainer.ppo.v1.AgentLoopManagerTQ")
    with pytest.raises(ConfigError, match=r"agent_loop_manager_class: serves verl from f104dfafb .* 1dda039b9"):
        _ = verl.AgentLoopManagerTQ
    verl._manager.cache_clear()
    monkeypatch.setattr(agent_loop, "AgentLoopManager", object)
    with pytest.raises(ConfigError, match="given neither its workers nor a client of its servers"):
        loaded()


def test_a_verl_whose_servers_are_actors_from_the_first_is_refused_before_it_launches_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in v0.7.0, with Ray's own decorator."""
    actors = ray.remote(async_sglang_server.SGLangHttpServer)
    monkeypatch.setattr(async_sglang_server, "SGLangHttpServer", actors)
    with pytest.raises(ConfigError, match=r"verl from f104dfafb .*this verl's is one already"):
        manager_of([])


def test_an_algorithm_is_known_by_every_name_that_sglang_takes() -> None:
    odd_padding = {"spec_verify_ct": 2, "spec_accepted_drafts": 1, "spec_proposed_drafts": 6, "completion_tokens": 4}
    for name in ("ngram", "NGRAM"):
        assert verl.measured([odd_padding], name)["spec/drafted_tokens"] == 0.0  # a round may be padded
    for name in ("eagle", "EAGLE"):
        assert verl.measured([odd_padding], name)["spec/drafted_tokens"] == 6.0


def test_a_tally_is_as_large_after_many_answers_as_after_a_few_and_loses_nothing() -> None:
    answers = [answer(4, 3, "1"), answer(2, 0, "1"), answer(4, 4, "2")] * 50
    for each in answers:  # with SGLang's plug-in: the prefill, the rounds, and here one plain step more
        each["meta_info"]["iter_count"] = each["meta_info"]["spec_verify_ct"] + 2
    no_round = {"finish_reason": {"type": "length"}, "weight_version": "2", "completion_tokens": 7}
    tally = Tally()
    for each in [*answers, {"meta_info": no_round}, {"meta_info": {**no_round, "finish_reason": None}}]:
        tally.note(each)
    taken = tally.take()
    assert len(taken) == 3  # version 1, version 2, version 2 without rounds
    assert sum(each["completion_tokens"] for each in taken) == 50 * (7 + 2 + 8) + 7
    assert tally.take() == []
    one_by_one = verl.measured([each["meta_info"] for each in answers], "EAGLE")
    assert verl.measured(taken, "EAGLE") == one_by_one
    assert one_by_one["spec/off_ratio"] == 3 / (3 + 10)
