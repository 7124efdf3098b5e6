"""Numbers that are not finite end one request, on whatever path they come, and reach no sample and no neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from pathlib import Path

import pytest
import torch

from rollout.embedded.core import GenerationCore
from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafters.standalone import StandaloneDrafter
from rollout.embedded.verification import make_verifier
from rollout.embedded.verification.verifier import Verified, VerifyRow
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import GenerationError
from slime_spec.partial_samples import as_partial
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.support.embedded_harness import engine_config, make_core, run
from tests.support.emission import FixedUniforms
from tests.support.tiny_models import make_tiny_checkpoint

VOCAB = 9
DRAFT = (1, 2, 3)
BAD_ROWS = {"nan": [nan], "inf": [inf], "no token": [-inf] * VOCAB}
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(),
    "filtered": SamplingParams(temperature=0.7, top_k=4, top_p=0.9, min_p=0.01),
    "nucleus": SamplingParams(top_p=0.9),
    "adjusted": SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1, logit_bias=((7, -inf), (5, 1.0))),
}
RULES = {
    "target only": SpeculativeConfig(),
    "rejection": SpeculativeConfig(use_rejection_sampling=True),
    "block": SpeculativeConfig(use_block_verification=True),
    "thresholds": SpeculativeConfig(lossy=True, accept_threshold_single=0.5, accept_threshold_acc=0.5),
}


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_gives_no_finite_logprob_to_a_token_of_logits_that_are_no_distribution(rule: str, params: str) -> None:
    """At the root, at drafted tokens and at the bonus token; rows beside it are as without it."""
    verifier = make_verifier(RULES[rule], frozenset())
    sound = torch.zeros(len(DRAFT) + 1, VOCAB)
    for node, token in enumerate((*DRAFT, 4)):
        sound[node, token] = 9.0  # so that the whole draft is accepted
    sampled = rule in ("rejection", "block")
    draft = Draft.chain(DRAFT, sound[:-1].softmax(dim=-1) if sampled else None)
    row = VerifyRow(draft, PARAMS[params], FixedUniforms(0, [0.5] * 4, [0.5] * 4), (0,), 1)
    expected = verifier(torch.cat([sound, sound]), [row, row])
    assert [each.token_ids for each in expected] == [[*DRAFT, 4]] * 2
    for bad in BAD_ROWS.values():
        for node in range(len(DRAFT) + 1):
            broken = sound.clone()
            broken[node, : len(bad)] = torch.tensor(bad)
            before, at, after = verifier(torch.cat([sound, broken, sound]), [row, row, row])
            assert [before, after] == expected
            assert [isfinite(each) for each in at.logprobs[: node + 1]] == [True] * node + [False], (bad, node)
            alone = verifier(broken[node : node + 1], [replace(row, draft=NO_DRAFT)])
            assert not isfinite(alone[0].logprobs[0])


@dataclass
class BrokenVerifier:
    """Gives every row the same token, with ``logprob`` after some tokens."""

    logprob: float
    after: int
    lossy = False

    def __call__(self, logits: torch.Tensor, rows: Sequence[VerifyRow]) -> list[Verified]:
        broken = [row.num_generated >= self.after and row.token_ids[0] == 1 for row in rows]
        return [Verified([5], [self.logprob if each else -1.0], ()) for each in broken]


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("logprob", [nan, inf, -inf])
def test_no_sample_with_a_logprob_that_is_not_finite_leaves_the_core(
    tiny_llama: Path, logprob: float, after: int
) -> None:
    core = make_core(engine_config(tiny_llama), verifier=BrokenVerifier(logprob, after))
    delivered: list[GeneratedSample] = []
    failures: list[GenerationError] = []
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    for group, first in (("bad", 1), ("sound", 2)):
        core.add(GroupRequest(group, (first, 3), (1, 2), params), delivered.append, on_failure=failures.append)
    while core.has_work:
        core.step()
    assert [(each.group_id, each.logprobs) for each in delivered] == [("sound", (-1.0,) * 5)] * 2
    assert len(failures) == 1
    assert f"at token {after} of sample" in str(failures[0])


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in torch's operators, as on CUDA, reads masked positions too: weight 0 times NaN is NaN."""
    if request.param == "torch":
        monkeypatch.setattr("rollout.embedded.linear.kernels", lambda: None)


LONG = SamplingParams(max_new_tokens=20, ignore_eos=True, logit_bias=((77, -inf),))
SINGLE = GroupRequest("single", (4, 5), (3,), LONG)


def stores_are_finite(core: GenerationCore) -> bool:
    caches = [each for each in (core.cache, core.drafter.cache) if each is not None]
    return all(
        bool(tensor.isfinite().all())
        for cache in caches
        for store in (cache.own, cache.prefixes)
        for tensor in (*store.keys, *store.values)
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("slot", [0, 2])
def test_keys_that_are_not_finite_numbers_are_never_passed_over(tiny_llama: Path, slot: int) -> None:
    core = make_core(engine_config(tiny_llama))
    delivered: list[GeneratedSample] = []
    failures: list[GenerationError] = []
    core.add(GroupRequest("g", (1, 2, 3, 4, 5), (1,), LONG), delivered.append, on_failure=failures.append)
    core.step()
    core.cache.own.keys[0][0, :, slot, 0] = nan  # as infinity minus infinity in the scores
    while core.has_work:
        core.step()
    assert (len(delivered), len(failures)) == (0, 1)


@pytest.mark.usefixtures("kernels")
def test_a_resumed_group_whose_prompt_has_no_finite_keys_fails_no_neighbour(tiny_llama: Path) -> None:
    """Its samples run at once, beside the others, before any logits of its prompt were looked at."""
    core = make_core(engine_config(tiny_llama))
    expected = run(core, [SINGLE])
    core.decoder.embedding[77] = nan
    bad = GroupRequest("bad", (1, 77, 5), (1, 2), LONG)
    parts = tuple(replace(as_partial(bad, position), token_ids=(6,), logprobs=(-1.0,)) for position in (0, 1))
    failures: list[GenerationError] = []
    core.add(replace(bad, partials=parts), lambda sample: None, on_failure=failures.append)
    assert {key: each.token_ids for key, each in run(core, [SINGLE]).items()} == {
        key: each.token_ids for key, each in expected.items()
    }
    assert len(failures) == 1
    assert stores_are_finite(core)


@pytest.mark.usefixtures("kernels")
def test_a_group_whose_draft_has_no_finite_keys_costs_no_neighbour_its_drafts(tmp_path: Path) -> None:
    target, small = make_tiny_checkpoint(tmp_path / "target"), make_tiny_checkpoint(tmp_path / "d", num_hidden_layers=1)
    speculative = SpeculativeConfig(algorithm="STANDALONE", draft_model_path=str(small), num_steps=3)
    core = make_core(replace(engine_config(target), speculative=speculative))
    assert isinstance(core.drafter, StandaloneDrafter)
    alone = run(core, [SINGLE])["single", 0].spec
    with torch.inference_mode():
        core.drafter.weights.decoder.embedding[77] = nan
    samples = run(core, [GroupRequest("bad", (1, 77, 5), (1, 2), LONG), SINGLE])
    assert samples["single", 0].spec == alone
    assert alone.num_drafted > 0 == alone.num_nonfinite_rounds
    assert all(samples["bad", index].spec.num_drafted == 0 for index in (0, 1))
    assert stores_are_finite(core)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
@pytest.mark.parametrize("end", ["abort", "retract"])
def test_a_prompt_that_was_left_in_the_middle_leaves_clean_rows(
    tiny_llama: Path, seeds: tuple[int, ...], end: str
) -> None:
    """Nobody had looked at logits of its keys when it was aborted, or gave way."""
    core = make_core(engine_config(tiny_llama))
    sound = replace(SINGLE, params=replace(LONG, max_new_tokens=40))
    core.add(sound, lambda sample: None)
    core.step()
    core.decoder.embedding[77] = nan
    long = core.add(GroupRequest("long", (1, 77, *range(2, 70)) * 6, seeds, LONG), lambda sample: None)
    core.step()
    assert not stores_are_finite(core)
    if end == "abort":
        core.abort(long)
        assert core.batch.running
    else:
        core.pause("retract")
    assert stores_are_finite(core)
