"""``slime-spec tune`` on two real servers: one that drafts with the target itself, and one that does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slime_spec.bench.tune.server_settings import server_settings
from slime_spec.bench.tune.server_sweep import ServerPlan, sweep_servers
from slime_spec.bench.tune.verdict import verdict_of
from slime_spec.bench.tune.workload import KnownPrompt, Workload
from slime_spec.types import SamplingParams
from tests.support.sglang_real import PROMPTS, Models, cpu_environment

pytestmark = pytest.mark.sglang_server

PLAN = ServerPlan((1, 4), num_repetitions=2, seconds=10.0, time="cpu_s", assumed_lengths=(3.0,))


def test_two_real_servers_take_turns_and_say_what_a_draft_brings(models: Models, tmp_path: Path) -> None:
    """The draft is the target, which SGLang shows all but the first token of a text; nothing is asked of its speed."""
    config = models.config("NONE", tmp_path)
    rollout = replace(config.rollout, temperature=0.0, max_prompt_len=64, max_response_len=64)
    config = replace(config, rollout=rollout)
    workload = Workload(tuple(map(KnownPrompt, PROMPTS)), SamplingParams(16, temperature=0.0, ignore_eos=True), 1)
    with cpu_environment():
        judged = server_settings(config, frozenset(), [str(models.target)], is_quick=True)
        assert [each.name for each in judged.settings] == [
            "NGRAM, 4 tokens",
            "STANDALONE target, 3 drafts, target_only",
        ]
        draft = replace(judged, settings=judged.settings[1:])
        found = sweep_servers(config, draft, PLAN, workload, tmp_path)
    (acceptance,) = found.acceptance
    assert acceptance.gained is not None
    assert acceptance.gained == pytest.approx(sum(acceptance.cumulative))
    assert 0.1 < acceptance.gained <= 3.0, found
    assert acceptance.num_tried[0] > 0
    assert all(0.0 <= rate <= 1.0 for rate in acceptance.rates)
    assert not found.left_out
    for batch in found.batches:
        (rounds,) = batch.rounds.values()
        assert rounds.accept_length is not None
        assert 1.0 < rounds.accept_length <= rounds.most == 4, found
        assert rounds.break_even is not None
        assert rounds.break_even > 0.0
        assert all(len(each.each) == 2 for each in batch.speed_ups.values())
        assert batch.assumed[0][0] == 3.0
        verdict = verdict_of(batch)
        assert verdict.why or verdict.flags[:2] == ("--speculative-algorithm", "STANDALONE")
