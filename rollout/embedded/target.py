"""The target holds the weights in use, runs and times a pass over them, and collects features for the drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rollout.embedded.drafting import FeatureNeed
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.model import Decoder
from rollout.embedded.plan import RowSpan, make_plan


@dataclass
class Timing:
    """Counts seconds since start: in the target's forward, in the drafter, and in ``step`` altogether."""

    forward_s: float = 0.0
    draft_s: float = 0.0
    total_s: float = 0.0


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
    ) -> None:
        self.decoder, self.cache = decoder, cache
        self._need, self._dtype, self._device = need, dtype, device
        self._clock, self._timing = clock, timing

    def run(self, store: KvStore, spans: Sequence[RowSpan], token_ids: Sequence[int]) -> PassOutput:
        """Return one forward over rows of ``store``; their keys and values are written."""
        start = self._clock()
        spec = self.decoder.spec
        prefixes = self.cache.prefixes if any(span.prefix_row >= 0 for span in spans) else None
        plan = make_plan(store, spans, spec.num_heads // spec.num_kv_heads, self._dtype, self._device, prefixes)
        tokens = torch.tensor(token_ids, device=self._device)
        hidden, captured = self.decoder.hidden(tokens, plan, self._need.layers)
        self._timing.forward_s += self._synchronised() - start
        return PassOutput(hidden, captured)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [rows, vocab] of states before the final norm."""
        start = self._clock()
        logits = self.decoder.logits(hidden)
        self._timing.forward_s += self._synchronised() - start
        return logits

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
        return torch.tensor(indices, device=self._device)

    def _synchronised(self) -> float:
        """Return the time after the device has finished all queued work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
