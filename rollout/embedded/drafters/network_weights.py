"""A builder turns a draft checkpoint's tensors into the network's fused modules, which can be read back."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from rollout.embedded.drafters.block_network import BlockNetwork
from rollout.embedded.drafters.network import DraftNetwork
from rollout.embedded.drafters.quantized import make_linear
from rollout.embedded.drafters.step import DrafterSetup
from rollout.embedded.drafting import Swap
from rollout.embedded.linear import PackedLinear
from rollout.embedded.mixed_blocks import plain
from rollout.embedded.rope import RopeTable
from rollout.embedded.slots import Slot, block_slots, make_layer, module_at
from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.draft_tensors import draft_shapes, load_draft
from slime_spec.checkpoints.families.dspark import BIAS, MIXES, PREVIOUS

logger = logging.getLogger(__name__)
Network = DraftNetwork | BlockNetwork
FC_NORMS = "fc_norms."


def draft_slots(spec: DraftSpec) -> list[Slot]:
    """Return every module of the network; together they use each tensor of ``draft_shapes(spec)`` once."""
    shapes = draft_shapes(spec)
    blocks = [f"layers.{index}." for index in range(spec.block.num_layers)]
    top = {"fc": "fc.weight", "norm": "norm.weight", "embedding": "embed_tokens.weight", "head": "lm_head.weight"}
    if spec.family == "eagle3":
        blocks[0] = "midlayer."
        top |= {"embedding_norm": "midlayer.input_layernorm.weight", "hidden_norm": "midlayer.hidden_norm.weight"}
        top |= {"input_norm": "input_norm.weight"}
        top |= {f"{FC_NORMS}{index}": f"fc_norm.{index}.weight" for index in range(len(spec.capture_layers))}
    elif spec.block_size:
        top |= {"hidden_norm": "hidden_norm.weight", "previous": PREVIOUS, "bias": BIAS}
        top |= {"mix": f"{MIXES.get(spec.markov_kind)}.weight"}
    elif spec.family == "mtp":
        family = spec.mtp_layer
        blocks = [family.prefix + family.block]
        top = {"fc": family.projection, "norm": family.final_norm, "hidden_norm": family.hidden_norm}
        top = {attribute: family.prefix + name for attribute, name in top.items()}
        top |= {"embedding_norm": family.prefix + family.embedding_norm}
    slots = []
    for attribute, name in top.items():
        if name in shapes:
            bias = name.removesuffix("weight") + "bias"
            is_linear = attribute in ("fc", "head", "bias", "mix")
            slots.append(Slot(-1, attribute, (name,), (bias,) if bias in shapes else (), linear=is_linear))
    for layer, block in enumerate(blocks):
        slots += _block_slots(layer, block, spec, shapes)
    return slots


def _block_slots(layer: int, block: str, spec: DraftSpec, shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    slots = block_slots(layer, block, spec.block)
    # EAGLE-3's first block has two norms, of the two halves it reads; its further ones call theirs hidden_norm.
    norm = block + ("hidden_norm.weight" if spec.family == "eagle3" else "input_layernorm.weight")
    if norm in shapes and (spec.family, layer) != ("eagle3", 0):
        slots.append(Slot(layer, "input_norm", (norm,), linear=False))
    return slots


class NetworkBuilder:
    """Makes networks of one draft from its tensors, in the engine's dtype; ``quantization`` rounds its matrices."""

    def __init__(
        self, spec: DraftSpec, rope: RopeTable, dtype: torch.dtype, device: torch.device, quantization: str | None
    ) -> None:
        self.spec, self.quantization = spec, quantization
        self._rope, self._dtype, self._device = rope, dtype, device
        self._slots = draft_slots(spec)

    def build(self, tensors: Mapping[str, torch.Tensor]) -> Network:
        """Return the network; shares no memory with ``tensors``, which are those of ``draft_shapes``."""
        top: dict[str, PackedLinear | torch.Tensor] = {}
        # A first block whose attention is given its input never reads its norm.
        unread = torch.ones(self.spec.block.hidden_size, dtype=self._dtype, device=self._device)
        blocks: list[dict[str, PackedLinear | torch.Tensor]] = [
            {"input_norm": unread} for _ in range(self.spec.block.num_layers)
        ]
        for slot in self._slots:
            weight = self._stacked(slot.weights, tensors, torch.float32 if slot.wide else self._dtype)
            bias = self._stacked(slot.biases, tensors, self._dtype) if slot.biases else None
            module = make_linear(weight, bias, self.quantization) if slot.linear else weight
            (top if slot.layer < 0 else blocks[slot.layer])[slot.attribute] = module
        norms = [top.pop(attribute) for attribute in list(top) if attribute.startswith(FC_NORMS)]
        layers = [make_layer(block, self.spec.block) for block in blocks]
        if self.spec.block_size:
            return BlockNetwork(self.spec, self._rope, plain(layers), **top)  # type: ignore[arg-type]
        return DraftNetwork(self.spec, self._rope, layers, fc_norms=norms, **top)  # type: ignore[arg-type]

    def tensors(self, network: Network) -> dict[str, torch.Tensor]:
        """Return the weights that ``network`` computes with, under the names of ``draft_shapes``, in its order."""
        shapes = draft_shapes(self.spec)
        read: dict[str, torch.Tensor] = {}
        for slot in self._slots:
            module = _module(network, slot)
            weight = module.unpacked() if isinstance(module, PackedLinear) else module
            rows = [shapes[name][0] for name in slot.weights]
            read.update(zip(slot.weights, weight.split(rows), strict=True))
            if slot.biases:
                assert isinstance(module, PackedLinear), "biases belong to linears"
                assert module.bias is not None, "a slot with biases has them"
                read.update(zip(slot.biases, module.bias.split(rows), strict=True))
        return {name: read[name] for name in shapes}

    def _stacked(self, names: tuple[str, ...], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the parts as one tensor, always a copy: a push's memory is not ours to keep."""
        return torch.cat([tensors[name].detach().to(self._device, dtype) for name in names])


class NetworkWeights:
    """Holds the draft's own weights (see DraftWeights); a push builds a second network and swaps the two."""

    def __init__(self, spec: DraftSpec, setup: DrafterSetup) -> None:
        num_positions = setup.context_length + max(setup.shape.headroom, spec.block_size)
        rope = RopeTable(spec.block, num_positions, setup.dtype, setup.device)
        self._builder = NetworkBuilder(spec, rope, setup.dtype, setup.device, setup.quantization)
        self._network: Network | None = None

    def read(self, setup: DrafterSetup) -> torch.Tensor | None:
        """Take the checkpoint's weights into use; returns its hot token ids, None where it names every token."""
        checkpoint = load_draft(setup.draft.folder, self._builder.spec, [setup.dtype])
        if {tensor.dtype for tensor in checkpoint.tensors.values()} != {setup.dtype}:
            logger.info("cast the draft folder=%s to=%s", setup.draft.folder, setup.dtype)
        self.build(checkpoint.tensors)()
        ids = checkpoint.hot_token_ids
        return None if ids is None else ids.to(setup.device)

    @property
    def network(self) -> Network:
        assert self._network is not None, "a drafter reads its weights when it is first bound"
        return self._network

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return draft_shapes(self._builder.spec)

    @property
    def exact(self) -> bool:
        return self._builder.quantization is None

    def build(self, tensors: Mapping[str, torch.Tensor]) -> Swap:
        network = self._builder.build(tensors)

        def swap() -> None:
            self._network = network

        return swap

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._builder.tensors(self.network)

    def move(self, device: torch.device) -> None:
        self.network.move(device)


def _module(network: Network, slot: Slot) -> PackedLinear | torch.Tensor:
    if slot.attribute.startswith(FC_NORMS):
        assert isinstance(network, DraftNetwork), "a block drafter has no such norms"
        return network.fc_norms[int(slot.attribute.removeprefix(FC_NORMS))]
    holder = network if slot.layer < 0 else network.layers[slot.layer]
    module: PackedLinear | torch.Tensor = module_at(holder, slot.attribute)
    return module
