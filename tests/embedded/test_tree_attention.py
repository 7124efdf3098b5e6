"""One pass over a tree gives every node what a pass over its own path, as a chain, gives it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.embedded.core import GenerationCore
from rollout.embedded.kv_cache import KvCache
from rollout.embedded.linear import Packing
from rollout.embedded.plan import RowSpan, make_plan, positions_of, sees, tree_shape
from slime_spec.checkpoints.model_spec import ModelSpec
from tests.support.embedded_harness import engine_config, make_core, prefill, random_prompt

CPU = torch.device("cpu")
HEADS_PER_KV = 3  # of the tiny checkpoints


@dataclass(frozen=True)
class Row:
    """A row of a pass: its shared prefix (or -1), the tokens it has committed itself, and its tree."""

    prefix_row: int
    committed: tuple[int, ...]
    parents: tuple[int, ...] | None
    token_ids: tuple[int, ...]

    def span(self, row: int, prefixes: Sequence[Sequence[int]]) -> RowSpan:
        prefix_len = len(prefixes[self.prefix_row]) if self.prefix_row >= 0 else 0
        return RowSpan(row, len(self.committed), len(self.token_ids), self.prefix_row, prefix_len, self.parents)

    def path(self, node: int) -> list[int]:
        """The tokens from the tree's first level down to ``node``."""
        if self.parents is None:
            return list(self.token_ids[: node + 1])
        lineage, _ = tree_shape(self.parents)
        return [token for token, seen in zip(self.token_ids, lineage[node], strict=True) if seen]


PREFIXES = [random_prompt(12, seed=1), random_prompt(5, seed=2)]
FORK = (-1, 0, 0, 1, 1, 2, 5)
ROWS = {
    "plain": [Row(-1, random_prompt(9, seed=3), FORK, random_prompt(7, seed=4))],
    "ragged plain": [
        Row(-1, random_prompt(9, seed=3), FORK, random_prompt(7, seed=4)),
        Row(-1, random_prompt(2, seed=5), (-1,), random_prompt(1, seed=6)),
        Row(-1, random_prompt(30, seed=7), (-1, 0, 1, 0), random_prompt(4, seed=8)),
        Row(-1, random_prompt(4, seed=9), None, random_prompt(5, seed=10)),
    ],
    "cascade": [Row(0, random_prompt(6, seed=3), FORK, random_prompt(7, seed=4))],
    "ragged cascade": [
        Row(0, random_prompt(6, seed=3), FORK, random_prompt(7, seed=4)),
        Row(1, (), (-1, 0, 0), random_prompt(3, seed=5)),
        Row(-1, random_prompt(8, seed=6), (-1, 0, 0, 0, 1), random_prompt(5, seed=7)),
        Row(0, random_prompt(1, seed=8), None, random_prompt(2, seed=9)),
        Row(1, random_prompt(11, seed=11), FORK, random_prompt(7, seed=12)),
    ],
}


def prepared_core(folder: Path, rows: Sequence[Row]) -> GenerationCore:
    """A core whose caches hold the prefixes and what each row has committed."""
    core = make_core(engine_config(folder))
    core.cache.reserve((len(rows) + 1, 64), (len(PREFIXES), 12))
    for prefix_row, prompt in enumerate(PREFIXES):
        prefill(core, core.cache.prefixes, prefix_row, prompt)
    for index, row in enumerate(rows):
        if row.committed:
            span = Row(row.prefix_row, (), None, row.committed).span(index, PREFIXES)
            core.target.run(core.cache.own, [span], row.committed)
    return core


def chain_hidden(core: GenerationCore, scratch: int, row: Row, node: int) -> torch.Tensor:
    """The hidden state of a node, from one pass over prompt, committed tokens and its path in a row of their own."""
    prefix = PREFIXES[row.prefix_row] if row.prefix_row >= 0 else ()
    chain = [*prefix, *row.committed, *row.path(node)]
    return core.target.run(core.cache.own, [RowSpan(scratch, 0, len(chain))], chain).hidden[-1]


@pytest.fixture(params=["native", "torch"])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of this machine, and without."""
    if request.param == "torch":
        monkeypatch.setattr("rollout.embedded.assemble.best_packing", lambda device, dtype: Packing.PLAIN)


@pytest.mark.usefixtures("forward")
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_every_node_of_a_tree_gets_what_its_path_alone_would_give_it(tiny_llama: Path, rows: list[Row]) -> None:
    core = prepared_core(tiny_llama, rows)
    spans = [row.span(index, PREFIXES) for index, row in enumerate(rows)]
    hidden = core.target.run(core.cache.own, spans, [token for row in rows for token in row.token_ids]).hidden
    first = 0
    for row in rows:
        for node in range(len(row.token_ids)):
            assert (hidden[first + node] - chain_hidden(core, len(rows), row, node)).abs().max() < 1e-4
        first += len(row.token_ids)


@pytest.mark.usefixtures("forward")
def test_a_pass_over_some_rows_out_of_order_gives_each_what_it_gets_alone(tiny_llama: Path) -> None:
    rows = ROWS["ragged cascade"]
    core = prepared_core(tiny_llama, rows)
    spans = [row.span(index, PREFIXES) for index, row in enumerate(rows)]
    alone = [
        core.target.run(core.cache.own, [span], row.token_ids).hidden for span, row in zip(spans, rows, strict=True)
    ]
    chosen = [3, 0, 4]
    tokens = [token for index in chosen for token in rows[index].token_ids]
    hidden = core.target.run(core.cache.own, [spans[index] for index in chosen], tokens).hidden
    assert (hidden - torch.cat([alone[index] for index in chosen])).abs().max() < 1e-4


@pytest.mark.usefixtures("forward")
def test_a_tree_grown_level_by_level_equals_the_tree_in_one_pass(tiny_llama: Path) -> None:
    rows = ROWS["cascade"]
    core = prepared_core(tiny_llama, rows)
    whole = rows[0].span(0, PREFIXES)
    expected = core.target.run(core.cache.own, [whole], rows[0].token_ids).hidden
    first, grown = whole.start, []
    for end in (1, 3, 6, 7):  # the levels of FORK
        span = RowSpan(0, first, whole.start + end - first, 0, whole.prefix_len, FORK[:end])
        tokens = rows[0].token_ids[span.start - whole.start : end]
        grown.append(core.target.run(core.cache.own, [span], tokens).hidden)
        first = span.end
    assert (torch.cat(grown) - expected).abs().max() < 1e-4


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, ...]:
    size = draw(st.integers(1, 12))
    return tuple(draw(st.integers(-1, node - 1)) for node in range(size))


@st.composite
def spans(draw: st.DrawFn) -> list[RowSpan]:
    made = []
    for row in range(draw(st.integers(1, 4))):
        parents = draw(st.none() | trees())
        count = draw(st.integers(1, 6 if parents is None else len(parents)))
        tree_start = draw(st.integers(0, 9))
        start = tree_start if parents is None else tree_start + len(parents) - count
        made.append(RowSpan(row, start, count, -1, 0, parents))
    return made


@settings(max_examples=150, deadline=None)
@given(spans())
def test_the_mask_says_what_the_walk_up_the_tree_says(made: list[RowSpan]) -> None:
    spec = ModelSpec.from_dict({**SPEC, "architectures": ["LlamaForCausalLM"]})
    plan = make_plan(KvCache(spec, torch.float32, CPU, 0).own, made, HEADS_PER_KV, torch.float32, CPU)
    for index, span in enumerate(made):
        for token in range(span.count):
            for slot in range(plan.length):
                query = token * HEADS_PER_KV if plan.num_queries > 1 else 0
                seen = plan.mask is None or plan.mask[index, 0, query, slot] == 0.0
                assert bool(seen) == sees(span, token, slot), (span, token, slot)
        expected = [sum(sees(span, token, slot) for slot in range(span.end)) - 1 for token in range(span.count)]
        assert positions_of(span).tolist() == expected


SPEC = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "vocab_size": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
