"""What prompts begin alike with is computed once, and nothing of what they are answered with changes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.embedded.assemble import Assembly
from rollout.embedded.core import GenerationCore
from rollout.embedded.kv_cache import KvStore
from rollout.embedded.plan import RowSpan
from rollout.embedded.prompt_cache import MOST_PROMPTS, num_common
from rollout.embedded.target import PassOutput
from slime_spec.launch.compose import compose
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import Samples, engine_config, make_core, random_prompt, run
from tests.support.tiny_drafts import DFLASH, EAGLE3, make_tiny_draft

PARAMS = SamplingParams(max_new_tokens=12)
TEMPLATE = random_prompt(40, seed=99)


def task(number: int, length: int = 5) -> tuple[int, ...]:
    """A prompt that begins with the template; its next token is its number's own."""
    return (*TEMPLATE, number, *random_prompt(length - 1, seed=number))


def requests_of(prompts: Sequence[tuple[int, ...]], num_samples: int) -> list[GroupRequest]:
    seeds = [tuple(range(10 * i, 10 * i + num_samples)) for i in range(len(prompts))]
    return [GroupRequest(str(i), prompt, seeds[i], PARAMS) for i, prompt in enumerate(prompts)]


def record_prefills(core: GenerationCore, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """The (start, count) of each span of every pass that computes prompts, from now on."""
    passes: list[list[tuple[int, int]]] = []
    run_pass, step = core.target.run, core._prefiller.step

    def recorded(store: KvStore, spans: Sequence[RowSpan], *rest: Any) -> PassOutput:
        passes.append([(span.start, span.count) for span in spans])
        return run_pass(store, spans, *rest)

    def prefill_step(version: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core.target, "run", recorded)
            return step(version)

    monkeypatch.setattr(core._prefiller, "step", prefill_step)
    return passes


def said(samples: Samples) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


def assert_equal(ours: Samples, expected: Samples) -> None:
    assert said(ours) == said(expected)
    for key, sample in ours.items():
        assert sample.logprobs == pytest.approx(expected[key].logprobs, abs=1e-5)


def uncached(folder: Path, requests: Sequence[GroupRequest], **engine: Any) -> Samples:
    return run(make_core(engine_config(folder, disable_radix_cache=True, **engine)), requests)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_prompts_of_one_template_that_come_together_compute_it_once(
    tiny_llama: Path, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of([task(i, length=3 + i) for i in range(4)], num_samples)
    core = make_core(engine_config(tiny_llama))
    passes = record_prefills(core, monkeypatch)
    samples = run(core, requests)
    assert passes == [[(0, 43)], [(40, 4), (40, 5), (40, 6)]]
    assert_equal(samples, uncached(tiny_llama, requests))
    cached = {key: sample.cached_tokens for key, sample in samples.items()}
    assert [cached[str(i), 0] for i in range(4)] == [0, 40, 40, 40]
    assert all(cached[str(i), s] == 43 + i for i in range(4) for s in range(1, num_samples))


def test_without_the_cache_every_prompt_is_computed_whole(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(engine_config(tiny_llama, disable_radix_cache=True))
    passes = record_prefills(core, monkeypatch)
    run(core, requests_of([task(0), task(1)], 1))
    assert passes == [[(0, 45), (0, 45)]]
    assert compose(["--sglang-disable-radix-cache"]).engine.disable_radix_cache
    assert not compose([]).engine.disable_radix_cache


def test_a_prompt_that_was_seen_before_computes_its_last_token_alone(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(engine_config(tiny_llama))
    passes = record_prefills(core, monkeypatch)
    requests = requests_of([task(1)] * 3, 1)
    samples = run(core, requests[:1]) | run(core, requests[1:])
    assert passes == [[(0, 45)], [(44, 1), (44, 1)]]
    assert_equal(samples, uncached(tiny_llama, requests))


def test_prompts_that_begin_alike_for_few_tokens_are_computed_in_one_pass(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(engine_config(tiny_llama))
    passes = record_prefills(core, monkeypatch)
    short = TEMPLATE[:15]
    run(core, requests_of([(*short, 1, *random_prompt(30, seed=1)), (*short, 2, *random_prompt(30, seed=2))], 1))
    assert passes == [[(0, 46), (0, 46)]]


def test_a_prompt_in_chunks_is_kept_whole(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_ALONE", 16)
    core = make_core(engine_config(tiny_llama))
    passes = record_prefills(core, monkeypatch)
    requests = requests_of([task(1), task(2)], 2)
    samples = run(core, requests[:1]) | run(core, requests[1:])
    assert passes == [[(0, 16)], [(16, 16)], [(32, 13)], [(40, 5)]]
    assert_equal(samples, uncached(tiny_llama, requests))


@pytest.mark.parametrize("num_samples", [1, 2])
def test_new_weights_compute_every_prompt_anew(
    tiny_llama: Path, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that the old weights had begun, whose keys and values nobody may copy."""
    monkeypatch.setattr("rollout.embedded.prefill.CHUNK_TOKENS_ALONE", 16)
    config = engine_config(tiny_llama)
    assembly = Assembly(config)
    builder = assembly.builder(assembly.device)
    for name, tensor in assembly.tensors():
        builder.add(name, tensor * 1.25 if tensor.ndim == 2 else tensor)
    other = builder.finish()
    fresh = make_core(config)
    fresh.use(other, 1)
    requests = requests_of([task(1), task(2), task(3)], num_samples)
    expected = run(fresh, requests)
    assert said(expected) != said(run(make_core(config), requests)), "the weights must matter"

    core = make_core(config)
    run(core, [replace(requests[2], group_id="before")])
    core.add(replace(requests[0], group_id="begun"), lambda _: None)
    core.step()
    core.use(other, 1)
    while core.has_work:
        core.step()
    passes = record_prefills(core, monkeypatch)
    samples = run(core, requests)
    assert passes[0] == [(0, 16)]
    assert_equal(samples, expected)


def drafts(samples: Samples) -> dict[tuple[str, int], Any]:
    return {key: (sample.spec.num_drafted, sample.spec.histogram) for key, sample in samples.items()}


@pytest.mark.parametrize(("algorithm", "draft_config"), [("EAGLE3", EAGLE3), ("DFLASH", DFLASH)])
def test_a_draft_network_is_shown_the_copied_tokens_with_their_features(
    algorithm: str, draft_config: dict[str, Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = make_tiny_draft(tmp_path / "draft", tiny_llama, draft_config)
    steps = {"num_steps": 3, "eagle_topk": 1} if algorithm == "EAGLE3" else {}
    for num_samples in (1, 3):
        requests = requests_of([task(i, length=3 + i) for i in range(4)], num_samples)
        plain = engine_config(tiny_llama, algorithm, num_draft_tokens=4)
        speculative = replace(plain.speculative, draft_model_path=str(draft), **steps)
        config = replace(plain, speculative=speculative)
        whole = replace(config, engine=replace(config.engine, disable_radix_cache=True))
        expected = run(make_core(whole), requests)
        assert sum(sample.spec.num_drafted for sample in expected.values()) > 0
        core = make_core(config)
        passes = record_prefills(core, monkeypatch)
        first = run(core, requests[:1])
        samples = first | run(core, requests[1:])
        assert passes == [[(0, 43)], [(40, 4), (40, 5), (40, 6)]]
        assert_equal(samples, expected)
        assert drafts(samples) == drafts(expected)


def test_the_prompt_that_was_of_no_use_for_longest_gives_way(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_prompt(30, seed=i) for i in range(MOST_PROMPTS + 1)]
    core = make_core(engine_config(tiny_llama))
    order = [*range(MOST_PROMPTS), 0, MOST_PROMPTS, 0, 1]
    passes = record_prefills(core, monkeypatch)
    for turn, number in enumerate(order):
        run(core, [GroupRequest(str(turn), prompts[number], (turn,), PARAMS)])
    started = [spans[0][0] for spans in passes]
    assert started == [*[0] * MOST_PROMPTS, 29, 0, 29, 0]  # number 1 gave way, number 0 had been used since


def test_a_long_prompt_is_kept_as_far_as_its_share_of_the_cache(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(engine_config(tiny_llama, max_total_tokens=32 * 20))
    prompt = random_prompt(100, seed=1)
    passes = record_prefills(core, monkeypatch)
    for turn in range(2):
        run(core, [GroupRequest(str(turn), prompt, (turn,), PARAMS)])
    assert passes == [[(0, 100)], [(20, 80)]]


def test_memory_that_was_given_back_holds_no_prompt(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(engine_config(tiny_llama))
    requests = requests_of([task(1), task(1)], 1)
    samples = run(core, requests[:1])
    core.release_kv()
    assert core.cache.kept.num_tokens == 0
    passes = record_prefills(core, monkeypatch)
    samples |= run(core, requests[1:])
    assert passes == [[(0, 45)]]
    assert_equal(samples, uncached(tiny_llama, requests))


@st.composite
def loads(draw: st.DrawFn) -> list[GroupRequest]:
    """Prompts of two templates and of none, some of them equal."""
    requests = []
    for index in range(draw(st.integers(2, 9))):
        beginning = random_prompt(draw(st.integers(0, 30)), seed=draw(st.integers(0, 1)))
        prompt = (*beginning, *random_prompt(draw(st.integers(1, 20)), seed=draw(st.integers(0, 3))))
        params = SamplingParams(max_new_tokens=draw(st.integers(1, 60)))
        seeds = tuple(100 * index + sample for sample in range(draw(st.integers(1, 4))))
        requests.append(GroupRequest(str(index), prompt, seeds, params))
    return requests


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=loads(), room=st.floats(0.0, 2.0), chunk=st.integers(1, 80), least=st.integers(1, 8))
def test_kept_prompts_take_only_room_that_nothing_else_needs(
    tiny_llama: Path, requests: list[GroupRequest], room: float, chunk: int, least: int
) -> None:
    expected = uncached(tiny_llama, requests)
    longest = max(len(each.prompt_token_ids) + each.params.max_new_tokens for each in requests) + 6
    config = engine_config(tiny_llama, max_total_tokens=round(longest * (1 + room)), max_running_requests=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout.embedded.prompt_cache.PART_OF_CACHE", 1)
        patch.setattr("rollout.embedded.prompt_cache.LEAST_TOKENS", least)
        for name in ("CHUNK_TOKENS_ALONE", "CHUNK_TOKENS_BESIDE_DECODING"):
            patch.setattr(f"rollout.embedded.prefill.{name}", chunk)
        core, samples = make_core(config), Samples()
        for request in requests:
            core.add(request, lambda sample: samples.__setitem__((sample.group_id, sample.sample_index), sample))
        while core.has_work:
            core.step()
            stores = (core.cache.own, core.cache.prefixes, core.cache.kept)
            assert sum(store.num_tokens for store in stores) <= core.cache.max_total_tokens
    assert said(samples) == said(expected)


@given(left=st.lists(st.integers(0, 2), max_size=8), right=st.lists(st.integers(0, 2), max_size=8))
def test_num_common_counts_the_longest_common_beginning(left: list[int], right: list[int]) -> None:
    count = num_common(left, right)
    assert left[:count] == right[:count]
    assert count == min(len(left), len(right)) or left[count] != right[count]


def test_rows_of_one_store_are_copied_into_another_for_every_layer(tiny_llama: Path) -> None:
    cache = make_core(engine_config(tiny_llama)).cache
    cache.own.resize(2, 8)
    cache.kept.resize(3, 5)
    for number, tensor in enumerate((*cache.kept.keys, *cache.kept.values)):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + 1000.0 * number)
    cache.own.copy_from(cache.kept, 2, 1, 3)
    for mine, its in zip((*cache.own.keys, *cache.own.values), (*cache.kept.keys, *cache.kept.values), strict=True):
        assert torch.equal(mine[1, :, :3], its[2, :, :3])
        assert not mine[0].any()
        assert not mine[1, :, 3:].any()
