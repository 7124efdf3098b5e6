"""Passes as graphs give the tokens of passes operator by operator."""

from pathlib import Path

import pytest

from slime_spec.types import GroupRequest
from tests.support.draft_formats import make_format
from tests.support.embedded_harness import greedy, make_core, random_prompt, run

pytest.importorskip("triton")
from tests.support.graphs_on_cpu import graphs_on_cpu

REQUESTS = [GroupRequest(str(i), random_prompt(4 + i, seed=i), (0, 1)[: 1 + i % 2], greedy(9)) for i in range(3)]


@pytest.mark.parametrize("name", ["eagle3", "eagle", "mimo"])
def test_chains_of_graphs_give_the_tokens_of_operators(tmp_path: Path, name: str) -> None:
    tiny = make_format(tmp_path, name)
    config = tiny.config(3, 1, 4, engine={"max_running_requests": 16})
    expected = run(make_core(config), REQUESTS)
    with graphs_on_cpu() as capturer:
        got = run(make_core(config), REQUESTS)
    assert {key: each.token_ids for key, each in got.items()} == {key: each.token_ids for key, each in expected.items()}
    assert {key: each.spec for key, each in got.items()} == {key: each.spec for key, each in expected.items()}
    assert capturer.num_replays > capturer.num_captured
