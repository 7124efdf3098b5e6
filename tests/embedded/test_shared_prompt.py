"""A group's shared prompt (the cascade) gives what a prompt of one's own gives (plain attention)."""

from pathlib import Path

import pytest
import torch

from rollout.embedded.plan import RowSpan, make_plan
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import engine_config, make_core, prefill, random_prompt, run


@pytest.mark.parametrize("algorithm", ["NONE", "LOOKUP", "HISTORY"])
def test_samples_are_the_same_with_a_shared_prompt_and_with_their_own(tiny_llama: Path, algorithm: str) -> None:
    params = SamplingParams(max_new_tokens=30)
    prompts = {f"g{i}": random_prompt(3 + 11 * i, seed=i) for i in range(4)}
    seeds = {f"g{i}": tuple(range(100 * i + 50, 100 * i + 52 + i)) for i in range(4)}
    shared = run(
        make_core(engine_config(tiny_llama, algorithm)),
        [GroupRequest(name, prompts[name], seeds[name], params) for name in prompts],
    )
    alone = run(
        make_core(engine_config(tiny_llama, algorithm)),
        [GroupRequest(f"{name}/{s}", prompts[name], (s,), params) for name in prompts for s in seeds[name]],
    )
    for (name, index), sample in shared.items():
        single = alone[f"{name}/{seeds[name][index]}", 0]
        assert sample.token_ids == single.token_ids
        assert torch.allclose(torch.tensor(sample.logprobs), torch.tensor(single.logprobs), atol=1e-4)


def test_ragged_rows_with_and_without_a_prefix_agree_with_plain_attention(tiny_llama: Path) -> None:
    """One pass mixing two prefixes, a row without one, and different numbers of query tokens."""
    core = make_core(engine_config(tiny_llama))
    decoder, cache, device = core.decoder, core.cache, core.decoder.device
    prompts = [random_prompt(12, seed=1), random_prompt(5, seed=2)]
    rows = [(0, 4), (1, 1), (-1, 3), (0, 2), (1, 5)]  # (prefix or none, tokens in the pass)
    tails = [random_prompt(count, seed=20 + i) for i, (_, count) in enumerate(rows)]
    own_prompt = random_prompt(7, seed=3)
    cache.reserve((5, 40), (2, 12))
    for prefix_row, prompt in enumerate(prompts):
        prefill(core, cache.prefixes, prefix_row, prompt)
    prefill(core, cache.own, 2, own_prompt)
    spans = [
        RowSpan(i, 7, count) if prefix < 0 else RowSpan(i, 0, count, prefix, len(prompts[prefix]))
        for i, (prefix, count) in enumerate(rows)
    ]
    plan = make_plan(cache.own, spans, 3, torch.float32, device, cache.prefixes)
    hidden, _ = decoder.hidden(torch.tensor([token for tail in tails for token in tail], device=device), plan)
    first = 0
    for (prefix, count), tail in zip(rows, tails, strict=True):
        sequence = (own_prompt if prefix < 0 else prompts[prefix]) + tail
        cache.own.resize(5, 40)
        plain = make_plan(cache.own, [RowSpan(4, 0, len(sequence))], 3, torch.float32, device)
        expected = decoder.hidden(torch.tensor(sequence, device=device), plain)[0][-count:]
        assert (hidden[first : first + count] - expected).abs().max() < 1e-4
        first += count


def test_a_shared_prompt_is_prefilled_and_stored_once(tiny_llama: Path) -> None:
    core = make_core(engine_config(tiny_llama))
    core.add(GroupRequest("g", random_prompt(50, seed=0), tuple(range(6)), SamplingParams(max_new_tokens=8)), print)
    core.step()
    assert core.batch.kv_tokens_used == 50 + 6  # and each sample's first token, which its first round has cached
    assert (core.cache.prefixes.rows, core.cache.prefixes.capacity) == (1, 50)
    assert core.cache.own.capacity <= 9
