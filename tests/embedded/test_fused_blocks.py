"""The GPU's kernels, run by Triton's interpreter (on a GPU: compiled), against torch's operators."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle

import pytest
import torch

from rollout.embedded.blocks import BlockStack
from rollout.embedded.cuda import operators
from rollout.embedded.cuda.device_pass import Bucket, DevicePass, KvTable, words_of
from rollout.embedded.cuda.fused_blocks import FusedBlocks
from rollout.embedded.cuda.products import LIBRARY, Choose, Products
from rollout.embedded.cuda.store_kernels import table_of
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.linear import Packing
from rollout.embedded.plan import RowSpan
from rollout.embedded.rope import RopeTable
from tests.support.random_blocks import RandomBlocks, RandomCache, block_spec, inputs

pytestmark = pytest.mark.proves  # Triton's interpreter takes its time
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEAR = 1e-5  # some eighty roundings of fp32: two layers of sums over up to 340 slots
FORK = (-1, 0, 0, 1, 1, 2, 5)
PASSES = {
    "a batch": [RowSpan(0, 5, 1), RowSpan(1, 60, 1), RowSpan(2, 0, 1), RowSpan(3, 130, 1)],
    "ragged chains": [RowSpan(1, 5, 4), RowSpan(2, 61, 1), RowSpan(4, 33, 3)],
    "trees and chains": [RowSpan(0, 20, 7, parents=FORK), RowSpan(1, 3, 3), RowSpan(2, 9, 3, parents=(-1, 0, 0))],
    "a tree's third level": [RowSpan(0, 23, 3, parents=FORK[:6])],
    "a tree of two words": [RowSpan(0, 7, 40, parents=tuple(range(-1, 30)) + (3,) * 9)],
    "shared prompts": [RowSpan(0, 7, 1, 0, 50), RowSpan(1, 0, 2, 1, 1), RowSpan(2, 19, 2), RowSpan(3, 8, 2, 0, 50)],
    "a prompt": [RowSpan(2, 0, 70)],
    "a prompt's second piece": [RowSpan(0, 41, 33)],
}
SHAPES = {"a group of 3": (6, 2, 16), "no group": (2, 2, 8), "an odd size": (3, 1, 10)}


@dataclass(frozen=True)
class Result:
    """The states of a pass's tokens, and what the pass left in the store."""

    states: list[torch.Tensor]
    store: KvStore

    def furthest(self, other: "Result") -> float:
        pairs = zip(self.everything(), other.everything(), strict=True)
        return max(float((a.float().cpu() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)

    def everything(self) -> list[torch.Tensor]:
        return [*self.states, *self.store.keys, *self.store.values]


def by_library(runs: Mapping[Products, Callable[[], object]]) -> Products:
    return LIBRARY


def by_tile(index: int) -> Choose:
    return lambda runs: list(runs)[index]


def in_turn(*indices: int) -> Choose:
    """One after the other for a block's four products."""
    turns = cycle(indices)
    return lambda runs: list(runs)[next(turns)]


def by_operators(stack: BlockStack, cache: RandomCache, spans: Sequence[RowSpan], dtype: torch.dtype) -> Result:
    plan = cache.plan(spans, dtype)
    hidden, captured = stack.run(inputs(cache.spec, spans, cache.source_dtype).to(dtype), plan, capture=(0, 1))
    return Result([hidden, *captured], plan.store)


def by_kernels(
    stack: BlockStack,
    cache: RandomCache,
    spans: Sequence[RowSpan],
    dtype: torch.dtype,
    choose: Choose | None = None,
    padding: int = 1,
) -> Result:
    """With one row and one token a row of padding, which holds large numbers."""
    plan = cache.plan([*spans, RowSpan(4, 0, 1, 0, 1)], dtype)  # a plan with both stores
    assert plan.prefixes is not None
    bucket = Bucket(len(spans) + padding, max(span.count for span in spans) + padding, words_of(spans))
    for store in (plan.store, plan.prefixes):
        store.keys, store.values = ([side.to(DEVICE) for side in sides] for sides in (store.keys, store.values))
    one_pass = DevicePass(bucket, KvTable(plan.store, plan.prefixes, DEVICE), DEVICE)
    x = inputs(cache.spec, spans, cache.source_dtype).to(dtype)
    one_pass.fill(spans, range(len(x)))
    own = torch.cat([index * bucket.queries + torch.arange(span.count) for index, span in enumerate(spans)])
    assert one_pass.tokens[own].tolist() == list(range(len(x)))
    padded = torch.full((bucket.tokens, cache.spec.hidden_size), 1e4, dtype=dtype)
    padded[own] = x
    layers = deepcopy(stack.layers)
    for layer in layers:
        layer.move(DEVICE)
    rope = RopeTable(cache.spec, len(stack.rope.cos), dtype, DEVICE)
    hidden, captured = FusedBlocks(cache.spec, rope, layers, choose or by_library).run(
        padded.to(DEVICE), one_pass, (0, 1), None
    )
    return Result([each[own] for each in (hidden, *captured)], plan.store)


@pytest.fixture(autouse=True)
def _one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a row's slots be one part, as on a card that is full: the interpreter takes its time for every program."""
    monkeypatch.setattr(operators, "num_splits", lambda programs: 1)


@pytest.mark.parametrize("spans", PASSES.values(), ids=PASSES)
def test_kernels_give_the_states_and_the_cache_of_operators(spans: list[RowSpan]) -> None:
    cache = RandomCache(block_spec(*SHAPES["a group of 3"]), torch.float32)
    stack = RandomBlocks.make(cache.spec, torch.float32, biased=True).stack(torch.float32, Packing.PLAIN)
    ours, expected = (run(stack, cache, spans, torch.float32) for run in (by_kernels, by_operators))
    assert ours.furthest(expected) < NEAR


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_compute_heads_of_every_shape(shape: tuple[int, int, int]) -> None:
    cache = RandomCache(block_spec(*shape), torch.float32)
    stack = RandomBlocks.make(cache.spec, torch.float32, normed=True).stack(torch.float32, Packing.PLAIN)
    spans = PASSES["ragged chains"]
    ours, expected = (run(stack, cache, spans, torch.float32) for run in (by_kernels, by_operators))
    assert ours.furthest(expected) < NEAR


def test_kernels_in_bf16_are_as_near_to_fp32_as_operators_in_bf16() -> None:
    cache = RandomCache(block_spec(*SHAPES["a group of 3"]), torch.bfloat16)
    blocks = RandomBlocks.make(cache.spec, torch.bfloat16)
    exact = by_operators(blocks.stack(torch.float32, Packing.PLAIN), cache, PASSES["shared prompts"], torch.float32)
    rounded = blocks.stack(torch.bfloat16, Packing.PLAIN)
    ours, theirs = (
        run(rounded, cache, PASSES["shared prompts"], torch.bfloat16).furthest(exact)
        for run in (by_kernels, by_operators)
    )
    assert 1e-4 < ours < 1.5 * theirs


FEW = {
    "the first tile": (by_tile(1), [RowSpan(0, 37, 1)], 0),
    "the second tile, a row and a token of padding": (by_tile(2), [RowSpan(0, 37, 1, 0, 50)], 1),
    "norms by the kernel": (in_turn(1, 0), [RowSpan(1, 5, 3)], 0),
    "sums by the kernel": (in_turn(0, 2), [RowSpan(0, 37, 1)], 0),
}


@pytest.mark.parametrize(("choose", "spans", "padding"), FEW.values(), ids=FEW)
def test_products_of_few_tokens_by_the_kernel_give_the_states_and_the_cache_of_operators(
    choose: Choose, spans: list[RowSpan], padding: int
) -> None:
    cache = RandomCache(block_spec(*SHAPES["a group of 3"]), torch.float32)
    stack = RandomBlocks.make(cache.spec, torch.float32, biased=True).stack(torch.float32, Packing.PLAIN)
    ours = by_kernels(stack, cache, spans, torch.float32, choose, padding)
    assert ours.furthest(by_operators(stack, cache, spans, torch.float32)) < NEAR


def test_products_of_few_tokens_in_bf16_are_as_near_to_fp32_as_operators_in_bf16() -> None:
    cache = RandomCache(block_spec(*SHAPES["a group of 3"]), torch.bfloat16)
    blocks, spans = RandomBlocks.make(cache.spec, torch.bfloat16), [RowSpan(1, 5, 3)]
    exact = by_operators(blocks.stack(torch.float32, Packing.PLAIN), cache, spans, torch.float32)
    rounded = blocks.stack(torch.bfloat16, Packing.PLAIN)
    ours = by_kernels(rounded, cache, spans, torch.bfloat16, by_tile(1), 0).furthest(exact)
    assert 1e-4 < ours < 1.5 * by_operators(rounded, cache, spans, torch.bfloat16).furthest(exact)


@pytest.mark.parametrize("parts", operators.SPLITS)
def test_parts_of_a_long_cache_join_to_one_softmax(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "num_splits", lambda programs: parts)
    cache = RandomCache(block_spec(*SHAPES["no group"]), torch.float32)
    stack = RandomBlocks.make(cache.spec, torch.float32).stack(torch.float32, Packing.PLAIN)
    spans = [RowSpan(0, 330, 2), RowSpan(1, 3, 1, 0, 50)]
    ours, expected = (run(stack, cache, spans, torch.float32) for run in (by_kernels, by_operators))
    assert ours.furthest(expected) < NEAR


def filled_cache() -> KvCache:
    cache = KvCache(block_spec(*SHAPES["an odd size"]), torch.float32, DEVICE, 10_000)
    cache.reserve((4, 120), (2, 30))
    generator = torch.Generator().manual_seed(3)
    for store in (cache.own, cache.prefixes):
        for tensor in (*store.keys, *store.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


def test_rows_and_slots_move_by_kernels_as_by_operators() -> None:
    ours, theirs = filled_cache(), filled_cache()
    table_of(ours, DEVICE)
    for cache in (ours, theirs):
        cache.own.move_row(3, 1, 107)
        cache.own.clear_row(3, 110)
        cache.own.clear_row(2, 500)  # longer than there is memory
        cache.own.clear_row(9, 5)  # a row that has no memory yet
        cache.own.move_slots([(0, 8, 6), (0, 11, 7), (0, 12, 8), (1, 41, 40)])
        cache.prefixes.move_row(1, 0, 30)
        cache.reserve((8, 300), (2, 30))  # the memory moves, and the table with it
        cache.own.move_row(1, 7, 107)
    for store, other in ((ours.own, theirs.own), (ours.prefixes, theirs.prefixes)):
        for mine, its in zip((*store.keys, *store.values), (*other.keys, *other.values), strict=True):
            assert torch.equal(mine, its)
