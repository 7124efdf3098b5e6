"""Qwen3-MoE, GLM-4.5 and DeepSeek-V3 have experts in place of the MLP: keys of config.json, tensor names, shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime_spec.checkpoints.block_parts import Experts
from slime_spec.checkpoints.config_keys import (
    CORRECT,
    Keys,
    flag,
    harmless,
    listed,
    only,
    real,
    whole,
)
from slime_spec.errors import CheckpointError

MOST_EXPERTS = 2**16
ROUTER, CORRECTION = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"
OF_LOSSES = harmless("of losses that balance the experts, which are not trained with here")
COMMON_KEYS: Keys = {
    "num_experts_per_tok": whole(1, MOST_EXPERTS),
    "moe_intermediate_size": whole(1, 2**20),
    "norm_topk_prob": flag(),
    **dict.fromkeys(("router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "output_router_logits"), OF_LOSSES),
}
# Qwen3's router: softmax over all experts.
SOFTMAX_KEYS: Keys = {
    **COMMON_KEYS,
    **dict.fromkeys(("num_experts", "num_local_experts"), whole(1, MOST_EXPERTS)),
    "decoder_sparse_step": whole(1, 4096),
    "mlp_only_layers": listed(whole(0, 4096)),
    "shared_expert_intermediate_size": only(0, why="a gated shared expert, as Qwen2-MoE's"),
}
# DeepSeek-V3's router, which GLM-4.5 took over: a sigmoid per expert, a corrected choice, groups, shared experts.
SIGMOID_KEYS: Keys = {
    **COMMON_KEYS,
    **dict.fromkeys(("n_routed_experts", "num_local_experts"), whole(1, MOST_EXPERTS)),
    "n_shared_experts": whole(0, MOST_EXPERTS),
    "first_k_dense_replace": whole(0, 4096),
    "n_group": whole(1, MOST_EXPERTS),
    "topk_group": whole(1, MOST_EXPERTS),
    "routed_scaling_factor": real(1e-6, 1e6),
    "moe_layer_freq": only(1, why="no layer between has an MLP"),
    "scoring_func": only("sigmoid"),
    "topk_method": only("noaux_tc"),
    "ep_size": harmless("how a server places the experts"),
    "num_nextn_predict_layers": whole(0),
}


def served_dtype(name: str, dtype: str) -> str:
    """Return the dtype that a model of ``dtype`` has the tensor in: rounded, a router's bias chooses other experts."""
    return "float32" if name.endswith(CORRECTION) else dtype


def softmax_experts(config: Mapping[str, Any], source: str) -> Experts:
    """Return the experts of Qwen3's kind; raises CheckpointError for numbers that contradict each other."""
    layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step") or 1
    without = {layer for layer in range(layers) if (layer + 1) % step}
    return _checked(
        Experts(
            num_experts=_number(config, ("num_experts", "num_local_experts"), source),
            num_per_token=_number(config, ("num_experts_per_tok",), source),
            width=_number(config, ("moe_intermediate_size",), source),
            dense_layers=frozenset(without | set(config.get("mlp_only_layers") or ())),
            renormalises=bool(config.get("norm_topk_prob", False)),
        ),
        source,
    )


def sigmoid_experts(config: Mapping[str, Any], source: str) -> Experts:
    """Return the experts of DeepSeek-V3's kind; raises CheckpointError for numbers that contradict each other."""
    return _checked(
        Experts(
            num_experts=_number(config, ("n_routed_experts", "num_local_experts"), source),
            num_per_token=_number(config, ("num_experts_per_tok",), source),
            width=_number(config, ("moe_intermediate_size",), source),
            num_shared=config.get("n_shared_experts") or 0,
            dense_layers=frozenset(range(config.get("first_k_dense_replace") or 0)),
            score="sigmoid",
            has_correction=True,
            num_groups=config.get("n_group") or 1,
            num_groups_per_token=config.get("topk_group") or 1,
            renormalises=bool(config.get("norm_topk_prob", True)),
            scaling=float(config.get("routed_scaling_factor") or 1.0),
        ),
        source,
    )


def expert_shapes(prefix: str, experts: Experts, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's router and experts, as checkpoints name them."""
    shapes: dict[str, tuple[int, ...]] = {prefix + ROUTER: (experts.num_experts, hidden)}
    if experts.has_correction:
        shapes[prefix + CORRECTION] = (experts.num_experts,)
    for expert in range(experts.num_experts):
        shapes |= mlp_shapes(f"{prefix}mlp.experts.{expert}.", hidden, experts.width)
    if experts.num_shared:
        shapes |= mlp_shapes(f"{prefix}mlp.shared_experts.", hidden, experts.num_shared * experts.width)
    return shapes


def mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a SwiGLU MLP of ``width`` columns."""
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def _number(config: Mapping[str, Any], names: tuple[str, ...], source: str) -> int:
    found = [config[name] for name in names if config.get(name) is not None]
    if not found:
        raise CheckpointError(f"{source}: {names[0]}", "must be given for a mixture of experts", None, CORRECT)
    if len(set(found)) > 1:
        raise CheckpointError(f"{source}: {names[0]}", f"must be the same as {names[1]}", found[0], CORRECT)
    return int(found[0])


def _checked(experts: Experts, source: str) -> Experts:
    if experts.num_per_token > experts.num_experts:
        rule = f"must be at most the number of experts ({experts.num_experts})"
        raise CheckpointError(f"{source}: num_experts_per_tok", rule, experts.num_per_token, CORRECT)
    groups, chosen = experts.num_groups, experts.num_groups_per_token
    if experts.num_experts % groups:
        rule = f"must divide the number of experts ({experts.num_experts})"
        raise CheckpointError(f"{source}: n_group", rule, groups, CORRECT)
    size = experts.num_experts // groups
    if chosen > groups or (groups > 1 and size < 2) or experts.num_per_token > chosen * size:
        rule = (
            f"must be at most n_group ({groups}) and leave {experts.num_per_token} experts of groups of {size}, which "
            "are chosen by their best two"
        )
        raise CheckpointError(f"{source}: topk_group", rule, chosen, CORRECT)
    return experts
