"""Greedy identity over every algorithm, shape and dtype: 64 prompts of 128 tokens each, the whole grid at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
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
    **{f"history {count}": {"algorithm": "HISTORY", "num_draft_tokens": count} for count in (2, 8, 32)},
    "ngram by recency": {"algorithm": "NGRAM"},
    "ngram by frequency": {"algorithm": "NGRAM", "ngram_match_type": "PROB", "num_draft_tokens": 32},
}
NETWORKS = ["standalone", "eagle3", "eagle", "nextn in a folder of its own", "mimo"]


DTYPES = ["float32", "bfloat16"]


@dataclass(frozen=True)
class Plain:
    """A target, what drafts for it, and its responses without speculation."""

    config: Callable[[tuple[int, int, int]], Config]
    tokens: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def plain_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Plain]:
    """``plain_of(network, dtype)``: the same for every shape, so generated once."""

    @cache
    def made(name: str, dtype: str) -> Plain:
        config = config_of_network(tmp_path_factory.mktemp("network"), name, dtype)
        return Plain(config, plain_tokens(config(SHAPES[0])))

    return made


@pytest.fixture(scope="module")
def text_plain_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[tuple[int, ...]]]]:
    @cache
    def made(dtype: str) -> tuple[Path, list[tuple[int, ...]]]:
        target = make_tiny_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=NUM_LAYERS)
        return target, plain_tokens(config_of(target, dtype, SpeculativeConfig(algorithm="NONE")))

    return made


def needs_kernels(dtype: str, pytestconfig: pytest.Config) -> None:
    has_kernels = pytestconfig.getoption("--device") == "cpu" and kernels() is not None
    if dtype == "bfloat16" and not has_kernels:
        pytest.skip("torch's bf16 depends on a pass's size; the bench reports the margins of its divergences")


def config_of(target: Path, dtype: str, speculative: SpeculativeConfig) -> Config:
    engine = EngineConfig(dtype=dtype, max_running_requests=16)
    return Config(model=ModelConfig(hf_checkpoint=str(target)), speculative=speculative, engine=engine)


def config_of_network(folder: Path, name: str, dtype: str) -> Callable[[tuple[int, int, int]], Config]:
    """A tiny target and draft, as the configuration of each shape."""
    if name != "standalone":
        tiny = make_format(folder, name)
        return lambda shape: tiny.config(*shape, engine={"dtype": dtype, "max_running_requests": 16})
    target, draft = make_tiny_checkpoint(folder / "target"), make_tiny_checkpoint(folder / "draft")

    def of_shape(shape: tuple[int, int, int]) -> Config:
        numbers = dict(zip(("num_steps", "eagle_topk", "num_draft_tokens"), shape, strict=True))
        return config_of(
            target, dtype, SpeculativeConfig(algorithm="STANDALONE", draft_model_path=str(draft), **numbers)
        )

    return of_shape


def plain_tokens(config: Config) -> list[tuple[int, ...]]:
    return tokens_of(run(make_core(replace(config, speculative=SpeculativeConfig(algorithm="NONE"))), REQUESTS))


def tokens_of(samples: Samples) -> list[tuple[int, ...]]:
    return [samples[str(i), 0].token_ids for i in range(NUM_PROMPTS)]


def num_correct(samples: Samples) -> int:
    return sum(sample.spec.num_correct for sample in samples.values())


@pytest.mark.long
@pytest.mark.proves("rollout.embedded.drafters")
@pytest.mark.parametrize("name", TEXT_DRAFTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_drafters_without_a_network_change_no_token(
    text_plain_of: Callable[[str], tuple[Path, list[tuple[int, ...]]]],
    pytestconfig: pytest.Config,
    dtype: str,
    name: str,
) -> None:
    needs_kernels(dtype, pytestconfig)
    target, expected = text_plain_of(dtype)
    samples = run(make_core(config_of(target, dtype, SpeculativeConfig(**TEXT_DRAFTERS[name]))), REQUESTS)  # type: ignore[arg-type]
    assert tokens_of(samples) == expected
    assert num_correct(samples) > 0


@pytest.mark.long
@pytest.mark.proves("rollout.embedded.drafters")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_drafters_with_a_network_change_no_token(
    plain_of: Callable[[str, str], Plain],
    pytestconfig: pytest.Config,
    dtype: str,
    name: str,
    shape: tuple[int, int, int],
) -> None:
    needs_kernels(dtype, pytestconfig)
    plain = plain_of(name, dtype)
    samples = run(make_core(plain.config(shape)), REQUESTS)
    assert tokens_of(samples) == plain.tokens
    if name == "standalone" or shape[1] > 1:
        assert num_correct(samples) > 0
