"""Sequences may start to draft, stop and start again: their drafts are those of sequences that always drafted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollout.embedded import speculation
from rollout.embedded.calibrate import calibrate
from rollout.embedded.core import GenerationCore
from slime_spec.config.speculative import UNQUANTIZED
from slime_spec.config.tree import Config
from slime_spec.speculation.controller import Controller, RoundPlan, RowState
from slime_spec.speculation.round_costs import PassCurve, RoundCosts
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.draft_formats import BLOCK_FORMATS, FORMATS, TinyDraft, make_format
from tests.support.embedded_harness import Samples, continuation, make_core, random_prompt, run
from tests.support.recording_drafter import RecordingDrafter

PROMPTS = [random_prompt(1 + 5 * i, seed=i) for i in range(5)]
NUM_TOKENS = 40


class Moody(Controller):
    """Decides at random who drafts, and how deep: some sequences for the first time when they are nearly done."""

    def __init__(self, seed: int, max_depth: int) -> None:
        super().__init__(RoundCosts(PassCurve(((1, 1.0),))), max_depth)
        self._rng = random.Random(seed)
        self.num_rounds = 0

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        self.num_rounds += 1
        nobody = self.num_rounds < 20 and self.num_rounds % 7
        depths = (min(self._rng.choice((0, 0, 1, 2, 3)), row.max_depth) for row in rows)
        return RoundPlan(tuple(0 if nobody else depth for depth in depths))

    def again(self, limits: Sequence[int]) -> RoundPlan | None:
        return None


def requests(temperature: float = 0.8) -> list[GroupRequest]:
    params = SamplingParams(max_new_tokens=NUM_TOKENS, temperature=temperature)
    return [GroupRequest(str(i), prompt, tuple(range(1 + i % 3)), params) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(params=[*FORMATS, *BLOCK_FORMATS], scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return make_format(tmp_path_factory.mktemp("format"), request.param)


def automatic(config: Config) -> Config:
    """Let a controller decide how deep to draft, with the same drafts as where the depth is fixed."""
    same = {"history": False, "draft_model_quantization": UNQUANTIZED}
    numbers = {"num_steps": None, "eagle_topk": None, "num_draft_tokens": None}
    return replace(config, speculative=replace(config.speculative, **numbers, **same))


def recorded(core: GenerationCore, samples: Samples) -> RecordingDrafter:
    """Watch the core's drafter; the core is given what the samples really say, so that drafts are accepted."""
    recorder = RecordingDrafter(core.drafter, continuation(samples, PROMPTS))
    core.speculation.drafter = recorder  # type: ignore[assignment]
    return recorder


def drafts_of(recorder: RecordingDrafter) -> dict[tuple[int, ...], tuple[int, ...]]:
    return {each.token_ids: each.draft.token_ids for each in recorder.proposals}


@pytest.mark.parametrize("seed", range(3))
def test_late_drafts_are_those_of_a_sequence_that_always_drafted(tiny: TinyDraft, seed: int) -> None:
    plain = run(make_core(tiny.plain), requests())
    always = make_core(tiny.config(1, 1, 2))  # a draft of one token after every token that plain decoding has
    always_drafts = recorded(always, plain)
    always_drafts._script = lambda context: ()
    assert tokens(run(always, requests())) == tokens(plain)

    core = make_core(automatic(tiny.config(3, 1, 4)))
    recorder = recorded(core, plain)
    core.speculation.controller = Moody(seed, core.speculation.shape.num_steps)
    samples = run(core, requests())
    assert tokens(samples) == tokens(plain)
    expected, late = drafts_of(always_drafts), drafts_of(recorder)
    assert len(late) > 20
    compared = [(draft[:1], expected[prefix][:1]) for prefix, draft in late.items() if prefix in expected]
    assert len(compared) == len(late)
    assert all(ours == theirs for ours, theirs in compared)
    for sample in samples.values():
        spec = sample.spec
        made = 1 + spec.num_off_steps + spec.num_rounds + spec.num_correct
        assert made >= len(sample.token_ids) == NUM_TOKENS or sample.finish_reason == "stop"
    assert sum(sample.spec.num_off_steps for sample in samples.values()) > 50
    assert sum(sample.spec.num_correct for sample in samples.values()) > 20


def tokens(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


def test_what_waits_for_the_drafter_is_read_before_it_takes_too_much_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_format(tmp_path, "eagle3")
    plain = run(make_core(tiny.plain), requests())
    core = make_core(automatic(tiny.config(3, 1, 4)))
    recorder = recorded(core, plain)
    bound = 12 * core.target.feature_bytes
    monkeypatch.setattr(speculation, "MOST_WAITING_BYTES", bound)
    most = 0

    class Watched(Moody):
        def plan(self, rows: Sequence[RowState]) -> RoundPlan:
            nonlocal most
            most = max(most, sum(row.backlog for row in rows))
            return super().plan(rows)

    core.speculation.controller = Watched(0, 3)
    assert tokens(run(core, requests())) == tokens(plain)
    assert recorder.proposals
    # Each round every sequence adds at most four tokens, and the longest waiting quarter is read at once.
    assert 0 < most < NUM_TOKENS * 2


def test_a_prompt_that_the_drafter_has_not_read_is_weighed_before_the_first_draft(tmp_path: Path) -> None:
    """It is read with the first draft of any of the group's sequences, which share its cost."""
    backlogs: list[tuple[int, ...]] = []

    class Third(Moody):
        """Drafts in the third round alone."""

        def plan(self, rows: Sequence[RowState]) -> RoundPlan:
            backlogs.append(tuple(row.backlog for row in rows))
            return RoundPlan((1 if len(backlogs) == 3 else 0,) * len(rows))

    core = make_core(automatic(make_format(tmp_path, "eagle3").config(3, 1, 4)))
    core.speculation.controller = Third(0, 3)
    params = SamplingParams(max_new_tokens=8, temperature=0.8, ignore_eos=True)
    run(core, [GroupRequest("0", random_prompt(11, seed=0), (0, 1, 2), params)])
    assert backlogs[:3] == [(1 + 4,) * 3, (2 + 4,) * 3, (3 + 4,) * 3]  # 11 tokens, of three sequences
    assert all(1 <= backlog <= 2 for backlog in backlogs[3])


def test_an_engine_that_knows_its_costs_decides_by_itself(tmp_path: Path) -> None:
    tiny = make_format(tmp_path, "eagle3")
    plain = run(make_core(tiny.plain), requests())
    core = make_core(automatic(tiny.config(3, 1, 4)))
    assert core.speculation.controller is None
    calibrate(core)
    assert core.speculation.controller is not None
    points = core.speculation.controller.costs.curve.points
    assert [rows for rows, _ in points][:3] == [1, 2, 4]
    assert all(seconds > 0 for _, seconds in points)
    assert core.cache.own.rows == 0, "scratch rows are given back"
    assert tokens(run(core, requests())) == tokens(plain)
    assert core.speculation.benefit.spent_s > 0
    assert torch.isfinite(torch.tensor(core.speculation.benefit.plain_s))
