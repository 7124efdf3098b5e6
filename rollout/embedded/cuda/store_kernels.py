"""Rows and slots of a store on a GPU move and are cleared in one launch for all layers, where operators need sixty."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import triton

from rollout.embedded.cuda import kernels
from rollout.embedded.cuda.device_pass import KvTable, upload
from rollout.embedded.kv_cache import KvCache, Move

BLOCK = 1024


def table_of(cache: KvCache, device: torch.device) -> KvTable:
    """Return the table of a cache, whose stores move and clear their rows by kernels from now on."""
    table = KvTable(cache.own, cache.prefixes, device)
    cache.own.kernels, cache.prefixes.kernels = RowKernels(table, 0), RowKernels(table, 1)
    return table


class RowKernels:
    """Implements StoreKernels for one of a table's two stores."""

    def __init__(self, table: KvTable, store: int) -> None:
        self._table, self._store = table, store

    def move_row(self, source: int, target: int, length: int) -> None:
        self._copy(source, target, length, clears=False)

    def clear_row(self, row: int, length: int) -> None:
        self._copy(row, row, length, clears=True)

    def move_slots(self, moves: Sequence[Move]) -> None:
        table, like = self._ready()
        counts = [len(list(group)) for _, group in groupby(moves, key=lambda move: move[0])]
        firsts = [sum(counts[:index]) for index in range(len(counts) + 1)]
        numbers = torch.empty(3 * len(moves) + len(firsts), dtype=torch.int64, device=like.device)
        upload(torch.tensor([number for move in moves for number in move] + firsts), numbers)
        head_dim = like.shape[-1]
        kernels.move_slots[(2 * len(table.addresses), like.shape[1], len(counts))](
            *(table.addresses, table.strides, like, numbers, numbers[3 * len(moves) :], self._store),
            *(head_dim, triton.next_power_of_2(head_dim)),
            num_warps=1,
        )

    def _copy(self, source: int, target: int, length: int, clears: bool) -> None:
        if not length:
            return
        table, like = self._ready()
        head_dim = like.shape[-1]
        kernels.copy_row[(2 * len(table.addresses), like.shape[1], triton.cdiv(length * head_dim, BLOCK))](
            *(table.addresses, table.strides, like, self._store, source, target, length, head_dim, BLOCK, clears),
            num_warps=4,
        )

    def _ready(self) -> tuple[KvTable, torch.Tensor]:
        """Return the table as it is now, and a tensor of the store."""
        self._table.refresh()
        return self._table, self._table.stores[self._store].keys[0]
