"""A whole second model serves as a draft: its decoder, and its weights for pushes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rollout.embedded.drafters.quantized import make_linear
from rollout.embedded.drafters.step import DrafterSetup
from rollout.embedded.drafting import Swap
from rollout.embedded.linear import PackedLinear, best_packing
from rollout.embedded.model import Decoder
from rollout.embedded.rope import RopeTable
from rollout.embedded.slots import holder_of
from rollout.embedded.weights import DecoderBuilder, named_tensors, slots_of
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes, load_tensors


class ModelWeights:
    """Holds the draft model's weights (see DraftWeights); a push builds a second decoder and swaps the two."""

    def __init__(self, spec: ModelSpec, setup: DrafterSetup) -> None:
        self._spec, self._setup = spec, setup
        positions = setup.context_length + setup.shape.headroom
        self._rope = RopeTable(spec, positions, setup.dtype, setup.device)
        self._quantization = setup.quantization
        self._decoder: Decoder | None = None

    @property
    def decoder(self) -> Decoder:
        assert self._decoder is not None, "a drafter reads its weights when it is first bound"
        return self._decoder

    @property
    def is_read(self) -> bool:
        return self._decoder is not None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return expected_shapes(self._spec)

    @property
    def exact(self) -> bool:
        return self._quantization is None

    def read(self) -> None:
        """Take the weights of the draft's folder."""
        self.build(load_tensors(self._setup.draft.folder, self._spec, [self._setup.dtype]))()

    def build(self, tensors: Mapping[str, torch.Tensor]) -> Swap:
        setup = self._setup
        packing = best_packing(setup.device, setup.dtype)
        builder = DecoderBuilder(self._spec, self._rope, setup.dtype, setup.device, packing)
        for name in self.shapes:
            builder.add(name, tensors[name])
        decoder = builder.finish()
        if self._quantization is not None:
            self._round(decoder)

        def swap() -> None:
            self._decoder = decoder

        return swap

    def tensors(self) -> dict[str, torch.Tensor]:
        return named_tensors(self.decoder)

    def move(self, device: torch.device) -> None:
        self.decoder.move(device)

    def _round(self, decoder: Decoder) -> None:
        """Quantise the blocks' matrices; embedding and head, often one table, stay as they are."""
        for slot in slots_of(self._spec):
            if slot.layer >= 0 and slot.linear:
                holder, name = holder_of(decoder.layers[slot.layer], slot.attribute)
                linear: PackedLinear = getattr(holder, name)
                setattr(holder, name, make_linear(linear.unpacked(), linear.bias, self._quantization))
