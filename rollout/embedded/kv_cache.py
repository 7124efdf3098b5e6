"""The KV cache has three contiguous stores: of running sequences, of prompts that groups share, and of kept prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from slime_spec.checkpoints.block_parts import Experts
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.routed_experts import id_dtype

Shape = tuple[int, int]  # rows, capacity
Move = tuple[int, int, int]  # row, slot, the slot it is copied to
MIN_GROWTH_TOKENS = 64


class StoreKernels(Protocol):
    """Moves and clears the keys and values of all layers at once; see KvStore."""

    def move_row(self, source: int, target: int, length: int) -> None: ...

    def clear_row(self, row: int, length: int) -> None: ...

    def move_slots(self, moves: Sequence[Move]) -> None: ...


class KvStore:
    """Stores keys and values per layer, [rows, kv_heads, capacity, head_dim]; live rows are 0..n-1.

    Attention reads ``[:n, :, :length]`` as a view, so nothing is gathered. Memory starts as zeros: masked positions
    get weight 0, and 0 times uninitialised memory could be NaN. A row is cleared when it is left.

    With ``routing`` the experts that a slot's token was given lie beside its keys and values, [rows, capacity, chosen]
    for each layer with experts, and go along wherever these are copied or moved.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, routing: Experts | None = None
    ) -> None:
        self._layers, self._heads, self._head_dim = spec.num_layers, spec.num_kv_heads, spec.head_dim
        self._dtype, self._device, self._routing = dtype, device, routing
        self._expert_layers = () if routing is None else routing.layers(spec.num_layers)
        self.generation = 0  # counts the changes of where the memory lies
        self.kernels: StoreKernels | None = None  # do it in one launch for all layers, on a GPU
        self.release()

    def release(self) -> None:
        """Give the memory back; the store is empty afterwards."""
        self.rows = self.capacity = 0
        self.generation += 1
        self.keys = [self._zeros(0, 0) for _ in range(self._layers)]
        self.values = [self._zeros(0, 0) for _ in range(self._layers)]
        self.experts = {layer: self._no_experts(0, 0) for layer in self._expert_layers}

    def resize(self, rows: int, capacity: int) -> None:
        """Change the allocation, keeping what fits; layer by layer, so that only one layer exists twice."""
        keep_rows, keep = min(rows, self.rows), min(capacity, self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = self._zeros(rows, capacity)
                new[:keep_rows, :, :keep] = old[:keep_rows, :, :keep]
                tensors[layer] = new
        for layer, chosen in self.experts.items():
            self.experts[layer] = self._no_experts(rows, capacity)
            self.experts[layer][:keep_rows, :keep] = chosen[:keep_rows, :keep]
        self.rows, self.capacity = rows, capacity
        self.generation += 1

    def write_index(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the flat index [tokens * kv_heads] of each token's vectors, for ``write``."""
        first = rows * (self._heads * self.capacity) + positions
        heads = torch.arange(self._heads, device=rows.device) * self.capacity
        return (first.unsqueeze(1) + heads).flatten()

    def write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [tokens, kv_heads, head_dim] of one layer."""
        self.keys[layer].view(-1, self._head_dim).index_copy_(0, index, keys.reshape(-1, self._head_dim))
        self.values[layer].view(-1, self._head_dim).index_copy_(0, index, values.reshape(-1, self._head_dim))

    def write_experts(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, chosen: torch.Tensor) -> None:
        """Store the experts [tokens, chosen] of one layer that compute the tokens at these rows and positions."""
        self.experts[layer][rows, positions] = chosen.to(self.experts[layer].dtype)

    def experts_of(self, row: int, length: int) -> torch.Tensor:
        """Return a copy of the experts [length, layers, chosen] of a row's first slots, on the host."""
        return torch.stack([chosen[row, :length] for chosen in self.experts.values()], dim=1).cpu()

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of row ``source`` over row ``target``."""
        if self.kernels is not None:
            self.kernels.move_row(source, target, length)
            return
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]
        for chosen in self.experts.values():
            chosen[target, :length] = chosen[source, :length]

    def copy_from(self, other: KvStore, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of row ``source`` of another store over row ``target``."""
        for mine, its in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[target, :, :length] = its[source, :, :length]
        for layer, chosen in self.experts.items():
            chosen[target, :length] = other.experts[layer][source, :length]

    def clear_row(self, row: int, length: int) -> None:
        """Make the first ``length`` positions of a row zeros, as fresh memory is, as far as there is memory."""
        if self.kernels is not None:
            self.kernels.clear_row(row, min(length, self.capacity) if row < self.rows else 0)
            return
        for tensor in (*self.keys, *self.values):
            tensor[row : row + 1, :, :length].zero_()

    def move_slots(self, moves: Sequence[Move]) -> None:
        """Copy slots over slots of the same row; a row's moves go to the front, in order: none writes what is read."""
        if self.kernels is not None:
            self.kernels.move_slots(moves)
            return
        rows, sources, targets = torch.tensor(moves, device=self._device).unbind(dim=1)
        source_index, target_index = self.write_index(rows, sources), self.write_index(rows, targets)
        for tensor in (*self.keys, *self.values):
            flat = tensor.view(-1, self._head_dim)
            flat.index_copy_(0, target_index, flat.index_select(0, source_index))
        for chosen in self.experts.values():
            chosen[rows, targets] = chosen[rows, sources]

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that memory is allocated for."""
        return self.rows * self.capacity

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *self.experts.values()))

    def _zeros(self, rows: int, capacity: int) -> torch.Tensor:
        return torch.zeros(rows, self._heads, capacity, self._head_dim, dtype=self._dtype, device=self._device)

    def _no_experts(self, rows: int, capacity: int) -> torch.Tensor:
        assert self._routing is not None, "a layer with experts routes"
        dtype = getattr(torch, id_dtype(self._routing.num_experts).name)
        return torch.zeros(rows, capacity, self._routing.num_per_token, dtype=dtype, device=self._device)


class KvCache:
    """Owns the stores and keeps their bound: allocated tokens (rows x capacity) never exceed ``max_total_tokens``.

    Prompts in ``kept`` have room that nothing else needs, and lose it when something does.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        max_total_tokens: int,
        routing: Experts | None = None,
    ) -> None:
        self.own = KvStore(spec, dtype, device, routing)
        self.prefixes = KvStore(spec, dtype, device, routing)
        self.kept = KvStore(spec, dtype, device, routing)
        self.max_total_tokens, self.device = max_total_tokens, device

    def fits(self, own: Shape, prefixes: Shape) -> bool:
        """Return whether these shapes of both stores in use stay within the bound."""
        return own[0] * own[1] + prefixes[0] * prefixes[1] <= self.max_total_tokens

    def reserve(self, own: Shape, prefixes: Shape, worst_capacity: int = 0) -> bool:
        """Make room for these shapes; False, and nothing changed in them, if the bound forbids it.

        Rows grow by doubling, the own capacity by half (up to ``worst_capacity``, what rows may come to need), and
        nothing shrinks while the bound allows it: so a filling batch is copied rarely.
        """
        kept = _kept(self.own, own), _kept(self.prefixes, prefixes)
        doubled = _doubled(self.own, own), _doubled(self.prefixes, prefixes)
        for (rows, _), prefix_shape in (doubled, kept, (own, prefixes)):
            capacity = self._own_capacity(rows, own[1], prefix_shape, worst_capacity)
            if capacity >= own[1]:
                self._resize((rows, capacity), prefix_shape)
                return True
        if self.kept.rows:
            self.kept.release()
            return self.reserve(own, prefixes, worst_capacity)
        return False

    def reserve_kept(self, kept: Shape) -> bool:
        """Make room for prompts to keep; False, and nothing changed, if the bound forbids it."""
        if self.own.num_tokens + self.prefixes.num_tokens + kept[0] * kept[1] > self.max_total_tokens:
            return False
        if kept != (self.kept.rows, self.kept.capacity):
            self.kept.resize(*kept)
        return True

    def _own_capacity(self, rows: int, needed: int, prefixes: Shape, worst: int) -> int:
        """Return own rows' capacity beside these prefixes: the present, or more than needed; negative if none fits."""
        room = self.max_total_tokens - self.kept.num_tokens - prefixes[0] * prefixes[1]
        grown = max(needed, min(worst, needed + max(MIN_GROWTH_TOKENS, needed // 2)))
        return min(self.own.capacity if needed <= self.own.capacity else grown, room // max(rows, 1))

    def _resize(self, own: Shape, prefixes: Shape) -> None:
        # The shrinking store goes first, so that the sum stays within the bound on the way.
        for store, (rows, capacity) in sorted(
            ((self.own, own), (self.prefixes, prefixes)),
            key=lambda pair: pair[1][0] * pair[1][1] - pair[0].rows * pair[0].capacity,
        ):
            if (rows, capacity) != (store.rows, store.capacity):
                store.resize(rows, capacity)

    def follow(self, leader: KvCache) -> None:
        """Take the leader's shapes, so that a row here is the row there; the bound counts the bytes of both."""
        for store, led in ((leader.own, self.own), (leader.prefixes, self.prefixes)):
            if (store.rows, store.capacity) != (led.rows, led.capacity):
                led.resize(store.rows, store.capacity)

    def release(self) -> None:
        for store in (self.own, self.prefixes, self.kept):
            store.release()


def routing_bytes_per_token(spec: ModelSpec, routing: Experts | None) -> int:
    """Return the bytes of a token's routed experts in a store that records them."""
    if routing is None:
        return 0
    return len(routing.layers(spec.num_layers)) * routing.num_per_token * id_dtype(routing.num_experts).itemsize


def bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize


def _kept(store: KvStore, needed: Shape) -> Shape:
    return max(needed[0], store.rows), max(needed[1], store.capacity)


def _doubled(store: KvStore, needed: Shape) -> Shape:
    rows, capacity = _kept(store, needed)
    return (max(rows, 2 * store.rows) if rows > store.rows else rows), capacity
