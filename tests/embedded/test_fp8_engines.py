"""An engine that loads DeepSeek-R1's format of weights in fp8 computes what transformers does with their numbers."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import pytest
import torch

from rollout.embedded.assemble import Assembly
from rollout.embedded.weights import named_tensors
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.types import GroupRequest
from tests.support.embedded_harness import Samples, greedy, random_prompt, run
from tests.support.fp8_checkpoints import numbers_of, store_in_fp8, store_numbers
from tests.support.make_stand_ins import VOCAB, make_deepseek
from tests.support.tiny_models import load_reference

PROMPTS = [random_prompt(9, seed=1, vocab=VOCAB), random_prompt(14, seed=2, vocab=VOCAB)]
BLOCKS = {"smaller than most matrices": (16, 16), "larger than any": (128, 128), "of two sizes": (32, 20)}


@pytest.fixture(scope="module", params=BLOCKS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The stand-in of R1 in fp8, and the same numbers in fp32."""
    root = tmp_path_factory.mktemp("r1")
    stored = store_in_fp8(make_deepseek(root / "stand-in").target, BLOCKS[request.param])
    return stored, store_numbers(stored, root / "numbers")


def assembly(folder: Path, algorithm: str, dtype: str = "float32") -> Assembly:
    speculative = SpeculativeConfig(algorithm=algorithm)
    engine = EngineConfig(dtype=dtype, context_length=256)
    return Assembly(Config(model=ModelConfig(str(folder)), speculative=speculative, engine=engine))


def generated(folder: Path, algorithm: str) -> Samples:
    requests = [GroupRequest(str(index), prompt, (0, 1), greedy(24)) for index, prompt in enumerate(PROMPTS)]
    return run(assembly(folder, algorithm).core(0, perf_counter), requests)


@pytest.mark.parametrize("algorithm", ["NONE", "NEXTN"])
def test_an_engine_says_greedily_what_transformers_says_with_the_numbers(
    algorithm: str, folders: tuple[Path, Path]
) -> None:
    stored, numbers = folders
    samples, same = generated(stored, algorithm), generated(numbers, algorithm)
    model = load_reference(numbers)
    for index, prompt in enumerate(PROMPTS):
        sample = samples[str(index), 0]
        ids = torch.tensor([[*prompt, *sample.token_ids]])
        with torch.inference_mode():
            wanted = model(ids).logits[0, len(prompt) - 1 : -1]
        assert wanted.argmax(dim=-1).tolist() == list(sample.token_ids)
        logprobs = wanted.log_softmax(dim=-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logprobs), logprobs, atol=5e-5, rtol=1e-5)
        # The MTP layer, whose drafts are never seen: as many are proposed and accepted as with the numbers.
        assert sample.spec == same[str(index), 0].spec
        assert (sample.spec.num_proposed > 0) == (algorithm == "NEXTN")


def test_an_engines_weights_are_the_numbers_in_its_dtype(folders: tuple[Path, Path]) -> None:
    stored, _ = folders
    wanted = numbers_of(stored)
    core = assembly(stored, "NONE", "bfloat16").core(0, perf_counter)
    for name, tensor in named_tensors(core.target.decoder).items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
