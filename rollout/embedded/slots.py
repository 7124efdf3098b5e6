"""A slot is one module of a block and the checkpoint's tensors that it is made of; slots' modules make a layer.

A slot's attribute is the way to the module: ``mlp.experts.3.down``. Plain blocks have no parts, and one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rollout.embedded.experts import ExpertMlps, GatedMlp
from rollout.embedded.layer import Layer
from rollout.embedded.linear import PackedLinear
from rollout.embedded.mixed_blocks import AnyLayer, GroupedLinears, LatentLinears, MixedLayer
from slime_spec.checkpoints.block_parts import Experts
from slime_spec.checkpoints.families.experts import CORRECTION, ROUTER
from slime_spec.checkpoints.model_spec import ModelSpec

Module = PackedLinear | torch.Tensor
Modules = Mapping[str, Module]


@dataclass(frozen=True)
class Slot:
    """Names one module and its tensors, stacked by rows; layer -1 is outside the blocks.

    ``wide`` tensors are fp32 in an engine of any dtype.
    """

    layer: int
    attribute: str
    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    linear: bool = True
    wide: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return self.weights + self.biases


def module_at(holder: Any, attribute: str) -> Any:
    """Return the module at a slot's attribute."""
    last, name = holder_of(holder, attribute)
    return getattr(last, name)


def holder_of(holder: Any, attribute: str) -> tuple[Any, str]:
    """Return what holds the module at a slot's attribute, and its name there."""
    *steps, name = attribute.split(".")
    for step in steps:
        holder = holder[int(step)] if step.isdigit() else getattr(holder, step)
    return holder, name


def block_slots(layer: int, prefix: str, spec: ModelSpec) -> list[Slot]:
    """Return the slots of a block whose tensors' names begin with ``prefix``, but its first norm's."""
    in_attention, in_mlp = ("", "") if spec.has_plain_blocks else ("attention.", "mlp.")
    norm = Slot(layer, "post_norm", (prefix + "post_attention_layernorm.weight",), linear=False)
    attention = _grouped_slots if spec.latent is None else _latent_slots
    slots = [*attention(layer, in_attention, prefix, spec), norm]
    experts = spec.experts
    if experts is not None and experts.serve(layer):
        return [*slots, *_expert_slots(layer, in_mlp, prefix, experts)]
    return [*slots, *_mlp_slots(layer, in_mlp, prefix + "mlp.")]


def make_layer(modules: Modules, spec: ModelSpec) -> AnyLayer:
    """Return the layer of its modules by attribute."""
    if spec.has_plain_blocks:
        return Layer(**modules)  # type: ignore[arg-type]
    norms: Any = {name: module for name, module in modules.items() if "." not in name}
    attention: Any = _within(modules, "attention.")
    linears = GroupedLinears if spec.latent is None else LatentLinears
    return MixedLayer(attention=linears(**attention), mlp=_mlp(_within(modules, "mlp."), spec.experts), **norms)


def _mlp(modules: Any, experts: Experts | None) -> GatedMlp | ExpertMlps:
    if "router" not in modules or experts is None:
        return GatedMlp(**modules)
    shared: Any = _within(modules, "shared.")
    mlps = [GatedMlp(**_of_expert(modules, expert)) for expert in range(experts.num_experts)]
    return ExpertMlps(
        experts, modules["router"], mlps, modules.get("correction"), GatedMlp(**shared) if shared else None
    )


def _of_expert(modules: Modules, expert: int) -> Any:
    return {name: modules[f"experts.{expert}.{name}"] for name in ("gate_up", "down")}


def _within(modules: Modules, step: str) -> dict[str, Module]:
    return {name.removeprefix(step): module for name, module in modules.items() if name.startswith(step)}


def _grouped_slots(layer: int, step: str, prefix: str, spec: ModelSpec) -> list[Slot]:
    qkv = tuple(f"{prefix}self_attn.{x}_proj." for x in "qkv")
    biases = tuple(name + "bias" for name in qkv) if spec.qkv_bias else ()
    slots = [
        Slot(layer, step + "qkv", tuple(name + "weight" for name in qkv), biases),
        Slot(
            *(layer, step + "out", (prefix + "self_attn.o_proj.weight",)),
            (prefix + "self_attn.o_proj.bias",) if spec.out_bias else (),
        ),
    ]
    if spec.qk_norm:
        slots += [Slot(layer, f"{step}{x}_norm", (f"{prefix}self_attn.{x}_norm.weight",), linear=False) for x in "qk"]
    return slots


def _latent_slots(layer: int, step: str, prefix: str, spec: ModelSpec) -> list[Slot]:
    assert spec.latent is not None, "the block has latent attention"
    names = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    if spec.latent.query_rank is None:
        names |= {"q_up": "q_proj"}
    else:
        names |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}
    return [
        Slot(layer, step + attribute, (f"{prefix}self_attn.{name}.weight",), linear=not attribute.endswith("norm"))
        for attribute, name in names.items()
    ]


def _mlp_slots(layer: int, step: str, prefix: str) -> list[Slot]:
    return [
        Slot(layer, step + "gate_up", (prefix + "gate_proj.weight", prefix + "up_proj.weight")),
        Slot(layer, step + "down", (prefix + "down_proj.weight",)),
    ]


def _expert_slots(layer: int, step: str, prefix: str, experts: Experts) -> list[Slot]:
    slots = [Slot(layer, step + "router", (prefix + ROUTER,), linear=False)]
    if experts.has_correction:
        slots.append(Slot(layer, step + "correction", (prefix + CORRECTION,), linear=False, wide=True))
    for expert in range(experts.num_experts):
        slots += _mlp_slots(layer, f"{step}experts.{expert}.", f"{prefix}mlp.experts.{expert}.")
    if experts.num_shared:
        slots += _mlp_slots(layer, step + "shared.", prefix + "mlp.shared_experts.")
    return slots
