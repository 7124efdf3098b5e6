"""The target holds the weights in use, runs and times a pass over them, and collects features for the drafter."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rollout.embedded.drafting import FeatureNeed
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.model import Decoder
from rollout.embedded.plan import RowSpan, make_plan
from rollout.embedded.unread import Placement

if TYPE_CHECKING:
    from rollout.embedded.cuda.graphs import Graphs


@dataclass
class Timing:
    """Counts seconds since start: in the target's forward, in the drafter, and in ``step`` altogether."""

    forward_s: float = 0.0
    draft_s: float = 0.0
    total_s: float = 0.0


class HostWatch:
    """Times work that is done when the call returns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began = clock, 0.0

    def start(self) -> None:
        self._began = self._clock()

    def stop(self) -> float:
        """Return the seconds since ``start``."""
        return self._clock() - self._began


class DeviceWatch:
    """Times queued work by the device's own events, without waiting for the device."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self._began: torch.cuda.Event | None = None

    def start(self) -> None:
        self._began = self._event()

    def stop(self) -> float:
        """Return the seconds of all work that has ended since the last call."""
        assert self._began is not None, "a watch is started before it is stopped"
        self._pending.append((self._began, self._event()))
        seconds = 0.0
        while self._pending and self._pending[0][1].query():
            began, ended = self._pending.popleft()
            seconds += began.elapsed_time(ended) / 1000
            self._spare += (began, ended)
        return seconds

    def _event(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class PassOutput:
    """Holds a pass's states, one row per token: before the final norm, and after each captured layer."""

    hidden: torch.Tensor
    captured: list[torch.Tensor]

    def __getitem__(self, index: torch.Tensor | slice) -> PassOutput:
        return PassOutput(self.hidden[index], [each[index] for each in self.captured])


class Target:
    """Runs passes over the target; ``need`` names the states that are kept for the drafter."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        need: FeatureNeed,
        dtype: torch.dtype,
        device: torch.device,
        clock: Callable[[], float],
        timing: Timing,
        graphs: Graphs | None = None,
    ) -> None:
        self.decoder, self.cache = decoder, cache
        self._need, self._dtype, self.device = need, dtype, device
        self._clock, self._timing = clock, timing
        self._graphed = None
        if graphs is not None:
            from rollout.embedded.cuda.graphed_target import GraphedTarget  # needs Triton, which a CPU does without

            self._graphed = GraphedTarget(decoder, cache, need.layers, device, graphs)
        self._watch = DeviceWatch() if device.type == "cuda" else HostWatch(clock)

    @property
    def feature_bytes(self) -> int:
        """Return the bytes of one token's features for the drafter."""
        num_states = len(self._need.layers) + self._need.final
        return num_states * self.decoder.spec.hidden_size * self._dtype.itemsize

    def use(self, decoder: Decoder) -> None:
        """Compute with other weights of the same model; captured passes stay right."""
        if self._graphed is not None:
            decoder.exchange_memory(self.decoder)
            self._graphed.decoder = decoder
        self.decoder = decoder

    @property
    def takes_unread(self) -> bool:
        """Return whether a pass takes drafts that lie on the device."""
        return self._graphed is not None

    def run(
        self,
        store: KvStore,
        spans: Sequence[RowSpan],
        token_ids: Sequence[int],
        unread: Placement | None = None,
    ) -> PassOutput:
        """Return one forward over rows of ``store``; their keys and values are written.

        Drafts that are ``unread`` replace what ``spans`` and ``token_ids`` say of their tokens.
        """
        with self._timed():
            if self._graphed is not None:
                return PassOutput(*self._graphed.run(store, spans, token_ids, unread))
            assert unread is None, "passes without graphs take drafts that were read"
            return PassOutput(*self._eager(store, spans, token_ids))

    def _eager(
        self, store: KvStore, spans: Sequence[RowSpan], token_ids: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        spec = self.decoder.spec
        prefixes = self.cache.prefixes if any(span.prefix_row >= 0 for span in spans) else None
        plan = make_plan(store, spans, spec.num_heads // spec.num_kv_heads, self._dtype, self.device, prefixes)
        return self.decoder.hidden(self.tensor(token_ids), plan, self._need.layers)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [rows, vocab] of states before the final norm."""
        with self._timed():
            return self.decoder.logits(hidden)

    @property
    def has_features(self) -> bool:
        """Return whether the drafter wants hidden states of every position."""
        return self._need.any

    def features(self, output: PassOutput) -> torch.Tensor | None:
        """Return the features for the drafter [tokens, width], in the order of FeatureNeed.

        None if the drafter needs none.
        """
        parts = list(output.captured)
        if self._need.final:
            parts.append(self.decoder.final_norm(output.hidden))
        if not parts:
            return None
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def tensor(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor(indices, device=self.device)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self._watch.start()
        yield
        self._timing.forward_s += self._watch.stop()
