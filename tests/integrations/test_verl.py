"""verl's rollouts are counted by the manager class that its configuration names."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from slime_spec.integrations import verl

LOADED = "slime_spec.integrations.verl.AgentLoopManager"


class Section(SimpleNamespace):
    """A part of verl's configuration, which is read by attribute and by ``get``."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def answer(rounds: int, correct: int, version: str) -> dict[str, Any]:
    meta = {"spec_verify_ct": rounds, "spec_num_correct_drafts": correct, "spec_num_proposed_drafts": 3 * rounds}
    meta |= {"completion_tokens": rounds + correct, "weight_version": version, "finish_reason": {"type": "stop"}}
    return {"output_ids": [1, 2], "meta_info": {**meta, "spec_correct_drafts_histogram": [rounds - correct, correct]}}


def manager_of(answers: list[dict[str, Any]], name: str = "sglang") -> Any:
    module, _, attribute = LOADED.rpartition(".")
    assert module == verl.__name__
    rollout = Section(name=name, answers=answers, engine_kwargs={"sglang": {"speculative_algorithm": "EAGLE"}})
    return getattr(verl, attribute)(config=Section(actor_rollout_ref=Section(rollout=rollout)))


def prompts(num: int, **meta_info: Any) -> Any:
    return SimpleNamespace(ids=[[7]] * num, meta_info=meta_info)


def test_a_steps_acceptance_is_that_of_its_servers_answers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int | None, dict[str, float]]] = []
    monkeypatch.setattr(verl, "report", lambda step, metrics: logged.append((step, dict(metrics))))
    manager = manager_of([answer(4, 3, "1"), answer(2, 0, "1"), answer(4, 4, "2"), answer(1, 1, "2")])
    assert manager.generate_sequences(prompts(2, global_steps=5)) == [[1, 2], [1, 2]]
    manager.generate_sequences(prompts(1, global_steps=6))
    manager.generate_sequences(prompts(1, global_steps=6, validate=True))
    assert [step for step, _ in logged] == [5, 6, None]
    first, second, _ = (metrics for _, metrics in logged)
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
