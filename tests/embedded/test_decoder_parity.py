"""The lean forward computes what transformers computes."""

from pathlib import Path

import pytest
import torch

from slime_spec.types import GroupRequest, SamplingParams
from tests.support.embedded_harness import ReplayDrafter, engine_config, greedy, make_core, prefill, random_prompt, run
from tests.support.tiny_models import LLAMA3_ROPE, load_reference, make_tiny_checkpoint

FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama tied, llama3 rope": ("LlamaForCausalLM", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3 without GQA": ("Qwen3ForCausalLM", {"num_key_value_heads": 6}),
    "vocabulary of whole blocks": ("LlamaForCausalLM", {"vocab_size": 512}),
}
REAL_MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(params=FAMILIES, scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, overrides = FAMILIES[request.param]
    return make_tiny_checkpoint(tmp_path_factory.mktemp("family") / "model", architecture, **overrides)


def test_prefill_logits_equal_those_of_transformers(checkpoint: Path) -> None:
    core, reference = make_core(engine_config(checkpoint)), load_reference(checkpoint)
    for length in (1, 2, 17, 90):
        prompt = random_prompt(length, seed=length)
        core.cache.reserve((1, length), (0, 0))
        logits = prefill(core, core.cache.own, 0, prompt)
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[:, -1]
        assert (logits - expected).abs().max() < 2e-4


def test_greedy_tokens_are_those_of_generate(checkpoint: Path) -> None:
    prompts = [random_prompt(length, seed=length) for length in (3, 20, 45)]
    requests = [GroupRequest(str(i), prompt, (0,), greedy(40)) for i, prompt in enumerate(prompts)]
    samples = run(make_core(engine_config(checkpoint)), requests)
    reference = load_reference(checkpoint)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert list(samples[str(i), 0].token_ids) == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_under_speculation_equal_a_fresh_forward(tiny_llama: Path, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=60, temperature=temperature, top_p=0.8)
    prompts = [random_prompt(6 + i, seed=i) for i in range(6)]
    requests = [GroupRequest(str(i), prompt, (i, i + 100), params) for i, prompt in enumerate(prompts)]
    config = engine_config(tiny_llama, num_draft_tokens=6)
    drafter = ReplayDrafter(run(make_core(config), requests), prompts, wrong_every=4)
    samples = run(make_core(config, drafter=drafter), requests)
    reference = load_reference(tiny_llama)
    assert sum(sample.spec.num_correct for sample in samples.values()) > 300
    for (group_id, _), sample in samples.items():
        prompt = prompts[int(group_id)]
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(sample.token_ids).unsqueeze(1)).squeeze(1)
        assert (torch.tensor(sample.logprobs) - expected).abs().max() < 1e-4


def test_bfloat16_logprobs_stay_close_to_float32(tiny_llama: Path) -> None:
    prompt = random_prompt(30, seed=5)
    request = GroupRequest("g", prompt, (1, 2, 3), SamplingParams(max_new_tokens=50))
    samples = run(make_core(engine_config(tiny_llama, "LOOKUP", dtype="bfloat16")), [request])
    reference = load_reference(tiny_llama)
    for sample in samples.values():
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids).unsqueeze(1)).squeeze(1)
        assert (torch.tensor(sample.logprobs) - expected).abs().mean() < 0.1


@pytest.mark.real_model
def test_the_real_model_gives_transformers_logits_and_greedy_tokens() -> None:
    prompt = random_prompt(40, seed=0, vocab=49152)
    core, reference = make_core(engine_config(REAL_MODEL, "LOOKUP")), load_reference(REAL_MODEL)
    core.cache.reserve((1, 40), (0, 0))
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[:, -1]
    assert (prefill(core, core.cache.own, 0, prompt) - expected).abs().max() < 2e-4
    sample = run(core, [GroupRequest("g", prompt, (0,), greedy(32, ignore_eos=True))])["g", 0]
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, min_new_tokens=32, do_sample=False
    )
    assert list(sample.token_ids) == out[0, 40:].tolist()
