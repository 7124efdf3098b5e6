"""Turns on the embedded engine begin with what earlier turns computed, and draft from what other samples said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.config.tree import Config
from slime_spec.rl.rollouts import Rollout
from tests.support.agents_harness import agents_config, step_of
from tests.support.embedded_harness import make_core
from tests.support.tiny_drafts import EAGLE3, make_tiny_draft
from tests.support.tiny_policy import make_tiny_policy

NUM_TURNS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def job(folder: Path, algorithm: str = "NONE", keeps: bool = True) -> Config:
    config = agents_config(folder, algorithm, rollout={"batch_size": 4, "n_samples_per_prompt": 3})
    return replace(config, engine=replace(config.engine, max_total_tokens=16_384, disable_radix_cache=not keeps))


async def turns(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
    for _ in range(NUM_TURNS):
        await client.turn(sample)
        client.insert(sample, f"<{len(set(sample.tokens))}>")
    return sample


def assert_same(ours: Rollout, expected: Rollout) -> None:
    """The same tokens, and logprobs as close as two ways to compute them are."""
    for one, other in zip(ours.samples, expected.samples, strict=True):
        assert one.response.token_ids == other.response.token_ids
        assert one.response.logprobs == pytest.approx(other.response.logprobs, rel=0, abs=1e-5)


@pytest.mark.parametrize("algorithm", ["NONE", "NGRAM", "HISTORY"])
def test_a_turn_computes_what_the_turn_before_it_did_not_and_its_tokens_are_the_same(
    folder: Path, algorithm: str
) -> None:
    kept, _ = step_of(job(folder, algorithm), turns)
    computed, _ = step_of(job(folder, algorithm, keeps=False), turns)
    assert_same(kept, computed)
    assert [each.response.cached_tokens for each in computed.samples] == [0] * 12
    for sample in kept.samples:
        response, made = sample.response, sample.response.turns
        assert made is not None
        # A turn's prompt has the whole of the turn before, of which all but the last token had been fed; short prompts
        # are computed as fast as they are copied.
        num_inserted = response.loss_mask.count(0)
        num_computed = made.num_prompt_tokens - response.cached_tokens
        assert made.num_turns == NUM_TURNS
        assert num_computed <= len(sample.prompt.token_ids) + num_inserted + NUM_TURNS
        assert num_computed < response.cached_tokens


def test_what_is_kept_is_forgotten_where_the_weights_changed_within_a_turn(folder: Path) -> None:
    """Keys and values of two versions are no version's, and the next turn computes them anew."""

    async def changes(args: Any, sample: Any, sampling_params: Any, client: Any) -> Any:
        turn = await client.turn(sample)
        assert len(turn.token_ids) == 24
        await client.turn(sample)
        return sample

    config = agents_config(folder, rollout={"batch_size": 1, "n_samples_per_prompt": 1})
    rollout, engines = step_of(config, changes, engines=ChangingEngines(config))
    (sample,) = rollout.samples
    assert engines.has_changed
    assert sample.response.weight_version == 0
    assert sample.response.cached_tokens == 0


class ChangingEngines:
    """Implements Engines by one core, which gets the next version of the same weights in the middle of a turn."""

    def __init__(self, config: Config) -> None:
        self.core, self.has_changed = make_core(config), False

    def generate(self, requests: Any) -> Any:
        finished: list[Any] = []
        while requests.has_more or self.core.has_work:
            for request in requests.taken():
                self.core.add(request, finished.append)
            if self.core.has_work:
                self.core.step()
            running = self.core.batch.running
            if not self.has_changed and running and running[0].num_generated == 10:
                self.core.use(self.core.decoder, 1)
                self.has_changed = True
            yield from finished
            finished.clear()

    def abort(self) -> None:
        raise AssertionError("no group is left over")


def test_a_drafter_of_hidden_states_gets_all_of_them_computed(folder: Path, tmp_path: Path) -> None:
    """What it needs of a generated token is not kept, and its turns are the same with and without a cache."""
    draft = make_tiny_draft(tmp_path / "draft", folder, {**EAGLE3, "vocab_size": 257})
    results = []
    for keeps in (True, False):
        config = job(folder, "EAGLE3", keeps)
        config = replace(config, speculative=replace(config.speculative, draft_model_path=str(draft)))
        results.append(step_of(config, turns)[0])
    assert_same(*results)


@pytest.mark.parametrize(("algorithm", "carries"), [("HISTORY", True), ("NGRAM", False)])
def test_turns_carry_what_other_samples_of_the_prompt_said_where_drafts_come_from_it(
    folder: Path, algorithm: str, carries: bool
) -> None:
    config = job(folder, algorithm)
    rollout, engines = step_of(config, turns)
    heard = [request for request in engines.asked if request.earlier]
    assert bool(heard) == carries
    generated = {}  # replies by the sample whose they are
    for sample in rollout.samples:
        generated[sample.prompt.prompt_id, sample.response.sample_index] = sample.response.token_ids
    for request in heard:
        prompt_id, index = (int(part) for part in request.group_id.split("/")[:2])
        for reply in request.earlier:
            assert reply.sample_index != index
            whole = generated[prompt_id, reply.sample_index or 0]
            places = range(len(whole) - len(reply.token_ids) + 1)
            assert any(whole[place : place + len(reply.token_ids)] == reply.token_ids for place in places)
