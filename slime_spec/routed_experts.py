"""RoutedExperts are the experts that an engine's routers chose, for the trainer to choose the same ones.

A router's choice is discontinuous: near a tie the least difference between two computations of a token's state gives
the token to another expert. An engine and a trainer compute in other orders and dtypes, and then they differ in the
very function whose logprobs training compares. Routing replay (R3, arXiv 2510.11370) gives the trainer the engine's
choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]
MOST_IN_A_BYTE = 256


def id_dtype(num_experts: int) -> np.dtype[np.unsignedinteger]:
    """Return the dtype in which choices among so many experts are kept: a byte each up to 256 experts, else two."""
    return np.dtype(np.uint8 if num_experts <= MOST_IN_A_BYTE else np.uint16)


@dataclass(frozen=True)
class RoutedExperts:
    """Holds the experts of every token that the engine was fed: of a sample's prompt and response all but the last.

    ``data`` are the bytes of ids [tokens, layers, chosen] of unsigned integers of ``item_bytes``: layers are those with
    experts, in the model's order, and a token's experts are in the router's order, the best first. A token takes
    layers * chosen bytes (two where a layer has more than 256 experts): 752 of Qwen3-235B-A22B, 464 of DeepSeek-V3.

    Example: ``RoutedExperts.of(np.zeros((35, 94, 8), np.uint8))``
    """

    num_layers: int
    num_per_token: int
    item_bytes: int
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, ids: Ids) -> RoutedExperts:
        """Return what holds ids [tokens, layers, chosen] of one or two bytes."""
        _, num_layers, num_per_token = ids.shape
        return cls(num_layers, num_per_token, ids.dtype.itemsize, ids.tobytes())

    @property
    def num_tokens(self) -> int:
        return len(self.data) // self._bytes_per_token

    @property
    def ids(self) -> Ids:
        """Return ids [tokens, layers, chosen], read-only."""
        flat = np.frombuffer(self.data, dtype=f"u{self.item_bytes}")
        return flat.reshape(-1, self.num_layers, self.num_per_token)

    def first(self, num_tokens: int) -> RoutedExperts:
        """Return the experts of at most the first ``num_tokens`` tokens."""
        data = self.data[: num_tokens * self._bytes_per_token]
        return RoutedExperts(self.num_layers, self.num_per_token, self.item_bytes, data)

    def completed(self, later: RoutedExperts) -> RoutedExperts:
        """Return these experts and, of the tokens after them, those of ``later``, which begins at the same token."""
        data = self.data + later.data[len(self.data) :]
        return RoutedExperts(self.num_layers, self.num_per_token, self.item_bytes, data)

    @property
    def _bytes_per_token(self) -> int:
        return self.num_layers * self.num_per_token * self.item_bytes
