"""A block's four products run by the library or, for few tokens, by the kernel that only reads a weight: the faster.

    by the library   norm │ qkv │ rotate │ attend │ merge │ out │ add, norm │ gate and up │ silu │ down │ add ..
    by the kernel    norm and qkv │ rotate │ attend │ merge │ out, add │ norm, gate and up, silu │ down, add

Which is faster depends on the shape and on the card, so both are timed when the first pass of so few tokens comes,
right before it is captured. In bf16 the two round differently; in fp32 they agree but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

import torch

from rollout.embedded.cuda import operators
from rollout.embedded.cuda.graphs import CudaCapturer
from rollout.embedded.cuda.operators import Tile
from rollout.embedded.layer import Layer
from rollout.embedded.linear import PackedLinear, Packing

MOST_TOKENS = 4
# Few, since each is compiled: one that reads ahead, and one that has more loads of each thread on their way.
TILES_OF_ONE = (Tile(8, 512, 3, 4), Tile(4, 1024, 1, 4))
TILES_OF_MORE = (Tile(4, 512, 3, 4), Tile(2, 1024, 1, 8))
NUM_TIMED = 5


class Stage(Enum):
    """Names a block's products; they are timed by themselves."""

    QKV = "qkv"
    OUT = "out"
    GATE_UP = "gate_up"
    DOWN = "down"


@dataclass
class Residual:
    """Holds the residual stream in fp32 [tokens, hidden], and what is still to be added to it."""

    stream: torch.Tensor
    delta: torch.Tensor | None = None

    def summed(self) -> torch.Tensor:
        return self.stream if self.delta is None else self.stream.add_(self.delta)


class Products(Protocol):
    """Computes a block's products with what lies around them."""

    def enter(self, residual: Residual, norm: torch.Tensor, linear: PackedLinear, eps: float) -> torch.Tensor:
        """Return the product of the residual's norm; nothing is left to be added to the residual afterwards."""

    def enter_gated(self, residual: Residual, norm: torch.Tensor, linear: PackedLinear, eps: float) -> torch.Tensor:
        """Return silu(gate) * up of such a product."""

    def leave(self, residual: Residual, x: torch.Tensor, linear: PackedLinear) -> None:
        """Add the product of x to the residual, or leave it to be added."""


class LibraryProducts:
    """Implements Products by cuBLAS, and launches of their own for what lies around."""

    def enter(self, residual: Residual, norm: torch.Tensor, linear: PackedLinear, eps: float) -> torch.Tensor:
        inputs = operators.add_and_norm(residual.stream, residual.delta, norm, eps)
        residual.delta = None
        return linear(inputs)

    def enter_gated(self, residual: Residual, norm: torch.Tensor, linear: PackedLinear, eps: float) -> torch.Tensor:
        return operators.silu_times(self.enter(residual, norm, linear, eps))

    def leave(self, residual: Residual, x: torch.Tensor, linear: PackedLinear) -> None:
        residual.delta = linear(x)


@dataclass(frozen=True)
class KernelProducts:
    """Implements Products by one launch each, for at most MOST_TOKENS tokens and plain weights."""

    tile: Tile

    def enter(self, residual: Residual, norm: torch.Tensor, linear: PackedLinear, eps: float) -> torch.Tensor:
        return self._enter(residual, norm, linear, eps, gated=False)

    def enter_gated(self, residual: Residual, norm: torch.Tensor, linear: PackedLinear, eps: float) -> torch.Tensor:
        return self._enter(residual, norm, linear, eps, gated=True)

    def leave(self, residual: Residual, x: torch.Tensor, linear: PackedLinear) -> None:
        assert residual.delta is None, "a block's norms have added what was left"
        operators.multiply_and_add(residual.stream, x, linear, self.tile)

    def _enter(
        self, residual: Residual, norm: torch.Tensor, linear: PackedLinear, eps: float, gated: bool
    ) -> torch.Tensor:
        product, residual.stream = operators.norm_and_multiply(
            residual.stream, residual.delta, norm, linear, eps, gated, self.tile
        )
        residual.delta = None
        return product


LIBRARY = LibraryProducts()
ALL_BY_LIBRARY: Mapping[Stage, Products] = dict.fromkeys(Stage, LIBRARY)
# Chooses among products, by what computes a stage of all blocks with each of them.
Choose = Callable[[Mapping[Products, Callable[[], object]]], Products]


def replays(run: Callable[[], object]) -> Callable[[], float]:
    """Return what runs a captured graph of ``run`` on the GPU, as a pass will, and returns its milliseconds."""
    captured = CudaCapturer().capture(run)

    def replay() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        captured.replay()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)

    return replay


def fastest(
    runs: Mapping[Products, Callable[[], object]],
    timer: Callable[[Callable[[], object]], Callable[[], float]] = replays,
) -> Products:
    """Return whose run is the shortest, of several taken in turn: noise only adds."""
    timed = {products: timer(run) for products, run in runs.items()}
    times = [{products: each() for products, each in timed.items()} for _ in range(NUM_TIMED)]
    return min(runs, key=lambda products: min(each[products] for each in times))


def choose_on(device: torch.device) -> Choose | None:
    """Return who chooses on a device; on a CPU nobody does, since the kernel would be interpreted."""
    return fastest if device.type == "cuda" else None


class ChosenProducts:
    """Says for each number of tokens by what a stack's products are computed; where nobody chooses, by the library."""

    def __init__(self, layers: Sequence[Layer], eps: float, choose: Choose | None = None) -> None:
        self._layers, self._eps = layers, eps
        self._choose = choose or choose_on(layers[0].input_norm.device)
        self._chosen: dict[int, Mapping[Stage, Products]] = {}

    def of(self, num_tokens: int) -> Mapping[Stage, Products]:
        """Return what computes each stage of a pass of so many tokens."""
        if num_tokens > MOST_TOKENS or self._choose is None:
            return ALL_BY_LIBRARY
        if num_tokens not in self._chosen:
            runs = {stage: stage_runs(self._layers, stage, num_tokens, self._eps) for stage in Stage}
            self._chosen[num_tokens] = {stage: self._choose(each) if each else LIBRARY for stage, each in runs.items()}
        return self._chosen[num_tokens]


def stage_runs(
    layers: Sequence[Layer], stage: Stage, num_tokens: int, eps: float
) -> dict[Products, Callable[[], object]]:
    """Return what computes a stage of all blocks by each of the products; empty where only the library can.

    All blocks in turn, so that no weight lies in the card's cache because it was just read.
    """
    layers = [layer for layer in layers if _is_read_by_kernels(layer, stage)]
    tiles = TILES_OF_ONE if num_tokens == 1 else TILES_OF_MORE
    ways: list[Products] = [LIBRARY, *map(KernelProducts, tiles)] if layers else []
    return {products: partial(_run, products, layers, stage, num_tokens, eps) for products in ways}


def _run(products: Products, layers: Sequence[Layer], stage: Stage, num_tokens: int, eps: float) -> None:
    """Compute a stage of blocks from zeros."""
    norm, first = layers[0].input_norm, getattr(layers[0], stage.value)
    residual = Residual(torch.zeros(num_tokens, len(norm), dtype=torch.float32, device=norm.device))
    x = norm.new_zeros(num_tokens, first.num_inputs)
    for layer in layers:
        match stage:
            case Stage.QKV:
                products.enter(residual, layer.input_norm, layer.qkv, eps)
            case Stage.GATE_UP:
                products.enter_gated(residual, layer.post_norm, layer.gate_up, eps)
            case _:
                products.leave(residual, x, getattr(layer, stage.value))


def _is_read_by_kernels(layer: Layer, stage: Stage) -> bool:
    """Return whether the kernel reads such a weight: plain, not rounded, and of the residual's width where it enters.

    The first block of some drafts reads something wider than the residual.
    """
    linear: PackedLinear = getattr(layer, stage.value)
    is_plain = type(linear) is PackedLinear and linear.packing is Packing.PLAIN  # what derives from it rounds
    return is_plain and (stage is not Stage.QKV or linear.num_inputs == len(layer.input_norm))
