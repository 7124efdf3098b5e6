"""Greedy identity over every algorithm, shape and dtype: 64 prompts of 128 tokens each, the whole grid at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded.kernels.library import kernels
from slime_spec.config.tree import Config, EngineConfig, ModelConfig, SpeculativeConfig
from slime_spec.types import GroupRequest
from tests.support.draft_formats import NUM_LAYERS, make_format
from tests.support.embedded_harness import Samples, greedy, make_core, random_prompt, run
from tests.support.tiny_models import make_tiny_checkpoint

NUM_PROMPTS, NUM_TOKENS = 64, 128
REQUESTS = [
    GroupRequest(str(i), random_prompt(4 + i % 9, seed=i) * (1 + i % 3), (0,), greedy(NUM_TOKENS))
    for i in range(NUM_PROMPTS)
]
SHAPES = [(1, 1, 2), (3, 1, 4), (5, 1, 6), (7, 1, 8), (5, 4, 8), (3, 8, 32)]
TEXT_DRAFTERS = {
    **{f"lookup {count}": {"algorithm": "LOOKUP", "num_draft_tokens": count} for count in (2, 4, 8, 32)},
    "ngram by recency": {"algorithm": "NGRAM"},
    "ngram by frequency": {"algorithm": "NGRAM", "ngram_match_type": "PROB", "num_draft_tokens": 32},
}
NETWORKS = ["standalone", "eagle3", "eagle", "nextn in a folder of its own", "mimo"]


@pytest.fixture(params=["float32", "bfloat16"], scope="module")
def dtype(request: pytest.FixtureRequest) -> str:
    if request.param == "bfloat16" and kernels() is None:
        pytest.skip("torch's bf16 depends on a pass's size; the bench reports the margins of its divergences")
    return str(request.param)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def plain(target: Path, dtype: str) -> Samples:
    return run(make_core(config_of(target, dtype, SpeculativeConfig(algorithm="NONE"))), REQUESTS)


def config_of(target: Path, dtype: str, speculative: SpeculativeConfig) -> Config:
    engine = EngineConfig(dtype=dtype, max_running_requests=16)
    return Config(model=ModelConfig(hf_checkpoint=str(target)), speculative=speculative, engine=engine)


def tokens_of(samples: Samples) -> list[tuple[int, ...]]:
    return [samples[str(i), 0].token_ids for i in range(NUM_PROMPTS)]


def num_correct(samples: Samples) -> int:
    return sum(sample.spec.num_correct for sample in samples.values())


@pytest.mark.long
@pytest.mark.parametrize("name", TEXT_DRAFTERS)
def test_drafters_without_a_network_change_no_token(target: Path, plain: Samples, dtype: str, name: str) -> None:
    samples = run(make_core(config_of(target, dtype, SpeculativeConfig(**TEXT_DRAFTERS[name]))), REQUESTS)  # type: ignore[arg-type]
    assert tokens_of(samples) == tokens_of(plain)
    assert num_correct(samples) > 0


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_drafters_with_a_network_change_no_token(
    tmp_path: Path, dtype: str, name: str, shape: tuple[int, int, int]
) -> None:
    if name == "standalone":
        folder, draft = make_tiny_checkpoint(tmp_path / "target"), make_tiny_checkpoint(tmp_path / "draft")
        num_steps, topk, count = shape
        network = SpeculativeConfig(
            algorithm="STANDALONE",
            draft_model_path=str(draft),
            num_steps=num_steps,
            eagle_topk=topk,
            num_draft_tokens=count,
        )
        config = config_of(folder, dtype, network)
    else:
        tiny = make_format(tmp_path, name)
        config = tiny.config(*shape, engine={"dtype": dtype, "max_running_requests": 16})
    expected = run(make_core(replace(config, speculative=SpeculativeConfig(algorithm="NONE"))), REQUESTS)
    samples = run(make_core(config), REQUESTS)
    assert tokens_of(samples) == tokens_of(expected)
    if name == "standalone" or shape[1] > 1:
        assert num_correct(samples) > 0
