"""Prompts that the target computes in one pass are one pass of the draft's network, too, and nothing else changes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.embedded.drafters.feature_drafter import FeatureDrafter
from rollout.embedded.drafters.step import DraftRows
from rollout.embedded.drafting import Drafter, Prefill
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.partial_samples import request_for_rest
from slime_spec.speculation.controller import Controller, RoundPlan, RowState
from slime_spec.speculation.round_costs import PassCurve, RoundCosts
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.support.draft_formats import make_format
from tests.support.embedded_harness import Samples, make_core, random_prompt, run
from tests.support.graphs_on_cpu import graphs_on_cpu
from tests.support.tiny_models import make_tiny_checkpoint

PARAMS = SamplingParams(max_new_tokens=10, temperature=1.0, ignore_eos=True)
REQUESTS = [
    GroupRequest(str(i), random_prompt(length, seed=length), tuple(range(10 * i, 10 * i + num_samples)), PARAMS)
    for i, (length, num_samples) in enumerate([(2, 1), (9, 3), (24, 1), (1, 2), (1, 1), (7, 2)])
]
NOT_SPECULATIVE = GroupRequest("plain", random_prompt(8, seed=8), (90, 91), replace(PARAMS, speculative=False))


def standalone(folder: Path) -> Config:
    target, draft = make_tiny_checkpoint(folder / "target"), make_tiny_checkpoint(folder / "draft", num_hidden_layers=1)
    speculative = SpeculativeConfig(
        algorithm="STANDALONE",
        draft_model_path=str(draft),
        num_steps=3,
        eagle_topk=1,
        num_draft_tokens=4,
        use_rejection_sampling=True,
    )
    return Config(model=ModelConfig(hf_checkpoint=str(target)), speculative=speculative)


CONFIGS: dict[str, Callable[[Path], Config]] = {
    "eagle3": lambda folder: make_format(folder, "eagle3").config(3, use_rejection_sampling=True),
    "eagle3 trees": lambda folder: make_format(folder, "eagle3").config(3, 3, 8),
    "mimo": lambda folder: make_format(folder, "mimo").config(3, use_rejection_sampling=True),
    "standalone": standalone,
}


class OneByOne:
    """Shows each piece of a pass to ``inner`` by itself, and has it computed at once: slow, and easy to believe."""

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner

    def prefill(self, prefills: Sequence[Prefill]) -> None:
        for prefill in prefills:
            self._inner.prefill([prefill])
            if isinstance(self._inner, FeatureDrafter):
                self._inner.pay([(prefill.key, prefill.kv_row)])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Off(Controller):
    """Lets nobody draft."""

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        return RoundPlan((0,) * len(rows))

    def again(self, limits: Sequence[int]) -> RoundPlan | None:
        return None


def automatic(config: Config) -> SpeculativeConfig:
    return replace(config.speculative, num_steps=None, eagle_topk=None, num_draft_tokens=None)


def begun(config: Config) -> list[GroupRequest]:
    """The requests, every other one to go on from what its samples had after two steps."""
    core = make_core(config)
    samples: dict[str, list[GeneratedSample]] = {request.group_id: [] for request in REQUESTS}
    groups = [core.add(request, lambda sample: samples[sample.group_id].append(sample)) for request in REQUESTS]
    for _ in range(2):
        core.step()
    for group in groups:
        core.abort(group)
    return [
        request_for_rest(request, samples[request.group_id]) if i % 2 else request for i, request in enumerate(REQUESTS)
    ]


def outcome(samples: Samples) -> dict[tuple[str, int], Any]:
    return {key: (each.token_ids, each.spec) for key, each in samples.items()}


@pytest.mark.parametrize("passes", [nullcontext, graphs_on_cpu], ids=["operators", "graphs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_together_give_what_pieces_one_by_one_give(
    tmp_path: Path, name: str, passes: Callable[[], AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that some prompts come in several pieces
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_ALONE", 20)
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_BESIDE_DECODING", 11)
    config = CONFIGS[name](tmp_path)
    asked = [*begun(config), NOT_SPECULATIVE]
    expected = run(make_core(config, drafter=OneByOne(make_core(config).drafter)), asked)
    with passes():
        assert outcome(run(make_core(config), asked)) == outcome(expected)
    assert sum(sample.spec.num_correct for sample in expected.values()) > 0, "some drafts stand, or this proves little"


@pytest.mark.parametrize("passes", [nullcontext, graphs_on_cpu], ids=["operators", "graphs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_of_prompts_runs_the_drafts_network_once(
    tmp_path: Path, name: str, passes: Callable[[], AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    run_pass = DraftRows.run

    def counted(rows: DraftRows, store: Any, spans: Sequence[Any], *rest: Any) -> Any:
        lengths.append(len(spans))
        return run_pass(rows, store, spans, *rest)

    monkeypatch.setattr(DraftRows, "run", counted)
    with passes():
        core = make_core(CONFIGS[name](tmp_path))
        for request in [*REQUESTS, NOT_SPECULATIVE]:
            core.add(request, lambda sample: None)
        core._admit()
        core._allocate()
        core._prefill()
        if name != "standalone":
            assert lengths == [], "a network computes prompts when a sequence of theirs drafts"
            core._round()
    alone, shared = (sum((len(each.seeds) > 1) is is_shared for each in REQUESTS) for is_shared in (False, True))
    # The features of a prompt's one token wait for the next token, and there is nothing to compute yet.
    waits = name != "standalone"
    assert lengths[:2] == [shared - waits, alone - waits]


def test_prompts_of_which_no_sequence_drafts_cost_the_network_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> Any:
        raise AssertionError("nothing was drafted")

    core = make_core(replace(CONFIGS["eagle3"](tmp_path), speculative=automatic(CONFIGS["eagle3"](tmp_path))))
    core.speculation.controller = Off(RoundCosts(PassCurve(((1, 1.0),))), 7)
    expected = run(make_core(make_format(tmp_path / "plain", "eagle3").plain), REQUESTS)
    monkeypatch.setattr(DraftRows, "run", refused)
    samples = run(core, REQUESTS)
    assert {key: len(each.token_ids) for key, each in samples.items()} == {
        key: len(each.token_ids) for key, each in expected.items()
    }
    assert all(sample.spec.num_rounds == 0 < sample.spec.num_off_steps for sample in samples.values())


def test_prompts_are_computed_at_once_where_too_many_would_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.embedded.drafters.feature_drafter.MOST_OWED_BYTES", 1)
    config = CONFIGS["eagle3"](tmp_path)
    eager = outcome(run(make_core(config), REQUESTS))
    monkeypatch.undo()
    assert outcome(run(make_core(config), REQUESTS)) == eager
