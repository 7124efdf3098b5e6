"""A suggestion is the name that was meant, or none."""

import pytest

from slime_spec.suggest import closest, did_you_mean, num_edits


@pytest.mark.parametrize(
    ("ours", "theirs", "edits"),
    [
        ("", "", 0),
        ("lr", "lr", 0),
        ("", "abc", 3),
        ("graf", "graph", 2),
        ("trianer", "trainer", 1),
        ("kitten", "sitting", 3),
    ],
)
def test_edits_are_counted_as_by_hand(ours: str, theirs: str, edits: int) -> None:
    assert num_edits(ours, theirs) == num_edits(theirs, ours) == edits


FLAGS = (
    "--save-interval",
    "--rollout-top-k",
    "--rollout-top-p",
    "--rollout-batch-size",
    "--lr",
    "--min-p",
    "--use-wandb",
)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("--rolout_batch-size", "--rollout-batch-size"),
        ("--rolloutbatchsize", "--rollout-batch-size"),
        ("--batch-size", "--rollout-batch-size"),
        ("--LR", "--lr"),
        ("--min-q", "--min-p"),
        ("--eval-interval", None),
        ("--rollout-top-n", None),
        ("--use-kl", None),
        ("--size", None),
        ("--", None),
    ],
)
def test_a_name_is_suggested_where_its_words_are_near_and_it_is_the_only_one(name: str, meant: str | None) -> None:
    assert closest(name, FLAGS) == meant
    assert did_you_mean(name, FLAGS, repr) == ("" if meant is None else f"Did you mean {meant!r}? ")
