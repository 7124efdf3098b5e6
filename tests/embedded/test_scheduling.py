"""Admission, memory bound, rows, stopping and aborting."""

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rollout.embedded.core import GenerationCore
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams
from tests.support.embedded_harness import (
    Samples,
    ScriptedDrafter,
    engine_config,
    greedy,
    make_core,
    random_prompt,
    run,
)

PARAMS = SamplingParams(max_new_tokens=20)


def mixed_requests(count: int) -> list[GroupRequest]:
    return [
        GroupRequest(
            f"g{i}",
            random_prompt(1 + i * 13 % 50, seed=i),
            tuple(range(10 * i, 10 * i + 1 + i % 5)),
            SamplingParams(max_new_tokens=1 + i * 7 % 30),
        )
        for i in range(count)
    ]


def tokens(samples: Samples) -> dict:
    return {key: sample.token_ids for key, sample in samples.items()}


def step_within_bound(core: GenerationCore, requests: list[GroupRequest]) -> Samples:
    """Run like ``run``, checking after every step that allocated KV stays within the bound."""
    samples: list[GeneratedSample] = []
    for request in requests:
        core.add(request, samples.append)
    while core.has_work:
        core.step()
        stores = (core.cache.own, core.cache.prefixes)
        assert sum(store.rows * store.capacity for store in stores) <= core.cache.max_total_tokens
        assert sum(store.nbytes for store in stores) <= core.cache.max_total_tokens * 2 * 3 * 2 * 16 * 4
        assert core.batch.kv_tokens_used <= core.cache.max_total_tokens
    return {(sample.group_id, sample.sample_index): sample for sample in samples}


@pytest.mark.parametrize("max_total_tokens", [80, 200, 1000])
def test_tight_memory_delays_requests_but_changes_no_output(tiny_llama: Path, max_total_tokens: int) -> None:
    requests = mixed_requests(20)
    roomy = run(make_core(engine_config(tiny_llama, "LOOKUP", max_total_tokens=100_000)), requests)
    core = make_core(engine_config(tiny_llama, "LOOKUP", max_total_tokens=max_total_tokens, max_running_requests=7))
    tight = step_within_bound(core, requests)
    assert tokens(tight) == tokens(roomy)
    assert len(tight) == sum(len(request.seeds) for request in requests)
    assert core.batch.kv_tokens_used == 0
    assert not core.batch.groups


def test_a_group_larger_than_the_batch_runs_in_parts(tiny_llama: Path) -> None:
    request = GroupRequest("g", random_prompt(10, seed=0), tuple(range(9)), PARAMS)
    whole = run(make_core(engine_config(tiny_llama)), [request])
    assert tokens(run(make_core(engine_config(tiny_llama, max_running_requests=2)), [request])) == tokens(whole)


def test_no_more_than_max_running_requests_run_and_the_rest_wait(tiny_llama: Path) -> None:
    core = make_core(engine_config(tiny_llama, max_running_requests=3))
    for request in mixed_requests(8):
        core.add(request, lambda sample: None)
    seen = set()
    while core.has_work:
        core.step()
        seen.add(len(core.batch.sequences))
        assert all(sequence.num_remaining > 0 for sequence in core.batch.sequences)
    assert max(seen) <= 3


def test_the_response_is_cut_at_the_first_stop_inside_an_accepted_block(tiny_llama: Path) -> None:
    prompt = random_prompt(8, seed=3)
    full = run(make_core(engine_config(tiny_llama)), [GroupRequest("g", prompt, (0,), greedy(30))])["g", 0]
    stop = full.token_ids[9]
    cut = full.token_ids.index(stop) + 1
    oracle = ScriptedDrafter(lambda context: full.token_ids[len(context.token_ids) - len(prompt) :])
    request = GroupRequest("g", prompt, (0,), greedy(30, stop_token_ids=(stop,)))
    sample = run(make_core(engine_config(tiny_llama, num_draft_tokens=8), drafter=oracle), [request])["g", 0]
    assert sample.token_ids == full.token_ids[:cut]
    assert sample.logprobs == pytest.approx(full.logprobs[:cut], abs=1e-4)
    assert (sample.finish_reason, sample.matched_stop) == ("stop", stop)
    assert len(sample.token_ids) < 1 + sample.spec.num_rounds + sample.spec.num_correct


def test_eos_of_the_generation_config_stops_unless_ignored(tiny_llama: Path, tmp_path: Path) -> None:
    prompt = random_prompt(8, seed=3)
    full = run(make_core(engine_config(tiny_llama)), [GroupRequest("g", prompt, (0,), greedy(30))])["g", 0]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_llama / name)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{full.token_ids[4]}, 130]}}')
    core = make_core(engine_config(tmp_path))
    stopped = run(core, [GroupRequest("g", prompt, (0,), greedy(30))])["g", 0]
    assert stopped.finish_reason == "stop"
    assert stopped.matched_stop == stopped.token_ids[-1] == full.token_ids[4]
    assert len(stopped.token_ids) <= 5
    ignored = run(core, [GroupRequest("g", prompt, (0,), greedy(30, ignore_eos=True))])["g", 0]
    assert ignored.token_ids == full.token_ids
    assert (ignored.finish_reason, ignored.matched_stop) == ("length", None)


def test_eos_that_the_tokenizer_alone_names_ends_a_reply_in_every_path_of_the_engine(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Case reports/02: also a partial sample that goes on, and min_new_tokens, which keeps EOS away."""
    prompt = random_prompt(8, seed=3)
    full = run(make_core(engine_config(tiny_llama)), [GroupRequest("g", prompt, (0,), greedy(30))])["g", 0]
    eos = full.token_ids[4]
    vocabulary = {f"token{index}": index for index in range(131)}
    saved = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(WordLevel(vocabulary)), eos_token=f"token{eos}")
    saved.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_llama / name)
    first = full.token_ids.index(eos)
    core = make_core(engine_config(tmp_path))
    stopped = run(core, [GroupRequest("g", prompt, (0,), greedy(30))])["g", 0]
    assert (stopped.token_ids, stopped.finish_reason) == (full.token_ids[: first + 1], "stop")
    partial = replace(full, token_ids=full.token_ids[:first], logprobs=full.logprobs[:first], finish_reason="abort")
    request = GroupRequest("g", prompt, (0,), greedy(30), partials=(partial,))
    assert run(core, [request])["g", 0].token_ids == full.token_ids[: first + 1]
    later = run(core, [GroupRequest("g", prompt, (0,), greedy(30, min_new_tokens=first + 2))])["g", 0]
    assert eos not in later.token_ids[: first + 2]


def test_abort_returns_running_samples_with_what_they_have_and_leaves_others_alone(tiny_llama: Path) -> None:
    long, short = SamplingParams(max_new_tokens=100), SamplingParams(max_new_tokens=12)
    other = GroupRequest("other", random_prompt(9, seed=2), (5, 6), short)
    expected = run(make_core(engine_config(tiny_llama)), [other])
    core = make_core(engine_config(tiny_llama, max_running_requests=4))
    samples: list[GeneratedSample] = []
    doomed = core.add(GroupRequest("doomed", random_prompt(9, seed=1), (1, 2, 3), long), samples.append)
    core.add(other, samples.append)
    late = core.add(GroupRequest("late", random_prompt(4, seed=1), (1,), long), samples.append)
    for _ in range(5):
        core.step()
    core.abort(doomed)
    core.abort(late)
    while core.has_work:
        core.step()
    by_key = {(sample.group_id, sample.sample_index): sample for sample in samples}
    assert len(by_key) == len(samples) == 6
    for index in range(3):
        assert by_key["doomed", index].finish_reason == "abort"
        assert len(by_key["doomed", index].token_ids) == len(by_key["doomed", index].logprobs) == 6
    assert (by_key["late", 0].finish_reason, by_key["late", 0].token_ids) == ("abort", ())
    assert all(by_key[key].token_ids == sample.token_ids for key, sample in expected.items())
    assert core.batch.kv_tokens_used == 0


def test_the_drafter_forgets_every_finished_request_and_shared_prompt(tiny_llama: Path) -> None:
    drafter = ScriptedDrafter(lambda context: (1, 2))
    run(make_core(engine_config(tiny_llama), drafter=drafter), mixed_requests(6))
    assert {key for key, _ in drafter.observed} <= set(drafter.forgotten)
    num_samples, num_shared_prompts = sum(1 + i % 5 for i in range(6)), sum(i % 5 > 0 for i in range(6))
    assert len(drafter.forgotten) == len(set(drafter.forgotten)) == num_samples + num_shared_prompts
