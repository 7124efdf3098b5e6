"""SGLang's three numbers, resolved by SGLang's rules."""

from __future__ import annotations

import pytest

from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import ConfigError
from slime_spec.sglang.draft_shape import check_shape, draft_shape, tree_pool_size

LLAMA, QWEN = "LlamaForCausalLM", "Qwen2ForCausalLM"


def numbers(architecture: str, algorithm: str, **settings: object) -> tuple[int, int, int]:
    config = SpeculativeConfig(algorithm=algorithm, **settings)  # type: ignore[arg-type]
    check_shape(config)
    shape = draft_shape(config, architecture)
    return shape.num_steps, shape.topk, shape.num_draft_tokens


@pytest.mark.parametrize(
    ("architecture", "algorithm", "expected"),
    [
        (LLAMA, "EAGLE", (5, 4, 8)),
        (LLAMA, "EAGLE3", (5, 4, 8)),
        (LLAMA, "NEXTN", (5, 4, 8)),
        ("Grok1ForCausalLM", "EAGLE", (5, 4, 8)),
        (LLAMA, "STANDALONE", (3, 1, 4)),
        (QWEN, "EAGLE3", (3, 1, 4)),
        ("MiMoForCausalLM", "NEXTN", (3, 1, 4)),
        (QWEN, "NGRAM", (11, 10, 12)),
        (QWEN, "LOOKUP", (4, 1, 5)),
        (QWEN, "HISTORY", (7, 1, 8)),
    ],
)
def test_unset_numbers_are_sglangs_automatic_ones(
    architecture: str, algorithm: str, expected: tuple[int, int, int]
) -> None:
    assert numbers(architecture, algorithm) == expected


@pytest.mark.parametrize("switch", ["use_rejection_sampling", "use_block_verification", "use_gumbel_coupling"])
def test_sampled_drafts_are_a_chain_for_a_llama_target_too(switch: str) -> None:
    assert numbers(LLAMA, "EAGLE3", **{switch: True}) == (3, 1, 4)


def test_a_chain_is_verified_as_one_token_more_than_its_steps_whatever_was_asked() -> None:
    assert numbers(LLAMA, "EAGLE3", num_steps=3, eagle_topk=1, num_draft_tokens=9) == (3, 1, 4)
    assert numbers(LLAMA, "EAGLE3", num_steps=6) == (6, 1, 7)
    assert numbers(LLAMA, "LOOKUP", num_steps=6, num_draft_tokens=3) == (6, 1, 7)
    assert numbers(LLAMA, "LOOKUP", num_draft_tokens=3) == (2, 1, 3)
    assert numbers(LLAMA, "HISTORY", num_steps=3, num_draft_tokens=9) == (3, 1, 4)


def test_a_tree_has_the_size_that_was_asked_for_up_to_its_pool_and_root() -> None:
    assert tree_pool_size(num_steps=3, topk=2) == 10
    assert numbers(LLAMA, "EAGLE", num_steps=3, eagle_topk=2, num_draft_tokens=11) == (3, 2, 11)
    with pytest.raises(ConfigError, match="must be from 2 to 11"):
        numbers(LLAMA, "EAGLE", num_steps=3, eagle_topk=2, num_draft_tokens=12)
    with pytest.raises(ConfigError, match="must be from 2 to 11"):
        numbers(LLAMA, "EAGLE", num_steps=3, eagle_topk=2)


@pytest.mark.parametrize("set_alone", ["eagle_topk", "num_draft_tokens"])
def test_a_number_without_num_steps_is_refused(set_alone: str) -> None:
    with pytest.raises(ConfigError) as caught:
        numbers(LLAMA, "EAGLE3", **{set_alone: 4})
    assert caught.value.setting == f"speculative.{set_alone}"
    assert "--speculative-num-steps" in caught.value.remedy


def test_ngram_takes_its_breadth_for_topk_and_ignores_steps() -> None:
    assert numbers(QWEN, "NGRAM", num_steps=2, ngram_max_bfs_breadth=3, num_draft_tokens=6) == (5, 3, 6)


@pytest.mark.parametrize(
    ("algorithm", "settings", "headroom"),
    [
        ("NONE", {}, 1),
        ("LOOKUP", {}, 5),
        ("HISTORY", {}, 8),
        ("NGRAM", {}, 12),  # the trie's breadth takes no KV
        ("STANDALONE", {"num_steps": 7}, 8),
        ("EAGLE3", {"num_steps": 5, "eagle_topk": 4, "num_draft_tokens": 8}, 17),
        ("EAGLE3", {"num_steps": 2, "eagle_topk": 4, "num_draft_tokens": 16}, 16),
    ],
)
def test_headroom_holds_what_the_target_verifies_and_what_the_drafter_writes(
    algorithm: str, settings: dict[str, int], headroom: int
) -> None:
    assert draft_shape(SpeculativeConfig(algorithm=algorithm, **settings), LLAMA).headroom == headroom
