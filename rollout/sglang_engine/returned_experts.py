"""A final chunk's ``routed_experts`` say which experts a server chose; they are checked as everything that it says.

A server that was started with --enable-return-routed-experts answers a request with ``return_routed_experts`` (0.5.21):
base64 of int32 [tokens, layers, chosen], of prompt and output all tokens but the last, of all decoder layers. Those
without experts are zeros. A prompt's cached tokens have those of the pass that computed them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.sglang_engine.client import ProtocolError
from slime_spec.checkpoints.block_parts import Experts
from slime_spec.routed_experts import RoutedExperts, id_dtype

KEY = "routed_experts"
ASKED = {"return_routed_experts": True}  # of a request
WITHOUT = "the server was started without --enable-return-routed-experts, or its SGLang has no such flag"


@dataclass(frozen=True)
class ReturnedExperts:
    """Reads the experts of a model with ``num_layers`` decoder layers."""

    experts: Experts
    num_layers: int

    def read(self, meta: Mapping[str, Any], num_tokens: int, is_abort: bool) -> RoutedExperts | None:
        """Return the experts of the first ``num_tokens`` tokens; raises ProtocolError for what cannot be true.

        A request that was aborted may lack them, and may have generated more or fewer tokens than had arrived.
        """
        encoded = meta.get(KEY)
        if encoded is None and is_abort:
            return None
        flat = self._flat(encoded)
        per_token = self.num_layers * self.experts.num_per_token
        got, rest = divmod(len(flat), per_token)
        if rest or (got != num_tokens and not is_abort):
            raise ProtocolError(
                f"{KEY} have {len(flat)} numbers, and {num_tokens} tokens in {self.num_layers} layers are given "
                f"{num_tokens * per_token}"
            )
        ids = flat.reshape(-1, self.num_layers, self.experts.num_per_token)[:num_tokens]
        ids = ids[:, list(self.experts.layers(self.num_layers))]
        if ids.size and not 0 <= ids.min() <= ids.max() < self.experts.num_experts:
            raise ProtocolError(f"{KEY} name experts from {ids.min()} to {ids.max()} of {self.experts.num_experts}")
        return RoutedExperts.of(np.ascontiguousarray(ids, dtype=id_dtype(self.experts.num_experts)))

    def none(self) -> RoutedExperts:
        """Return the experts of no token."""
        shape = (0, len(self.experts.layers(self.num_layers)), self.experts.num_per_token)
        return RoutedExperts.of(np.zeros(shape, dtype=id_dtype(self.experts.num_experts)))

    @staticmethod
    def _flat(encoded: object) -> np.ndarray[Any, np.dtype[np.int32]]:
        if not isinstance(encoded, str):
            raise ProtocolError(f"{KEY} are {str(encoded)[:200]!r} where they were asked for: {WITHOUT}")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ProtocolError(f"{KEY} are no base64: {error}") from None
        if len(data) % 4:
            raise ProtocolError(f"{KEY} have {len(data)} bytes, which are no int32 numbers")
        return np.frombuffer(data, dtype="<i4")
