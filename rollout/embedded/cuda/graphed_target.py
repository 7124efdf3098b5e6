"""The target's passes run in fused kernels here; those of a few tokens a row, decode and verify, as captured graphs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from rollout.embedded.cuda.device_pass import Bucket, DevicePass, Places, exact_bucket, words_of, words_of_unread
from rollout.embedded.cuda.graphs import Graphs
from rollout.embedded.cuda.store_kernels import table_of
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.model import Decoder
from rollout.embedded.plan import RowSpan
from rollout.embedded.unread import Placement

# The shapes that are captured. Beyond them a pass has so much to compute that launches cost little beside it.
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
QUERIES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
MOST_TOKENS = 2048

States = tuple[torch.Tensor, list[torch.Tensor]]


def bucket_of(spans: Sequence[RowSpan], words: int = 0) -> Bucket | None:
    """Return the smallest captured shape, of at least ``words``, that holds a pass, None where there is none."""
    rows, queries = _at_least(ROWS, len(spans)), _at_least(QUERIES, max(span.count for span in spans))
    if rows is None or queries is None or rows * queries > MOST_TOKENS:
        return None
    return Bucket(rows, queries, max(words, words_of(spans)))


def _at_least(sizes: Sequence[int], wanted: int) -> int | None:
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None


class GraphedTarget:
    """Runs passes of ``decoder`` over a cache; ``layers`` are those whose output is kept."""

    def __init__(
        self, decoder: Decoder, cache: KvCache, layers: Sequence[int], device: torch.device, graphs: Graphs
    ) -> None:
        self.decoder = decoder
        self._cache, self._layers, self._device, self._graphs = cache, tuple(layers), device, graphs
        self._table = table_of(cache, device)
        self._passes: dict[Bucket, DevicePass] = {}

    def run(
        self, store: KvStore, spans: Sequence[RowSpan], token_ids: Sequence[int], unread: Placement | None = None
    ) -> States:
        """Return the states of ``Decoder.hidden``, in memory of their own."""
        words = 0 if unread is None else words_of_unread(unread)
        bucket, of_prefixes = bucket_of(spans, words), store is self._cache.prefixes
        if bucket is None:
            bucket = exact_bucket(spans, words)
            one_pass = DevicePass(bucket, self._table, self._device)
            one_pass.fill(spans, token_ids, of_prefixes, unread)
            hidden, captured = self.decoder.hidden(one_pass.tokens, one_pass, self._layers)
        else:
            known = self._passes.get(bucket)
            one_pass = self._passes[bucket] = known or DevicePass(bucket, self._table, self._device)
            one_pass.fill(spans, token_ids, of_prefixes, unread)
            hidden, captured = self._graphs.run(
                ("target", bucket),
                (self.decoder.memory,),
                lambda: self.decoder.hidden(one_pass.tokens, one_pass, self._layers),
            )
        places = Places(bucket, spans, self._device)
        return places.packed(hidden), [places.packed(each) for each in captured]
