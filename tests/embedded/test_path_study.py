"""The study of rules for several paths credits each with what it would emit, on the real pair."""

import numpy as np
import pytest

from tests.support.path_study import ADVANCING, MODEL, addresses, measure, table


def test_a_tree_has_every_elder_sibling_and_parent_of_its_leaves() -> None:
    assert addresses("001 1") == {(0,), (1,), (0, 0), (0, 0, 0), (0, 0, 1)}


@pytest.mark.real_model
def test_rules_are_credited_with_the_tokens_that_a_round_emits() -> None:
    if not MODEL.is_dir():
        pytest.skip("models/SmolLM2-135M-Instruct is not there: run slime-spec models")
    judge = measure(num_prompts=2, seed=3)
    brought = {name: np.array(each) for name, each in judge.brought.items()}
    emitted, expected = np.array(judge.emitted), brought[ADVANCING]
    # Five standard errors: a right study fails for one seed in a million, and the seed is fixed.
    assert abs((emitted - expected).mean()) < 5 * (emitted - expected).std() / len(emitted) ** 0.5
    assert (brought["block, 5"] >= 1.0).all()
    for length in (2, 4, 6):  # the same path is judged first, by the same trials
        assert (brought[f"traversal, {'0' * length} 1"] > brought[f"block, {length}"] - 1e-9).all()
    assert "| traversal, 000000 1 | 7 |" in table(judge)
