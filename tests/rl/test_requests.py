"""Seeds and group requests."""

from slime_spec.config.tree import RolloutConfig
from slime_spec.rl.requests import group_requests, sample_seed
from slime_spec.types import Prompt


def test_a_samples_seed_depends_on_the_run_the_prompt_and_the_sample_only():
    seeds = {sample_seed(run, prompt, index) for run in range(3) for prompt in range(20) for index in range(8)}
    assert len(seeds) == 3 * 20 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, 5, 2) == sample_seed(0, 5, 2)


def test_every_prompt_becomes_one_group_with_the_runs_sampling_parameters():
    prompts = [Prompt(4, "t", "?", (1, 2), "x"), Prompt(9, "t", "?", (3,), "y")]
    config = RolloutConfig(n_samples_per_prompt=3, temperature=0.7, top_p=0.9, max_response_len=11, stop=("\n",))
    first, second = group_requests(prompts, config, run_seed=1)
    assert (first.group_id, second.group_id) == ("4", "9")
    assert first.prompt_token_ids == (1, 2)
    assert first.seeds == tuple(sample_seed(1, 4, i) for i in range(3))
    assert (first.params.temperature, first.params.top_p, first.params.max_new_tokens) == (0.7, 0.9, 11)
    assert first.params.stop == ("\n",)


def test_a_prompts_advice_goes_with_its_own_group_and_edit_with_all():
    prompts = [Prompt(4, "t", "?", (1, 2), "x", advice_token_ids=(7, 8)), Prompt(9, "t", "?", (3,), "y")]
    for edit in (False, True):
        first, second = group_requests(prompts, RolloutConfig(), run_seed=1, edit=edit)
        assert (first.params.advice_token_ids, second.params.advice_token_ids) == ((7, 8), ())
        assert (first.params.edit, second.params.edit) == (edit, edit)
