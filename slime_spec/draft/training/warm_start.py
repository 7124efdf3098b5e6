"""A draft's first weights are taken from its target: norm, head, and the attention and MLP of its last block.

SpecForge starts at random and has billions of tokens; with tens of thousands the start decides the final acceptance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.block import SwiGlu
from slime_spec.draft.dflash import DFlashLayer, DFlashNetwork
from slime_spec.draft.eagle import EagleLayer, EagleNetwork
from slime_spec.draft.eagle3 import Eagle3Layer, Eagle3Network
from slime_spec.draft.mtp import MtpNetwork
from slime_spec.draft.network import DraftNetwork
from slime_spec.draft.training.vocabulary import DraftVocabulary

INIT_STD = 0.02
KEYS, GATE = "self_attn.k_proj.weight", "mlp.gate_proj.weight"


@torch.no_grad()
def warm_start(
    network: DraftNetwork,
    tensors: Mapping[str, torch.Tensor],
    target: ModelSpec,
    vocabulary: DraftVocabulary,
    seed: int,
) -> None:
    """Fill the network from the target's last block, final norm and head, and the rest from ``seed``.

    The projection starts as the identity of the hidden state (EAGLE-3: of the highest captured layer); columns that
    read the embedding or lower layers start small. A block narrower than the target's takes its first neurons; what a
    target's block has not, with experts or latent attention, starts small, too.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, INIT_STD, generator=generator)
    prefix = f"model.layers.{target.num_layers - 1}."
    last = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if isinstance(network, Eagle3Network):
        _eagle3(network, last, tensors, target, vocabulary)
    elif isinstance(network, MtpNetwork):
        _mtp(network, last, tensors, target)
    elif isinstance(network, EagleNetwork):
        _eagle(network, last, target)
    elif isinstance(network, DFlashNetwork):
        _dflash(network, tensors, target)


def _eagle3(
    network: Eagle3Network,
    last: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    target: ModelSpec,
    vocabulary: DraftVocabulary,
) -> None:
    hidden, layer = target.hidden_size, network.midlayer
    network.fc.weight[:, -hidden:] = torch.eye(hidden)
    layer.hidden_norm.weight.copy_(last["input_layernorm.weight"])
    for x in "qkv" if KEYS in last else "":
        projection = getattr(layer.self_attn, f"{x}_proj")
        projection.weight[:, hidden:] = last[f"self_attn.{x}_proj.weight"]
    _block(layer, last)
    network.norm.weight.copy_(tensors["model.norm.weight"])
    head = tensors["model.embed_tokens.weight" if target.tie_word_embeddings else "lm_head.weight"]
    network.lm_head.weight.copy_(head[vocabulary.target_ids])


def _mtp(
    network: MtpNetwork, last: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], target: ModelSpec
) -> None:
    network.input_proj.weight[:, : target.hidden_size] = torch.eye(target.hidden_size)
    network.input_layernorm.weight.copy_(last["input_layernorm.weight"])
    for x in "qkv" if KEYS in last else "":
        for part in ("weight", "bias") if network.spec.block.qkv_bias else ("weight",):
            getattr(getattr(network.self_attn, f"{x}_proj"), part).copy_(last[f"self_attn.{x}_proj.{part}"])
    _block(network, last)
    network.final_layernorm.weight.copy_(tensors["model.norm.weight"])


def _eagle(network: EagleNetwork, last: Mapping[str, torch.Tensor], target: ModelSpec) -> None:
    """Fill an EAGLE draft, whose hidden states are normed already: its block has no norm where the target's has one."""
    network.fc.weight[:, target.hidden_size :] = torch.eye(target.hidden_size)
    for x in "qkv" if KEYS in last else "":
        for part in ("weight", "bias") if network.spec.block.qkv_bias else ("weight",):
            getattr(getattr(network.layer.self_attn, f"{x}_proj"), part).copy_(last[f"self_attn.{x}_proj.{part}"])
    _block(network.layer, last)


def _dflash(network: DFlashNetwork, tensors: Mapping[str, torch.Tensor], target: ModelSpec) -> None:
    """Fill the layers from the target's last ones, the context from its highest captured layer."""
    network.fc.weight[:, -target.hidden_size :] = torch.eye(target.hidden_size)
    network.norm.weight.copy_(tensors["model.norm.weight"])
    first = max(0, target.num_layers - len(network.layers))
    for index, layer in enumerate(network.layers):
        assert isinstance(layer, DFlashLayer), "a DFlash draft has such layers"
        prefix = f"model.layers.{min(first + index, target.num_layers - 1)}."
        block = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        layer.input_layernorm.weight.copy_(block["input_layernorm.weight"])
        for x in "qkv" if KEYS in block else "":
            getattr(layer.self_attn, f"{x}_proj").weight.copy_(block[f"self_attn.{x}_proj.weight"])
        _block(layer, block)
    if network.spec.markov_rank:
        network.markov_head.markov_w2.weight.zero_()  # it begins as a DFlash draft


def _block(layer: Eagle3Layer | EagleLayer | MtpNetwork | DFlashLayer, last: Mapping[str, torch.Tensor]) -> None:
    """Fill the tensors that every family's block shares with the target's block."""
    mlp = layer.mlp
    assert isinstance(mlp, SwiGlu), "a new draft's block is plain"
    layer.post_attention_layernorm.weight.copy_(last["post_attention_layernorm.weight"])
    if KEYS in last:
        layer.self_attn.o_proj.weight.copy_(last["self_attn.o_proj.weight"])
    if GATE not in last:
        return
    width = min(mlp.gate_proj.out_features, last[GATE].shape[0])
    mlp.gate_proj.weight[:width] = last[GATE][:width]
    mlp.up_proj.weight[:width] = last["mlp.up_proj.weight"][:width]
    mlp.down_proj.weight[:, :width] = last["mlp.down_proj.weight"][:, :width]
