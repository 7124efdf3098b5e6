"""The kernel for products of few tokens against its definition in torch, and who chooses between it and the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from rollout.embedded.cuda import operators
from rollout.embedded.cuda.products import (
    ALL_BY_LIBRARY,
    LIBRARY,
    MOST_TOKENS,
    TILES_OF_MORE,
    TILES_OF_ONE,
    ChosenProducts,
    KernelProducts,
    Products,
    Stage,
    fastest,
    stage_runs,
)
from rollout.embedded.drafters.quantized import Int8Linear
from rollout.embedded.layer import Layer
from rollout.embedded.linear import PackedLinear, Packing
from tests.support import reference_operators
from tests.support.random_blocks import RandomBlocks, block_spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = {1: TILES_OF_ONE, 3: TILES_OF_MORE}
CASES = [(tokens, tile) for tokens, tiles in TILES.items() for tile in tiles]
SIZES = [(1100, 14), (37, 6)]  # width, outputs: several pieces of a row, and what no tile divides


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def linear_of(outputs: int, width: int, dtype: torch.dtype, biased: bool = False) -> PackedLinear:
    bias = drawn(outputs, dtype=dtype, seed=2) if biased else None
    return PackedLinear(drawn(outputs, width, dtype=dtype, seed=1) / width**0.5, bias, Packing.PLAIN)


def agree(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    bound = 1e-6 if ours.dtype == torch.float32 else 2.0**-7
    return bool((ours - expected).abs().max() <= bound * expected.abs().max()) and ours.dtype == expected.dtype


@pytest.mark.parametrize(("has_delta", "gated"), [(False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "tile"), CASES)
def test_the_product_of_a_norm_is_that_of_its_definition(
    tokens: int, tile: operators.Tile, dtype: torch.dtype, has_delta: bool, gated: bool
) -> None:
    for width, outputs in SIZES:
        linear = linear_of(outputs, width, dtype, biased=not gated)
        x, norm = 3 * drawn(tokens, width, seed=3), 1 + drawn(width, dtype=dtype, seed=4)
        delta = drawn(tokens, width, dtype=dtype, seed=5) if has_delta else None
        before = x.clone()
        ours, sums = operators.norm_and_multiply(x, delta, norm, linear, 1e-5, gated, tile)
        expected, expected_sums = reference_operators.norm_and_multiply(x, delta, norm, linear, 1e-5, gated, tile)
        assert agree(ours, expected)
        assert torch.equal(sums, expected_sums)
        assert torch.equal(x, before), "other programs read it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "tile"), CASES)
def test_a_product_is_added_to_the_residual(tokens: int, tile: operators.Tile, dtype: torch.dtype) -> None:
    for width, outputs in SIZES:
        linear, x = linear_of(outputs, width, dtype), drawn(tokens, width, dtype=dtype, seed=3)
        ours, expected = drawn(tokens, outputs, seed=4), drawn(tokens, outputs, seed=4)
        operators.multiply_and_add(ours, x, linear, tile)
        reference_operators.multiply_and_add(expected, x, linear, tile)
        assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


def layers_of(dtype: torch.dtype = torch.float32) -> list[Layer]:
    return RandomBlocks.make(block_spec(6, 2, 16), dtype).stack(dtype, Packing.PLAIN).layers


def test_each_stage_of_each_small_number_of_tokens_is_chosen_once() -> None:
    asked: list[list[Products]] = []

    def choose(runs: Mapping[Products, Callable[[], object]]) -> Products:
        asked.append(list(runs))
        return list(runs)[1]

    chosen = ChosenProducts(layers_of(), 1e-5, choose)
    for _ in range(2):
        assert chosen.of(1) == dict.fromkeys(Stage, KernelProducts(TILES_OF_ONE[0]))
        assert chosen.of(MOST_TOKENS) == dict.fromkeys(Stage, KernelProducts(TILES_OF_MORE[0]))
        assert chosen.of(MOST_TOKENS + 1) == ALL_BY_LIBRARY
    assert len(asked) == 2 * len(Stage)
    assert all(ways[0] is LIBRARY and len(ways) == 3 for ways in asked)


def test_on_a_cpu_nobody_chooses_and_the_library_computes() -> None:
    layers = layers_of()
    assert layers[0].input_norm.device.type == "cpu"
    assert ChosenProducts(layers, 1e-5).of(1) == ALL_BY_LIBRARY


def test_the_shortest_run_is_taken_and_a_disturbance_does_not_count() -> None:
    slow, quick, quicker = (KernelProducts(operators.Tile(rows, 8, 1, 1)) for rows in (1, 2, 4))
    times = {slow: [3.0] * 9, quick: [2.0] * 9, quicker: [9.0, 8.0, 1.0, 9.0, 9.0]}
    runs = {products: (lambda products=products: products) for products in times}

    def timer(run: Callable[[], object]) -> Callable[[], float]:
        left = iter(times[run()])  # type: ignore[index]
        return lambda: next(left)

    assert fastest(runs, timer) is quicker


@pytest.mark.parametrize("stage", Stage)
def test_every_way_of_a_stage_runs(stage: Stage) -> None:
    runs = stage_runs(layers_of()[:1], stage, 2, 1e-5)
    assert list(runs) == [LIBRARY, *map(KernelProducts, TILES_OF_MORE)]
    for run in runs.values():
        run()


def test_rounded_weights_and_what_is_wider_than_the_residual_stay_with_the_library() -> None:
    layers = layers_of()
    layers[0].qkv = linear_of(160, 96, torch.float32)  # as the first block of an EAGLE-3 draft
    assert len(stage_runs(layers, Stage.QKV, 1, 1e-5)) == 3  # the other block's can be read
    assert stage_runs(layers[:1], Stage.QKV, 1, 1e-5) == {}
    for layer in layers:
        layer.down = Int8Linear(layer.down.unpacked())
    assert stage_runs(layers, Stage.DOWN, 1, 1e-5) == {}
    assert ChosenProducts(layers, 1e-5, lambda runs: list(runs)[-1]).of(1)[Stage.DOWN] is LIBRARY
