"""Which replies of a step a draft learns from, and where their rows are in packed microbatches."""

from slime_spec.types import TrainSample
from trainer_bridge.draft_rows import choose_replies, reply_rows
from trainer_bridge.packing import plan_microbatches


def test_chosen_replies_are_drawn_from_those_with_a_token_to_draft() -> None:
    samples = [TrainSample(tuple(range(10 + extra)), 10, (-1.0,) * extra, 1.0) for extra in (1, 2, 30, 5, 1, 9)]
    chosen = choose_replies(samples, 10, 8, "seed")
    assert {each.sample_index: each.num_rows for each in chosen} == {1: 1, 2: 8, 3: 4, 5: 8}
    assert all(0 <= each.first <= len(samples[each.sample_index].token_ids) - 11 - each.num_rows for each in chosen)
    assert chosen == choose_replies(samples, 10, 8, "seed")
    draws = {tuple(choose_replies(samples, 2, 8, str(seed))) for seed in range(20)}
    assert all(len(draw) == 2 for draw in draws)
    assert len(draws) > 10
    assert choose_replies(samples[:1], 10, 8, "seed") == []


def test_a_draft_sees_so_many_tokens_up_to_its_window() -> None:
    sample = TrainSample(tuple(range(30)), 10, (-1.0,) * 20, 1.0)
    (chosen,) = choose_replies([sample], 1, 4, "seed")
    (plan,) = plan_microbatches([sample], 64, 1)[0]
    for max_length in (6, 13, 100):
        (rows,) = reply_rows([sample], plan, [chosen], max_length)
        end = 10 + chosen.first + 4
        first = max(0, end - max_length)
        assert rows.fed.tolist() == list(range(first, end))
        assert rows.token_ids == tuple(range(first, end + 1))
        assert rows.logits.tolist() == list(range(1 + chosen.first, 5 + chosen.first))


def test_where_replies_are_few_all_come_as_often_before_one_comes_again() -> None:
    samples = [TrainSample(tuple(range(14)), 10, (-1.0,) * 4, 1.0)] * 4
    chosen = choose_replies(samples, 10, 8, "seed")
    assert sorted(slot for each in chosen for slot in each.slots) == list(range(10))
    assert sorted(len(each.slots) for each in chosen) == [2, 2, 3, 3]
    for round_number in range(2):
        of_round = set(range(4 * round_number, 4 * round_number + 4))
        assert all(len(of_round & set(each.slots)) == 1 for each in chosen)
