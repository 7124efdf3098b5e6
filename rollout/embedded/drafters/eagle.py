"""These drafters run EAGLE (arXiv 2401.15077), EAGLE-2 (2406.16858), EAGLE-3 (2503.01840) and multi-token prediction.

EAGLE and EAGLE-2 share one checkpoint format and draft with the target's head, which may be cut to hot tokens (FR-Spec,
``--speculative-token-map``), so that it costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rollout.embedded.drafters.feature_drafter import FeatureDrafter
from rollout.embedded.drafters.step import DrafterSetup, DraftVocab
from rollout.embedded.linear import PackedLinear
from rollout.embedded.model import Decoder
from slime_spec.errors import ConfigError


class EagleDrafter(FeatureDrafter):
    """Runs checkpoints of LlamaForCausalLMEagle with the target's head, or with the hot rows of the head."""

    def __init__(self, setup: DrafterSetup) -> None:
        super().__init__(setup)
        self._hot: torch.Tensor | None = None
        if setup.config.token_map is not None:
            self._hot = read_token_map(setup.config.token_map, setup.target.vocab_size).to(setup.device)
            self._vocab = DraftVocab(setup.target.vocab_size, self._hot)

    def _head_of(self, decoder: Decoder) -> PackedLinear:
        if self._hot is None:
            return decoder.head
        # A copy, cut again after every change of the target's weights.
        return PackedLinear(decoder.head.rows(self._hot.to(decoder.device)), packing=decoder.head.packing)


class Eagle3Drafter(FeatureDrafter):
    """Runs checkpoints of LlamaForCausalLMEagle3, as SpecForge exports and SGLang serves them.

    The network is one block over three of the target's layers, usually with a reduced vocabulary.
    """


class NextNDrafter(EagleDrafter):
    """Drafts with the MTP layer of the target's checkpoint, or of a folder of its own; SGLang calls this EAGLE.

    Only the first MTP layer is used; steps beyond the first reuse it on its own output, as SGLang does.
    """


def read_token_map(path: str, vocab_size: int) -> torch.Tensor:
    """Return the hot token ids [hot] of a file that torch saved (a list or a tensor, as SGLang reads it)."""
    setting, remedy = (
        "speculative.token_map",
        "Pass a file that torch.save wrote from a list of the target's token ids.",
    )
    if not Path(path).is_file():
        raise ConfigError(setting, "must be a file", path, remedy)
    stored: Any = torch.load(path, weights_only=True)
    if not isinstance(stored, torch.Tensor | Sequence):
        raise ConfigError(setting, "must hold a list of token ids", type(stored).__name__, remedy)
    ids = torch.as_tensor(stored, dtype=torch.int64)
    if ids.ndim != 1 or not len(ids) or len(ids.unique()) < len(ids) or ids.min() < 0 or ids.max() >= vocab_size:
        raise ConfigError(setting, f"must hold different token ids from 0 to {vocab_size - 1}", path, remedy)
    return ids
