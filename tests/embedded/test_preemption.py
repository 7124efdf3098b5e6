"""Under pressure the youngest gives way; nothing is lost, nothing is said twice, and no output changes."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.embedded.core import GenerationCore
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.support.embedded_harness import (
    Samples,
    continuation,
    engine_config,
    make_core,
    random_prompt,
    run,
)
from tests.support.ledger_drafter import LedgerDrafter

HEADROOM = 6
CHUNK_SETTINGS = ("CHUNK_TOKENS_ALONE", "CHUNK_TOKENS_BESIDE_DECODING")


@st.composite
def loads(draw: st.DrawFn) -> list[GroupRequest]:
    requests = []
    for index in range(draw(st.integers(2, 7))):
        prompt = random_prompt(draw(st.integers(1, 60)), seed=draw(st.integers(0, 99)))
        params = SamplingParams(
            max_new_tokens=draw(st.integers(1, 90)),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            speculative=draw(st.booleans()),
        )
        seeds = tuple(100 * index + sample for sample in range(draw(st.integers(1, 5))))
        requests.append(GroupRequest(str(index), prompt, seeds, params))
    return requests


def longest(requests: list[GroupRequest]) -> int:
    return max(len(each.prompt_token_ids) + each.params.max_new_tokens for each in requests) + HEADROOM


def step_within_bound(core: GenerationCore, requests: list[GroupRequest]) -> tuple[Samples, dict, list[int]]:
    """Run to the end; samples, their streamed tokens, and how many sequences were running after each step."""
    samples: list[GeneratedSample] = []
    streamed: dict[tuple[str, int], list[int]] = {}
    running = []
    for request in requests:
        add(core, request, samples, streamed)
    while core.has_work:
        core.step()
        running.append(core.batch.num_running)
        stores = (core.cache.own, core.cache.prefixes, core.cache.kept)
        assert sum(store.num_tokens for store in stores) <= core.cache.max_total_tokens
        assert core.batch.kv_tokens_used <= core.cache.max_total_tokens
    assert len(samples) == sum(len(request.seeds) for request in requests)
    assert (core.batch.kv_tokens_used, core.batch.groups, core.waiting) == (0, [], [])
    return {(sample.group_id, sample.sample_index): sample for sample in samples}, streamed, running


def add(core: GenerationCore, request: GroupRequest, samples: list, streamed: dict) -> None:
    core.add(
        request,
        samples.append,
        lambda progress: streamed.setdefault((request.group_id, progress.sample_index), []).extend(progress.token_ids),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=loads(), room=st.floats(0.0, 2.0), max_running=st.integers(1, 12), chunk=st.integers(1, 80))
def test_whatever_the_load_and_the_bound_every_sample_comes_out_as_with_room_for_all(
    tiny_llama: Path, requests: list[GroupRequest], room: float, max_running: int, chunk: int
) -> None:
    roomy = run(make_core(engine_config(tiny_llama)), requests)
    prompts = [request.prompt_token_ids for request in requests]
    config = engine_config(
        tiny_llama,
        num_draft_tokens=HEADROOM,
        max_total_tokens=int(longest(requests) * (1 + room)),
        max_running_requests=max_running,
    )
    core = make_core(config, drafter=LedgerDrafter(continuation(roomy, prompts), branches=1))
    with pytest.MonkeyPatch.context() as patch:
        for name in CHUNK_SETTINGS:
            patch.setattr(f"rollout.embedded.prefill.{name}", chunk)
        tight, streamed, _ = step_within_bound(core, requests)
    for key, sample in roomy.items():
        assert tight[key].token_ids == sample.token_ids == tuple(streamed[key])
        assert tight[key].logprobs == pytest.approx(sample.logprobs, abs=1e-4)
        assert sum(tight[key].spec.histogram) == tight[key].spec.num_rounds
    assert sum(sample.num_preemptions for sample in tight.values()) == core.num_preemptions


def test_a_batch_that_outgrows_the_bound_shrinks_to_its_oldest_and_grows_again(tiny_llama: Path) -> None:
    params = SamplingParams(max_new_tokens=150)
    requests = [GroupRequest(str(i), random_prompt(10, seed=i), (i,), params) for i in range(6)]
    core = make_core(engine_config(tiny_llama, max_total_tokens=330))
    samples, _, running = step_within_bound(core, requests)
    # 10 + 150 tokens a row at the end: the bound holds two such rows, and six when all are young.
    assert max(running) == 6
    assert 2 in running[running.index(6) :]
    assert samples["0", 0].num_preemptions == samples["1", 0].num_preemptions == 0
    assert samples["5", 0].num_preemptions > 0
    finished_alone = run(make_core(engine_config(tiny_llama)), requests)
    assert {key: each.token_ids for key, each in samples.items()} == {
        key: each.token_ids for key, each in finished_alone.items()
    }


def test_who_waits_for_room_is_served_by_age_and_overtaken_by_nobody(tiny_llama: Path) -> None:
    big = GroupRequest("big", random_prompt(200, seed=1), (1,), SamplingParams(max_new_tokens=20))
    small = [
        GroupRequest(f"small{i}", random_prompt(20, seed=i), (i,), SamplingParams(max_new_tokens=40)) for i in range(8)
    ]
    core = make_core(engine_config(tiny_llama, max_total_tokens=260, max_running_requests=4))
    order: list[str] = []
    for request in [*small[:4], big, *small[4:]]:
        core.add(request, lambda sample: order.append(sample.group_id))
    while core.has_work:
        core.step()
    assert order.index("big") == 4


def test_an_aborted_sample_that_waits_to_be_resumed_keeps_its_tokens(tiny_llama: Path) -> None:
    params = SamplingParams(max_new_tokens=150)
    core = make_core(engine_config(tiny_llama, max_total_tokens=330))
    samples: list[GeneratedSample] = []
    groups = [core.add(GroupRequest(str(i), random_prompt(10, seed=i), (i,), params), samples.append) for i in range(6)]
    while not core.num_preemptions:
        core.step()
    waiting = core.waiting[0]
    assert waiting.group is groups[5]
    core.abort(groups[5])
    assert [sample.group_id for sample in samples] == ["5"]
    assert samples[0].finish_reason == "abort"
    assert len(samples[0].token_ids) == len(samples[0].logprobs) == waiting.num_generated > 10
    while core.has_work:
        core.step()
    assert len(samples) == 6


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_pausing_and_going_on_with_the_same_weights_changes_no_output(tiny_llama: Path, mode: str) -> None:
    requests = [
        GroupRequest(str(i), random_prompt(5 + 9 * i, seed=i), tuple(range(10 * i, 10 * i + 1 + i)), SamplingParams(40))
        for i in range(4)
    ]
    expected = run(make_core(engine_config(tiny_llama)), requests)
    drafter = LedgerDrafter(continuation(expected, [request.prompt_token_ids for request in requests]), branches=1)
    core = make_core(engine_config(tiny_llama, num_draft_tokens=3), drafter=drafter)
    samples: Samples = {}
    for request in requests:
        core.add(request, lambda sample: samples.__setitem__((sample.group_id, sample.sample_index), sample))
    for _ in range(6):
        core.step()
        core.pause(mode)
        core.pause(mode)
        assert not core.can_step
        assert core.has_work
        assert (core.batch.kv_tokens_used == 0) == (mode == "retract")
        core.resume()
    while core.has_work:
        core.step()
    assert {key: each.token_ids for key, each in samples.items()} == {
        key: each.token_ids for key, each in expected.items()
    }
    assert core.num_preemptions == sum(sample.num_preemptions for sample in samples.values()) == 0


def test_pausing_by_abort_ends_everything_with_what_it_has(tiny_llama: Path) -> None:
    core = make_core(engine_config(tiny_llama, max_running_requests=3))
    samples: list[GeneratedSample] = []
    request = GroupRequest("g", random_prompt(9, seed=1), (1, 2, 3, 4), SamplingParams(max_new_tokens=50))
    core.add(request, samples.append)
    core.add(replace(request, group_id="h", seeds=(7,)), samples.append)
    for _ in range(4):
        core.step()
    core.pause("abort")
    assert not core.has_work
    assert sorted(len(sample.token_ids) for sample in samples) == [0, 0, 5, 5, 5]
    assert {sample.finish_reason for sample in samples} == {"abort"}
    core.resume()
    assert len(run(core, [replace(request, params=SamplingParams(max_new_tokens=3))])) == 4
