"""A builder turns Hugging Face tensors into the engine's fused, packed modules, which can be read back.

Loading a checkpoint and receiving a push are the same work: tensors arrive by name in any order, and a module is
packed as soon as its last part is there, so that parts never pile up.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rollout.embedded.linear import PackedLinear, Packing, best_packing
from rollout.embedded.model import Decoder
from rollout.embedded.rope import RopeTable
from rollout.embedded.slots import Slot, block_slots, make_layer, module_at
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.tensors import expected_shapes


def slots_of(spec: ModelSpec) -> list[Slot]:
    slots = [
        Slot(-1, "embedding", ("model.embed_tokens.weight",), linear=False),
        Slot(-1, "norm", ("model.norm.weight",), linear=False),
    ]
    if not spec.tie_word_embeddings:
        slots.append(Slot(-1, "head", ("lm_head.weight",)))
    for layer in range(spec.num_layers):
        block = f"model.layers.{layer}."
        slots.append(Slot(layer, "input_norm", (block + "input_layernorm.weight",), linear=False))
        slots += block_slots(layer, block, spec)
    return slots


class DecoderBuilder:
    """Collects a model's tensors; ``finish`` returns a Decoder that shares no memory with what was added.

    Example::

        builder = DecoderBuilder(spec, rope, torch.float32, torch.device("cpu"))
        for name, tensor in tensors.items():
            builder.add(name, tensor)
        decoder = builder.finish()
    """

    def __init__(
        self,
        spec: ModelSpec,
        rope: RopeTable,
        dtype: torch.dtype,
        device: torch.device,
        packing: Packing | None = None,
    ) -> None:
        self._spec, self._rope, self._dtype, self._device = spec, rope, dtype, device
        self._packing = best_packing(device, dtype) if packing is None else packing
        # Natively, a tied head's panels serve as the embedding too: the table exists once.
        self._shares_table = spec.tie_word_embeddings and self._packing is Packing.NATIVE
        slots = slots_of(spec)
        if self._shares_table:
            slots[0] = replace(slots[0], attribute="head", linear=True)
        self._slot_of = {name: slot for slot in slots for name in slot.parts}
        self._parts: dict[str, torch.Tensor] = {}
        self._modules: dict[tuple[int, str], PackedLinear | torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor under its Hugging Face name; it must not change until its module is packed, or ``keep``."""
        self._parts[name] = tensor
        slot = self._slot_of[name]
        if all(part in self._parts for part in slot.parts):
            dtype = torch.float32 if slot.wide else self._dtype
            bias = self._stacked(slot.biases, dtype).clone() if slot.biases else None
            weight = self._stacked(slot.weights, dtype)
            is_packed = slot.linear and self._packing is not Packing.PLAIN
            # Packing copies; anything else must not share memory that belongs to a push's transport.
            weight = weight if is_packed else weight.clone()
            module = PackedLinear(weight, bias, self._packing) if slot.linear else weight
            self._modules[slot.layer, slot.attribute] = module

    def keep(self) -> None:
        """Copy the tensors whose modules lack a part: the caller's memory is about to change."""
        self._parts = {name: tensor.clone() for name, tensor in self._parts.items()}

    def finish(self) -> Decoder:
        """Return the decoder; every tensor must have been added."""
        top: dict[str, PackedLinear | torch.Tensor | None] = {
            attribute: module for (layer, attribute), module in self._modules.items() if layer < 0
        }
        if self._shares_table:
            top["embedding"] = None
        elif self._spec.tie_word_embeddings:
            embedding = top["embedding"]
            assert isinstance(embedding, torch.Tensor), "the embedding is a table"
            top["head"] = PackedLinear(embedding, packing=self._packing)
        blocks: list[dict[str, PackedLinear | torch.Tensor]] = [{} for _ in range(self._spec.num_layers)]
        for (layer, attribute), module in self._modules.items():
            if layer >= 0:
                blocks[layer][attribute] = module
        layers = [make_layer(block, self._spec) for block in blocks]
        return Decoder(spec=self._spec, rope=self._rope, layers=layers, **top)  # type: ignore[arg-type]

    def _stacked(self, names: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return the parts as one tensor; a single part may still be the caller's memory."""
        tensors = [self._parts.pop(name).detach().to(self._device, dtype) for name in names]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def named_tensors(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Return the weights the decoder computes with, read back out of their packed form, under Hugging Face names."""
    spec = decoder.spec
    shapes = expected_shapes(spec)
    read: dict[str, torch.Tensor] = {}
    for slot in slots_of(spec):
        module = module_at(decoder if slot.layer < 0 else decoder.layers[slot.layer], slot.attribute)
        if module is None:  # the embedding, which lies in the tied head
            module = decoder.head
        weight = module.unpacked() if isinstance(module, PackedLinear) else module
        rows = [shapes[name][0] for name in slot.weights]
        read.update(zip(slot.weights, weight.split(rows), strict=True))
        if slot.biases:
            read.update(zip(slot.biases, module.bias.split(rows), strict=True))
    if spec.tie_word_embeddings and decoder.embedding is not None:
        assert torch.equal(decoder.head.unpacked(), decoder.embedding), "the tied head computes with other weights"
    return {name: read[name] for name in shapes}
