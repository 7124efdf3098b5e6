"""Samples that go on from what an earlier engine left of them become what they would have been undisturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded.core import GenerationCore
from rollout.embedded.engine import EmbeddedEngine
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams, SpecCounters
from slime_spec.weights.run import run_push
from tests.support.draft_formats import make_format
from tests.support.embedded_harness import Samples, engine_config, make_core, random_prompt, run
from tests.support.pushes import DirectTransport, other_weights, push_of

PROMPTS = [random_prompt(3 + 7 * i, seed=i) for i in range(4)]
CONFIGS = ("plain", "eagle3", "eagle3 by rejection", "tree")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    eagle3 = make_format(tmp_path_factory.mktemp("eagle3"), "eagle3")
    return {
        "plain": eagle3.plain,
        "eagle3": eagle3.config(3),
        "eagle3 by rejection": eagle3.config(3, use_rejection_sampling=True),
        "tree": eagle3.config(3, 3, 8),
    }


def requests(params: SamplingParams) -> list[GroupRequest]:
    return [
        GroupRequest(str(i), prompt, tuple(range(10 * i, 10 * i + 1 + i)), params) for i, prompt in enumerate(PROMPTS)
    ]


def cut(core: GenerationCore, asked: Sequence[GroupRequest], num_steps: int) -> Samples:
    """Every sample, the unfinished ones aborted after ``num_steps`` of the core's steps."""
    samples: Samples = {}

    def keep(sample: GeneratedSample) -> None:
        samples[sample.group_id, sample.sample_index] = sample

    groups = [core.add(request, keep) for request in asked]
    for _ in range(num_steps):
        core.step()
    for group in groups:
        core.abort(group)
    return samples


def rest_of(asked: Sequence[GroupRequest], samples: Samples) -> list[GroupRequest]:
    """The unfinished samples of each group, to go on from."""
    rest = []
    for request in asked:
        begun = [each for each in samples.values() if each.group_id == request.group_id]
        begun = sorted((each for each in begun if each.finish_reason == "abort"), key=lambda each: -each.sample_index)
        if begun:
            seeds = tuple(request.seeds[each.sample_index] for each in begun)
            rest.append(replace(request, seeds=seeds, partials=tuple(begun)))
    return rest


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_that_goes_on_elsewhere_gets_the_very_tokens_of_an_undisturbed_one(
    configs: dict[str, Config], name: str, temperature: float
) -> None:
    asked = requests(SamplingParams(max_new_tokens=40, temperature=temperature, ignore_eos=True))
    undisturbed = run(make_core(configs[name]), asked)
    for num_steps in (0, 1, 4, 11):
        first = cut(make_core(configs[name]), asked, num_steps)
        again = cut(make_core(configs[name]), rest_of(asked, first), 3)  # interrupted a second time
        second = first | again
        whole = second | run(make_core(configs[name]), rest_of(asked, second))
        assert whole.keys() == undisturbed.keys()
        assert any(sample.finish_reason == "abort" for sample in first.values()), "nothing was interrupted"
        for key, sample in whole.items():
            assert sample.token_ids == undisturbed[key].token_ids
            assert sample.logprobs == pytest.approx(undisturbed[key].logprobs, abs=1e-4)
            assert sample.spec == undisturbed[key].spec
            assert (sample.finish_reason, sample.version_spans) == ("length", ())


@pytest.mark.parametrize("params", [{"frequency_penalty": 1.5}, {"repetition_penalty": 1.6}, {"min_new_tokens": 20}])
def test_what_looks_back_at_generated_tokens_sees_those_of_the_earlier_part(
    configs: dict[str, Config], params: dict[str, float]
) -> None:
    asked = requests(SamplingParams(max_new_tokens=25, **params))  # type: ignore[arg-type]
    undisturbed = run(make_core(configs["eagle3"]), asked)
    first = cut(make_core(configs["eagle3"]), asked, 5)
    whole = first | run(make_core(configs["eagle3"]), rest_of(asked, first))
    assert {key: (each.token_ids, each.finish_reason) for key, each in whole.items()} == {
        key: (each.token_ids, each.finish_reason) for key, each in undisturbed.items()
    }


def test_times_and_counts_of_both_parts_are_summed(tiny_llama: Path) -> None:
    request = GroupRequest("g", (1, 2, 3), (5, 6), SamplingParams(max_new_tokens=30, ignore_eos=True))
    first = cut(make_core(engine_config(tiny_llama)), [request], 4)
    slow = {key: replace(each, e2e_latency_s=100.0, num_preemptions=3, lossy=True) for key, each in first.items()}
    whole = run(make_core(engine_config(tiny_llama)), rest_of([request], slow))
    for key, sample in whole.items():
        assert 100.0 < sample.e2e_latency_s < 200.0
        assert (sample.wait_s, sample.first_token_s) == (first[key].wait_s, first[key].first_token_s)
        assert (sample.num_preemptions, sample.lossy, sample.num_prompt_tokens) == (3, True, 3)
        assert sample.cached_tokens == first[key].cached_tokens == 3 * sample.sample_index
    never_started = cut(make_core(engine_config(tiny_llama)), [request], 0)
    late = {key: replace(each, e2e_latency_s=100.0) for key, each in never_started.items()}
    for sample in run(make_core(engine_config(tiny_llama)), rest_of([request], late)).values():
        assert sample.wait_s is not None
        assert sample.first_token_s is not None
        assert 100.0 < sample.wait_s <= sample.first_token_s <= sample.e2e_latency_s


def test_a_part_whose_rounds_are_unknown_leaves_the_whole_without_counters(configs: dict[str, Config]) -> None:
    request = GroupRequest("g", PROMPTS[1], (5,), SamplingParams(max_new_tokens=30, ignore_eos=True))
    first = cut(make_core(configs["eagle3"]), [request], 6)
    unknown = {key: replace(each, spec=SpecCounters()) for key, each in first.items()}
    (sample,) = run(make_core(configs["eagle3"]), rest_of([request], unknown)).values()
    assert sample.spec == SpecCounters()
    (known,) = run(make_core(configs["eagle3"]), rest_of([request], first)).values()
    assert known.spec.num_rounds > first["g", 0].spec.num_rounds > 0


def test_tokens_of_newer_weights_follow_those_of_older_ones(tiny_llama: Path) -> None:
    engine = EmbeddedEngine(engine_config(tiny_llama, max_total_tokens=3000), 0, DirectTransport())
    engine.start()
    try:
        request = GroupRequest("g", (1, 2, 3), (5, 6), SamplingParams(max_new_tokens=300, ignore_eos=True))
        core = make_core(engine_config(tiny_llama))
        begun = cut(core, [request], 7)
        run_push(push_of(other_weights(tiny_llama, seed=4), 3), lambda message: [engine.update_weights(message)])
        for sample in engine.generate(rest_of([request], begun)[0]):
            before = begun["g", sample.sample_index].token_ids
            assert 0 < len(before) < 300
            assert sample.token_ids[: len(before)] == before
            assert sample.version_spans == ((0, 0), (len(before), 3))
            assert sample.weight_version == 0
            assert len(sample.token_ids) == len(sample.logprobs) == 300
    finally:
        engine.stop()


PART = GeneratedSample("g", 4, (1, 2), (-1.0, -2.0), "abort", 0, 3)


@pytest.mark.parametrize(
    ("begun", "message"),
    [
        ((PART,), "one sample for each of the 2 seeds"),
        ((PART, PART), "each sample once"),
        ((PART, replace(PART, sample_index=5, finish_reason="stop")), "aborted; sample 5"),
        ((PART, replace(PART, sample_index=5, logprobs=(-1.0,))), "a logprob for each of 2 tokens"),
        ((PART, replace(PART, sample_index=5, token_ids=(1,) * 9, logprobs=(0.0,) * 9)), "within max_new_tokens .9."),
        ((PART, replace(PART, sample_index=5, token_ids=(1, 131))), "from 0 to 130"),
    ],
)
def test_parts_that_nothing_can_go_on_from_are_refused(
    tiny_llama: Path, begun: tuple[GeneratedSample, ...], message: str
) -> None:
    engine = EmbeddedEngine(engine_config(tiny_llama), 0, DirectTransport())
    engine.start()
    try:
        with pytest.raises(ConfigError, match=message):
            engine.generate(GroupRequest("g", (1, 2, 3), (5, 6), SamplingParams(max_new_tokens=9), begun))
    finally:
        engine.stop()
