"""What the KV cache holds, known from the configuration and the model's shape alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from rollout.embedded.validate import check_kv_cache, limits_of
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import RolloutConfig, SpeculativeConfig
from slime_spec.errors import ConfigError
from tests.support.embedded_harness import engine_config

KV_BYTES = 2 * 3 * 2 * 16 * 4  # per token: keys and values, layers, KV heads, head_dim, fp32
LENGTHS = RolloutConfig(max_prompt_len=100, max_response_len=60)


def test_the_kv_cache_in_gb_becomes_tokens_of_this_model_and_dtype(tiny_llama: Path) -> None:
    spec = ModelSpec.from_folder(tiny_llama)
    assert limits_of(engine_config(tiny_llama, kv_cache_gb=0.01), spec).max_total_tokens == 10_000_000 // KV_BYTES
    half = engine_config(tiny_llama, kv_cache_gb=0.01, dtype="bfloat16")
    assert limits_of(half, spec).max_total_tokens == 20_000_000 // KV_BYTES
    assert limits_of(engine_config(tiny_llama, max_total_tokens=77), spec).max_total_tokens == 77


def test_what_a_draft_needs_beside_the_tokens_counts_in_the_bound(tiny_llama: Path) -> None:
    spec = ModelSpec.from_folder(tiny_llama)
    chain = engine_config(tiny_llama, "LOOKUP", num_draft_tokens=7, kv_cache_gb=0.01)
    assert (limits_of(chain, spec).headroom, limits_of(engine_config(tiny_llama), spec).headroom) == (7, 0)
    exact = replace(engine_config(tiny_llama, "LOOKUP", num_draft_tokens=7, max_total_tokens=167), rollout=LENGTHS)
    assert check_kv_cache(exact, spec).max_total_tokens == 167
    with pytest.raises(ConfigError, match=r"max_response_len \+ 7 drafted = 167 tokens"):
        check_kv_cache(replace(exact, engine=replace(exact.engine, max_total_tokens=166)), spec)
    # The draft is the target itself here: its cache has as many bytes per token, so the bound holds half the tokens.
    network = SpeculativeConfig(algorithm="STANDALONE", draft_model_path=str(tiny_llama), num_steps=5, eagle_topk=4)
    tree = limits_of(replace(chain, speculative=replace(network, num_draft_tokens=8)), spec)
    assert (tree.max_total_tokens, tree.headroom) == (10_000_000 // (2 * KV_BYTES), 17)


@pytest.mark.parametrize("room", [0, -1])
def test_a_kv_cache_that_cannot_hold_the_longest_sequence_is_refused(tiny_llama: Path, room: int) -> None:
    kv_cache_gb = (160 + room + 0.5) * KV_BYTES / 1e9
    in_gb = replace(engine_config(tiny_llama, kv_cache_gb=kv_cache_gb), rollout=LENGTHS)
    in_tokens = replace(engine_config(tiny_llama, max_total_tokens=160 + room), rollout=LENGTHS)
    spec = ModelSpec.from_folder(tiny_llama)
    for config, setting in ((in_gb, "engine.kv_cache_gb"), (in_tokens, "engine.max_total_tokens")):
        if room == 0:
            assert check_kv_cache(config, spec).max_total_tokens == 160
            continue
        with pytest.raises(ConfigError, match="160 tokens") as caught:
            check_kv_cache(config, spec)
        assert caught.value.setting == setting
