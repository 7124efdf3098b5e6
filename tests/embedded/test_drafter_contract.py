"""What a drafter is promised: every token once and in order, rows that stay its rows, the target's true features."""

from pathlib import Path

import pytest
import torch

from rollout.embedded.drafting import FeatureNeed
from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import (
    Samples,
    continuation,
    engine_config,
    greedy,
    make_core,
    random_prompt,
    run,
)
from tests.support.ledger_drafter import LedgerDrafter
from tests.support.tiny_models import load_reference

PROMPTS = [random_prompt(3 + 17 * i % 40, seed=i) for i in range(8)]


def requests(temperature: float = 1.0, shortest: int = 6) -> list[GroupRequest]:
    return [
        GroupRequest(
            str(i),
            prompt,
            tuple(range(10 * i, 10 * i + 1 + i % 4)),
            SamplingParams(max_new_tokens=shortest + 5 * i, temperature=temperature),
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def tokens(samples: Samples) -> dict:
    return {key: sample.token_ids for key, sample in samples.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("branches", [0, 2])
def test_trees_that_are_right_somewhere_change_no_token_and_save_rounds(
    tiny_llama: Path, temperature: float, branches: int
) -> None:
    plain = run(make_core(engine_config(tiny_llama)), requests(temperature))
    config = engine_config(tiny_llama, num_draft_tokens=11)
    drafter = LedgerDrafter(continuation(plain, PROMPTS), branches=branches)
    drafted = run(make_core(config, drafter=drafter), requests(temperature))
    assert tokens(drafted) == tokens(plain)
    for key, sample in drafted.items():
        assert sample.logprobs == pytest.approx(plain[key].logprobs, abs=1e-4)
        # Three siblings a level and ten nodes: three levels; without siblings ten. All right, unless the budget ends.
        depth = 10 // (branches + 1)
        assert sample.spec.num_rounds == -(-(len(sample.token_ids) - 1) // (depth + 1))


def test_wrong_siblings_alone_change_nothing(tiny_llama: Path) -> None:
    plain = run(make_core(engine_config(tiny_llama)), requests())
    rest = continuation(plain, PROMPTS)
    drafter = LedgerDrafter(lambda context: [(token + 7) % 131 for token in rest(context)])
    drafted = run(make_core(engine_config(tiny_llama, num_draft_tokens=7), drafter=drafter), requests())
    assert tokens(drafted) == tokens(plain)


@pytest.mark.parametrize("need", [FeatureNeed((0, 2)), FeatureNeed((1,), final=True), FeatureNeed(final=True)])
@pytest.mark.parametrize("max_total_tokens", [100_000, 300])
def test_features_are_the_targets_states_at_every_committed_token(
    tiny_llama: Path, need: FeatureNeed, max_total_tokens: int
) -> None:
    """At the lower bound some sequences are preempted, and their features come a second time with the prefill."""
    plain = run(make_core(engine_config(tiny_llama)), requests(0.0, shortest=50))
    drafter = LedgerDrafter(continuation(plain, PROMPTS), need)
    core = make_core(engine_config(tiny_llama, num_draft_tokens=8, max_total_tokens=max_total_tokens), drafter=drafter)
    sequences = {}
    groups = [core.add(request, lambda sample: None) for request in requests(0.0, shortest=50)]
    for sequence in core.waiting:
        sequences[sequence.key] = sequence
    while core.has_work:
        core.step()
    assert (core.num_preemptions > 0) == (max_total_tokens == 300)
    reference = load_reference(tiny_llama)
    shared = {group.key: group for group in groups if group.shares_prompt}
    assert {key for key, _ in drafter.features} <= sequences.keys() | shared.keys()
    for key, sequence in sequences.items():
        with torch.no_grad():
            out = reference(torch.tensor([sequence.token_ids]), output_hidden_states=True)
        # transformers gives the embedding first, and the last layer's only after the final norm
        states = [out.hidden_states[layer + 1][0] if layer < 2 else None for layer in need.layers]
        if None in states:
            states[states.index(None)] = before_final_norm(reference, sequence.token_ids)
        if need.final:
            states.append(out.hidden_states[-1][0])
        expected = torch.cat(states, dim=-1)
        first = sequence.group.prefix_tokens
        owners = [(sequence.group.key, range(first)), (key, range(first, len(sequence.token_ids) - 3))]
        for owner, positions in owners:
            for position in positions:
                assert (drafter.features[owner, position] - expected[position]).abs().max() < 2e-4


def before_final_norm(reference: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    captured: list[torch.Tensor] = []
    hook = reference.model.norm.register_forward_pre_hook(lambda module, args: captured.append(args[0][0]))
    with torch.no_grad():
        reference(torch.tensor([token_ids]))
    hook.remove()
    return captured[0]


def test_requests_that_do_not_speculate_never_reach_the_drafter(tiny_llama: Path) -> None:
    plain = GroupRequest("0", PROMPTS[0], (1, 2), greedy(12, speculative=False))
    drafter = LedgerDrafter(lambda context: (5, 6, 7))
    core = make_core(engine_config(tiny_llama, num_draft_tokens=8), drafter=drafter)
    samples = run(core, [plain, GroupRequest("1", PROMPTS[1], (3,), greedy(12))])
    assert {prefill.token_ids for prefill in drafter.prefills} == {PROMPTS[1]}
    assert len(drafter.forgotten) == 1
    assert samples["0", 0].spec.num_rounds == 0 < samples["1", 0].spec.num_rounds


def test_every_key_is_forgotten_once_and_the_caches_keep_one_shape(tiny_llama: Path) -> None:
    drafter = LedgerDrafter(lambda context: (1, 2))
    core = make_core(engine_config(tiny_llama, num_draft_tokens=9), drafter=drafter)
    run(core, requests())
    num_shared = sum(len(request.seeds) > 1 for request in requests())
    assert len(drafter.forgotten) == len(set(drafter.forgotten))
    assert len(drafter.forgotten) == num_shared + sum(len(request.seeds) for request in requests())
    assert not drafter.num_prefilled
    assert drafter.cache is not None
    for led, store in ((drafter.cache.own, core.cache.own), (drafter.cache.prefixes, core.cache.prefixes)):
        assert (led.rows, led.capacity) == (store.rows, store.capacity)
    core.release_kv()
    assert drafter.cache.own.nbytes == core.cache.own.nbytes == 0


def test_the_drafter_is_bound_to_every_new_version_of_the_target(tiny_llama: Path) -> None:
    drafter = LedgerDrafter(lambda context: ())
    core = make_core(engine_config(tiny_llama), drafter=drafter)
    first, second = core.decoder, make_core(engine_config(tiny_llama)).decoder
    core.use(second, 3)
    assert drafter.bound == [first, second]
    assert (core.decoder, core.version) == (second, 3)
